"""Token ids in, text out, one at a time: never half a character, never part of a stop string."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tokenizers

from edge.chat_format.reply import MARKERS
from edge.errors import EdgeError, UsageError

if TYPE_CHECKING:
    from edge.text import Tokenizer

_FUSE = {"type": "Fuse"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


# SentencePiece replaces every bad byte, the byte-level decoder (like Python's "replace") every bad sequence.
codecs.register_error("edge.replace_each_byte", _replace_each_byte)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself if printable, else the next free one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


@dataclass(frozen=True)
class TokenDecoder:
    """What each token adds to the text, by the `decoder` of tokenizer.json.

    Two families: byte-level BPE, whose tokens are bytes; and SentencePiece, whose tokens are text, or like
    `<0xE4>` a byte of a character outside the vocabulary. Special tokens and unknown ids add nothing, but for the
    markers of edge/chat_format, which mean something to whoever reads the text.
    """

    model: tokenizers.Tokenizer
    special_ids: frozenset[int]
    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip: tuple[str, int] = (" ", 0)  # this character, at most so many times, at the very start of the text
    first_token_drop: str = ""  # a character that the first token loses wherever it stands

    @staticmethod
    def of(model: tokenizers.Tokenizer) -> TokenDecoder:
        """Read the decoder of a loaded tokenizer.json; EdgeError if it is of neither family."""
        added = model.get_added_tokens_decoder().items()
        special_ids = frozenset(i for i, token in added if token.special and token.content not in MARKERS)
        steps = _decoder_steps(model)
        if steps and steps[0]["type"] == "ByteLevel" and all(step == _FUSE for step in steps[1:]):
            return TokenDecoder(model, special_ids, byte_level=True)
        if not steps:
            raise _unsupported(steps)
        fields: dict[str, Any] = {}
        replacements: list[tuple[str, str]] = []
        for i, step in enumerate(steps):
            match step:
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    replacements.append((old, new))
                case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
                    replacements.append((mark, " "))
                    fields["first_token_drop"] = "" if scheme == "never" else mark
                case {"type": "ByteFallback"}:
                    fields["byte_fallback"] = True
                case {"type": "Strip", "content": character, "start": count, "stop": 0} if _FUSE in steps[:i]:
                    fields["strip"] = (character, count)
                case {"type": "Fuse"}:
                    pass  # the pieces are joined anyway
                case _:
                    raise _unsupported(steps)
        return TokenDecoder(model, special_ids, replacements=tuple(replacements), **fields)

    @property
    def special_texts(self) -> list[str]:
        """How the special tokens are written, the longest first."""
        texts = {self.model.id_to_token(token_id) or "" for token_id in self.special_ids}
        return sorted(texts - {""}, key=lambda text: (-len(text), text))

    def piece(self, token_id: int) -> bytes | str | None:
        """Bytes (which may be part of a character), or text, or None for a token that is not shown."""
        token = self.model.id_to_token(token_id)
        if token is None or token_id in self.special_ids:
            return None
        if self.byte_level:
            try:
                return bytes([_BYTE_OF[character] for character in token])
            except KeyError:  # an added token with a character outside the alphabet stands for itself
                return token.encode()
        if self.byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token


def _decoder_steps(model: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if model.decoder is None:
        return []
    decoder = json.loads(model.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _unsupported(steps: list[dict[str, Any]]) -> EdgeError:
    kind = "+".join(step["type"] for step in steps) or "none"
    return EdgeError(
        f"the decoder of tokenizer.json ({kind}) cannot be streamed: use one with a ByteLevel decoder"
        " or with SentencePiece's (Replace or Metaspace, ByteFallback, Fuse, then Strip at the start)"
    )


class Detokenizer:
    """Ids to text, each character as soon as its last byte is there. Constant work a token.

    `after_prompt`: the text goes on from another one and so keeps the leading space that a SentencePiece
    decoder drops at the start of a text.
    """

    def __init__(self, decoder: TokenDecoder, *, after_prompt: bool = False) -> None:
        self._decoder = decoder
        errors = "replace" if decoder.byte_level else "edge.replace_each_byte"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._strip_left = 0 if after_prompt else decoder.strip[1]
        self._first_token_drop = "" if after_prompt else decoder.first_token_drop

    def push(self, token_id: int) -> str:
        """The text that this token completes; often "" inside a character of several tokens."""
        piece = self._decoder.piece(token_id)
        if piece is None:
            return ""
        if isinstance(piece, bytes):
            text = self._utf8.decode(piece)
        else:
            if self._first_token_drop:
                piece = piece.replace(self._first_token_drop, "")
            for old, new in self._decoder.replacements:
                piece = piece.replace(old, new)
            text = self._utf8.decode(b"", final=True) + piece
        self._first_token_drop = ""
        return self._strip(text)

    def finish(self) -> str:
        """What an unfinished character at the end becomes: U+FFFD."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if not text.startswith(self._decoder.strip[0]):
                self._strip_left = 0
            else:
                text = text[1:]
                self._strip_left -= 1
        return text


class StopMatcher:
    """Text in, text out, up to the first stop string to be completed (the longest, if several end together).

    Works character by character (Knuth-Morris-Pratt), so how the text is cut into pieces makes no
    difference, and holds back only what may still become a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UsageError("a stop string is empty and would end every answer at once: leave it out")
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)  # characters of each stop string that the text ends with
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that is now known to be before any stop string."""
        if not self._stops:
            return text
        if self.stopped is not None:
            return ""
        start = len(self._held)
        self._held += text
        for end, character in enumerate(text, start + 1):
            self._advance(character)
            if found := [s for s, n in zip(self._stops, self._matched, strict=True) if n == len(s)]:
                self.stopped = max(found, key=len)
                released, self._held = self._held[: end - len(self.stopped)], ""
                return released
        cut = len(self._held) - max(self._matched)
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> None:
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            count = self._matched[i]
            while count and stop[count] != character:
                count = borders[count - 1]
            self._matched[i] = count + (stop[count] == character)


def _borders(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for character in pattern[1:]:
        length = borders[-1]
        while length and pattern[length] != character:
            length = borders[length - 1]
        borders.append(length + (pattern[length] == character))
    return borders


class TextStream:
    """The text of one answer as its tokens arrive, ended by the first stop string, which is not part of it.

    Without a stop string, the pieces joined are `tokenizer.decode` of all ids (`after_prompt`: see
    `Detokenizer`). Once `stopped` names the stop string that was met, nothing more comes out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, after_prompt: bool = False) -> None:
        self._detokenizer = Detokenizer(tokenizer.decoder, after_prompt=after_prompt)
        self._matcher = StopMatcher(stop)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._matcher.stopped

    def push(self, token_id: int) -> str:
        """Text that is certain now; "" while a character or a possible stop string is incomplete."""
        return self._matcher.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The rest of the text, when no more tokens come; "" if a stop string ended it."""
        return self._matcher.push(self._detokenizer.finish()) + self._matcher.finish()
