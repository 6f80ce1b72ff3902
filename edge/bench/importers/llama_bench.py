"""llama.cpp's `llama-bench`: -o json, jsonl, csv and md (tools/llama-bench/README.md of llama.cpp).

A test is pp N (a prompt of N tokens), tg N (N generated tokens) or pp N + tg M, each after `n_depth` tokens in
the cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edge.bench.importers.rows import Imported, ResultFile, count, merge, positive, read_csv
from edge.bench.options import PeerRow

# What a test is, and what it measured: all else that differs within a file belongs to the engine's name.
_OF_A_TEST = {"n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts"}
_OF_A_TEST |= {"samples_ns", "samples_ts", "test", "t/s", "model_filename", "model_size", "model_n_params"}
_OF_A_TEST |= {"size", "params", "model_type", "model"}
_TEST = re.compile(r"(?:pp ?(?P<prompt>\d+))?\+?(?:tg ?(?P<gen>\d+))?(?: ?@ ?d(?P<depth>\d+))?")
_BUILD = re.compile(r"^build: (\S+)", re.MULTILINE)

Test = Mapping[str, Any]


def recognises(file: ResultFile) -> bool:
    """JSON objects with avg_ts, a CSV heading with avg_ts, or a Markdown table with the columns test and t/s."""
    tests = _json_tests(file)
    if tests:
        return all(isinstance(test, dict) and "avg_ts" in test for test in tests)
    return any(_is_csv_heading(line) or _is_table_heading(line) for line in file.text.splitlines())


def read(file: ResultFile) -> Imported:
    """A row a context: pp N is the prefill of N tokens, tg at depth D is decoding after D tokens.

    Left out, with a note: pp at a depth, which is the speed of a long prompt's last tokens only, and pp + tg, which is
    both phases in one figure. ValueError: a field is missing or no number.
    """
    tests = _json_tests(file) or _csv_tests(file.text) or _table_tests(file.text)
    settings = _differing(tests)
    rows, left_out = [], []
    for test in tests:
        prompt, generated, depth = (count(test.get(f, 0), f) for f in ("n_prompt", "n_gen", "n_depth"))
        speed = positive(_field(test, "avg_ts"), "avg_ts")
        label = f"pp{prompt}" * (prompt > 0) + "+" * (prompt * generated > 0) + f"tg{generated}" * (generated > 0)
        if prompt and generated:
            left_out.append(f"{label}: prefill and decode in one figure")
        elif prompt and depth:
            left_out.append(
                f"{label} @ d{depth}: the speed of a prompt's last {prompt} of {depth + prompt} tokens only"
            )
        elif prompt:
            rows.append(_row(test, settings, prompt, speed, None))
        elif generated:
            # The first token is decoded with one token in the cache: llama-bench begins with one.
            rows.append(_row(test, settings, max(depth, 1), None, speed))
        else:
            raise ValueError("a test has neither n_prompt nor n_gen")
    return Imported(merge(rows), tuple(f"left out {what}" for what in left_out))


def _json_tests(file: ResultFile) -> list[Test]:
    return file.values if isinstance(file.values, list) else [file.values] if isinstance(file.values, dict) else []


def _row(test: Test, settings: Sequence[str], context: int, prefill: float | None, decode: float | None) -> PeerRow:
    name = f"llama.cpp {_field(test, 'model_type')}"
    if settings:
        name += ", " + " ".join(f"{setting}={test.get(setting)}" for setting in settings)
    where = [str(test[key]) for key in ("cpu_info", "gpu_info") if test.get(key)] or [str(test.get("backend") or "")]
    if test.get("n_threads"):
        where.append(f"{test['n_threads']} threads")
    build = test.get("build_commit")
    source = f"llama-bench, build {build}" if build else "llama-bench"
    return PeerRow(name, context, prefill, decode, machine=", ".join(filter(None, where)), source=source)


def _field(test: Test, name: str) -> Any:
    if test.get(name) in (None, ""):
        raise ValueError(f"a test has no {name}")
    return test[name]


def _differing(tests: Iterable[Test]) -> list[str]:
    """The settings in which the file's tests of one model differ."""
    models: dict[Any, dict[str, set[str]]] = {}
    for test in tests:
        settings = models.setdefault(test.get("model_type"), {})
        for name, value in test.items():
            if name not in _OF_A_TEST:
                settings.setdefault(name, set()).add(str(value))
    return sorted({name for settings in models.values() for name, values in settings.items() if len(values) > 1})


def _is_csv_heading(line: str) -> bool:
    return {"avg_ts", "n_prompt", "n_gen"} <= {name.strip('" ') for name in line.split(",")}


def _csv_tests(text: str) -> list[Test]:
    """The rows under each heading; fields that older versions shifted against their heading are refused."""
    return [*read_csv(text, lambda cells: _is_csv_heading(",".join(cells)), "; use -o json")]


def _is_table_heading(line: str) -> bool:
    return line.lstrip().startswith("|") and {"model", "test", "t/s"} <= set(_cells(line))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _table_tests(text: str) -> list[Test]:
    """The rows of a Markdown table as tests: "tg128 @ d512" and "120.60 ± 0.59" become fields."""
    build = _BUILD.search(text)
    tests: list[Test] = []
    heading: list[str] = []
    for line in text.splitlines():
        if not line.lstrip().startswith("|"):
            continue
        cells = _cells(line)
        if _is_table_heading(line):
            heading = cells
        elif heading and not set("".join(cells)) <= set("-: "):
            if len(cells) != len(heading):
                raise ValueError(f"a table row has {len(cells)} cells under a heading of {len(heading)}")
            tests.append(_table_test(dict(zip(heading, cells, strict=True)), build[1] if build else None))
    return tests


def _table_test(row: dict[str, str], build: str | None) -> Test:
    match = _TEST.fullmatch(row["test"])
    if match is None or not (match["prompt"] or match["gen"]):
        raise ValueError(f"the test {row['test']!r} is none of pp, tg and pp+tg")
    lengths = {"n_prompt": match["prompt"], "n_gen": match["gen"], "n_depth": match["depth"]}
    settings = {{"threads": "n_threads", "model": "model_type"}.get(name, name): cell for name, cell in row.items()}
    speed = row["t/s"].split("±")[0].strip()
    return settings | {name: length or 0 for name, length in lengths.items()} | {"avg_ts": speed, "build_commit": build}
