"""The emulated CUDA driver, for tests: a fresh GPU without hardware, on which real cubins run their CPU builds."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace

from plugins.launch import Kernel
from plugins.simt.driver.library import EmulatedDriver, device_facts, load_driver


@contextmanager
def emulated_gpu(
    architecture: str = "sm_86", kernels: Iterable[Kernel] = (), *, memory: int | None = None
) -> Generator[EmulatedDriver, None, None]:
    """A GPU on which nothing has happened; `kernels` are those that may be launched, memory its bytes.

    What was made on it is gone at the next; modules must have been compiled for the architecture.
    """
    driver = load_driver()
    gc.collect()  # what earlier tests left is freed while its device still exists
    facts = device_facts(architecture)
    driver.reset(facts if memory is None else replace(facts, total_memory=memory))
    driver.add_kernels(kernels)
    yield driver
