"""What quantising needs to hold, before anything is allocated: a layer, one Hessian, one sequence; then all states."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from build_engine.checkpoint import expected_shapes
from build_engine.quantizer.forward import layer_tensors
from build_engine.quantizer.gptq import ERROR_ROWS
from edge.config import ModelConfig
from edge.errors import EdgeError

BASE = 256 << 20  # the interpreter, its libraries, their threads' buffers, the tokenizer, chunks of the embedding


def working_bytes(config: ModelConfig, length: int) -> int:
    """The largest moment of one layer, in bytes, beside BASE and the hidden states; length 0: no calibration."""
    tensors = dict(expected_shapes(config))
    shapes = [tensors[name] for name in layer_tensors(0).values()]
    sizes = [rows * inputs for rows, inputs in shapes]
    layer = 4 * sum(sizes) + 2 * sum(sizes)  # float32, and codes as they are and packed
    rounding = 20 * max(sizes)  # weights, steps, what is left of them, codes
    if not length:
        return layer + rounding
    inputs = max(inputs for _, inputs in shapes)
    # Hessian, its ordered copy, LAPACK's own and the factor in float64; then Hessian and the float32 factor beside the
    # rounding, or beside some rows and their products in float64.
    hessian = max(32 * inputs**2, 12 * inputs**2 + rounding + 32 * ERROR_ROWS * inputs)
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = 4 * length * (4 * length + 3 * heads * config.head_dim + 3 * config.hidden_size)
    mlp = 4 * length * (9 * config.intermediate_size + 3 * config.hidden_size)
    return layer + max(hessian, 12 * inputs**2 + max(attention, mlp))


def hidden_states(config: ModelConfig, shape: tuple[int, int], memory: int, scratch: Path) -> np.ndarray:
    """Zeros [S, L, H] float32 for the residual stream of all sequences.

    In memory if they fit there beside everything else, in a nameless file in `scratch` otherwise. EdgeError if a
    single layer does not fit `memory`; OSError if the disk is full.
    """
    working = BASE + working_bytes(config, shape[1])
    if working > memory:
        raise EdgeError(
            f"quantising needs {_mib(working)} for the largest layer and a sequence of {shape[1]} tokens, but --memory "
            f"is {_mib(memory)}; raise --memory or lower --length"
        )
    size = 4 * shape[0] * shape[1] * config.hidden_size
    full = (*shape, config.hidden_size)
    if working + size <= memory:
        return np.zeros(full, np.float32)
    with tempfile.TemporaryFile(dir=scratch) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and a crash later
        return np.memmap(file, np.float32, "r+", shape=full)


def require_memory(config: ModelConfig, memory: int) -> None:
    """EdgeError if rounding alone does not fit."""
    working = BASE + working_bytes(config, 0)
    if working > memory:
        raise EdgeError(
            f"quantising needs {_mib(working)} for the largest layer, but --memory is {_mib(memory)}; raise --memory"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
