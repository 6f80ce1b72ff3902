"""What the tests of the evaluation share: a reader that answers from the text alone, and a tokenizer of whole words."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from edge.eval.report import EvalSettings
from edge.eval.tasks import HaystackPlan
from edge.stream import TokenDecoder
from edge.text import TextSettings, Tokenizer

PAIR = re.compile(r"One of the special magic numbers for (\S+) is: (\d+)\.")
MARK = re.compile(r"\bmark (k\d+) (v\d+) (v\d+)")
ASSIGNMENT = re.compile(r"VAR ([A-Z]+) = (?:VAR )?(\w+)\.")


def answer_from_text(message: str) -> Counter[str]:
    """Every value of the key (or variable of the value) that the message asks for, by reading the message."""
    if asked := re.search(r"assigned the value (\d+) in the text", message):
        known = {asked[1]}
        found: Counter[str] = Counter()
        for name, source in ASSIGNMENT.findall(message):
            if source in known:
                known.add(name)
                found[name] += 1
        return found
    if asked := re.search(r"special magic numbers? for (\S+) mentioned", message):
        return Counter(value for key, value in PAIR.findall(message) if key == asked[1])
    asked = re.search(r"ask (k\d+) is$", message)
    assert asked is not None
    return Counter(value for key, *values in MARK.findall(message) if key == asked[1] for value in values)


def recall_tokenizer() -> tokenizers.Tokenizer:
    """The words of the language recall, one token each, after <unk>, <s> and </s>."""
    special = ["<unk>", "<s>", "</s>"]
    words = ["mark", "ask", "is"]
    words += [f"{letter}{i}" for letter, number in (("k", 32), ("v", 32), ("w", 64)) for i in range(number)]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"▁{word}" for word in words)])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    return tokenizer


@lru_cache
def recall_text() -> Tokenizer:
    """`recall_tokenizer` as a bundle's tokenizer that begins with <s>."""
    model = recall_tokenizer()
    return Tokenizer(model, TextSettings(True, "<s>", "</s>", None), TokenDecoder.of(model))


def settings_of(plan: HaystackPlan, *tasks: str, prompt: str = "chat") -> EvalSettings:
    return EvalSettings(tasks or ("niah_single",), plan, "english", prompt, "invented", None)
