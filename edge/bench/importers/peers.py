"""A result file of any known tool, told by its content, as rows of a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge.bench.importers import cpm_cu, edge_llm, llama_bench, own_report
from edge.bench.importers.rows import Imported, ResultFile
from edge.errors import EdgeError

_IMPORTERS = (own_report, llama_bench, edge_llm, cpm_cu)
_KNOWN = (
    "llama-bench (-o json, jsonl, csv or md), CPM.cu's summary, TensorRT Edge-LLM's llm_bench (CSV or log) and "
    "llm_inference (profile JSON), and reports of `edge bench`"
)
_LARGEST = 64 * 2**20


def read_peers(path: Path, name: str | None = None) -> Imported:
    """The rows of a result file; `name` stands for the engine's own, which is kept behind it if there are several.

    EdgeError: the file cannot be read, is of no known tool, or is damaged.
    """
    file = _load(path)
    importer = next((importer for importer in _IMPORTERS if importer.recognises(file)), None)
    if importer is None:
        raise EdgeError(f"{path} is no result that edge can read: it knows {_KNOWN}.")
    try:
        found = importer.read(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EdgeError(f"{path} is damaged: {error}.") from error
    if not found.rows:
        raise EdgeError(f"{path} has no speed that can stand beside ours ({'; '.join(found.notes) or 'it is empty'}).")
    names = {row.name for row in found.rows}
    rows = [
        replace(row, name=_renamed(row.name, name, len(names)), source=f"{row.source}, {path.name}")
        for row in found.rows
    ]
    return Imported(tuple(rows), tuple(f"{path.name}: {note}" for note in found.notes))


def _renamed(own: str, wanted: str | None, engines: int) -> str:
    if wanted is None:
        return own
    return wanted if engines == 1 else f"{wanted} ({own})"


def _load(path: Path) -> ResultFile:
    try:
        if path.stat().st_size > _LARGEST:
            raise EdgeError(
                f"{path} has more than {_LARGEST >> 20} MiB, which no benchmark's result has; check the path."
            )
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise EdgeError(f"{path} is no text, so it is no result that edge can read: it knows {_KNOWN}.") from None
    except OSError as error:
        raise EdgeError(f"cannot read the result {path}: {error.strerror}.") from error
    return ResultFile(path.name, text, _json_values(text))


def _json_values(text: str) -> Any:
    """A JSON document's value, or the list of a JSONL file's; None if the text is neither."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()] or None
    except ValueError:
        return None
