"""Replies that keep to a JSON schema, a regular expression or a grammar, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

from edge.chooser import Constraint
from edge.errors import EdgeError, UsageError

_JSON_OPTIONS: Any = {
    "whitespace_pattern": r"[ \n]{0,16}"
}  # more would let a model write spaces until the reply is full


class GrammarConstraint:
    """One reply's way through a grammar; see edge/chooser.py."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str) -> None:
        self._matcher = llguidance.LLMatcher(tokenizer, grammar)
        self._mask = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocab_size)

    def mask(self) -> np.ndarray:
        """The tokens that may come next; only end tokens where the grammar is through."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask)
        self._check()
        return self._mask[0].view(np.uint32)

    def accept(self, token: int) -> None:
        """The reply goes on with a token."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EdgeError(f"the reply cannot go on by its grammar ({self._matcher.get_error()}); simplify it")


class Guidance:
    """Makes constraints for one tokenizer. vocab_size: rows of the model's head. ends: tokens that end a reply."""

    def __init__(self, tokenizer_json: Path, vocab_size: int, ends: Sequence[int]) -> None:
        self._tokenizer = llguidance.LLTokenizer(str(tokenizer_json), n_vocab=vocab_size, eos_token=list(ends))

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Callable[[], Constraint]:
        """Replies are JSON that a schema allows; UsageError if it is none, or has what llguidance does not know."""
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)
        except ValueError as error:
            raise UsageError(f"the JSON schema is not usable: {error}") from None
        return self._of(grammar, "JSON schema")

    def json_object(self) -> Callable[[], Constraint]:
        """Replies are JSON objects."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Callable[[], Constraint]:
        """Replies match a regular expression, as a whole."""
        return self._of(llguidance.LLMatcher.grammar_from_regex(pattern), "regular expression")

    def lark(self, grammar: str) -> Callable[[], Constraint]:
        """Replies are sentences of a grammar in Lark's syntax, of which `start` is the whole."""
        return self._of(llguidance.LLMatcher.grammar_from_lark(grammar), "grammar")

    def _of(self, grammar: str, kind: str) -> Callable[[], Constraint]:
        if problem := llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise UsageError(f"the {kind} is not usable: {' '.join(problem.split())[:300]}")
        return lambda: GrammarConstraint(self._tokenizer, grammar)
