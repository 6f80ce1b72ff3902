"""A TensorRT engine in memory, and its contexts with everything bound: the calls of TensorRT's runtime API."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge.cuda import DeviceArray, Stream
from edge.engine_file import EngineFile
from edge.errors import EdgeError
from edge.tensorrt import Flavour, error_logger
from plugins.plugin import PluginHost
from plugins.tensorrt import register_plugins


@dataclass(frozen=True)
class LoadedEngine:
    """An engine on the device. working_bytes: activations and scratch of the profile that needs most of them.

    device_bytes: by which the device's free memory fell when it was loaded. key: of the recipe it was built by.
    """

    tensorrt: str
    api: Any
    engine: Any
    profiles: tuple[str, ...]  # in the order of their indices
    working_bytes: int
    host: PluginHost
    errors: list[str]
    key: str
    device_bytes: int = 0
    kept: list[Any] = field(default_factory=list)  # the runtime and the plugins' creators, which must outlive it

    def open_context(self, profile: str, working: DeviceArray, stream: Stream) -> BoundContext:
        """A context for one profile that works in `working`, as all others do: only one of them runs at a time."""
        strategy = self.api.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(strategy)
        if context is None:
            raise EdgeError(f"{self.tensorrt} gives no execution context: {reasons(self)}")
        index = self.profiles.index(profile)
        if not context.set_optimization_profile_async(index, int(stream.handle)):
            raise EdgeError(f"{self.tensorrt} does not take profile {profile}: {reasons(self)}")
        context.set_device_memory(working.address, working.nbytes)
        names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        return BoundContext(self, context, frozenset(names))


def load_engine(file: EngineFile, flavour: Flavour, host: PluginHost) -> LoadedEngine:
    """Read an engine onto the current device; EdgeError if this TensorRT or GPU does not take it."""
    api, errors = flavour.api, list[str]()
    creators = register_plugins(api, host)
    runtime = api.Runtime(error_logger(api, errors))
    engine = runtime.deserialize_cuda_engine(_read(file.path))
    if engine is None:
        why = "; ".join(dict.fromkeys([*host.errors, *errors])) or "it gives no reason"
        raise EdgeError(f"{flavour.name} does not load {file.path} ({why}); build it again on this machine: edge build")
    profiles = tuple(profile.name for profile in file.recipe.profiles)
    working = max(engine.get_device_memory_size_for_profile_v2(i) for i in range(len(profiles)))
    kept = [runtime, *creators]
    return LoadedEngine(flavour.name, api, engine, profiles, max(working, 1), host, errors, file.recipe.key, kept=kept)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EdgeError(f"{path} cannot be read ({error.strerror}); build it again: edge build") from None


def reasons(engine: LoadedEngine) -> str:
    """What TensorRT and the plugins said since the last time, and forget it."""
    said = "; ".join(dict.fromkeys([*engine.host.errors, *engine.errors])) or "it gives no reason"
    engine.host.errors.clear()
    engine.errors.clear()
    return said


@dataclass(frozen=True)
class BoundContext:
    """An execution context whose tensors keep their places; only shapes change, and only when they do."""

    engine: LoadedEngine
    context: Any
    names: frozenset[str]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Is it an input or output of the engine?"""
        return name in self.names

    def bind(self, name: str, array: DeviceArray) -> None:
        """Give a tensor its place; one that the engine does not have is passed over."""
        if self.has(name) and not self.context.set_tensor_address(name, array.address):
            raise EdgeError(f"{self.engine.tensorrt} refuses the memory of {name}: {reasons(self.engine)}")

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Give an input its shape for the runs from now on."""
        if self.has(name) and self.shapes.get(name) != shape:
            if not self.context.set_input_shape(name, shape):
                raise EdgeError(
                    f"the engine does not take {name} of shape {shape} ({reasons(self.engine)}); build it for larger "
                    "steps: edge build --chunk, --batch or --max-context"
                )
            self.shapes[name] = shape

    def run(self, stream: Stream) -> None:
        """Queue one run."""
        if not self.context.execute_async_v3(int(stream.handle)):
            raise EdgeError(f"{self.engine.tensorrt} failed in a step: {reasons(self.engine)}")
