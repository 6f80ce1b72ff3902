"""Plugins called as TensorRT calls them: descriptors, creators, and a device that is host memory and the emulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from plugins.launch import Launch
from plugins.plugin import ALIGNMENT, Operator, PluginHost
from plugins.simt import emulator
from plugins.tensorrt import plugin_creators
from plugins.vectors import poisoned
from tests.plugin_samples import Sample

STREAM = 77
_kept: list[Any] = []


def keep(plugin: Any) -> Any:
    """A plugin that lives as long as the process: TensorRT owns them, and 10.3 crashes when Python drops one."""
    _kept.append(plugin)
    return plugin


def make_creator(api: Any, host: PluginHost, operator: Operator) -> Any:
    """The operator's creator."""
    return next(one for one in plugin_creators(api, host) if one.name == operator.NAME)


def make_plugin(api: Any, host: PluginHost, operator: Operator) -> Any:
    """The plugin that TensorRT gets for a node with the operator's attributes."""
    creator, (_, collection) = make_creator(api, host, operator), attribute_fields(api, operator)
    return keep(creator.create_plugin("node", collection, api.TensorRTPhase.BUILD))


def attribute_fields(api: Any, operator: Operator) -> tuple[list[Any], Any]:
    """(fields, collection) as the ONNX parser makes them of a node's attributes, with those of every edge node."""
    text = np.frombuffer(b"1\0", np.int8)
    made = [api.PluginField("plugin_version", text, api.PluginFieldType.CHAR)]
    for one in fields(operator):  # type: ignore[arg-type]
        value = getattr(operator, one.name)
        kind = (np.int32, api.PluginFieldType.INT32) if one.type == "int" else (np.float32, api.PluginFieldType.FLOAT32)
        made.append(api.PluginField(one.name, np.array([value], kind[0]), kind[1]))
    return made, api.PluginFieldCollection(made)


def describe(api: Any, shape: Sequence[int], dtype: np.dtype) -> Any:
    """A PluginTensorDesc."""
    desc = api.PluginTensorDesc()
    desc.dims, desc.type, desc.format = tuple(shape), getattr(api, dtype.name), api.TensorFormat.LINEAR
    return desc


def describe_range(api: Any, dtype: np.dtype, least: Sequence[int], most: Sequence[int]) -> Any:
    """A DynamicPluginTensorDesc: extents that differ are unknown to the network."""
    dynamic = api.DynamicPluginTensorDesc()
    dynamic.desc = describe(api, [a if a == b else -1 for a, b in zip(least, most, strict=True)], dtype)
    dynamic.min, dynamic.opt, dynamic.max = tuple(least), tuple(most), tuple(most)
    return dynamic


def input_ranges(api: Any, sample: Sample) -> list[Any]:
    """The sample's inputs as the largest shapes of a profile that starts at one."""
    arrays = [sample.inputs[name] for name in sample.operator.INPUTS]
    return [describe_range(api, a.dtype, (1,) * a.ndim, a.shape) for a in arrays]


class EmulatedDevice:
    """A Launcher over arrays at made-up addresses; `run` runs what was launched, by the addresses in the structs."""

    multiprocessors = 16

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}  # address -> bytes
        self.queue: list[tuple[Launch, bytes]] = []
        self.next_address = 1 << 40  # beyond 32 bits

    def place(self, array: np.ndarray) -> int:
        """A copy of the array in this device's memory."""
        address = self.next_address
        self.memory[address] = np.frombuffer(array.tobytes(), np.uint8).copy()
        self.next_address += -(-max(array.nbytes, 1) // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        return address

    def read(self, address: int, like: np.ndarray) -> np.ndarray:
        """An array of the form of `like` that starts there."""
        return self.memory[address].view(like.dtype).reshape(like.shape)

    def launch(self, launch: Launch, arguments: bytes, stream: int) -> None:
        """Queue one launch."""
        assert stream == STREAM
        self.queue.append((launch, arguments))

    def run(self) -> None:
        """All that is queued. A buffer ends where the next used address starts: the emulator finds writes past it."""
        launches = [_by_address(launch, arguments) for launch, arguments in self.queue]
        used = sorted({int(a, 16) for launch in launches for a in launch.arguments if isinstance(a, str)})
        parts = {}
        for start, array in self.memory.items():
            cuts = [address for address in used if start <= address < start + array.nbytes]
            for address, end in zip(cuts, [*cuts[1:], start + array.nbytes], strict=False):
                parts[f"{address:x}"] = array[address - start : end - start]
        emulator.run(launches, parts)
        self.queue.clear()


def _by_address(launch: Launch, arguments: bytes) -> Launch:
    """The launch with addresses in the place of names; all else in `arguments` must be as it says."""
    found = iter(int.from_bytes(arguments[at : at + 8], "little") for at, _ in launch.pointers())
    placed = replace(launch, arguments=tuple(f"{next(found):x}" if isinstance(a, str) else a for a in launch.arguments))
    assert placed.pack({f"{a}": int(a, 16) for a in placed.arguments if isinstance(a, str)}) == arguments
    return placed


def call(api: Any, plugin: Any, sample: Sample, device: EmulatedDevice) -> dict[str, int]:
    """Enqueue on poisoned outputs and a workspace of exactly the planned size. -> addresses by name."""
    operator = sample.operator
    addresses = {name: device.place(sample.inputs[name]) for name in operator.INPUTS}
    for name in operator.OUTPUTS:
        same = operator.SAME_MEMORY.get(name)
        room = poisoned(sample.expected[name].shape, sample.output_dtype(name))
        addresses[name] = device.place(room) if same is None else addresses[same]
    size = plugin.get_workspace_size(input_ranges(api, sample), [])
    addresses["workspace"] = device.place(poisoned((size,), np.dtype(np.uint8)))
    plugin.enqueue(
        [describe(api, sample.inputs[name].shape, sample.inputs[name].dtype) for name in operator.INPUTS],
        [describe(api, sample.expected[name].shape, sample.output_dtype(name)) for name in operator.OUTPUTS],
        [addresses[name] for name in operator.INPUTS],
        [addresses[name] for name in operator.OUTPUTS],
        addresses["workspace"],
        STREAM,
    )
    return addresses


def check_outputs(sample: Sample, device: EmulatedDevice, addresses: Mapping[str, int]) -> None:
    """Outputs are the meaning's, and inputs that no output updates have the bytes they had."""
    operator = sample.operator
    for name in set(operator.INPUTS) - set(operator.SAME_MEMORY.values()):
        assert device.memory[addresses[name]].tobytes() == sample.inputs[name].tobytes(), f"{name} was changed"
    for name, want in sample.expected.items():
        got = device.read(addresses[name], poisoned(want.shape, sample.output_dtype(name)))
        absolute = sample.absolute
        if want.dtype == np.int8:  # bytes of a code plus 128, of which a rotation's last bit may move one
            got, want, absolute = got.view(np.uint8), want.view(np.uint8), 1
        np.testing.assert_allclose(
            got.astype(np.float64),
            want.astype(np.float64),
            rtol=sample.relative,
            atol=absolute,
            err_msg=f"{operator.NAME}: {name}",
        )
