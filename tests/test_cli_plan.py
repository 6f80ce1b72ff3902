"""`edge plan`: the ledger of a model that is not here yet, what fits at most, and what would help."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.cli.plan import _answer, _subject, _Wish
from edge.engine import open_engine
from edge.errors import UsageError
from edge.memory.advice import changes, largest_of_each
from edge.memory.attended import least_resident
from edge.memory.devices import DEVICES, Device, find_device
from edge.memory.ledger import Subject, cpu_ledger, total
from edge.memory.run import Run
from edge.memory.weights import StoredWeights, device_weight_bytes
from edge.models import MINICPM4_8B, PUBLISHED
from edge.plan import EngineOptions
from tests.command import edge
from tests.synthetic import tiny_config, write_hf_checkpoint

MIB, GIB = 1 << 20, 1 << 30
NO_WISH = _Wish(None, None, None, None)


@pytest.fixture(scope="module")
def tiny_checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_checkpoint(tmp_path_factory.mktemp("plan") / "checkpoint", tiny_config())


def planned(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a plan."""
    done = edge("plan", *arguments, "--json")
    return done.returncode, json.loads(done.stdout)


def test_a_model_by_name_fits_a_board_or_not() -> None:
    code, values = planned("MiniCPM4-8B", "--device", "AGX Orin 32GB", "--context", 131072)
    assert (code, values["fits"], values["target"], values["attention"]) == (0, True, "jetson", "sparse")
    assert values["total"] == sum(line["bytes"] for line in values["lines"]) <= values["budget"]
    code, values = planned("openbmb/minicpm4-8b", "--device", "orin nano", "--context", 131072)
    assert (code, values["fits"]) == (1, False)
    assert values["changes"][-1]["fits"] and values["changes"][-1]["total"] <= values["budget"]


def test_the_published_sizes_of_weights_and_cache() -> None:
    """spec: quantization_and_speculation.md 1.6: MB of the 8B's linears, head, and KV bytes a token."""
    stored = StoredWeights("w4a16", 128, True, "int8", 128, "float16")
    linears, head, scales, table = 7583.3e6 / 2 + 118.5e6, 300.8e6, 73448 * 4096 / 128 * 2, 601.7e6
    assert device_weight_bytes(MINICPM4_8B, stored) == pytest.approx(linears + head + scales + table, rel=1e-3)
    _, values = planned("MiniCPM4-8B", "--device", "orin64", "--context", 65536, "--attention", "dense")
    cache = next(line for line in values["lines"] if line["name"] == "kv cache")
    assert cache["bytes"] == 65536 * 32768


def test_a_bundle_is_planned_as_it_runs(tiny_bundle: Path) -> None:
    code, values = planned(tiny_bundle, "--context", 640, "--budget", "1GiB", "--threads", 2)
    assert code == 0
    engine = open_engine(tiny_bundle, EngineOptions(context=640, memory=GIB, threads=2))
    assert {line["name"]: line["bytes"] for line in values["lines"]} == {
        line.name: line.bytes for line in engine.plan.lines
    }


def test_a_checkpoint_is_planned_as_it_would_be_exported(tiny_checkpoint_folder: Path, tmp_path: Path) -> None:
    code, values = planned(tiny_checkpoint_folder, "--budget", "1GiB", "--kv", "int8")
    assert (code, values["kv"]) == (0, "int8")
    bundle = tmp_path / "bundle"
    assert edge("export", tiny_checkpoint_folder, "--out", bundle, "--kv", "int8").returncode == 0
    _, exported = planned(bundle, "--budget", "1GiB")
    assert values["lines"] == exported["lines"]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(PUBLISHED)),
    context=st.integers(1, 1 << 18),
    sequences=st.integers(1, 8),
    chunk=st.integers(1, 2048),
    budget=st.integers(0, 16 * GIB),
)
def test_what_fits_at_most_fits_and_more_does_not(
    name: str, context: int, sequences: int, chunk: int, budget: int
) -> None:
    _, _, subject = _subject(name, "onnxruntime", NO_WISH)
    run = Run(context, sequences, chunk, rows=16, threads=2)
    most = largest_of_each(cpu_ledger, subject, run, budget)

    def fits(**changed: int) -> bool:
        return total(cpu_ledger(subject, Run(**{**vars(run), **changed}))) <= budget

    assert most.context == 0 or fits(context=most.context)
    assert most.context == 1 << 20 or not fits(context=most.context + 64)
    assert most.sequences == 0 or fits(sequences=most.sequences)
    assert most.sequences == 256 or not fits(sequences=most.sequences + 1)
    assert most.chunk == 0 or fits(chunk=most.chunk)


@settings(max_examples=60, deadline=None)
@given(
    context=st.integers(64, 1 << 17), budget=st.integers(200 * MIB, 8 * GIB), kind=st.sampled_from(("w4a16", "fp16"))
)
def test_changes_add_up_and_the_last_one_fits(context: int, budget: int, kind: str) -> None:
    _, _, subject = _subject("MiniCPM4-8B", "onnxruntime", _Wish(kind, None, None, None))
    run = Run(context, rows=16, threads=2)
    needed = total(cpu_ledger(subject, run))
    found = list(changes(cpu_ledger, subject, run, budget, least=least_resident(subject.config, run, on_cpu=True)))
    for change in found:
        assert change.saves > 0 and change.total == needed - change.saves
        assert change.fits == (change.total <= budget)
        needed = change.total
    assert not any(change.fits for change in found[:-1])
    smallest = Subject(
        subject.config, StoredWeights("w4a16", 64, True, "int4", 64), {"activation": "float32", "kv": "int8"}
    )
    least = total(cpu_ledger(smallest, Run(64, chunk=min(run.chunk, 128), rows=16, threads=2)))
    assert found[-1].fits or least > budget or needed <= budget


def test_offload_leaves_what_a_token_needs() -> None:
    device = Device("test", "onnxruntime", 8 * GIB, cores=2)
    _, _, subject = _subject("MiniCPM4-8B", "onnxruntime", NO_WISH)
    answer = _answer("8B", "onnxruntime", subject, Run(1 << 17, rows=16, threads=2), device, offload=True)
    assert answer.fits and answer.run.resident is not None and 41 <= answer.run.resident < answer.run.pages
    one_more = replace(answer.run, resident=answer.run.resident + 1)
    assert total(cpu_ledger(subject, one_more)) > device.budget
    elsewhere = [line for line in answer.lines if line.is_elsewhere]
    assert [line.bytes for line in elsewhere] == [(1 << 17) * 32768]


def test_devices_are_found_by_part_of_a_name_and_ambiguity_is_refused() -> None:
    assert find_device("4090").name == "RTX 4090"
    assert find_device("jetson-agx-orin-64gb") is DEVICES[0]
    with pytest.raises(
        UsageError, match=r"orin may be one of several; choose AGX Orin 64GB, AGX Orin 32GB, .*--budget"
    ):
        find_device("orin")
    with pytest.raises(UsageError, match="H100 is unknown; choose cpu, AGX Orin 64GB"):
        find_device("H100")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nothing",), "nothing is no file or folder and no model known by name; known are MiniCPM4-0.5B, "),
        (("MiniCPM4-8B", "--budget", "many"), "'many' is no size; write it as 4GiB"),
        (("MiniCPM4-8B", "--weights", "int3"), "unknown weight format 'int3'"),
        (("MiniCPM4-8B", "--head", "int3"), "unknown head format 'int3'; choose exact, int8 or int4"),
        (("MiniCPM4-8B", "--device", "4090", "--kv", "float32"), "stores keys and values as float16 or int8"),
        (("MiniCPM4-8B", "--kv", "fp8"), "unknown --kv 'fp8'"),
        (
            ("MiniCPM4-0.5B", "--device", "4090", "--offload"),
            "dense attention needs every page on the GPU for every token",
        ),
        (("MiniCPM4-8B", "--device", "orin64", "--offload"), "shares its memory with the host"),
    ],
)
def test_wrong_use_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    done = edge("plan", *arguments)
    assert done.returncode == 2 and done.stdout == b""
    assert sentence in " ".join(done.stderr.decode().split())


def test_the_picture_draws_every_line_to_scale(tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    done = edge("plan", "MiniCPM4-8B", "--device", "4090", "--svg", file)
    assert done.returncode == 0, done.stderr
    _, values = planned("MiniCPM4-8B", "--device", "4090")
    parts = [rect for rect in ET.parse(file).iter() if rect.tag.endswith("rect") and len(rect)]
    widths = [float(rect.get("width", "0")) for rect in parts]
    sizes = [line["bytes"] for line in values["lines"]]
    scale = 720 / max(values["budget"], values["total"])
    assert widths == pytest.approx([size * scale for size in sizes], abs=0.01)


def test_a_narrow_terminal_and_a_pipe_get_plain_text() -> None:
    done = edge("plan", "MiniCPM4-8B", "--device", "nano", "--context", 131072, NO_COLOR="1")
    text = done.stdout.decode()
    assert done.returncode == 1 and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "--kv int8" in text and b"make the changes above: --kv int8" in done.stderr.replace(b"\n", b" ")
