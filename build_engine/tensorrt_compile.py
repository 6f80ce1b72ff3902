"""ONNX file -> TensorRT engine file, in a process of its own (build_engine/tensorrt.py starts it).

TensorRT ends the process on some errors, holds gigabytes, and answers to nobody while it compiles a profile. In a
child process a crash becomes a message, the memory goes back, and Ctrl-C acts at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_engine.tensorrt_flavour import load_flavour
from edge.errors import EdgeError

PROGRESS_TOTAL = 1000
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """`engine` is written as it is; profiles: {input: (min, opt, max)} each; capabilities as 'sm86'."""

    target: str
    onnx: str
    engine: str
    profiles: list[dict[str, tuple[Shape, Shape, Shape]]]
    compute_capabilities: list[str]


def main() -> None:
    """Read a Request as JSON from stdin; write JSON lines to stdout: progress, then peak_rss_bytes or error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not end up between the messages

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        _compile(Request(**json.load(sys.stdin)), lambda done, name: send(progress=done, name=name))
    except EdgeError as error:
        send(error=str(error))
        return
    send(peak_rss_bytes=_peak_rss_bytes())


def _compile(request: Request, progress: Callable[[int, str], None]) -> None:
    flavour = load_flavour(request.target)
    trt = flavour.api
    errors: list[str] = []
    logger = _error_logger(trt, errors)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.onnx):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)] or errors
        raise EdgeError(f"{flavour.name} cannot read {request.onnx}: {_sentence(errors)}")
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, progress)
    _set_compute_capabilities(trt, config, request.compute_capabilities)
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, *bounds)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EdgeError(f"{flavour.name} cannot build {request.onnx}: {_sentence(errors)}")
    _write(Path(request.engine), memoryview(engine))


def _parser_error(error: Any) -> str:
    node = error.node_name()
    return f"{error.desc()} (node {node})" if node else error.desc()


def _sentence(errors: list[str]) -> str:
    """The first two different messages: what follows them are consequences."""
    return "; ".join(list(dict.fromkeys(errors))[:2]) or "it gives no reason"


def _error_logger(trt: Any, errors: list[str]) -> Any:
    class ErrorLogger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(message.strip())

    return ErrorLogger()


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


def _set_compute_capabilities(trt: Any, config: Any, names: list[str]) -> None:
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)


def _write(path: Path, engine: memoryview) -> None:
    try:
        with path.open("wb") as file:
            file.write(engine)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EdgeError(
            f"writing an engine of {engine.nbytes / 2**20:.0f} MiB to {path.parent} failed: {error.strerror}; "
            "free space there and build again"
        ) from None


def _peak_rss_bytes() -> int:
    """VmHWM, because getrusage also counts what the parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
