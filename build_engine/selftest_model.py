"""The small model of `edge selftest`: made from bits, the same on every machine, with every kind of layer there is.

Its weights lie on the grids that they are quantised to, with scales that are powers of two. So quantising changes
nothing, and the tokens that exact float32 arithmetic gives (edge/selftest/golden.json) are those that int4 kernels on a
GPU must give, as far as float16 sums do not decide between near ties; the golden tokens are none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from build_engine.checkpoint import Checkpoint, LazyTensor, expected_shapes
from edge.config import LongRope, ModelConfig, SparseConfig

NAME = "selftest"
CONFIG = ModelConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=64.0,
    bos_token_id=1,
    eos_token_ids=(2,),
    # Sequences of the test are longer than all three limits, so that its tokens need the long list and chosen blocks.
    long_rope=LongRope((1.0,) * 32, tuple(1.0 + i / 8 for i in range(32)), original_max_position_embeddings=64),
    sparse=SparseConfig(topk=2, window_size=64, dense_len=128),
)
_GROUP = 64  # weights that share a scale


def selftest_checkpoint() -> Checkpoint:
    """The model as a checkpoint without a tokenizer."""
    tensors = {
        name: _tensor(name, shape, _values(number, name, shape))
        for number, (name, shape) in enumerate(expected_shapes(CONFIG))
    }
    return Checkpoint(Path(NAME), "made", CONFIG, tensors, text=None, generation={})


def _tensor(name: str, shape: tuple[int, ...], values: np.ndarray) -> LazyTensor:
    return LazyTensor(name, shape, values.dtype, "float32", lambda rows: values[rows])


def _values(number: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 weights from the raw bits of a generator that is one for each tensor."""
    size = int(np.prod(shape))
    raw = np.random.PCG64(number).random_raw(size) >> np.uint64(40)  # NumPy promises these bits, not its distributions
    if len(shape) == 1:
        return (1 + (raw % np.uint64(64)).astype(np.float32) / 128).reshape(shape)
    if name == "model.embed_tokens.weight":
        return ((raw % np.uint64(256)).astype(np.float32) - 128).reshape(shape) / 1024
    most = 127 if name == "lm_head.weight" else 7
    codes = (raw % np.uint64(2 * most + 1)).astype(np.float32).reshape(-1, _GROUP) - most
    # Every group reaches the end of its grid, so that its scale is what it is here: -8 of int4, 127 of int8.
    groups = np.arange(len(codes))
    codes[groups, groups * 7 % _GROUP] = -8 if most == 7 else 127
    return codes.reshape(shape) * np.float32(2.0**-9 if most == 127 else 2.0**-6)
