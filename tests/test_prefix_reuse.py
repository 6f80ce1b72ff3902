"""Prompts that begin alike, through the engine: what is computed once, and that nobody can tell from the tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.config import LongRope, SparseConfig
from edge.engine import Engine, Session, open_engine
from edge.errors import EdgeError
from edge.plan import EngineOptions
from edge.reuse import Mode, Modes, record
from edge.sampler import SamplingParams
from tests.synthetic import tiny_config, write_hf_checkpoint
from tests.test_engine import GREEDY, Counting, prompt, reply

SPARSE = SparseConfig(topk=2, window_size=64, dense_len=300)  # 3 blocks: the first 192 tokens are dense in any case


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse from 300 tokens on, rotated by the long list from 201 on."""
    folder = tmp_path_factory.mktemp("prefix")
    rope = LongRope((1.0,) * 8, tuple(4.0 + i for i in range(8)), 200)
    config = tiny_config(tie_word_embeddings=False, long_rope=rope, sparse=SPARSE)
    checkpoint = open_checkpoint(write_hf_checkpoint(folder / "checkpoint", config))
    return export_bundle(
        checkpoint, folder / "bundle", ExportOptions(weights=WeightFormat("w4a16", 32, symmetric=True))
    )


def warm(bundle: Path, context: int = 1024) -> Engine:
    return open_engine(bundle, EngineOptions(context=context, chunk=64, threads=2))


@pytest.fixture(scope="module")
def cold(bundle: Path) -> Engine:
    return open_engine(bundle, EngineOptions(context=1024, chunk=512, threads=2, prefix_cache=False))


def first_logits(engine: Engine, ids: list[int]) -> np.ndarray:
    """Logits after a prompt, as a reply begins with them."""
    session = engine.open_session()
    engine.reuse(session._sequence, ids)
    logits = engine.advance(session._sequence)
    session.close()
    return logits


@pytest.mark.parametrize("length", [130, 193, 194, 320, 321, 322, 450, 513])
def test_a_warm_prompt_has_the_cold_ones_logits_to_the_bit(length: int, bundle: Path, cold: Engine) -> None:
    """Dense and sparse, whatever is left to compute: a step of one token would round otherwise, and never comes."""
    engine = warm(bundle)
    ids = prompt(length)
    wanted = first_logits(cold, ids)
    np.testing.assert_array_equal(first_logits(engine, ids), wanted)
    counting = Counting(engine)
    np.testing.assert_array_equal(first_logits(engine, ids), wanted)
    assert counting.tokens == length - (length - 2) // 64 * 64


@pytest.fixture(scope="module")
def tight(bundle: Path) -> Engine:
    """One engine for many conversations, in a pool that has to evict."""
    return warm(bundle, 640)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_replies_are_those_of_cold_runs(data: st.DataObject, tight: Engine, cold: Engine) -> None:
    """Requests and turns of any lengths, on both sides of both switches."""
    engine, texts = tight, [prompt(420, seed) for seed in (1, 2)]
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    session: Session | None = None
    for _ in range(3):
        shared = data.draw(st.sampled_from([0, 64, 130, 192, 200, 256, 330, 400]))
        ids = data.draw(st.sampled_from(texts))[:shared] + prompt(data.draw(st.integers(1, 20)), seed=shared)
        source = engine
        if data.draw(st.booleans()):
            session = source = session or engine.open_session()
        assert [event.token_id for event in source.generate(ids, params)] == reply(cold, ids, params)
    if session is not None:
        session.close()
    assert engine.cache.free_pages == engine.cache.num_pages


@pytest.mark.parametrize(
    ("first", "second", "computed"),
    [
        (150, 160, 32),  # short and dense
        (150, 260, 260),  # the other list rotates
        (260, 280, 24),
        (280, 400, 208),  # dense, then sparse: alike as far as three blocks
        (400, 280, 88),
        (400, 450, 66),  # sparse
    ],
)
def test_only_what_was_computed_alike_is_taken(
    first: int, second: int, computed: int, bundle: Path, cold: Engine
) -> None:
    engine, ids = warm(bundle), prompt(500)
    reply(engine, ids[:first])
    counting = Counting(engine)
    assert reply(engine, ids[:second]) == reply(cold, ids[:second])
    assert counting.tokens == computed + GREEDY.max_tokens - 1


def test_a_reply_is_part_of_the_next_requests_prefix(bundle: Path) -> None:
    engine, ids = warm(bundle), prompt(100)
    answer = reply(engine, ids, SamplingParams(max_tokens=60, ignore_eos=True))
    counting = Counting(engine)
    reply(engine, [*ids, *answer])
    assert counting.tokens == 160 - 128 + 7


def test_logits_and_cold_engines_take_and_leave_nothing(bundle: Path, cold: Engine) -> None:
    engine, ids = warm(bundle), prompt(200)
    engine.logits(ids, 1)
    assert engine.cache.cached_pages == 0
    reply(engine, ids)
    assert engine.cache.cached_pages == 3
    counting = Counting(engine)
    engine.logits(ids, 1)
    assert counting.tokens == 200
    reply(cold, ids)
    assert cold.cache.cached_pages == 0


class ModesByToken:
    """What `Modes` says, token by token: the definition that the runs abbreviate."""

    def __init__(self, modes: Modes) -> None:
        self.modes, self.tokens = modes, list[Mode]()

    def alike(self, mode: Mode, tokens: int) -> int:
        for i, own in enumerate(self.tokens[:tokens]):
            if own.is_long != mode.is_long or (own.is_sparse != mode.is_sparse and i >= 192):
                return i
        return tokens


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 300), st.integers(1, 600)), min_size=1, max_size=6),
    length=st.integers(1, 600),
    tokens=st.integers(0, 600),
)
def test_runs_say_what_every_token_would(parts: list[tuple[int, int, int]], length: int, tokens: int) -> None:
    config = tiny_config(sparse=SPARSE, long_rope=LongRope((1.0,) * 8, (2.0,) * 8, 200))
    modes, runs = Modes(config, SPARSE), list[tuple[int, Mode]]()
    truth = ModesByToken(modes)
    for start, count, switch in parts:
        start = min(start, len(truth.tokens))
        record(runs, start, modes.of(switch))
        truth.tokens[start:] = [modes.of(switch)] * count
    tokens, mode = min(tokens, len(truth.tokens)), modes.of(length)
    assert modes.alike(runs, mode, tokens) == truth.alike(mode, tokens)
    for index in range(tokens // 64):
        last = truth.tokens[64 * index + 63]
        is_uniform = truth.alike(last, 64 * index + 64) == 64 * index + 64
        assert modes.salt_of(runs, index) == (modes.salt(last, index) if is_uniform else None)


# ---- sessions in files


def turn(session: Session, ids: list[int]) -> list[int]:
    return [event.token_id for event in session.generate(ids, GREEDY)]


@pytest.fixture
def saved(bundle: Path, tmp_path: Path) -> tuple[Path, list[int]]:
    """A session of 400 tokens and a reply, and the next turn's prompt."""
    session, ids = warm(bundle).open_session(), prompt(400)
    answer = turn(session, ids)
    session.notes["messages"] = ["Größe"]
    session.save(tmp_path / "session")
    assert [path.name for path in tmp_path.iterdir()] == ["session"]
    return tmp_path / "session", [*ids, *answer, *prompt(30, seed=1)]


def test_a_restored_session_goes_on_as_if_nothing_had_been(
    saved: tuple[Path, list[int]], bundle: Path, cold: Engine
) -> None:
    path, ids = saved
    engine = warm(bundle)
    session, counting = engine.restore_session(path), Counting(engine)
    assert session.notes == {"messages": ["Größe"]}
    assert turn(session, ids) == reply(cold, ids)
    assert counting.tokens == 1 + 30 + 7
    counting.tokens = 0
    assert reply(engine, ids) == reply(cold, ids)  # others share it, too
    assert counting.tokens == 438 - 384 + 7
    session.save(path)
    again = warm(bundle).restore_session(path)
    assert turn(again, ids) == reply(cold, ids)


def test_an_empty_session_can_be_saved(bundle: Path, tmp_path: Path, cold: Engine) -> None:
    engine = warm(bundle)
    engine.open_session().save(tmp_path / "empty")
    assert turn(engine.restore_session(tmp_path / "empty"), prompt(70)) == reply(cold, prompt(70))


def refused(engine: Engine, path: Path, problem: str) -> None:
    """The file is refused with that sentence and leaves no page behind."""
    with pytest.raises(EdgeError, match=problem) as caught:
        engine.restore_session(path)
    assert "\n" not in str(caught.value)
    assert engine.cache.free_pages == engine.cache.num_pages and not engine.cache._sequences


def test_files_that_are_damaged_are_refused(saved: tuple[Path, list[int]], bundle: Path) -> None:
    path, _ = saved
    data, engine = path.read_bytes(), warm(bundle)
    rng = np.random.default_rng(0)
    for cut in [0, 5, 20, 40, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:cut])
        refused(engine, path, "damaged|no session that this version saved")
    for at in [0, 17, 30, *rng.integers(30, len(data), 20).tolist(), len(data) - 1]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        refused(engine, path, "damaged|no session that this version saved")
    path.write_bytes(data + b"more")
    refused(engine, path, "its checksum is wrong")
    path.unlink()
    refused(engine, path, "cannot be read")


def forge(path: Path, **changes: object) -> None:
    """Change the header and seal the file again."""
    data = path.read_bytes()
    start = len(b"EDGE session 1\n\0") + 8
    length = int.from_bytes(data[start - 8 : start], "little")
    header = json.loads(data[start : start + length]) | changes
    text = json.dumps(header).encode()
    body = data[: start - 8] + len(text).to_bytes(8, "little") + text + data[start + length : -32]
    path.write_bytes(body + hashlib.blake2b(body, digest_size=32).digest())


@pytest.mark.parametrize("changes", [{"computed": 10}, {"computed": 10**9}, {"runs": []}, {"cache": 5}, {"tokens": -1}])
def test_a_header_that_lies_is_refused(changes: dict[str, object], saved: tuple[Path, list[int]], bundle: Path) -> None:
    forge(saved[0], **changes)
    refused(warm(bundle), saved[0], "damaged")


def test_files_for_something_else_are_refused(
    saved: tuple[Path, list[int]], bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    path, _ = saved
    refused(warm(tiny_bundle), path, "was saved with bundle .* and this one is")
    dense = open_engine(bundle, EngineOptions(context=1024, attention="dense"))
    refused(dense, path, "attention settings .*--attention and --sparse")
    refused(warm(bundle, 384), path, "408 tokens and the context is limited to 384; raise --context")
    engine = warm(bundle, 448)
    other = engine.open_session()
    turn(other, prompt(90))
    with pytest.raises(EdgeError, match="does not fit: 407 tokens need 7 more KV pages of 64 tokens and 5 are free"):
        engine.restore_session(path)
    other.close()
    cache = json.loads(path.read_bytes()[24:].split(b'}, "tokens"')[0].removeprefix(b'{"cache": ') + b"}")
    forge(path, cache=cache | {"page_format": "float64, others"})
    refused(engine, path, "holds a KV cache of float64, others")
    with pytest.raises(EdgeError, match="cannot be saved as"):
        engine.open_session().save(tmp_path / "nowhere" / "session")
