"""Runs launches on the CPU from the kernels' own source: g++ compiles it against cpu.h, a child process runs it.

Builds: `fast`; `asan` with the compiler's address and undefined-behaviour checks; `race` with the detector of race.cpp
and exact counts of the bytes moved. `seed` 0 runs threads in order, others switch at random.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edge.errors import EdgeError, UsageError
from plugins.build.cache import ROOT, cache_folder, source_key, write_atomically
from plugins.launch import Kernel, Launch, module_source
from plugins.simt import KernelFault, Report

BUILDS = ("fast", "asan", "race")
ENGINE = ("block.cpp", "switch.cpp", "warp.cpp", "copies.cpp", "buffers.cpp", "race.cpp", "runner.cpp")
COMMON = [
    "-std=c++20",
    "-g",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-ffp-contract=off",
    f"-I{ROOT}",
    f"-fmacro-prefix-map={ROOT}/=",
]
# Integer casts of numbers that do not fit saturate on a device and are undefined here.
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"
KERNEL_FLAGS = {
    "fast": ["-O2"],
    "asan": ["-O1", SANITIZERS, "-fno-sanitize-recover=all"],
    "race": ["-O1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"],
}
ENGINE_FLAGS = {
    "fast": ["-O3", "-flto=auto"],
    "asan": ["-O1", SANITIZERS, "-fno-sanitize-recover=all"],
    "race": ["-O3", "-flto=auto", "-DSIMT_RACE"],
}
SOURCE, OBJECT = "kernel.cpp", "kernel.o"
BUFFER_NUMBER = re.compile(r"\bbuffer (\d+)\b")
CODE_ADDRESS = re.compile(r"<(/\S+)\+(0x[0-9a-f]+)>")  # as block.cpp prints it
MESSAGE_LINES = 40  # of a failed child's standard error


class EmulationError(KernelFault):
    """A launch failed; the message is the emulator's or the sanitizer's."""


def run(
    launches: Sequence[Launch],
    buffers: Mapping[str, np.ndarray],
    *,
    build: str = "fast",
    seed: int = 0,
) -> Report:
    """Runs `launches` in order; `buffers` (C-contiguous) are changed in place, also those that no launch names.

    A launch's arguments name buffers; accesses outside them are found by `asan`, writes just past them by all builds.
    -> bytes moved by buffer (build `race`, else none), bank conflicts of ldmatrix, and matrix instructions.
    Raises EmulationError; the buffers are then unchanged.
    """
    if build not in BUILDS:
        raise UsageError(f"there is no build '{build}' of the emulator: choose from {', '.join(BUILDS)}")
    for name, array in buffers.items():
        if not array.flags.c_contiguous:
            raise UsageError(f"buffer '{name}' is not C-contiguous: pass a contiguous copy")
    executable = _engine(build)
    libraries = {kernel: kernel_library(kernel, build) for kernel in {launch.kernel: None for launch in launches}}
    with tempfile.TemporaryDirectory(prefix="edge-simt-") as folder:
        job, result = Path(folder) / "job", Path(folder) / "result"
        with job.open("wb") as file:
            file.write(_job_text(launches, list(buffers), buffers, libraries, seed).encode())
            for array in buffers.values():
                file.write(array.tobytes())
        child = subprocess.run([executable, job, result], capture_output=True, text=True, errors="replace")
        if child.returncode:
            raise EmulationError(_failure(child, launches, list(buffers)))
        report = _read_result(result.read_bytes(), buffers)
        return report if build == "race" else replace(report, read={}, written={})


def _job_text(
    launches: Sequence[Launch],
    names: list[str],
    buffers: Mapping[str, np.ndarray],
    libraries: Mapping[Kernel, Path],
    seed: int,
) -> str:
    """The job's lines, as runner.cpp reads them. Buffers go by number: a name may hold anything."""
    lines = [f"seed {seed}", *(f"buffer {i} {buffers[name].nbytes}" for i, name in enumerate(names))]
    for launch in launches:
        pointers = launch.pointers()
        packed = launch.pack(dict.fromkeys(buffers, 0))
        places = " ".join(f"{offset} {names.index(name)}" for offset, name in pointers)
        grid = " ".join(map(str, launch.grid))
        kernel = launch.kernel
        lines.append(
            f"launch {libraries[kernel]} {kernel.symbol} {grid} {kernel.threads} {launch.shared_bytes} "
            f"{len(pointers)} {places} {packed.hex()}"
        )
    return "\n".join([*lines, "data"]) + "\n"


def _read_result(data: bytes, buffers: Mapping[str, np.ndarray]) -> Report:
    head, _, rest = data.partition(b"data\n")
    lines = [line.split() for line in head.decode().splitlines()]
    counts = {line[0]: int(line[1]) for line in lines if line[0] != "buffer"}
    traffic = [(int(line[1]), int(line[2])) for line in lines if line[0] == "buffer"]
    start = 0
    for array in buffers.values():
        flat = np.frombuffer(rest, np.uint8, array.nbytes, start)
        array.reshape(-1).view(np.uint8)[:] = flat
        start += array.nbytes
    read = {name: r for name, (r, _) in zip(buffers, traffic, strict=True)}
    written = {name: w for name, (_, w) in zip(buffers, traffic, strict=True)}
    return Report(read, written, counts["bank_conflicts"], counts["mma"])


def _failure(child: subprocess.CompletedProcess[str], launches: Sequence[Launch], names: Sequence[str]) -> str:
    """What the child said, with the buffers' names and the lines of the kernels' source."""
    said = "\n".join(line for line in child.stderr.strip().splitlines()[:MESSAGE_LINES] if line.strip("="))
    said = BUFFER_NUMBER.sub(lambda found: f"buffer {names[int(found[1])]}", said)
    said = CODE_ADDRESS.sub(lambda found: _source_line(found[1], found[2]), said)
    if child.returncode < 0:
        said = f"{signal.Signals(-child.returncode).name}\n{said}".strip()
    symbols = dict.fromkeys(launch.kernel.symbol for launch in launches)
    return f"{', '.join(symbols)}: {said}"


@functools.cache
def _source_line(library: str, offset: str) -> str:
    """'file:line' of a code address: of the innermost function that is a kernel's own."""
    try:
        found = subprocess.run(["addr2line", "-ie", library, offset], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"{library}+{offset}"
    lines = [os.path.relpath(line.partition(" (")[0], ROOT) for line in found.stdout.splitlines()]
    return next((line for line in lines if not line.startswith("plugins/simt/")), lines[0])


@functools.cache
def compiler() -> tuple[str, ...]:
    """The C++ compiler's name and version, and the flags that tell it this machine."""
    try:
        version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[
            0
        ]
    except (OSError, subprocess.CalledProcessError):
        raise EdgeError("running kernels on the CPU needs g++, which is not there; install it (package g++)") from None
    return (version, "-march=native" if platform.machine() == "x86_64" else "-mcpu=native")


@functools.cache
def _engine(build: str) -> Path:
    """The executable that runs jobs."""
    text = "".join(f'#include "plugins/simt/{name}"\n' for name in ENGINE)
    sources = [str(ROOT / "plugins/simt" / name) for name in ENGINE]
    return compile_cached(
        f"run-{build}", text, [[*COMMON, *ENGINE_FLAGS[build], compiler()[1], "-rdynamic", *sources, "-ldl"]]
    )


@functools.cache
def kernel_library(kernel: Kernel, build: str) -> Path:
    """A shared library with the kernel's entry point."""
    compile_it = [*COMMON, *KERNEL_FLAGS[build], compiler()[1], "-fPIC", "-fvisibility=hidden", "-c", SOURCE]
    # Linked apart: -fsanitize=thread would bring its own library, whose place the engine takes.
    link_it = ["-shared", *([SANITIZERS] if build == "asan" else []), OBJECT]
    return compile_cached(kernel.symbol[:100], module_source([kernel]), [compile_it, link_it])


def compile_cached(name: str, text: str, commands: list[list[str]]) -> Path:
    """The result of g++'s last command, from the cache if it is there. `text` reaches all that is compiled."""
    key = source_key(text, [*compiler(), *(word for command in commands for word in command)])
    made = cache_folder("simt") / f"{name}-{key[:20]}"
    if made.exists():
        return made
    with tempfile.TemporaryDirectory(prefix="edge-simt-") as folder:
        (Path(folder) / SOURCE).write_text(text)
        for command, out in zip(commands, [OBJECT, "out"][-len(commands) :], strict=True):
            done = subprocess.run(["g++", *command, "-o", out], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise EmulationError(f"g++ cannot compile {name}:\n{done.stderr[:4000]}")
        write_atomically(made, (Path(folder) / "out").read_bytes(), mode=0o755)
    return made
