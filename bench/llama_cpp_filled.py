"""llama.cpp's decode speed at a long context that was never computed; prints JSON. Used by bench/context.py.

A prompt of 32K tokens takes all layers of llama.cpp half an hour on two cores. Instead, a short prompt is computed, its
part of the cache is restored into as many sequences as make up the context (the library's own state functions), and
all of them are given to one sequence. That sequence's next token reads and multiplies what a true context of the length
would have it do; what the numbers say makes no difference.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Sequence

import llama_cpp as llama
import numpy as np

PART = 2048  # tokens computed for real


def measure(model: str, context: int, new_tokens: int, flash: bool, threads: int) -> dict:
    """tok/s of the median step of one token after `context` others (rounded to whole parts)."""
    part = min(PART, context)
    parts = context // part
    handle, weights = open_context(model, part * parts + new_tokens + 8, parts, flash, threads)
    generator = np.random.default_rng(0)
    for start in range(0, part, 512):
        decode(handle, generator.integers(3, 70000, min(512, part - start)).tolist(), start)
    copy_part(handle, parts)
    seconds = []
    for step, token in enumerate(generator.integers(3, 70000, new_tokens).tolist()):
        started = time.perf_counter()
        decode(handle, [token], part + step)
        seconds.append(time.perf_counter() - started)
    llama.llama_free(handle)
    llama.llama_model_free(weights)
    return {"decode": 1 / float(np.median(seconds[1:])), "tokens": part * parts}


def open_context(model: str, tokens: int, sequences: int, flash: bool, threads: int) -> tuple[object, object]:
    """(context, model) with one cache for all sequences."""
    llama.llama_backend_init()
    weights = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = tokens, 512, 512
    params.n_seq_max, params.kv_unified = sequences, True
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = int(flash)
    handle = llama.llama_init_from_model(weights, params)
    if not handle:
        raise MemoryError(f"llama.cpp has no room for {tokens} tokens")
    return handle, weights


def decode(handle: object, tokens: Sequence[int], position: int) -> None:
    """Compute tokens of sequence 0 from `position` on, with logits of the last."""
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, position + i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[i] = i == len(tokens) - 1
    result = llama.llama_decode(handle, batch)
    llama.llama_batch_free(batch)
    if result:
        raise RuntimeError(f"llama_decode returned {result}")


def copy_part(handle: object, parts: int) -> None:
    """What sequence 0 holds, `parts` times in the cache, all of it seen by sequence 0."""
    size = llama.llama_state_seq_get_size(handle, 0)
    data = (ctypes.c_uint8 * size)()
    llama.llama_state_seq_get_data(handle, data, size, 0)
    memory = llama.llama_get_memory(handle)
    for sequence in range(1, parts):
        if llama.llama_state_seq_set_data(handle, data, size, sequence) == 0:
            raise RuntimeError("llama.cpp could not restore a part of its cache")
        llama.llama_memory_seq_cp(memory, sequence, 0, -1, -1)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
