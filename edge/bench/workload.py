"""Fixed workloads: TOML files that say what to measure, with which options, and what was published of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edge.bench.options import PeerRow, WorkloadFacts
from edge.bench.samples import BenchCase
from edge.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).with_name("workloads")
PUBLISHED = "published, another machine"
_SPEEDS = ("prefill_tok_s", "decode_tok_s")
_KINDS = {str: "text", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class EngineSettings:
    """Engine options that a workload asks for; None leaves one to the command. offload: whether pages may be elsewhere.

    speculative: 'eagle' becomes 'lookup' where the bundle has no draft model that can run.
    """

    attention: str | None = None
    sparse: str | None = None
    offload: bool = False
    speculative: str | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class Workload:
    """lengths: of prompts, or with `whole` of prompts and replies together; every length is measured at every batch."""

    facts: WorkloadFacts
    lengths: tuple[int, ...]
    whole: bool
    new_tokens: int
    repetitions: int
    batches: tuple[int, ...] = (1,)
    seed: int = 0
    engine: EngineSettings = EngineSettings()
    references: tuple[Mapping[str, Any], ...] = ()

    def cases(self) -> tuple[BenchCase, ...]:
        """Every length at every batch; UsageError if a whole context leaves no room for a prompt."""
        reply = self.new_tokens if self.whole else 0
        if min(self.lengths) <= reply:
            raise UsageError(
                f"the workload {self.facts.name} has a context of {min(self.lengths)} tokens, of which {reply} are the "
                "reply's; give a smaller --new-tokens"
            )
        return tuple(
            BenchCase(length - reply, self.new_tokens, batch) for batch in self.batches for length in self.lengths
        )

    def peers(self) -> tuple[PeerRow, ...]:
        """The published figures, each at the case of its context."""
        reply = self.new_tokens if self.whole else 0
        return tuple(
            PeerRow(
                name=row["name"],
                prompt_tokens=row["context"] - reply,
                prefill_tok_s=row.get("prefill_tok_s"),
                decode_tok_s=row.get("decode_tok_s"),
                machine=row["machine"],
                source=PUBLISHED,
            )
            for row in self.references
        )


def workload_names() -> tuple[str, ...]:
    """Those that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load_workload(name: str) -> Workload:
    """A workload of the package by its name, or a TOML file; UsageError says what is wrong with it."""
    path = FOLDER / f"{name}.toml" if name in workload_names() else Path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(workload_names())
        raise UsageError(f"there is no workload {name}: choose from {known}, or give a TOML file") from None
    except (OSError, ValueError) as error:  # TOML errors and bad UTF-8 are ValueErrors
        raise UsageError(f"the workload {path} cannot be read ({error}); write it as docs/report.md says") from None
    try:
        return _workload(path.stem, values)
    except KeyError as error:
        raise UsageError(f"the workload {path} has no {error}; write it as docs/report.md says") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"the workload {path} is wrong: {error}; write it as docs/report.md says") from None


def _workload(name: str, values: dict[str, Any]) -> Workload:
    known = {"description", "source", "model", "prompts", "contexts", "batches", "new_tokens", "repetitions", "seed"}
    _refuse_unknown(values, known | {"engine", "reference"}, "")
    if ("prompts" in values) == ("contexts" in values):
        raise ValueError("it must have either prompts or contexts")
    settings = values.get("engine", {})
    _refuse_unknown(settings, {field.name for field in fields(EngineSettings)}, "engine.")
    _check(settings, {"attention": str, "sparse": str, "offload": bool, "speculative": str, "chunk": int})
    references = values.get("reference", [])
    for row in references:
        _check_reference(row)
    facts = {key: values[key] for key in ("description", "source", "model")}
    _check(facts, dict.fromkeys(facts, str))
    return Workload(
        facts=WorkloadFacts(name, **facts),
        lengths=_numbers(values, "contexts" if "contexts" in values else "prompts"),
        whole="contexts" in values,
        new_tokens=_number(values, "new_tokens", 2),
        repetitions=_number(values, "repetitions", 1),
        batches=_numbers(values, "batches") if "batches" in values else (1,),
        seed=_number(values, "seed", 0) if "seed" in values else 0,
        engine=EngineSettings(**settings),
        references=tuple(references),
    )


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}{unknown[0]} is unknown, it may have {', '.join(sorted(known))}")


def _check(values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Raise ValueError if one of these keys has a value of another type; a missing one is fine."""
    for key, kind in types.items():
        if key in values and type(values[key]) is not kind:
            raise ValueError(f"{key} is {values[key]!r} and must be {_KINDS[kind]}")


def _check_reference(row: Mapping[str, Any]) -> None:
    _refuse_unknown(row, {"name", "machine", "context", *_SPEEDS}, "reference.")
    _check(row, {"name": str, "machine": str, "context": int})
    if missing := [key for key in ("name", "machine", "context") if key not in row]:
        raise ValueError(f"a reference has no {missing[0]}")
    for key in _SPEEDS:
        if key in row and (type(row[key]) not in (int, float) or not row[key] > 0):
            raise ValueError(f"{key} is {row[key]!r} and must be a number above 0")


def _number(values: Mapping[str, Any], key: str, least: int) -> int:
    value = values[key]
    if type(value) is not int or value < least:
        raise ValueError(f"{key} is {value!r} and must be a whole number of at least {least}")
    return value


def _numbers(values: Mapping[str, Any], key: str) -> tuple[int, ...]:
    found: Sequence[Any] = values[key]
    if not isinstance(found, list) or not found or any(type(n) is not int or n < 1 for n in found):
        raise ValueError(f"{key} is {found!r} and must be a list of whole numbers of at least 1")
    return tuple(sorted(set(found)))
