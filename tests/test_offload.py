"""KV pages on disk: results are the same to the last bit, nothing is left behind, a failing disk is a sentence."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import open_bundle
from edge.config import SparseConfig
from edge.engine import Engine, open_engine
from edge.errors import EdgeError, UsageError
from edge.executors.onnxruntime import OnnxRuntimeExecutor
from edge.memory.fit import make_plan
from edge.memory.ledger import page_bytes
from edge.offload import Offload
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.scheduler import Scheduler, Sequence
from plugins.offload.store import MINIMUM_SLOTS, PageFile, PoolPart, unit_bytes
from plugins.ort.library import find_library
from tests.command import edge
from tests.synthetic import tiny_config, write_hf_checkpoint

# 6 of up to 16 blocks, which two KV heads choose for themselves.
SPARSE = SparseConfig(topk=4, window_size=128, dense_len=-1)
CONFIG = tiny_config(
    sparse=SPARSE, max_position_embeddings=1024, num_attention_heads=4, num_key_value_heads=2, head_dim=32
)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LENGTH = 900


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def one_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("one"), "float32")


def make_bundle(folder: Path, kv: str, sparse: SparseConfig | None = SPARSE) -> Path:
    checkpoint = open_checkpoint(write_hf_checkpoint(folder / "model", replace(CONFIG, sparse=sparse), tokenizer=True))
    return export_bundle(checkpoint, folder / "bundle", ExportOptions(weights=WeightFormat("exact"), kv=kv))


def engine_of(path: Path, folder: Path | None, slots: int = 0, chunk: int = 100, attention: str = "model") -> Engine:
    """Everything in memory, or `slots` pages of each layer and the others in `folder`."""
    opened = open_bundle(path)
    plan = make_plan(opened, EngineOptions(context=1024, chunk=chunk, threads=2, attention=attention))
    offload = None if folder is None else Offload(folder, slots)
    return Engine(opened, OnnxRuntimeExecutor(opened, plan.num_pages, 2, plan.sparse, offload=offload), plan, chunk)


def executor_of(engine: Engine) -> OnnxRuntimeExecutor:
    assert isinstance(engine.executor, OnnxRuntimeExecutor)
    return engine.executor


def ids_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()


def reply(engine: Engine, ids: list[int]) -> list[int]:
    return [event.token_id for event in engine.generate(ids, GREEDY)]


# ---- the same numbers


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize(("slots", "chunk"), [(MINIMUM_SLOTS, 64), (MINIMUM_SLOTS, LENGTH), (11, 100), (16, 100)])
def test_logits_are_those_of_a_cache_in_memory(
    slots: int, chunk: int, attention: str, bundle: Path, tmp_path: Path
) -> None:
    wanted = engine_of(bundle, None, 0, chunk, attention).logits(ids_of(LENGTH), LENGTH)
    engine = engine_of(bundle, tmp_path, slots, chunk, attention)
    for _ in range(2):  # the second time on pages that the first one has used
        assert engine.logits(ids_of(LENGTH), LENGTH).tobytes() == wanted.tobytes()
    counters = executor_of(engine).take_offload_counters()
    assert counters is not None
    assert (counters.bytes_read > 0) == (slots < LENGTH / 64)
    assert (
        counters.bytes_written
        >= (LENGTH // 64 - slots) * sum(page_bytes(engine.bundle.config, engine.bundle.manifest.types)) // 2
    )


def test_a_session_moves_between_memory_and_disk(bundle: Path, tmp_path: Path) -> None:
    """Its pages are the same bytes; and a page that two conversations share is copied before one writes into it."""
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    ids = ids_of(500)
    replies = {}
    for kind, folder in (("memory", None), ("disk", tmp_path)):
        engine = engine_of(bundle, folder, MINIMUM_SLOTS)
        session = engine.open_session()
        first = [event.token_id for event in session.generate(ids, params)]
        session.save(tmp_path / f"{kind}.session")
        other = [event.token_id for event in engine.generate([*ids, 5, 6], params)]
        replies[kind] = (first, other, [event.token_id for event in session.generate([*ids, *first, 7], params)])
    assert replies["memory"] == replies["disk"]
    for kind, folder in (("disk", None), ("memory", tmp_path)):
        session = engine_of(bundle, folder, MINIMUM_SLOTS).restore_session(tmp_path / f"{kind}.session")
        again = [*ids, *replies[kind][0], 7]
        assert [event.token_id for event in session.generate(again, params)] == replies[kind][2]


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_replies_are_those_of_a_cache_in_memory(attention: str, bundle: Path, tmp_path: Path) -> None:
    wanted = reply(engine_of(bundle, None, attention=attention), ids_of(700))
    assert reply(engine_of(bundle, tmp_path, MINIMUM_SLOTS, attention=attention), ids_of(700)) == wanted


def test_sequences_that_share_steps_get_their_own_logits(one_bundle: Path, tmp_path: Path) -> None:
    """A prompt of one sequence beside tokens of two others; all of them are longer than the pages in memory."""

    def last_logits(engine: Engine) -> list[np.ndarray]:
        sequences = [Sequence(engine.cache.open(), ids_of(n, n), prompt_length=n) for n in (330, 300, 260)]
        scheduler, found = Scheduler(engine.cache, 200), {}
        for _ in range(3):
            while step := scheduler.next_step(sequences):
                rows = iter(executor_of(engine).step(step.batch).logits)
                for sequence, count, logits in zip(step.sequences, step.counts, step.logits_counts, strict=True):
                    sequence.computed += count
                    if logits:
                        found[sequence.cache_id, sequence.computed] = next(rows)
            for sequence in sequences:
                sequence.tokens.append(7)
        return [found[key] for key in sorted(found)]

    wanted = last_logits(engine_of(one_bundle, None))
    assert len(wanted) == 9
    for got, expected in zip(last_logits(engine_of(one_bundle, tmp_path, MINIMUM_SLOTS)), wanted, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_long_dense_step_reads_what_does_not_fit_and_no_more(one_bundle: Path, tmp_path: Path) -> None:
    """Of 15 pages, 11 fit: 4 more are streamed through as many slots, the other 7 stay."""
    engine = engine_of(one_bundle, tmp_path, 11, attention="dense")
    sequence = Sequence(engine.cache.open(), ids_of(LENGTH), prompt_length=LENGTH)
    read = []
    for _ in range(6):
        engine.advance(sequence)
        counters = executor_of(engine).take_offload_counters()
        assert counters is not None
        read.append(counters.bytes_read)
        sequence.tokens.append(7)
    page = CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * unit_bytes([PoolPart(0, 2, 64 * 32 * 4)])
    assert 4 * page <= read[-1] <= 8 * page


# ---- the store itself

PAGES, SLOTS, HEADS, LAYERS = 24, MINIMUM_SLOTS, 2, 2
SLICES = (4096, 512)  # of two pools whose pages are stored together; a unit ends inside a disk block


class StoreMachine(RuleBasedStateMachine):
    """Two layers in one file against plain arrays: units hold what was last written, and locked ones do not move."""

    @initialize(direct=st.booleans(), folder=st.just(Path(os.environ.get("TMPDIR", "/var/tmp"))))
    def open(self, direct: bool, folder: Path) -> None:
        self.fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | (os.O_DIRECT if direct else 0))
        library = find_library()
        assert library is not None
        self.file = PageFile(library, self.fd, folder, direct=direct)
        self.memory = [[aligned((SLOTS, 2, HEADS, size)) for size in SLICES] for _ in range(LAYERS)]
        parts = [[PoolPart(m.ctypes.data, 2, m.shape[-1]) for m in pools] for pools in self.memory]
        layer_bytes = PAGES * HEADS * unit_bytes(parts[0])
        os.ftruncate(self.fd, LAYERS * layer_bytes)
        self.stores = [
            self.file.add_store(i, HEADS, PAGES, SLOTS, i * layer_bytes, part) for i, part in enumerate(parts)
        ]
        self.truth = [[np.zeros((PAGES, 2, HEADS, size), np.uint8) for size in SLICES] for _ in range(LAYERS)]
        self.locked: list[tuple[int, np.ndarray, list[int]]] = []
        self.rng = np.random.default_rng(0)

    def slots(self, layer: int, units: np.ndarray) -> list[int]:
        return [self.stores[layer].slot(page, head) for page, head, _ in units]

    def agrees(self, layer: int, page: int, head: int) -> bool:
        slot = self.stores[layer].slot(page, head)
        pairs = zip(self.memory[layer], self.truth[layer], strict=True)
        return all((memory[slot, :, head] == truth[page, :, head]).all() for memory, truth in pairs)

    @rule(
        layer=st.integers(0, LAYERS - 1),
        wanted=st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(0, HEADS - 1)), min_size=1, max_size=6),
        fresh=st.booleans(),
    )
    def lock(self, layer: int, wanted: list[tuple[int, int]], fresh: bool) -> None:
        held = {(page, head) for other, units, _ in self.locked if other == layer for page, head, _ in units}
        fresh = fresh and not held.intersection(wanted)
        units = np.array([(page, head, int(fresh)) for page, head in wanted], np.int32)
        in_use = [len({page for page, head in held | set(wanted) if head == h}) for h in range(HEADS)]
        possible = max(in_use) <= SLOTS
        assert self.stores[layer].lock(units) == possible
        if not possible:
            assert "may hold in memory are in use" in self.file.take_failure()
            return
        if fresh:  # as promised, all of them are written
            self.write(layer, units)
        assert all(self.agrees(layer, page, head) for page, head in wanted)
        if fresh:
            self.stores[layer].unlock(units, changed=True)
        else:
            self.locked.append((layer, units, self.slots(layer, units)))

    def write(self, layer: int, units: np.ndarray) -> None:
        for page, head, _ in units:
            slot = self.stores[layer].slot(page, head)
            for memory, truth in zip(self.memory[layer], self.truth[layer], strict=True):
                truth[page, :, head] = self.rng.integers(0, 256, truth[page, :, head].shape, np.uint8)
                memory[slot, :, head] = truth[page, :, head]

    @precondition(lambda self: self.locked)
    @rule(changed=st.booleans(), streamed=st.booleans(), which=st.integers(0, 100))
    def unlock(self, changed: bool, streamed: bool, which: int) -> None:
        layer, units, slots = self.locked.pop(which % len(self.locked))
        assert self.slots(layer, units) == slots
        if changed:
            self.write(layer, units)
        self.stores[layer].unlock(units, changed=changed, streamed=streamed)

    @rule(layer=st.integers(0, LAYERS - 1), page=st.integers(0, PAGES - 1))
    def read_page(self, layer: int, page: int) -> None:
        wanted = b"".join(truth[page].tobytes() for truth in self.truth[layer])
        assert self.stores[layer].read_page(page).tobytes() == wanted

    @rule(layer=st.integers(0, LAYERS - 1), page=st.integers(0, PAGES - 1))
    def write_page(self, layer: int, page: int) -> None:
        for truth in self.truth[layer]:
            truth[page] = self.rng.integers(0, 256, truth[page].shape, np.uint8)
        values = np.concatenate([truth[page].reshape(-1) for truth in self.truth[layer]])
        self.stores[layer].write_page(page, values)

    @invariant()
    def locked_units_stay(self) -> None:
        for layer, units, slots in getattr(self, "locked", []):
            assert self.slots(layer, units) == slots
            assert all(self.agrees(layer, page, head) for page, head, _ in units)

    def teardown(self) -> None:
        if hasattr(self, "file"):
            self.file.close()
            os.close(self.fd)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    memory = np.zeros(size + 4096, np.uint8)
    start = -memory.ctypes.data % 4096
    return memory[start : start + size].reshape(shape)


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestStore = StoreMachine.TestCase


# ---- a disk that fails


def test_a_file_cut_short_ends_one_request(one_bundle: Path, tmp_path: Path) -> None:
    engine = engine_of(one_bundle, tmp_path, MINIMUM_SLOTS)
    wanted = reply(engine_of(one_bundle, None), ids_of(700, 1))
    events = engine.generate(ids_of(700), replace(GREEDY, max_tokens=100))
    next(events)
    os.ftruncate(page_file_of(engine).fd, 4096)
    with pytest.raises(EdgeError) as failure:
        list(events)
    sentence = str(failure.value)
    assert sentence.startswith("KV page ")
    assert f"cannot be read back from {tmp_path} (the file is shorter than it should be); check the disk" in sentence
    assert engine.cache.free_pages == engine.plan.num_pages
    assert reply(engine, ids_of(700, 1)) == wanted  # writes its pages before it reads them


def page_file_of(engine: Engine) -> PageFile:
    file = executor_of(engine)._page_file
    assert file is not None
    return file


@pytest.fixture
def file_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_page_that_cannot_be_written_ends_the_request_that_needs_it(
    one_bundle: Path, tmp_path: Path, file_limit: None
) -> None:
    engine = engine_of(one_bundle, tmp_path, MINIMUM_SLOTS, attention="dense")
    wanted = reply(engine_of(one_bundle, None, attention="dense"), ids_of(400, 1))
    short = reply(engine_of(one_bundle, None, attention="dense"), ids_of(100, 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for _ in range(2):
        with pytest.raises(EdgeError, match=rf"^KV page \d+ of layer 0 could not be written to {tmp_path} \(File too"):
            reply(engine, ids_of(700))
    assert reply(engine, ids_of(100, 1)) == short  # needs no page but those in memory
    assert reply(engine, ids_of(400, 1)) == wanted


def test_no_room_for_the_file_is_refused_with_numbers(one_bundle: Path, tmp_path: Path, file_limit: None) -> None:
    dense = make_bundle(tmp_path / "dense", "float32", sparse=None)
    with pytest.raises(EdgeError, match=r"takes \d+MiB on disk and .* has \d+MiB free; free some, .*smaller --context"):
        open_engine(dense, EngineOptions(context=2**30, memory=3 << 29, offload=tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(EdgeError, match=r"\d+MiB of the KV cache cannot be had in .* \(File too large\); raise the"):
        engine_of(one_bundle, tmp_path, MINIMUM_SLOTS)
    with pytest.raises(UsageError, match="is no folder; create it"):
        engine_of(one_bundle, tmp_path / "none", MINIMUM_SLOTS)


def test_a_killed_process_leaves_nothing(one_bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.test_offload import *\n"
        "engine = engine_of(Path(sys.argv[1]), Path(sys.argv[2]), MINIMUM_SLOTS)\n"
        "while True: print(len(reply(engine, ids_of(700))), flush=True)"
    )
    command = [sys.executable, "-c", code, str(one_bundle), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "12\n"
        assert any(str(tmp_path) in os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir())
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


# ---- the plan and the command


def test_the_plan_fits_pages_beside_all_compressed_keys(one_bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(one_bundle)
    whole = make_plan(opened, EngineOptions(context=65536))
    assert (whole.resident_pages, whole.num_pages) == (None, 1024)
    memory = whole.total - whole.kv // 2
    plan = make_plan(opened, EngineOptions(context=65536, memory=memory, offload=tmp_path))
    assert plan.num_pages == 1024
    assert plan.total <= memory
    engine = open_engine(one_bundle, EngineOptions(context=65536, memory=memory, offload=tmp_path))
    assert sum(pool.numpy().nbytes for pool in executor_of(engine)._pools) == plan.kv
    assert plan.resident_pages is not None and plan.resident_pages < 512
    values, _ = page_bytes(opened.config, opened.manifest.types)
    assert plan.total + values > memory  # no further page fits
    with pytest.raises(EdgeError, match=r"a context of 65536 tokens needs \d+MiB"):
        make_plan(opened, EngineOptions(context=65536, memory=memory))
    with pytest.raises(EdgeError) as refusal:
        make_plan(opened, EngineOptions(context=1 << 24, memory=memory, offload=tmp_path))
    named = str(refusal.value).split("--memory ")[-1].split("MiB")[0]
    assert make_plan(opened, EngineOptions(context=1 << 24, memory=int(named) << 20, offload=tmp_path)).max_context
    assert make_plan(opened, EngineOptions(offload=tmp_path)).max_context == 1024  # the model's own limit


def test_the_command_takes_a_folder(one_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array(ids_of(500)))
    folder = tmp_path / "pages"
    folder.mkdir()
    files = {name: tmp_path / f"{name}.npy" for name in ("memory", "disk")}
    for name, file in files.items():
        options = ["--offload", folder] if name == "disk" else []
        result = edge("logits", one_bundle, "--ids-file", tmp_path / "ids.npy", "--out", file, *options)
        assert result.returncode == 0, result.stderr
    assert files["memory"].read_bytes() == files["disk"].read_bytes()
    assert list(folder.iterdir()) == []
