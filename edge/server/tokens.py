"""How tokens are shown: their text, bytes and log-probabilities, as OpenAI's two kinds of completions have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge.chooser import TokenLogprobs
from edge.generation import TokenEvent
from edge.serving.request import Ticket
from edge.text import Tokenizer

_LEAST = -9999.0  # what cannot occur has a log-probability of -inf, which is not in JSON


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token adds to a text; a special token's name."""
    piece = tokenizer.decoder.piece(token_id)
    if piece is None:
        return (tokenizer.model.id_to_token(token_id) or "").encode()
    if isinstance(piece, bytes):
        return piece
    for old, new in tokenizer.decoder.replacements:
        piece = piece.replace(old, new)
    return piece.encode("utf-8", "replace")


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; of a token that is part of a character its bytes, as OpenAI writes them."""
    data = token_bytes(tokenizer, token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
    """The `logprobs` of a chat's choice; None if none were asked for."""
    rows = []
    for event in events:
        if event.logprobs is None:
            return None
        top = [_entry(tokenizer, token, value) for token, value in event.logprobs.top]
        rows.append({**_entry(tokenizer, event.token_id, event.logprobs.logprob), "top_logprobs": top})
    return {"content": rows}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = token_bytes(tokenizer, token_id)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, _LEAST), "bytes": list(data)}


class CompletionLogprobs:
    """The `logprobs` of a completion's choice, whose text offsets go on from piece to piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def prompt(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Of an echoed prompt, whose first token has none."""
        return self._values(ids, [None, *logprobs])

    def reply(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """Of further tokens of the reply."""
        return self._values([event.token_id for event in events], [event.logprobs for event in events])

    def _values(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        texts = [token_text(self._tokenizer, token) for token in ids]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if x is None else max(x.logprob, _LEAST) for x in logprobs],
            "top_logprobs": [None if x is None else self._top(x) for x in logprobs],
            "text_offset": offsets,
        }

    def _top(self, logprobs: TokenLogprobs) -> dict[str, float]:
        return {token_text(self._tokenizer, token): max(value, _LEAST) for token, value in reversed(logprobs.top)}


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Values of CompletionLogprobs, one after the other."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [value for part in parts for value in part[name]] for name in names}


def usage(tickets: Sequence[Ticket], choices: int) -> dict[str, Any]:
    """Tokens of a request with so many choices for each prompt; a prompt counts once, whatever is made of it."""
    firsts = tickets[::choices]
    prompt = sum(len(ticket.request.prompt_ids) for ticket in firsts)
    cached = sum(ticket.statistics.cached_tokens for ticket in firsts)
    reply = sum(ticket.statistics.tokens for ticket in tickets)
    values: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": reply,
        "total_tokens": prompt + reply,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    guesses = [t.statistics.speculated for t in tickets if t.statistics.speculated is not None]
    if guesses:
        accepted, proposed = sum(g.accepted for g in guesses), sum(g.proposed for g in guesses)
        values["completion_tokens_details"] = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": proposed - accepted,
        }
    return values
