"""FR-Spec's lists of tokens: read from every format, counted from texts, and what must be in them is."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from edge.bundle import open_bundle
from edge.errors import EdgeError, UsageError
from edge.frequencies import control_tokens, most_frequent, read_frequencies
from edge.text import TextSettings, Tokenizer
from tests.command import edge
from tests.synthetic import tiny_config, write_hf_checkpoint

IDS = [17, 3, 319, 0, 42]
TEXT = "The quick brown fox jumps over the lazy dog.\nThere was thunder, über alles: 東京 and rain.\n" * 400


@pytest.mark.parametrize("kind", ["list", "int32", "int64", "npy", "npy int64", "json", "txt"])
def test_every_format_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / {"npy": "f.npy", "npy int64": "f.npy", "json": "f.json", "txt": "f.txt"}.get(kind, "freq_5.pt")
    if path.suffix == ".pt":
        torch.save(IDS if kind == "list" else torch.tensor(IDS, dtype=getattr(torch, kind)), path)
    elif path.suffix == ".npy":
        np.save(path, np.array(IDS, np.int64 if "int64" in kind else np.int32))
    else:
        path.write_text(json.dumps(IDS) if kind == "json" else "\n".join(map(str, IDS)))
    ids = read_frequencies(path, 320)
    assert ids.dtype == np.int32 and ids.tolist() == IDS


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "lists no tokens"),
        ([1, 2, 1], "lists token 1 more than once"),
        ([1, 320], r"lists token 320, but the model has the tokens 0 to 319"),
        ([-1], "lists token -1"),
        ([1 << 62], "lists token 4611686018427387904"),
        ([1.0], "something else than one list"),
        ([True], "something else than one list"),
        ([[1], [2]], "something else than one list"),
        ({"a": 1}, "something else than one list"),
        ("12", "something else than one list"),
    ],
)
def test_what_is_no_list_of_tokens_is_named(values: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "freq.json"
    path.write_text(json.dumps(values))
    with pytest.raises(EdgeError, match=words):
        read_frequencies(path, 320)
    torch.save(values, tmp_path / "freq.pt")
    with pytest.raises(EdgeError, match=words):
        read_frequencies(tmp_path / "freq.pt", 320)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    for name, data in (("f.json", b"[1,"), ("f.txt", b"1\nx"), ("f.npy", b"\x93NUM"), ("f.txt", b"\xff")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(EdgeError, match=f"{name} cannot be read"):
            read_frequencies(tmp_path / name, 320)
    np.save(tmp_path / "o.npy", np.array([1, "x"], object), allow_pickle=True)
    with pytest.raises(EdgeError, match=r"o\.npy cannot be read"):
        read_frequencies(tmp_path / "o.npy", 320)
    np.save(tmp_path / "f.npy", np.ones(3))
    with pytest.raises(EdgeError, match="something else"):
        read_frequencies(tmp_path / "f.npy", 320)
    with pytest.raises(UsageError, match="does not exist"):
        read_frequencies(tmp_path / "none.pt", 320)
    with pytest.raises(UsageError, match=r"ends in \.pt"):
        read_frequencies(tmp_path / "f.bin", 320)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=30).flatmap(
        lambda counts: st.tuples(
            st.just(counts),
            st.sets(st.integers(0, len(counts) - 1), max_size=len(counts)),
            st.integers(1, len(counts)),
        )
    )
)
def test_the_most_frequent_tokens_and_those_that_must_be(case: tuple[list[int], set[int], int]) -> None:
    counts, always, size = case
    if len(always) > size:
        with pytest.raises(UsageError, match="no room"):
            most_frequent(np.array(counts), size, always)
        return
    found = most_frequent(np.array(counts), size, always)
    ids = found.ids.tolist()
    assert len(set(ids)) == size and always <= set(ids)
    assert sorted(ids, key=lambda token: (-counts[token], token)) == ids
    # No token that was left out is more frequent than one that is here without having to be.
    left = [counts[token] for token in range(len(counts)) if token not in ids]
    chosen = [counts[token] for token in ids if token not in always]
    assert not left or not chosen or max(left) <= min(chosen)
    assert found.tokens == sum(counts)
    assert found.coverage == pytest.approx(sum(counts[token] for token in ids) / max(1, sum(counts)))


def test_the_command_counts_texts(tmp_path: Path) -> None:
    """Against the tokenizers library on the whole text; a piece's end changes no count here, for it is a line's."""
    checkpoint = write_hf_checkpoint(tmp_path / "model", tiny_config(), tokenizer=True)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[:500])
    result = edge(
        "freq",
        tmp_path / "a.txt",
        tmp_path / "b.txt",
        "--model",
        checkpoint,
        "--size",
        40,
        "--out",
        tmp_path / "f.json",
    )
    assert result.returncode == 0, result.stderr
    raw = RawTokenizer.from_file(str(checkpoint / "tokenizer.json"))
    expected: Counter[int] = Counter()
    for text in (TEXT, TEXT[:500]):
        expected.update(raw.encode(text, add_special_tokens=False).ids)
    ids = json.loads((tmp_path / "f.json").read_text())
    always = {0, 1, 2, 3, 4}  # the added tokens, those that end a reply among them: none of them occurs in the texts
    assert len(ids) == 40 and always <= set(ids)
    template = set(
        raw.encode("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n", add_special_tokens=False).ids
    )
    assert template <= set(ids)
    others = [token for token, _ in sorted(expected.items(), key=lambda item: (-item[1], item[0]))]
    free = 40 - len(always | template)
    wanted = (always | template) | set([token for token in others if token not in template][:free])
    assert set(ids) == wanted
    assert ids == sorted(ids, key=lambda token: (-expected[token], token))
    share = 100 * sum(expected[token] for token in ids) / expected.total()
    assert f"{share:.1f} % of the {expected.total()} tokens" in " ".join(result.stderr.decode().split())


def test_every_token_that_ends_a_reply_is_a_control_token(tiny_bundle: Path) -> None:
    """Also one that is neither special nor in the chat template; without a template, what else is known."""
    bundle = open_bundle(tiny_bundle)
    assert bundle.manifest.text is not None
    tokenizer = Tokenizer.load(tiny_bundle, TextSettings.from_dict(bundle.manifest.text))
    assert {2, 4, 200} <= control_tokens(tokenizer, (2, 200))
    failing = replace(tokenizer, settings=replace(tokenizer.settings, chat_template="{{ raise_exception('no') }}"))
    assert {0, 1, 2, 3, 4, 200} == control_tokens(failing, (200,))


def test_the_command_takes_a_bundle_and_writes_what_export_reads(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode() + b"\xff\xfe broken \xff bytes\n")
    for name in ("f.npy", "f.txt", "f.json"):
        result = edge(
            "freq", tmp_path / "a.txt", "--model", tiny_bundle, "--size", 64, "--out", tmp_path / name, "--json"
        )
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["size"] == 64
    lists = [read_frequencies(tmp_path / name, 320).tolist() for name in ("f.npy", "f.txt", "f.json")]
    assert lists[0] == lists[1] == lists[2] and len(lists[0]) == 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.txt", "--out", "f.npy"), "none.txt is no file"),
        (("a.txt", "--out", "f.pt"), "end it in .npy, .json or .txt"),
        (("a.txt", "--out", "f.npy", "--size", "3"), "no room for the"),
        (("a.txt", "--out", "f.npy", "--size", "321"), "exceeds the vocabulary of 320"),
        (("empty.txt", "--out", "f.npy"), "hold no tokens"),
    ],
)
def test_the_command_names_what_is_wrong(
    arguments: tuple[str, ...], words: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    here = [str(tmp_path / part) if part.endswith((".txt", ".npy", ".pt")) else part for part in arguments]
    result = edge("freq", *here, "--model", tiny_bundle)
    assert result.returncode == 2
    assert words in " ".join(result.stderr.decode().split())
