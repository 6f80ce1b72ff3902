"""Fixed workloads: the same tokens everywhere, the published figures at their places, and cases that do not fit."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge.bench.fit import Skipped, open_fitting
from edge.bench.measure import hash_prompts, make_prompts
from edge.bench.samples import BenchCase
from edge.bench.workload import FOLDER, PUBLISHED, load_workload, workload_names
from edge.cli.app import run_command
from edge.engine import Engine
from edge.errors import EdgeError, NoRoomError, UsageError

K = 1024

# ---- files -------------------------------------------------------------------------------------------------


def test_every_workload_of_the_package_loads_and_says_what_it_is() -> None:
    assert set(workload_names()) == {
        *("quick", "batch", "ladder-2k-128k"),
        *("announcement-orin", "announcement-4090-128k", "announcement-4090-140k"),
    }
    for name in workload_names():
        workload = load_workload(name)
        assert workload.cases() and workload.facts.name == name
        assert min(map(len, (workload.facts.description, workload.facts.source, workload.facts.model))) > 2
        places = {(case.prompt_tokens, case.batch) for case in workload.cases()}
        assert {(peer.prompt_tokens, peer.batch) for peer in workload.peers()} <= places
        assert {peer.source for peer in workload.peers()} <= {PUBLISHED}


def test_lengths_are_those_that_were_announced() -> None:
    assert [case.context for case in load_workload("ladder-2k-128k").cases()] == [2**n * K for n in range(1, 8)]
    assert [case.context for case in load_workload("announcement-orin").cases()] == [n * K for n in (32, 64, 96, 128)]
    assert [case.context for case in load_workload("announcement-4090-128k").cases()] == [128 * K]
    (beyond,) = load_workload("announcement-4090-140k").cases()
    assert beyond.prompt_tokens > 140 * K and load_workload("announcement-4090-140k").engine.offload
    assert load_workload("quick").cases() == tuple(BenchCase(n, 32) for n in (128, 512, 2048))


def test_published_figures_are_those_of_the_report() -> None:
    peers = load_workload("announcement-orin").peers()
    by_cpm = [(p.prefill_tok_s, p.decode_tok_s) for p in peers if p.name.startswith("CPM.cu")]
    assert by_cpm == [(1161, 58.8), (1166, 57.3), (1141, 54.2), (1093, 46.2)]
    announced = {p.name: (p.prefill_tok_s, p.decode_tok_s) for p in peers if p.name.startswith("announcement")}
    assert announced == {"announcement: MiniCPM4": (961.5, 39.1), "announcement: Qwen3-8B": (235.9, 6.8)}
    (ours, _) = load_workload("announcement-4090-128k").peers()
    assert (ours.prefill_tok_s, ours.decode_tok_s) == (7150, 148)


GOOD = (FOLDER / "announcement-orin.toml").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("new_tokens = 128", "new_tokens = 1"), "new_tokens is 1 and must be a whole number of at least 2"),
        (("new_tokens = 128", ""), "has no 'new_tokens'"),
        (("contexts =", "kontexts ="), "kontexts is unknown"),
        (("contexts =", "prompts = [1]\ncontexts ="), "either prompts or contexts"),
        (("contexts = [32768,", "contexts = [0,"), "list of whole numbers of at least 1"),
        (("contexts = [32768,", "contexts = [100,"), "of which 128 are the reply's"),
        (('speculative = "eagle"', "speculative = true"), "speculative is True and must be text"),
        (('speculative = "eagle"', "turbo = true"), "engine.turbo is unknown"),
        (("prefill_tok_s = 961.5", "prefill_tok_s = -1"), "prefill_tok_s is -1 and must be a number above 0"),
        (("context = 131072\nprefill_tok_s = 961.5", ""), "a reference has no context"),
        (("description =", "description == "), "cannot be read"),
    ],
)
def test_a_wrong_workload_is_one_sentence(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    assert change[0] in GOOD
    path.write_text(GOOD.replace(*change))
    with pytest.raises(UsageError, match=said):
        load_workload(str(path)).cases()


def test_an_unknown_workload_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="there is no workload marathon: choose from announcement-4090-128k, "):
        load_workload("marathon")


# ---- prompts -----------------------------------------------------------------------------------------------


def test_prompts_depend_on_seed_and_case_alone() -> None:
    case = BenchCase(20, 4, 3)
    prompts = make_prompts(case, 0, 1, 1000)
    assert prompts == make_prompts(case, 0, 1, 1000)
    others = [
        *(make_prompts(case, 1, 1, 1000), make_prompts(case, 0, 2, 1000)),
        *(make_prompts(replace(case, new_tokens=5), 0, 1, 1000), make_prompts(replace(case, batch=2), 0, 1, 1000)),
    ]
    seen = {tuple(ids) for group in (prompts, *others) for ids in group}
    assert len(seen) == 3 + 3 + 3 + 3 + 2, "every sequence of every run is another"
    data = b"".join(struct.pack("<21i", 20, *ids) for ids in prompts)
    assert hash_prompts(prompts) == hashlib.sha256(data).hexdigest()


# ---- cases that do not fit ---------------------------------------------------------------------------------


def engine_of(context: int, sequences: int, pages: int) -> Engine:
    plan = SimpleNamespace(run=SimpleNamespace(sequences=sequences), num_pages=pages)
    return cast(Engine, SimpleNamespace(max_context=context, plan=plan, chunk=512))


def opener(room: int, *, sequences: int = 4, calls: list[tuple[int, int]]) -> Any:
    """Opens engines for up to `room` tokens; a token needs a MiB."""

    def open_engine(tokens: int, at_once: int) -> Engine:
        calls.append((tokens, at_once))
        if tokens > room:
            raise NoRoomError("too long", room, "memory", room << 20, lambda context: context << 20)
        return engine_of(tokens, min(at_once, sequences), 2 * tokens // 64)

    return open_engine


def test_cases_that_do_not_fit_are_named_and_the_others_run() -> None:
    cases = [BenchCase(length - 64, 64) for length in (1024, 2048, 4096, 8192)]
    calls: list[tuple[int, int]] = []
    engine, fitting, skipped = open_fitting(cases, opener(3000, calls=calls))
    assert fitting == (cases[0], cases[1]) and engine.max_context == 2048
    assert calls == [(8192, 1), (2048, 1)], "an engine is opened once for what fits"
    assert [s.reason for s in skipped] == [
        "does not fit: needs 4,096 MiB of memory, has 3,000 MiB",
        "does not fit: needs 8,192 MiB of memory, has 3,000 MiB",
    ]


def test_what_fits_exactly_runs() -> None:
    cases = [BenchCase(tokens - 64, 64) for tokens in (2048, 2049)]
    _, fitting, skipped = open_fitting(cases, opener(2048, calls=[]))
    assert fitting == (cases[0],) and [s.case for s in skipped] == [cases[1]]
    assert skipped[0].reason == "does not fit: needs 2,049 MiB of memory, has 2,048 MiB"


def test_batches_need_pages_and_places() -> None:
    cases = [BenchCase(960, 64, batch) for batch in (1, 2, 4, 8)]
    _, fitting, skipped = open_fitting(cases, opener(3000, calls=[]))
    assert [case.batch for case in fitting] == [1, 2]
    assert skipped == (
        Skipped(cases[2], "64 KV pages", "32"),
        Skipped(cases[3], "8 sequences at once", "4"),
    )


def test_if_nothing_fits_the_engines_own_sentence_stays() -> None:
    with pytest.raises(NoRoomError, match="too long"):
        open_fitting([BenchCase(4096, 64)], opener(3000, calls=[]))
    with pytest.raises(EdgeError, match="no case can run here; 960 tokens x 8 with 64 new ones does not fit"):
        open_fitting([BenchCase(960, 64, 8)], opener(3000, calls=[]))


# ---- the command -------------------------------------------------------------------------------------------


def test_a_workload_with_a_case_too_long_reports_it(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'description = "d"\nsource = "s"\nmodel = "m"\nprompts = [16, 500000]\nbatches = [1, 2]\nnew_tokens = 4\n'
        'repetitions = 2\n[[reference]]\nname = "other"\nmachine = "a board"\ncontext = 16\ndecode_tok_s = 5\n'
    )
    words = ("--workload", str(path), "--repeat", "1", "--memory", "400MiB", "--no-gate", "--json")
    assert run_command(["bench", str(tiny_bundle), *words], debug=False) == 0
    report = json.loads(capfd.readouterr().out)
    assert [case["case"] for case in report["cases"]] == [
        {"prompt_tokens": 16, "new_tokens": 4, "batch": batch} for batch in (1, 2)
    ]
    assert [s["case"]["batch"] for s in report["skipped"]] == [1, 2] and "MiB" in report["skipped"][0]["needs"]
    assert report["workload"]["name"] == "mine" and report["peers"][0]["source"] == PUBLISHED


def test_workloads_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "--workload", "list"], debug=False) == 0
    said = capfd.readouterr().out
    assert all(name in said for name in workload_names())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--workload", "marathon"), "there is no workload marathon"),
        (("--batch", "0"), "--batch '0' holds a number below 1"),
        (("--batch", "two"), "write it as 1,4,8"),
        (("--static", "--batch", "2"), "--batch has no meaning"),
    ],
)
def test_wrong_use_is_one_sentence(
    words: tuple[str, ...], said: str, tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = [] if "--static" in words else [str(tiny_bundle)]
    assert run_command(["bench", *bundle, *words], debug=False) == 2
    stderr = capfd.readouterr().err
    assert said in stderr and stderr.count("\n") == 1
