"""GGUF's tokenizers against ids by llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from build_engine.checkpoint import Checkpoint
from build_engine.gguf_tokenizer import text_assets
from edge.errors import EdgeError

SOURCE = Path("model.gguf")

# Ids by llama.cpp, special tokens parsed, no BOS.
SMOLLM2_IDS = {
    "": [],
    "   ": [333],
    " \n \n": [3717, 3717],
    "Hello": [19556],
    " Hello": [38699],
    "  Hello  world  ": [216, 38699, 216, 905, 256],
    "The quick brown fox jumps over the lazy dog.": [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767,
                                                     30],
    "3.14159 and 1,000,000": [35, 30, 33, 36, 33, 37, 41, 284, 216, 33, 28, 32, 32, 32, 28, 32, 32, 32],
    "Ⅷ ½ ² ٣٤": [173, 223, 117, 216, 16738, 216, 19133, 216, 164, 113, 164, 114],
    "def f(x):\n    return x ** 2\n\n\tif x:\n\t\tpass\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903,
                                                          216, 34, 1116, 197, 342, 1792, 42, 3354, 197, 5467,
                                                          198],
    "e\u0301 a\u0308": [85, 151, 219, 253, 151, 226],
    "I'm you're WE'LL 'Twas": [57, 5248, 346, 2316, 26587, 23, 16421, 637, 68, 10591],
    "\r\n windows \r\n": [2738, 8393, 216, 2738],
    "a\xa0b\u2003c\u3000d": [81, 15442, 82, 321, 221, 83, 12109, 218, 84],
    "한국어": [33085, 246, 181, 130, 251, 183, 240, 129],
    "👍🏽🤖": [10813, 235, 231, 10813, 233, 138, 10813, 114, 240],
    "<|im_start|>user\nHi there<|im_end|>\n": [1, 4093, 198, 26843, 665, 2, 198],
}  # fmt: skip


def test_smollm2_tokenizer_agrees_with_llama_cpp(smollm2: Checkpoint) -> None:
    text = smollm2.text
    assert text is not None and "You are a helpful AI assistant named SmolLM" in str(text.chat_template)
    assert (text.add_bos, text.bos_token, text.eos_token) == (False, "<|im_start|>", "<|im_end|>")
    tokenizer = Tokenizer.from_str(text.tokenizer_json)
    for string, ids in SMOLLM2_IDS.items():
        assert tokenizer.encode(string).ids == ids, string
        assert tokenizer.decode(ids, skip_special_tokens=False) == string


PIECES = {
    "▁": -20, "e": -21, "t": -22, "h": -23, "l": -24, "o": -25, "a": -26, "w": -27, "r": -28, "d": -29,
    "▁t": -1, "he": -2, "▁the": -3, "ll": -4, "lo": -5, "▁w": -6, "or": -7, "▁wor": -8, "llo": -9, "▁he": -10,
    "▁hello": -11, "ld": -12, "▁▁": -13, "▁▁▁▁": -14, "at": -15, "▁world": -16, "ea": -17,
}  # fmt: skip
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES,
                              "<|im_start|>", "<|im_end|>", "<tool>", "[PAD0]"],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 3, 3, 4, 5],
    "tokenizer.ggml.scores": [0.0] * 259 + [float(s) for s in PIECES.values()] + [-1000.0] * 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("space_prefix", "ids"),
    [
        (
            None,
            {
                "": [1],
                "hello world": [1, 279, 284],
                " hello": [1, 259, 279],
                "the  world    at": [1, 271, 259, 284, 282, 283],
                "<|im_start|>hello\nthe<|im_end|>\n": [1, 286, 279, 13, 261, 270, 287, 259, 13],
                "a<tool>the": [1, 259, 265, 288, 271],
                "é 好": [1, 259, 198, 172, 259, 232, 168, 192],
            },
        ),
        (
            False,
            {
                "hello world": [1, 270, 277, 284],
                " hello": [1, 279],
                "<|im_start|>hello\nthe<|im_end|>\n": [1, 286, 270, 277, 13, 261, 270, 287, 13],
                "tealll ahello": [1, 261, 285, 272, 263, 259, 265, 270, 277],
            },
        ),
    ],
)
def test_sentencepiece_agrees_with_llama_cpp(space_prefix: bool | None, ids: dict[str, list[int]]) -> None:
    metadata: dict[str, Any] = dict(SENTENCEPIECE)
    if space_prefix is not None:
        metadata["tokenizer.ggml.add_space_prefix"] = space_prefix
    text = text_assets(metadata, SOURCE)
    assert text is not None and (text.add_bos, text.bos_token, text.eos_token) == (True, "<s>", "</s>")
    tokenizer = Tokenizer.from_str(text.tokenizer_json)
    assert {string: tokenizer.encode(string).ids for string in ids} == ids
    assert tokenizer.decode(ids["hello world"]) == "hello world"


SPLIT_ME = "I'LL pay 12345 \n\n  x²!!\n"


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["I", "'", "LL", " pay", " 12345", " \n\n ", " x", "²", "!!", "\n"]),
        ("smollm", ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", " \n\n ", " x", "²", "!!", "\n"]),
        ("llama-bpe", ["I", "'LL", " pay", " ", "123", "45", " \n\n", " ", " x", "²", "!!\n"]),
        ("qwen2", ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " \n\n", " ", " x", "²", "!!\n"]),
        ("default", ["I", "'", "LL", " pay", " ", "123", "45", " \n\n ", " x", "²", "!!", "\n"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(name: str, pieces: list[str]) -> None:
    alphabet = [chr(33 + i) for i in range(94)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [*alphabet, "<s>", "pay"],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 94,
    }
    text = text_assets(metadata, SOURCE)
    assert text is not None and text.add_bos == (name == "llama-bpe")
    tokenizer = Tokenizer.from_str(text.tokenizer_json)
    assert [SPLIT_ME[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(SPLIT_ME)] == pieces
    # Only Llama 3's kind takes a whole piece that is a token without merges that lead to it.
    assert (tokenizer.encode("pay", add_special_tokens=False).tokens == ["pay"]) == (name == "llama-bpe")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer model bert is not supported; supported are gpt2"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}, "pre-tokenizer tekken is not"),
        ({"tokenizer.ggml.scores": [0.0]}, "tokenizer.ggml.scores must list 290 numbers"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "holds a token twice"),
        ({"tokenizer.ggml.bos_token_id": 290}, "special token id 290 is outside the 290 tokens"),
    ],
)
def test_unsupported_tokenizers_are_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EdgeError, match=complaint):
        text_assets(SENTENCEPIECE | changes, SOURCE)
