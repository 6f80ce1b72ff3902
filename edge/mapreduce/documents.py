"""Documents cut into chunks that fit a prompt, at the ends of paragraphs and sentences where there are any."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edge.text import MOST_CHARACTERS

TokenStarts = Callable[[str], Sequence[int]]  # a text -> the character at which each of its tokens begins
Fits = Callable[[str], bool]
# Where a text may be cut, best first: after a paragraph, a sentence, a line, a word.
_BOUNDARIES = (r"\n\s*\n\s*", r"[.!?]['\")\]]*\s+|[。！？；]['\"”’）]*\s*", r"\n", r"\s+")


@dataclass(frozen=True)
class Document:
    """A text and the name it goes by."""

    name: str
    text: str


@dataclass(frozen=True)
class Chunk:
    """Characters `start` to `end` of a document."""

    document: Document
    start: int
    end: int

    @property
    def text(self) -> str:
        """What it says."""
        return self.document.text[self.start : self.end]

    @property
    def lines(self) -> tuple[int, int]:
        """The first and the last of its lines, from 1 on; white space around it does not count."""
        stripped = self.text.strip()
        first = self.start + self.text.index(stripped) if stripped else self.start
        before = self.document.text.count("\n", 0, first) + 1
        return before, before + stripped.count("\n")


def split_document(document: Document, most_tokens: int, token_starts: TokenStarts, fits: Fits) -> Iterator[Chunk]:
    """Chunks of at most `most_tokens` tokens, in order, which cover all of the text but white space.

    A chunk that does not fit after all, since in its prompt it is other tokens, is halved.
    """
    for start, end in _cuts(document.text, most_tokens, token_starts):
        yield from _fitting(Chunk(document, start, end), fits)


def _fitting(chunk: Chunk, fits: Fits) -> Iterator[Chunk]:
    text = chunk.text
    if not text.strip():
        return
    if fits(text) or len(text) == 1:
        yield chunk
        return
    middle = chunk.start + _boundary(text, (len(text) + 1) // 2)
    yield from _fitting(Chunk(chunk.document, chunk.start, middle), fits)
    yield from _fitting(Chunk(chunk.document, middle, chunk.end), fits)


def _cuts(text: str, most_tokens: int, token_starts: TokenStarts) -> Iterator[tuple[int, int]]:
    """Ranges of characters that hold at most so many tokens, or one character.

    Only what may belong to the next range is tokenized: a list of all tokens of a long text takes more than the text.
    """
    begin = 0
    while begin < len(text):
        window = text[begin : begin + most_tokens * MOST_CHARACTERS]
        starts = token_starts(window)
        if len(starts) > most_tokens:
            length = _boundary(window, max(starts[most_tokens], 1))
        elif begin + len(window) < len(text):
            length = _boundary(window, len(window))
        else:
            length = len(window)
        yield begin, begin + length
        begin += length


def _boundary(text: str, end: int) -> int:
    """The best place for a cut in the last quarter before `end`; `end` if there is none."""
    window = end * 3 // 4
    for pattern in _BOUNDARIES:
        places = [match.end() for match in re.finditer(pattern, text[window:end])]
        if places:
            return window + places[-1]
    return end
