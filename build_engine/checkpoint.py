"""Checkpoints: Hugging Face names to lazily read tensors, whatever the file format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from edge.config import ModelConfig
from edge.errors import EdgeError, UsageError

# dtype -> unsigned and signed integers of its width, and the bit pattern of +infinity.
_INFINITY_BITS = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, np.int16, 0x7F80),
    np.dtype(np.float16): (np.uint16, np.int16, 0x7C00),
    np.dtype(np.float32): (np.uint32, np.int32, 0x7F800000),
}


@dataclass(frozen=True)
class Codes:
    """How a quantised matrix [N, K] is stored: W[n, k] = (code - zero) * scale[n, k // group], to the last bit.

    bits: 2 (ternary: codes 0, 1, 2, zero 1) or 4 (codes 0..15, zero 8); group: K means a scale a row.
    `read(slice(a, b))` -> (codes [rows, K] uint8, scales [rows, K / group] float32, which are positive).
    """

    bits: int
    group: int
    zero: int
    read: Callable[[slice], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class LazyTensor:
    """One weight of a checkpoint; nothing is read before `read` is called.

    `read(slice(a, b))` returns rows a..b of the first axis as `dtype`, and `read(slice(None))` all of them.
    16- and 32-bit formats give a read-only view into the memory map (GGUF's q and k projections, whose rows
    are stored in another order, a copy of the rows asked for); quantised formats are dequantised to float32.
    `release()` lets the mapped pages that were read leave memory; reading again brings them back. `codes`: the stored
    codes of a format that an executor can take over as they are, else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stored_as: str
    read: Callable[[slice], np.ndarray]
    release: Callable[[], None] = lambda: None
    codes: Codes | None = None


@dataclass(frozen=True)
class TextAssets:
    """What turns text into tokens and back.

    `tokenizer_json` is a `tokenizers` JSON; encoding with its special tokens prepends exactly `bos_token` if
    `add_bos`, and nothing otherwise. `chat_template` is jinja2 source.
    """

    tokenizer_json: str
    chat_template: str | None
    add_bos: bool
    bos_token: str | None
    eos_token: str | None


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. `tensors` holds exactly the names of `expected_shapes(config)`.

    `format` is "safetensors" or "gguf"; `text` is None without tokenizer files; `generation` holds the
    sampling defaults of generation_config.json.
    """

    path: Path
    format: str
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    text: TextAssets | None
    generation: dict[str, Any]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder or a .gguf file and check every name and shape; reads no weights.

    Raises UsageError if `path` is neither, EdgeError if it is damaged or not a supported model.
    """
    # Both readers build on the types above.
    from build_engine.gguf_checkpoint import open_gguf
    from build_engine.hf_checkpoint import open_hf

    path = Path(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return open_hf(path)
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"pass the file itself, for example {ggufs[0]}" if ggufs else "pass the folder of a checkpoint"
        raise UsageError(f"{path} has no config.json; {hint}")
    if not path.is_file():
        raise UsageError(f"{path} does not exist; pass a folder with config.json or a .gguf file")
    if path.suffix != ".gguf":
        raise UsageError(f"{path} is not a .gguf file; pass one, or the folder that holds config.json")
    return open_gguf(path)


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model and its [out_features, in_features] shape, in file order."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (q_rows, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv_rows, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv_rows, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, q_rows)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (ffn, hidden)
        yield prefix + "mlp.up_proj.weight", (ffn, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def select_tensors(found: Mapping[str, LazyTensor], config: ModelConfig, source: Path) -> dict[str, LazyTensor]:
    """The model's tensors out of `found`; EdgeError names one that is missing, misshapen or unknown."""
    selected: dict[str, LazyTensor] = {}
    for name, shape in expected_shapes(config):
        tensor = found.get(name)
        if tensor is None:
            raise EdgeError(f"{source}: tensor {name} is missing; download the checkpoint again")
        if tensor.shape != shape:
            raise EdgeError(
                f"{source}: tensor {name} has shape {list(tensor.shape)}, but the configuration asks for "
                f"{list(shape)}; weights and configuration are not of the same model"
            )
        selected[name] = tensor
    for name in found:
        if name not in selected:
            raise EdgeError(
                f"{source}: tensor {name} has no place in a MiniCPM4 or Llama of {config.num_hidden_layers} "
                "layers (they have no biases, adapters or experts); the model is of another architecture"
            )
    return selected


def validate_config(config: ModelConfig, source: Path) -> None:
    """Reject sizes no forward pass exists for; EdgeError names the field and its value."""
    for field, value in vars(config).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or field == "bos_token_id":
            continue
        if not (value > 0 and math.isfinite(value)):
            raise EdgeError(f"{source}: {field} is {value} but must be positive")
    if config.num_attention_heads % config.num_key_value_heads:
        raise EdgeError(
            f"{source}: {config.num_attention_heads} attention heads cannot share "
            f"{config.num_key_value_heads} key-value heads; the first must be a multiple of the second"
        )
    if config.head_dim % 2:
        raise EdgeError(f"{source}: head_dim is {config.head_dim} but rotary embedding needs an even number")
    for token in (config.bos_token_id, *config.eos_token_ids):
        if token is not None and not 0 <= token < config.vocab_size:
            raise EdgeError(f"{source}: special token id {token} is outside the {config.vocab_size} tokens")
    if config.long_rope is None:
        return
    if config.long_rope.original_max_position_embeddings <= 1:
        raise EdgeError(f"{source}: original_max_position_embeddings must be above 1")
    for field in ("short_factor", "long_factor"):
        factors = getattr(config.long_rope, field)
        if len(factors) != config.head_dim // 2:
            raise EdgeError(
                f"{source}: rope {field} has {len(factors)} entries but head_dim {config.head_dim} "
                f"needs {config.head_dim // 2}"
            )
        if not all(factor > 0 and math.isfinite(factor) for factor in factors):
            raise EdgeError(f"{source}: rope {field} has an entry that is not a positive number")


def with_bos(tokenizer: Tokenizer, bos_token: str | None) -> Tokenizer:
    """Make encoding with special tokens prepend `bos_token` (nothing if None) and append nothing."""
    wanted = [] if bos_token is None else [tokenizer.token_to_id(bos_token)]
    if tokenizer.encode("").ids != wanted:
        tokenizer.post_processor = TemplateProcessing(
            single="$A" if bos_token is None else [bos_token, "$A"],
            special_tokens=[] if bos_token is None else [(bos_token, wanted[0])],
        )
    return tokenizer


def require_finite(name: str, array: np.ndarray, first_row: int = 0) -> None:
    """Raise EdgeError naming the tensor and the first bad row if a weight is NaN or infinite.

    `array` is bfloat16, float16 or float32; `first_row` is the tensor's row that array[0] came from.
    """
    unsigned, signed, infinity = _INFINITY_BITS[array.dtype]
    bits = array.view(unsigned)
    sign = 1 << (8 * array.itemsize - 1)
    # Bit patterns order like magnitudes: two reductions and no temporary find what is at or beyond infinity.
    if not bits.size or (bits.view(signed).max() < infinity and bits.max() < (sign | infinity)):
        return
    first = np.unravel_index(np.argmax((bits & infinity) == infinity), array.shape)
    column = f", column {first[1]}" if array.ndim > 1 else ""
    raise EdgeError(
        f"tensor {name} holds {float(array[first])} at row {first_row + int(first[0])}{column}; "
        "the weights are damaged: download or convert the checkpoint again"
    )
