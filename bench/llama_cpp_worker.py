"""One measurement of llama.cpp in a process of its own; prints JSON. Used by bench/peers.py and bench/context.py."""

from __future__ import annotations

import json
import sys
import time

import llama_cpp
import numpy as np


def measure(model: str, prompt_tokens: int, new_tokens: int, repeat: int, flash: bool, threads: int) -> dict:
    """Median prefill tok/s, and decode tok/s of the median step; sampling is not counted against llama.cpp.

    After one warm-up; `repeat` 0 measures the only run, for prompts that take minutes.
    """
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
    prefill: list[float] = []
    steps: list[float] = []
    for run in range(repeat + 1):
        ids = generator.integers(3, 70000, prompt_tokens).tolist()
        llm.reset()
        started = time.perf_counter()
        llm.eval(ids)
        ends = [time.perf_counter()]
        for token in generator.integers(3, 70000, new_tokens - 1).tolist():
            llm.eval([token])
            ends.append(time.perf_counter())
        if run or repeat == 0:
            prefill.append(prompt_tokens / (ends[0] - started))
            steps += np.diff(ends).tolist()
    return {"prefill": float(np.median(prefill)), "decode": 1 / float(np.median(steps))}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
