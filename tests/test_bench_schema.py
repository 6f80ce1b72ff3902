"""The JSON report and its schema: they say the same, older reports load, and damage is named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator

import edge.bench
from edge.bench.decode import decode
from edge.bench.report import SCHEMA_VERSION, Report, from_dict, load_report, to_json
from edge.bench.samples import BenchCase, Repetition
from tests.bench_samples import full_report, reports

SCHEMA = json.loads(Path(edge.bench.__file__).with_name("report.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
OLDER = Path(__file__).with_name("bench_report_v1.json")  # as version 1 wrote it


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema_version"] == {"const": SCHEMA_VERSION}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(reports())
def test_every_report_is_valid(report: Report) -> None:
    VALIDATOR.validate(json.loads(to_json(report)))


def test_a_report_with_everything_is_valid_and_comes_back() -> None:
    report = full_report()
    values = json.loads(to_json(report))
    VALIDATOR.validate(values)
    assert from_dict(values) == report
    assert not [name for name, value in values.items() if value in (None, [])], "everything has something to say"


def dataclasses_below(kind: Any) -> Iterator[type]:
    if get_origin(kind) in (Union, UnionType, tuple, Sequence, dict):
        for inner in get_args(kind):
            yield from dataclasses_below(inner)
    elif is_dataclass(kind):
        yield kind  # type: ignore[misc]
        for hint in get_type_hints(kind).values():
            yield from dataclasses_below(hint)


def test_every_field_of_the_report_is_in_the_schema() -> None:
    found = set(dataclasses_below(Report))
    assert len(found) > 15
    for kind in found:
        described = SCHEMA if kind is Report else SCHEMA["$defs"][kind.__name__]
        assert {field.name for field in fields(kind)} <= set(described["required"])
        assert set(described["required"]) <= set(described["properties"])
        assert described["additionalProperties"] is False


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 1},
        {"cases": []},
        {"seed": "0"},
        {"gate": {"checks": [{"name": "needle", "outcome": "perhaps", "detail": ""}]}},
        {"telephone": 1},
    ],
)
def test_what_is_no_report_is_not_valid(change: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(json.loads(to_json(full_report())) | change)


def test_a_report_of_version_1_loads() -> None:
    report = load_report(OLDER)
    assert [result.case for result in report.cases] == [BenchCase(128, 3), BenchCase(2048, 3)]
    assert report.cases[0].repetitions[1] == Repetition(0.52, (0.012, 0.014))
    assert report.cases[0].decode_tok_s is not None
    assert report.cases[0].decode_tok_s.median == pytest.approx((2 / 0.025 + 2 / 0.026) / 2)
    assert (report.roofline, report.gate, report.identity, report.skipped) == (None, None, None, ())
    assert report.peers[0].batch == 1 and report.cases[0].prompts_sha256 == ""
    VALIDATOR.validate(json.loads(to_json(report)))


def test_values_of_a_wrong_type_are_named() -> None:
    run = {"ttft_s": 1, "intervals_s": [0.5]}
    assert decode(Repetition, run) == Repetition(1.0, (0.5,))
    for change, said in (
        ({"ttft_s": "1"}, "ttft_s is '1' and should be float"),
        ({"intervals_s": 3}, "intervals_s is no list"),
        ({"intervals_s": [True]}, "intervals_s is True and should be float"),
        ({"pace": 1}, "unknown field 'pace'"),
    ):
        with pytest.raises(ValueError, match=said):
            decode(Repetition, run | change)
    with pytest.raises(KeyError, match="ttft_s"):
        decode(Repetition, {"intervals_s": []})
    assert replace(decode(BenchCase, {"prompt_tokens": 1, "new_tokens": 2}), batch=3) == BenchCase(1, 2, 3)
