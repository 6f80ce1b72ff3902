"""TensorRT Edge-LLM: the CSV and the log of `llm_bench`, the profile JSON of `llm_inference`.

Formats: examples/utils/benchLogger.cpp and profileFormatter.cpp of NVIDIA/TensorRT-Edge-LLM 0.9 to 0.11. All times are
the GPU's: sampling, tokenising and the host's part of a step are not in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edge.bench.importers.rows import Imported, ResultFile, count, merge, positive, read_csv
from edge.bench.options import PeerRow

NAME = "TensorRT Edge-LLM"
_NOTE = "GPU time only"
_CSV_HEADING = "mode,batch_size,osl,e2e_time_ms,per_token_ms,throughput_tps"
_LOG = "E2E Time (actual performance):"
_SPECULATIVE = ("eagle_generation", "mtp_generation", "spec_decode_generation")


def recognises(file: ResultFile) -> bool:
    """A profile with stages, the CSV's heading, or the log's line with the time."""
    if isinstance(file.values, dict):
        return "stages" in file.values and bool({"prefill", "generation", *_SPECULATIVE} & file.values.keys())
    return _CSV_HEADING in file.text or _LOG in file.text


def read(file: ResultFile) -> Imported:
    """Rows of prefill and decode; other modes (verification, drafting, images) are left out with a note.

    ValueError: a field is missing or no number.
    """
    if isinstance(file.values, dict):
        return Imported((_profile_row(file.values),))
    return _read_csv(file.text) if _CSV_HEADING in file.text else _read_log(file.text)


def _profile_row(profile: Mapping[str, Any]) -> PeerRow:
    """One row for all requests of the run, at the mean length of their prompts.

    Its prefill rate counts tokens that were found in the cache; here only those that were computed count.
    """
    prefill, context, notes = profile.get("prefill"), None, [_NOTE]
    speed = None
    if prefill:
        runs = positive(prefill.get("total_runs"), "prefill.total_runs")
        seconds = runs * positive(prefill.get("average_time_per_run_ms"), "prefill.average_time_per_run_ms") / 1000
        computed = count(prefill.get("computed_tokens"), "prefill.computed_tokens")
        context = round(positive(prefill.get("average_tokens_per_run"), "prefill.average_tokens_per_run"))
        speed = computed / seconds if computed else None
        if prefill.get("reused_tokens"):
            notes.append(f"{prefill['reused_tokens']} prompt tokens were in the cache and are not counted")
        notes.append(f"mean of {runs:g} prompts")
    name, decode = NAME, None
    for key in ("generation", *_SPECULATIVE):
        values = profile.get(key)
        if values:
            rate = "tokens_per_second" if key == "generation" else "overall_tokens_per_second_excluding_base_prefill"
            decode = positive(values.get(rate), f"{key}.{rate}")
            if key != "generation":
                name = f"{NAME}, speculative"
                notes.append(f"{positive(values.get('average_acceptance_rate'), 'acceptance'):.2f} tokens a step")
    if context is None:
        raise ValueError("it has no prefill, so the length of its prompts is unknown")
    return PeerRow(name, max(context, 1), speed, decode, source="llm_inference profile", note="; ".join(notes))


def _read_csv(text: str) -> Imported:
    """One or more CSV files, each with its heading; the rate in them is of one sequence of the batch."""
    rows, left_out = [], []
    for test in read_csv(text, lambda cells: cells[:1] == ["mode"]):
        lengths = {"prefill": test.get("input_len"), "decode": test.get("past_kv_len")}
        row = _test_row(test["mode"], lengths, test.get("batch_size"), test.get("throughput_tps"), "llm_bench CSV")
        left_out += [] if row else [f"left out mode {test['mode']}: neither prefill nor decode"]
        rows += [row] if row else []
    return Imported(merge(rows), tuple(left_out))


def _read_log(text: str) -> Imported:
    """The summaries of one or more runs in a log."""
    rows, left_out = [], []
    for summary in text.split("=== Results Summary ===")[1:]:
        found = {name: re.search(rf"{re.escape(name)}:\s*([\w.]+)", summary) for name in _LOG_FIELDS}
        test = {name: match[1] if match else None for name, match in found.items()}
        if test["Mode"] is None:
            raise ValueError("a results summary has no mode")
        if test["ReuseKVLen"] not in (None, "0"):
            left_out.append(
                f"left out a prefill of {test['InputLen']} tokens: {test['ReuseKVLen']} more were in the cache"
            )
            continue
        lengths = {"prefill": test["InputLen"], "decode": test["PastKVLen"]}
        row = _test_row(test["Mode"], lengths, test["Batch Size"], test["Tokens/sec (E2E)"], "llm_bench log")
        left_out += [] if row else [f"left out mode {test['Mode']}: neither prefill nor decode"]
        rows += [row] if row else []
    return Imported(merge(rows), tuple(left_out))


_LOG_FIELDS = ("Mode", "Batch Size", "InputLen", "ReuseKVLen", "PastKVLen", "Tokens/sec (E2E)")


def _test_row(mode: str, lengths: Mapping[str, Any], batch: Any, rate: Any, source: str) -> PeerRow | None:
    if mode not in lengths:
        return None
    sequences = int(positive(batch, "the batch size"))
    speed = sequences * positive(rate, "the rate")
    context = max(count(lengths[mode], "the length"), 1)
    prefill, decode = (speed, None) if mode == "prefill" else (None, speed)
    return PeerRow(NAME, context, prefill, decode, batch=sequences, source=source, note=_NOTE)
