"""A report of `edge bench`, whose medians stand as another engine's."""

from __future__ import annotations

from edge.bench.importers.rows import Imported, ResultFile, merge
from edge.bench.options import PeerRow
from edge.bench.report import execution, from_dict
from edge.bench.tables import machine_line, model_line


def recognises(file: ResultFile) -> bool:
    """A JSON object with a schema version and cases."""
    return isinstance(file.values, dict) and {"schema_version", "cases"} <= file.values.keys()


def read(file: ResultFile) -> Imported:
    """A row a case. EdgeError: the report is damaged or newer than this edge."""
    report = from_dict(file.values, file.name)
    name = f"edge, {model_line(report)}"
    machine = f"{machine_line(report.machine)}; {execution(report)}"
    rows = []
    for result in report.cases:
        prefill, decode = result.prefill_tok_s, result.decode_tok_s
        rows.append(
            PeerRow(
                name,
                result.case.prompt_tokens,
                prefill.median if prefill else None,
                decode.median if decode else None,
                batch=result.case.batch,
                machine=machine,
                source="edge bench",
            )
        )
    return Imported(merge(rows))
