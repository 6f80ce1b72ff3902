"""The shape of a MiniCPM4 model: everything the graph and the runtime need to know about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from edge.errors import UsageError

_NUMBERS: dict[Any, Any] = {"int": int, "float": (int, float), "bool": bool, "int | None": (int, type(None))}


@dataclass(frozen=True)
class LongRope:
    """LongRoPE factor lists, head_dim/2 entries each (spec: infllmv2.md 1.3, 2)."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int


@dataclass(frozen=True)
class SparseConfig:
    """InfLLM-V2 settings; lengths in tokens, topk in blocks (spec: infllmv2.md 1.2).

    `dense_len`: shorter sequences are computed densely; -1 makes every sequence sparse.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    use_nope: bool = False
    dense_len: int = 8192

    @property
    def local_blocks(self) -> int:
        """Blocks before a token's own that it always attends to."""
        return self.window_size // self.block_size

    @property
    def selected_blocks(self) -> int:
        """Blocks that a token attends to in all: init, local and chosen by score (spec: infllmv2.md 3.7)."""
        return self.topk + self.local_blocks

    def is_sparse(self, length: int) -> bool:
        """Whether a sequence of this length is computed sparsely; equality is sparse."""
        return self.dense_len < 0 or length >= self.dense_len

    def change(self, settings: Mapping[str, Any], *, fixed: Sequence[str] = ()) -> SparseConfig:
        """These settings with some of them set anew, except those that are `fixed`; UsageError names what is wrong."""
        changeable = [name for name in vars(self) if name not in fixed]
        for name in settings:
            if name not in changeable:
                raise UsageError(f"--sparse cannot set {name} here; it knows {', '.join(changeable)}")
        changed = replace(self, **settings)
        if (problem := changed.problem()) is not None:
            raise UsageError(f"--sparse: {problem}")
        return changed

    def problem(self) -> str | None:
        """What makes these settings unusable, as the end of a sentence; None if they are fine."""
        fixed = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                return f"{name} is {getattr(self, name)}, but the kernels are made for {value}"
        for name, low in {"init_blocks": 0, "dense_len": -1, "topk": 1, "window_size": 0}.items():
            if getattr(self, name) < low:
                return f"{name} is {getattr(self, name)} but must be at least {low}"
        if self.window_size % self.block_size:
            return f"window_size {self.window_size} must be a multiple of block_size {self.block_size}"
        if self.topk <= self.init_blocks:
            return f"topk {self.topk} must exceed init_blocks {self.init_blocks}, which it includes"
        return None


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only model. A Llama is the special case of neutral muP scales (see `neutral_mup`)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    scale_emb: float
    scale_depth: float
    dim_model_base: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    long_rope: LongRope | None = None
    sparse: SparseConfig | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def residual_scale(self) -> float:
        """Factor on every attention and MLP output before it joins the residual stream."""
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logit_divisor(self) -> float:
        """The final hidden state is divided by this before the head."""
        return self.hidden_size / self.dim_model_base

    @property
    def rope_attention_factor(self) -> float:
        """LongRoPE's factor on cos and sin; exactly 1 for every shipped config (spec: infllmv2.md 2)."""
        if self.long_rope is None:
            return 1.0
        original = self.long_rope.original_max_position_embeddings
        scale = self.max_position_embeddings / original
        return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0

    @property
    def rope_lists_differ(self) -> bool:
        """Whether the choice between LongRoPE's two lists can make a difference."""
        return self.long_rope is not None and self.long_rope.short_factor != self.long_rope.long_factor

    @property
    def switches_on_length(self) -> bool:
        """Whether what a token is computed from depends on the length of its sequence."""
        return self.rope_lists_differ or self.sparse is not None

    def rope_is_long(self, length: int) -> bool:
        """Whether a sequence of this length is rotated by LongRoPE's long list, where that makes a difference."""
        if self.long_rope is None or not self.rope_lists_differ:
            return False
        return length > self.long_rope.original_max_position_embeddings

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelConfig:
        """Rebuild from `to_dict` after a round trip through JSON; TypeError names a number that is none."""
        values = dict(values)
        values["eos_token_ids"] = tuple(values["eos_token_ids"])
        if values.get("long_rope"):
            rope = values["long_rope"]
            values["long_rope"] = LongRope(
                tuple(rope["short_factor"]), tuple(rope["long_factor"]), rope["original_max_position_embeddings"]
            )
        if values.get("sparse"):
            values["sparse"] = SparseConfig(**values["sparse"])
        config: ModelConfig = _require_numbers(ModelConfig(**values))
        return config


@dataclass(frozen=True)
class DraftConfig:
    """An EAGLE draft: one layer that guesses what its base says next (spec: quantization_and_speculation.md 4.1).

    All that is not named here is the base's: hidden size, head_dim, RoPE, embedding, head. vocab_size: rows of the head
    that it has, None for all. window: blocks of 64 tokens, a row's own among them, that its attention sees.
    logit_scale: factor on its hidden state before the head. A checkpoint may lack the norms of the two inputs, and the
    one before attention.
    """

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    residual_scale: float
    logit_scale: float
    vocab_size: int | None = None
    window: int = 16
    has_input_norms: bool = True
    has_attention_norm: bool = True

    def layer_config(self, base: ModelConfig) -> ModelConfig:
        """The draft as a dense model of one layer, for all that depends on shapes alone."""
        return replace(
            base,
            num_hidden_layers=1,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            rms_norm_eps=self.rms_norm_eps,
            vocab_size=self.vocab_size or base.vocab_size,
            sparse=None,
        )

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DraftConfig:
        """Rebuild from JSON; TypeError names a number that is none."""
        config: DraftConfig = _require_numbers(DraftConfig(**values))
        return config


def _require_numbers(config: Any) -> Any:
    for field in fields(config):
        if field.type in _NUMBERS and not isinstance(value := getattr(config, field.name), _NUMBERS[field.type]):
            raise TypeError(f"{field.name} is {value!r}")
    return config


def neutral_mup(num_hidden_layers: int, hidden_size: int) -> dict[str, float]:
    """The muP scales that turn MiniCPM4's forward pass into Llama's."""
    return {
        "scale_emb": 1.0,
        "scale_depth": math.sqrt(num_hidden_layers),
        "dim_model_base": float(hidden_size),
    }
