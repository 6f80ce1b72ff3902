"""GGUF's tokenizers as `tokenizers` JSON: "gpt2" (byte-level BPE) and "llama" (SentencePiece BPE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from build_engine.checkpoint import TextAssets, with_bos
from edge.errors import EdgeError

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# GGUF names one end-of-sequence token, but chat models stop on several: the usual ones count when present.
_END_TEXTS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3 and Qwen2 differ in how many digits may stand together.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Each pattern splits the pieces the one before it left (tokenizer.ggml.pre -> patterns).
_PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3.replace("DIGITS", "{1,3}"),),
    "qwen2": (_LLAMA3.replace("DIGITS", ""),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_PRE_TOKENIZER_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def text_assets(metadata: Mapping[str, Any], source: Path) -> TextAssets | None:
    """Tokenizer and chat template of a GGUF file; None if it has no tokenizer.

    `metadata` maps GGUF keys to Python values. EdgeError names a tokenizer or pre-tokenizer not supported.
    """
    model = metadata.get("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return None
    if model not in ("gpt2", "llama"):
        raise EdgeError(f"{source}: tokenizer model {model} is not supported; supported are gpt2 and llama")
    tokens = _string_list(metadata, "tokenizer.ggml.tokens", source)
    if len(set(tokens)) != len(tokens):
        raise EdgeError(f"{source}: tokenizer.ggml.tokens holds a token twice; convert the file again")
    types = _list_of(metadata, "tokenizer.ggml.token_type", len(tokens), [_NORMAL] * len(tokens), source)
    if model == "gpt2":
        tokenizer, bos_by_default = _byte_level_bpe(metadata, tokens, source)
    else:
        tokenizer, bos_by_default = _sentencepiece_bpe(metadata, tokens, types, source), True
    for kinds, special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        tokenizer.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in kinds and token
            ]
        )
    bos_id, eos_ids = special_token_ids(metadata, source)
    bos, eos = (_token(tokens, token_id, source) for token_id in (bos_id, eos_ids[0] if eos_ids else None))
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", bos_by_default))
    if add_bos and bos is None:
        raise EdgeError(f"{source}: the tokenizer prepends BOS but tokenizer.ggml.bos_token_id is missing")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise EdgeError(f"{source}: metadata key tokenizer.chat_template must be a string")
    return TextAssets(with_bos(tokenizer, bos if add_bos else None).to_str(), template, add_bos, bos, eos)


def special_token_ids(metadata: Mapping[str, Any], source: Path) -> tuple[int | None, tuple[int, ...]]:
    """The BOS id, and every id that ends generation, the file's end-of-sequence token first."""
    # llama.cpp's defaults for SentencePiece; for byte-level BPE it has none that mean anything.
    defaults = {"bos": 1, "eos": 2} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids = {}
    for role in ("bos", "eos", "eot", "eom"):
        ids[role] = metadata.get(key := f"tokenizer.ggml.{role}_token_id", defaults.get(role))
        if not isinstance(ids[role], (int, type(None))):
            raise EdgeError(f"{source}: metadata key {key} must be an integer")
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
    if not (isinstance(tokens, list) and isinstance(types, list)):
        raise EdgeError(f"{source}: metadata keys tokenizer.ggml.tokens and token_type must be lists")
    by_text = [
        index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (_CONTROL, _USER_DEFINED) and token in _END_TEXTS
    ]
    endings = (ids["eos"], ids["eot"], ids["eom"], *by_text)
    return ids["bos"], tuple(dict.fromkeys(token for token in endings if token is not None))


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str], source: Path) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether its kind prepends BOS unless told otherwise."""
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    name = _PRE_TOKENIZER_ALIASES.get(name, name)
    if name not in _PATTERNS:
        supported = ", ".join((*_PATTERNS, *_PRE_TOKENIZER_ALIASES))
        raise EdgeError(f"{source}: pre-tokenizer {name} is not supported; supported are {supported}")
    merges = [tuple(merge.split(" ", 1)) for merge in _string_list(metadata, "tokenizer.ggml.merges", source)]
    is_llama3 = name == "llama-bpe"
    tokenizer = _bpe(tokens, merges, source, ignore_merges=is_llama3)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[name]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, is_llama3


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int], source: Path) -> Tokenizer:
    scores = _list_of(metadata, "tokenizer.ggml.scores", len(tokens), None, source)
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    merges = _merges_by_score(tokens, types, scores)
    tokenizer = _bpe(tokens, merges, source, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    prefix, strip = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if space_prefix else ([], [])
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(tokens: list[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges any two pieces whose join is a piece, the highest-scored join first."""
    score_of = {token: score for token, kind, score in zip(tokens, types, scores, strict=True) if kind == _NORMAL}
    by_score = sorted(score_of, key=lambda token: -score_of[token])
    return [
        (token[:cut], token[cut:])
        for token in by_score
        for cut in range(1, len(token))
        if token[:cut] in score_of and token[cut:] in score_of
    ]


def _bpe(tokens: list[str], merges: list[Any], source: Path, **settings: Any) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **settings))
    except Exception as error:  # the library raises nothing narrower
        raise EdgeError(f"{source}: the tokenizer's vocabulary and merges do not fit: {error}") from error


def _token(tokens: list[str], token_id: int | None, source: Path) -> str | None:
    if token_id is not None and not 0 <= token_id < len(tokens):
        raise EdgeError(f"{source}: special token id {token_id} is outside the {len(tokens)} tokens")
    return None if token_id is None else tokens[token_id]


def _string_list(metadata: Mapping[str, Any], key: str, source: Path) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise EdgeError(f"{source}: metadata key {key} must be a list of strings; convert the file again")
    return value


def _list_of(metadata: Mapping[str, Any], key: str, length: int, default: list[int] | None, source: Path) -> list[Any]:
    value = metadata.get(key, default)
    numbers = isinstance(value, list) and all(isinstance(item, (int, float)) for item in value)
    if not numbers or len(value) != length:
        raise EdgeError(f"{source}: metadata key {key} must list {length} numbers; convert the file again")
    return list(value)
