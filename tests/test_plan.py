"""The memory plan: it fits its budget, and what a refusal offers works when it is given back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import machine
from edge.bundle import Bundle, open_bundle
from edge.cli.options import parse_size
from edge.config import ModelConfig
from edge.engine import open_engine
from edge.errors import EdgeError
from edge.memory import fit
from edge.memory.fit import make_plan
from edge.memory.ledger import cpu_ledger, page_bytes, total
from edge.plan import EngineOptions, subject_of
from plugins import PAGE_TOKENS

MIB = 1 << 20


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def page(bundle: Bundle) -> int:
    """Bytes of a page over all layers."""
    return sum(page_bytes(bundle.config, bundle.manifest.types))


def grown(bundle: Bundle, config: ModelConfig) -> Bundle:
    """The same bundle as if it held a larger model."""
    return replace(bundle, manifest=replace(bundle.manifest, model=config))


def offers(bundle: Bundle, options: EngineOptions) -> tuple[str, EngineOptions | None, EngineOptions | None]:
    """A refusal, and the options with the --memory and with the --context that it names."""
    with pytest.raises(EdgeError) as refusal:
        make_plan(bundle, options)
    sentence = str(refusal.value)
    memory = re.search(r"give --memory (\S+),", sentence)
    context = re.search(r"ask for --context (\d+)$", sentence)
    return (
        sentence,
        replace(options, memory=parse_size(memory[1])) if memory else None,
        replace(options, context=int(context[1])) if context else None,
    )


def test_a_page_is_what_the_executor_allocates(tiny_bundle: Path, bundle: Bundle) -> None:
    engine = open_engine(tiny_bundle, EngineOptions(context=640))
    pools = engine.executor._pools  # type: ignore[attr-defined]
    planned = engine.plan.bytes("kv cache") + engine.plan.bytes("compressed keys")
    assert sum(pool.numpy().nbytes for pool in pools) == planned == 10 * page(bundle)


@given(
    memory=st.integers(0, 300 * MIB),
    context=st.none() | st.integers(1, 100_000),
    chunk=st.integers(1, 4096),
    layers=st.integers(1, 200),
)
@settings(max_examples=200, deadline=None)
def test_a_plan_fits_or_says_what_would(
    bundle: Bundle, memory: int, context: int | None, chunk: int, layers: int
) -> None:
    model = grown(bundle, replace(bundle.config, num_hidden_layers=layers))
    options = EngineOptions(context=context, memory=memory, chunk=chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "available_memory", lambda: 1 << 50)
        check_plan_or_offers(model, options)


def check_plan_or_offers(model: Bundle, options: EngineOptions) -> None:
    context, memory = options.context, options.memory
    assert memory is not None
    try:
        plan = make_plan(model, options)
    except EdgeError:
        sentence, with_memory, with_context = offers(model, options)
        assert with_memory is not None
        assert make_plan(model, with_memory).max_context >= (context or 1)
        assert with_memory.memory is not None
        with pytest.raises(EdgeError):
            make_plan(model, replace(with_memory, memory=with_memory.memory - MIB))
        if with_context is None:
            assert "ask for --context" not in sentence
            with pytest.raises(EdgeError):
                make_plan(model, replace(options, context=1))
        else:
            assert with_context.context is not None
            assert make_plan(model, with_context).max_context == with_context.context
            with pytest.raises(EdgeError):
                make_plan(model, replace(options, context=with_context.context + 1))
    else:
        assert plan.total <= memory
        assert plan.max_context <= plan.num_pages * PAGE_TOKENS
        assert plan.max_context == context or (
            context is None and plan.max_context <= model.config.max_position_embeddings
        )


def test_without_a_wish_the_context_is_the_models_or_what_fits(bundle: Bundle) -> None:
    limit = bundle.manifest.limits["max_context"]
    assert make_plan(bundle, EngineOptions()).max_context == limit
    for pages in (1, 2, limit // PAGE_TOKENS - 1):
        memory = make_plan(bundle, EngineOptions(context=pages * PAGE_TOKENS)).total
        assert make_plan(bundle, EngineOptions(memory=memory)).max_context == pages * PAGE_TOKENS
    with pytest.raises(EdgeError):
        make_plan(bundle, EngineOptions(memory=make_plan(bundle, EngineOptions(context=1)).total - 1))


def test_a_context_beyond_the_training_length_is_the_users_choice(bundle: Bundle) -> None:
    wanted = bundle.manifest.limits["max_context"] + 100
    assert make_plan(bundle, EngineOptions(context=wanted)).max_context == wanted


def test_without_a_budget_the_free_memory_is_one(bundle: Bundle) -> None:
    with pytest.raises(EdgeError, match=r"90 % of the free memory is \d+MiB; free some, or ask for --context \d+$"):
        make_plan(bundle, EngineOptions(context=2**31 - 1))


def test_more_memory_than_there_is_is_not_promised(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was given a budget has it or does not begin: it shrinks only when it is told to."""
    monkeypatch.setattr(fit, "available_memory", lambda: 400 * MIB)
    monkeypatch.setattr(fit, "anonymous_bytes", lambda: 100 * MIB)
    with pytest.raises(EdgeError, match=r"^--memory 501MiB is more than the 500MiB .* give --memory 500MiB$"):
        make_plan(bundle, EngineOptions(memory=500 * MIB + 1))
    assert make_plan(bundle, EngineOptions(memory=500 * MIB)).budget == 500 * MIB
    assert make_plan(bundle, EngineOptions()).budget == 450 * MIB


def test_a_pool_that_the_system_refuses_is_one_sentence(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "available_memory", lambda: 1 << 61)
    with pytest.raises(EdgeError, match="the KV pool cannot be had"):
        open_engine(tiny_bundle, EngineOptions(context=2**31 - 1, memory=1 << 60))


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def test_a_container_may_have_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tightest of the groups counts; cached files are no use of memory, and 'max' is no limit."""
    monkeypatch.setattr(machine, "_control_groups", lambda: [tmp_path / "outer" / "inner", tmp_path / "outer"])
    assert abs(machine.available_memory() - psutil.virtual_memory().available) < 1 << 30
    write_group(tmp_path / "outer", memory_max="max\n", memory_current="1", cpu_max="max 100000\n")
    write_group(
        tmp_path / "outer" / "inner",
        memory_max=f"{100 * MIB}\n",
        memory_current=f"{60 * MIB}\n",
        memory_stat=f"anon {40 * MIB}\ninactive_file {20 * MIB}\n",
        cpu_max="150000 100000\n",
    )
    cores = machine.usable_cores()
    assert machine.available_memory() == 60 * MIB
    assert cores <= 2
    write_group(tmp_path / "outer", memory_max=str(50 * MIB), memory_current=str(70 * MIB), cpu_max="10000 100000")
    assert machine.available_memory() == 0
    assert machine.usable_cores() == 1


def test_the_first_version_of_control_groups_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its root has a limit of 2^63 bytes less a page; usage is that of all groups within, as its cached files are."""
    group = tmp_path / "memory" / "batch" / "job"
    group.mkdir(parents=True)
    cgroups = "5:cpu,cpuacct:/elsewhere\n4:hugetlb,memory:/batch/job\n0::/\n"
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    real = machine._text
    monkeypatch.setattr(machine, "_text", lambda p: cgroups if p == Path("/proc/self/cgroup") else real(p))
    assert machine._control_groups() == [group, group.parent, tmp_path / "memory", tmp_path]
    free = psutil.virtual_memory().available
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(f"{900 * MIB}\n")
    assert abs(machine.available_memory() - free) < 1 << 30
    (group / "memory.limit_in_bytes").write_text(f"{100 * MIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{70 * MIB}\n")
    (group / "memory.stat").write_text(
        f"inactive_file {1 * MIB}\ntotal_inactive_file {5 * MIB}\ntotal_active_file {20 * MIB}\n"
    )
    assert machine.available_memory() == 55 * MIB
    (group.parent / "memory.limit_in_bytes").write_text(f"{80 * MIB}\n")
    (group.parent / "memory.usage_in_bytes").write_text(f"{75 * MIB}\n")
    assert machine.available_memory() == 5 * MIB


def test_sequences_share_the_pages_that_memory_has_room_for(tiny_bundle: Path) -> None:
    """A whole context for one comes first, then as much as fits, up to a context for each."""
    bundle = open_bundle(tiny_bundle)
    alone = make_plan(bundle, EngineOptions(context=1024))
    plenty = make_plan(bundle, EngineOptions(context=1024, sequences=4))
    assert (alone.num_pages, plenty.num_pages) == (16, 64)
    least = make_plan(bundle, EngineOptions(context=64, sequences=4)).total
    for memory in range(plenty.total - 400_000, plenty.total, 37_000):
        plan = make_plan(bundle, EngineOptions(context=1024, memory=memory, sequences=4))
        assert plan.total <= memory and 16 <= plan.num_pages < 64
        one_more = replace(plan.run, spare=plan.num_pages - 16 + 1)
        subject = subject_of(bundle, EngineOptions())
        assert total(cpu_ledger(subject, one_more)) > memory > least
