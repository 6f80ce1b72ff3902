"""One measurement of llama.cpp in a process of its own; prints JSON. Used by bench/peers.py."""

from __future__ import annotations

import json
import sys
import time

import llama_cpp
import numpy as np


def measure(model: str, prompt_tokens: int, new_tokens: int, repeat: int, flash: bool, threads: int) -> dict:
    """Median prefill and decode tok/s after one warm-up; sampling is not counted against llama.cpp."""
    llm = llama_cpp.Llama(
        model,
        n_ctx=prompt_tokens + new_tokens + 8,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=512,
        n_ubatch=512,
        flash_attn=flash,
        verbose=False,
    )
    generator = np.random.default_rng(0)
    prefill, decode = [], []
    for run in range(repeat + 1):
        ids = generator.integers(3, 70000, prompt_tokens).tolist()
        llm.reset()
        started = time.perf_counter()
        llm.eval(ids)
        first = time.perf_counter()
        for token in generator.integers(3, 70000, new_tokens - 1).tolist():
            llm.eval([token])
        ended = time.perf_counter()
        if run or repeat == 0:
            prefill.append(prompt_tokens / (first - started))
            decode.append((new_tokens - 1) / (ended - first))
    return {"prefill": float(np.median(prefill)), "decode": float(np.median(decode))}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
