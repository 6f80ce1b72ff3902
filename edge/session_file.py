"""A saved session: token ids, how they were computed, and the raw pages of their cache, sealed by a checksum.

Layout: the magic with the format's version, the length of the header as a little-endian uint64, the header as JSON, the
token ids as int32, the pages one after another, and the BLAKE2b-256 hash of all that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edge.config import SparseConfig
from edge.errors import EdgeError
from edge.executor import Executor
from edge.kv_cache import KVCache, NoPagesError, pages_for
from edge.reuse import Mode, Runs
from edge.scheduler import Sequence as ScheduledSequence
from edge.whole_file import whole_file

MAGIC = b"EDGE session 1\n\0"
_LENGTH = struct.Struct("<Q")
_HASH_BYTES = 32
_PIECE = 1 << 22  # bytes read at once
_MOST_HEADER = 1 << 26
_PAGES_AT_ONCE = 16


@dataclass(frozen=True)
class CacheIdentity:
    """What must be the same where a cache is saved and restored.

    bundle: the key; page_format: the executor's; page_bytes: of one page; attention: the sparse settings in force.
    """

    bundle: str
    page_format: str
    page_bytes: int
    attention: dict[str, Any] | None

    @staticmethod
    def of(bundle: str, executor: Executor, sparse: SparseConfig | None) -> CacheIdentity:
        """That of an engine."""
        attention = None if sparse is None else asdict(sparse)
        return CacheIdentity(bundle, executor.page_format, executor.page_bytes, attention)


@dataclass(frozen=True)
class SessionHeader:
    """All but token ids and pages. The first `computed` of `tokens` tokens are in the pages; runs: edge/reuse.py."""

    cache: CacheIdentity
    tokens: int
    computed: int
    prompt_length: int
    runs: Runs
    notes: dict[str, Any]

    @staticmethod
    def from_json(text: bytes) -> SessionHeader:
        """Raises KeyError, TypeError or ValueError if it is no header."""
        values = json.loads(text)
        values["cache"] = CacheIdentity(**values["cache"])
        values["runs"] = [(int(start), Mode(**mode)) for start, mode in values["runs"]]
        header = SessionHeader(**values)
        starts = [start for start, _ in header.runs]
        sound = (
            0 <= header.computed <= header.tokens
            and starts == sorted(set(starts))
            and (starts[:1] == [0] if header.computed else True)
            and header.cache.page_bytes > 0
        )
        if not sound:
            raise ValueError("its counts contradict each other")
        return header

    @property
    def pages(self) -> int:
        """Pages in the file."""
        return pages_for(self.computed)


@dataclass(frozen=True)
class SessionFile:
    """A file that was found to be whole."""

    path: Path
    header: SessionHeader
    tokens: list[int]
    pages_at: int

    def check(self, here: CacheIdentity) -> None:
        """Raise EdgeError unless the cache it holds can be used here."""
        saved = self.header.cache
        if saved.bundle != here.bundle:
            raise EdgeError(
                f"{self.path} was saved with bundle {saved.bundle[:12]} and this one is {here.bundle[:12]}; use the "
                "bundle that it was saved with"
            )
        if (saved.page_format, saved.page_bytes) != (here.page_format, here.page_bytes):
            raise EdgeError(
                f"{self.path} holds a KV cache of {saved.page_format} ({saved.page_bytes} bytes a page) and this "
                f"executor's is {here.page_format} ({here.page_bytes}); use the machine and options it was saved with"
            )
        if saved.attention != here.attention:
            raise EdgeError(
                f"{self.path} was saved with attention settings {saved.attention} and this run has {here.attention}; "
                "give the same --attention and --sparse"
            )

    def read_pages(self) -> Iterator[np.ndarray]:
        """The pages in order, some at a time: [pages, bytes of one page] uint8."""
        size = self.header.cache.page_bytes
        with _reading(self.path) as file:
            file.seek(self.pages_at)
            for first in range(0, self.header.pages, _PAGES_AT_ONCE):
                count = min(_PAGES_AT_ONCE, self.header.pages - first)
                data = np.frombuffer(file.read(count * size), np.uint8)
                if data.size < count * size:
                    raise _damaged(self.path, "it became shorter")
                yield data.reshape(count, size)


def save_sequence(
    path: Path,
    sequence: ScheduledSequence,
    cache: KVCache,
    executor: Executor,
    identity: CacheIdentity,
    notes: dict[str, Any],
) -> None:
    """Write a sequence, with its pages in `cache` and `executor`, to a file."""
    pages = cache.pages(sequence.cache_id)[: pages_for(sequence.computed)]
    header = SessionHeader(
        cache=identity,
        tokens=len(sequence.tokens),
        computed=sequence.computed,
        prompt_length=sequence.prompt_length,
        runs=[run for run in sequence.runs if run[0] < sequence.computed],
        notes=notes,
    )
    parts = (pages[first : first + _PAGES_AT_ONCE] for first in range(0, len(pages), _PAGES_AT_ONCE))
    write_session(path, header, sequence.tokens, map(executor.save_pages, parts))


def restore_sequence(
    path: Path, cache: KVCache, executor: Executor, identity: CacheIdentity, max_context: int
) -> tuple[ScheduledSequence, dict[str, Any]]:
    """-> a new sequence as it was saved, and its notes. EdgeError, with nothing taken, if the file is no use here."""
    file = open_session_file(path)
    file.check(identity)
    header = file.header
    if header.tokens > max_context:
        raise EdgeError(
            f"{path} holds {header.tokens} tokens and the context is limited to {max_context}; raise --context or "
            "--memory"
        )
    cache_id, loaded = cache.open(), 0
    try:
        cache.reserve(cache_id, header.computed)
        pages = cache.pages(cache_id)
        for data in file.read_pages():
            executor.load_pages(pages[loaded : loaded + len(data)], data)
            loaded += len(data)
    except BaseException as error:
        cache.close(cache_id)
        if isinstance(error, NoPagesError):
            raise EdgeError(f"the session {path} does not fit: {error}") from None
        raise
    sequence = ScheduledSequence(cache_id, file.tokens, header.computed, header.prompt_length, runs=header.runs)
    return sequence, header.notes


def write_session(path: Path, header: SessionHeader, tokens: Sequence[int], pages: Iterable[np.ndarray]) -> None:
    """Write a file beside `path` and give it its name when it is complete; EdgeError if that cannot be."""
    text = json.dumps(asdict(header), ensure_ascii=False).encode()
    start = MAGIC + _LENGTH.pack(len(text)) + text + np.asarray(tokens, "<i4").tobytes()
    try:
        with whole_file(path) as file:
            digest = hashlib.blake2b(digest_size=_HASH_BYTES)
            for part in chain([memoryview(start)], (data.data for data in pages)):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
    except OSError as error:
        raise EdgeError(f"the session cannot be saved as {path} ({error.strerror}); choose another place") from None


def open_session_file(path: Path) -> SessionFile:
    """Read all of a file but its pages' contents; EdgeError unless its length and checksum are right."""
    with _reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(MAGIC) + _LENGTH.size)
        if start[: len(MAGIC)] != MAGIC:
            raise EdgeError(f"{path} is no session that this version saved; give a file that --save wrote")
        if len(start) < len(MAGIC) + _LENGTH.size:
            raise _damaged(path, "it is cut short")
        (length,) = _LENGTH.unpack(start[len(MAGIC) :])
        if length > min(size, _MOST_HEADER):
            raise _damaged(path, "it is cut short")
        text = file.read(length)
        _check_hash(file, path, size)
        try:
            header = SessionHeader.from_json(text)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise _damaged(path, f"unreadable header, {error}") from None
        ids_at = len(start) + length
        pages_at = ids_at + 4 * header.tokens
        if size != pages_at + header.pages * header.cache.page_bytes + _HASH_BYTES:
            raise _damaged(path, "its length does not fit its header")
        file.seek(ids_at)
        tokens = np.frombuffer(file.read(4 * header.tokens), "<i4").tolist()
    return SessionFile(path, header, tokens, pages_at)


def _check_hash(file: BinaryIO, path: Path, size: int) -> None:
    """Hash all but the last 32 bytes and compare."""
    file.seek(0)
    digest, left = hashlib.blake2b(digest_size=_HASH_BYTES), size - _HASH_BYTES
    while left > 0 and (piece := file.read(min(_PIECE, left))):
        digest.update(piece)
        left -= len(piece)
    if file.read(_HASH_BYTES) != digest.digest():
        raise _damaged(path, "its checksum is wrong")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise EdgeError(f"{path} cannot be read ({error.strerror}); give a file that --save wrote") from None


def _damaged(path: Path, why: str) -> EdgeError:
    return EdgeError(f"the session {path} is damaged ({why}); nothing of it was restored, start without it")
