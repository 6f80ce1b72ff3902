"""ONNX file -> TensorRT engine file, in a process of its own (build_engine/tensorrt_child.py starts it).

TensorRT ends the process on some errors, holds gigabytes, and answers to nobody while it compiles a profile. In a
child process a crash becomes a message, the memory goes back, and Ctrl-C acts at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edge.engine_file import Shape
from edge.errors import EdgeError
from edge.tensorrt import (
    Flavour,
    build_engine_into,
    error_logger,
    load_flavour,
    set_compute_capabilities,
    set_timing_cache,
    timing_cache,
)
from plugins.build.cache import write_atomically
from plugins.plugin import PluginHost
from plugins.tensorrt import register_plugins

PROGRESS_TOTAL = 1000
# What a layer may use while it runs. Our kernels need a few MiB, TensorRT's own for matrices do not gain from more;
# left to itself TensorRT tries whatever the GPU has, which on a Jetson is what everything else runs in.
WORKSPACE_BYTES = 512 << 20
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Request:
    """`engine` is written as it is; profiles: {input: (min, opt, max)} each; capabilities as 'sm86'.

    plugins: use them, or compile the operators' functions. Only for builds on a GPU: `kernels` is the file with its
    machine code, "" without plugins; `timing_cache` the file with what was timed before.
    """

    target: str
    onnx: str
    engine: str
    profiles: list[dict[str, tuple[Shape, Shape, Shape]]]
    compute_capabilities: list[str]
    plugins: bool = True
    kernels: str = ""
    timing_cache: str = ""


def main() -> None:
    """Read a Request as JSON from stdin; write JSON lines to stdout: progress and notes, then a peak or an error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not end up between the messages

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        _compile(Request(**json.load(sys.stdin)), send)
    except EdgeError as error:
        send(error=str(error))
        return
    send(peak_rss_bytes=_peak_rss_bytes())


def _compile(request: Request, send: Callable[..., None]) -> None:
    flavour = load_flavour(request.target)
    host = _plugin_host(request)
    errors: list[str] = []
    logger = error_logger(flavour.api, errors)
    builder = flavour.api.Builder(logger)
    creators = register_plugins(flavour.api, host) if request.plugins else []
    network, parser = parse(flavour, builder, logger, Path(request.onnx), {creator.name for creator in creators})
    if network is None:
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)] or errors
        raise EdgeError(f"{flavour.name} cannot read {request.onnx}: {_sentence(host.errors + errors)}")
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(flavour.api, lambda done, name: send(progress=done, name=name))
    set_compute_capabilities(flavour, config, request.compute_capabilities)
    if flavour.needs_gpu:
        # A decode step is captured into a CUDA graph: side streams would fork it for kernels that fill the GPU anyway.
        config.max_aux_streams = 0
        if request.plugins:  # functions plan scores of the whole context at once, which no limit makes smaller
            config.set_memory_pool_limit(flavour.api.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
        if note := _start_timing(flavour, config, Path(request.timing_cache)):
            send(note=note)
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, *bounds)
        config.add_optimization_profile(profile)
    with _engine_file(Path(request.engine)) as write:
        built = build_engine_into(flavour, builder, network, config, write)
    if not built:
        raise EdgeError(f"{flavour.name} cannot build {request.onnx}: {_sentence(host.errors + errors)}")
    if flavour.needs_gpu:
        write_timing_cache(Path(request.timing_cache), timing_cache(config))


def _plugin_host(request: Request) -> PluginHost:
    """TensorRT runs and times plugins where it builds on a GPU; elsewhere they only describe themselves."""
    if not request.kernels:
        return PluginHost()
    from edge.cuda import Kernels, open_device

    return PluginHost(Kernels(Path(request.kernels).read_bytes(), open_device()), building=True)


def parse(flavour: Flavour, builder: Any, logger: Any, graph: Path, plugins: set[str]) -> tuple[Any, Any]:
    """-> the network, None if there are errors, and the parser, which has them. Weights stay where they are.

    Functions of operators with a plugin are taken out, since TensorRT before 10.16 prefers them to the plugin. Without
    a plugin of its name a node is its function, whatever its plugin attributes say.
    """
    model = onnx.load(graph, load_external_data=False)
    kept = [function for function in model.functions if function.name not in plugins]
    del model.functions[:]
    model.functions.extend(kept)
    network = builder.create_network(1 << int(flavour.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = flavour.api.OnnxParser(network, logger)
    parsed = parser.parse(model.SerializeToString(), str(graph))
    return (network if parsed else None), parser


def _parser_error(error: Any) -> str:
    node = error.node_name()
    return f"{error.desc()} (node {node})" if node else error.desc()


def _sentence(errors: list[str]) -> str:
    """The first two different messages: what follows them are consequences."""
    return "; ".join(list(dict.fromkeys(errors))[:2]) or "it gives no reason"


def _start_timing(flavour: Flavour, config: Any, path: Path) -> str:
    """Start from the timings of earlier builds -> "" or why they are not used."""
    data, note = read_timing_cache(path)
    if set_timing_cache(flavour, config, data):
        return note
    set_timing_cache(flavour, config, b"")
    return f"{flavour.name} does not take the timings in {path}; kernels are timed again"


def read_timing_cache(path: Path) -> tuple[bytes, str]:
    """What write_timing_cache wrote, b"" if there is nothing sound, and in words why not if it is damaged."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return b"", ""
    except OSError as error:
        return b"", f"the timings in {path} cannot be read ({error.strerror}); kernels are timed again"
    digest, data = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if digest != hashlib.sha256(data).digest():
        return b"", f"the timings in {path} are damaged; kernels are timed again"
    return data, ""


def write_timing_cache(path: Path, data: bytes) -> None:
    """Whole or not at all, with a digest, since TensorRT would read a damaged one."""
    write_atomically(path, hashlib.sha256(data).digest() + data)


def _monitor(trt: Any, progress: Callable[[int, str], None]) -> Any:
    """Nested phases -> one number: a phase's steps share the width of the step of the phase around it."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, tuple[int, int]] = {}  # outermost first: steps done, steps
            self.sent = (0, "")

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (0, max(num_steps, 1))
            self.report(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases[phase_name] = (step + 1, self.phases[phase_name][1])
            return self.report(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            del self.phases[phase_name]

        def report(self, phase_name: str) -> bool:
            """False, which cancels the build, if nobody listens any more."""
            fraction, width = 0.0, 1.0
            for done, steps in self.phases.values():
                fraction += width * done / steps
                width /= steps
            message = (max(self.sent[0], int(PROGRESS_TOTAL * min(fraction, 1.0))), phase_name)
            if message != self.sent:
                self.sent = message
                try:
                    progress(*message)
                except OSError:
                    return False
            return True

    return Monitor()


@contextmanager
def _engine_file(path: Path) -> Iterator[Callable[[Any], Any]]:
    """What appends to the engine's file, whose bytes are on the disk when the block ends."""
    try:
        with path.open("wb") as file:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        size = path.stat().st_size >> 20
        raise EdgeError(
            f"writing an engine to {path.parent} failed after {size} MiB: {error.strerror}; free space there and build "
            "again"
        ) from None


def _peak_rss_bytes() -> int:
    """VmHWM, because getrusage also counts what the parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
