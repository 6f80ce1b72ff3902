"""The registers of a batch of thread blocks, and how an instruction becomes a step: a closure over its operands."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from plugins.launch import Launch
from plugins.simt.ptx_memory import (
    POISON,
    SHARED_BASE,
    SHARED_WINDOW,
    AsyncCopies,
    GlobalMemory,
    Lanes,
    ParameterSpace,
    SharedMemory,
)
from plugins.simt.ptx_numbers import DTYPES
from plugins.simt.ptx_opcode import Opcode, bits_of
from plugins.simt.ptx_operations import operation
from plugins.simt.ptx_parser import (
    Address,
    Entry,
    Immediate,
    Instruction,
    Name,
    Negated,
    Operand,
    PtxFault,
    Register,
    Vector,
)

Mask = bool | np.ndarray  # the active threads: True for all, or [threads] bool
Step = Callable[[Mask], None]
WARP = 32


class Machine:
    """A batch of `blocks` thread blocks of one launch side by side: registers are [threads of all blocks] arrays.

    `begin` makes it ready for the blocks from `first` on (linear index in the grid, x fastest). Steps that are bound
    to a machine stay valid. `mma` and `bank_conflicts` count as in a Report, since `begin`.
    """

    def __init__(self, entry: Entry, launch: Launch, memory: GlobalMemory, packed: bytes, blocks: int) -> None:
        self.entry, self.memory = entry, memory
        self.block_threads = launch.kernel.threads
        self.threads = blocks * self.block_threads
        self.parameters = ParameterSpace(packed)
        self.shared = SharedMemory(launch.shared_bytes, blocks, self.block_threads)
        self.copies = AsyncCopies(memory, self.shared, self.threads)
        self.mma = self.bank_conflicts = 0
        self._launch = launch
        self._registers: dict[str, np.ndarray] = {}
        self._constants: dict[tuple[int, str], np.ndarray] = {}
        self._special = special_registers(launch, blocks)

    def begin(self, first: int) -> None:
        self.mma = self.bank_conflicts = 0
        self.shared.data[:] = POISON
        self.copies.restart()
        for register in self._registers.values():
            register.view(np.uint8)[:] = 0 if register.dtype == bool else POISON
        block = first + np.arange(self.threads) // self.block_threads
        x, y, _ = self._launch.grid
        for axis, value in zip("xyz", (block % x, block // x % y, block // (x * y)), strict=True):
            self._special[f"%ctaid.{axis}"][:] = value

    def _register(self, register: Register) -> np.ndarray:
        """The register's storage; what is not written is poison."""
        storage = self._registers.get(register.name)
        if storage is None:
            storage = np.empty(self.threads, bool if register.bits == 1 else f"u{register.bits // 8}")
            self._registers[register.name] = storage
        return storage

    def _constant(self, value: int, kind: str) -> np.ndarray:
        constant = self._constants.get((value, kind))
        if constant is None:
            bits = np.array(value & ((1 << bits_of(kind)) - 1), f"u{DTYPES[kind].itemsize}")
            constant = self._constants[value, kind] = np.full(self.threads, bits).view(DTYPES[kind])
        return constant

    def source(self, operand: Operand, kind: str) -> np.ndarray:
        """[threads] values of type `kind`: a view that stays current, or constants."""
        if isinstance(operand, Register):
            storage = self._register(operand)
            if kind == "pred" or operand.bits == 1:
                if (kind, operand.bits) != ("pred", 1):
                    raise PtxFault(f"{operand.name} is used as .{kind}")
                return storage
            bits = bits_of(kind)
            if operand.bits < bits:
                raise PtxFault(f"{operand.name} has {operand.bits} bits and is used as .{kind}")
            values = storage.view(DTYPES[kind])
            return values if operand.bits == bits else values[:: operand.bits // bits]  # the lowest bytes
        if isinstance(operand, Immediate):
            return self._constant(operand.value, kind)
        if isinstance(operand, Name):
            if operand.name in self.entry.shared:
                return self._constant(SHARED_BASE, kind)
            if operand.name in self.entry.parameters:
                return self._constant(self.entry.parameters[operand.name], kind)
            if operand.name in self._special:
                return self._special[operand.name].view(DTYPES[kind])[:: 64 // bits_of(kind)]
            raise PtxFault(f"unknown name {operand.name}: kernels may use their struct and dynamic shared memory only")
        raise PtxFault(f"{operand} is no operand for a .{kind}")

    def target(self, operand: Operand, kind: str) -> np.ndarray:
        """[threads] storage to assign values of type `kind` to; a wider register gets them extended."""
        if isinstance(operand, Name) and operand.name == "_":
            return np.empty(self.threads, DTYPES[kind])
        if not isinstance(operand, Register) or (operand.bits == 1) != (kind == "pred"):
            raise PtxFault(f"{operand} cannot hold a .{kind}")
        storage = self._register(operand)
        if kind != "pred" and operand.bits < bits_of(kind):
            raise PtxFault(f"{operand.name} has {operand.bits} bits and is assigned a .{kind}")
        return storage.view(DTYPES[kind]) if operand.bits == bits_of(kind) else storage

    def addresses(self, operand: Operand) -> Callable[[Lanes], np.ndarray]:
        """The byte addresses of [base + offset] as a function of the active threads, int64."""
        if not isinstance(operand, Address):
            raise PtxFault(f"{operand} is no address")
        wide = isinstance(operand.base, Register) and operand.base.bits == 64
        base = self.source(operand.base, "s64" if wide else "u32")
        offset = np.int64(operand.offset)
        return lambda lanes: base[lanes] + offset

    def thread_name(self, thread: int) -> str:
        x, y, z = (int(self._special[f"%ctaid.{axis}"][thread]) for axis in "xyz")
        return f"thread {thread % self.block_threads} of block ({x}, {y}, {z})"

    def active(self, mask: Mask) -> Lanes:
        return slice(None) if mask is True else np.flatnonzero(mask)


def special_registers(launch: Launch, blocks: int) -> dict[str, np.ndarray]:
    """%tid, %ctaid (zero as yet) and so on: [threads of all blocks] int64."""
    threads = launch.kernel.threads
    thread = np.tile(np.arange(threads), blocks)
    lane = thread % WARP
    x, y, z = launch.grid
    values: dict[str, np.ndarray | int] = {
        "tid.x": thread,
        "tid.y": 0,
        "tid.z": 0,
        "ntid.x": threads,
        "ntid.y": 1,
        "ntid.z": 1,
        "ctaid.x": 0,
        "ctaid.y": 0,
        "ctaid.z": 0,
        "nctaid.x": x,
        "nctaid.y": y,
        "nctaid.z": z,
        "laneid": lane,
        "warpid": thread // WARP,
        "lanemask_eq": 1 << lane,
        "lanemask_lt": (1 << lane) - 1,
        "lanemask_le": (2 << lane) - 1,
        "lanemask_gt": 0xFFFFFFFF & -(2 << lane),
        "lanemask_ge": 0xFFFFFFFF & -(1 << lane),
        "dynamic_smem_size": launch.shared_bytes,
        "total_smem_size": launch.shared_bytes,
    }
    return {f"%{name}": np.full(thread.shape, value, np.int64) for name, value in values.items()}


def elementwise(instruction: Instruction, machine: Machine) -> Step:
    """The step of an instruction that is an `Operation`."""
    meaning = operation(instruction.opcode)
    destination, *operands = instruction.operands
    if len(operands) != len(meaning.operands):
        raise PtxFault(f"{len(meaning.operands)} operands expected")
    target = machine.target(destination, meaning.result)
    inverted = [isinstance(o, Negated) for o in operands]
    registers = [o.register if isinstance(o, Negated) else o for o in operands]
    sources = [machine.source(o, kind) for o, kind in zip(registers, meaning.operands, strict=True)]
    function = meaning.function
    if any(inverted):

        def assign_inverted(mask: Mask) -> None:
            values = (~source if invert else source for source, invert in zip(sources, inverted, strict=True))
            np.copyto(target, function(*values), casting="unsafe", where=mask)

        return assign_inverted
    if isinstance(function, np.ufunc) and target.dtype == DTYPES[meaning.result]:
        return lambda mask: function(*sources, out=target, where=mask)
    return lambda mask: np.copyto(target, function(*sources), casting="unsafe", where=mask)


def move(instruction: Instruction, machine: Machine) -> Step:
    """mov, which also packs and unpacks {low, ..., high}; cvta, an addition."""
    opcode = Opcode(instruction.opcode)
    kind = opcode.take_type()
    opcode.finish()
    destination, operand = instruction.operands
    if isinstance(destination, Vector):
        part = f"b{bits_of(kind) // len(destination.elements)}"
        whole = machine.source(operand, kind)
        parts = whole.view(DTYPES[part]).reshape(machine.threads, -1).T
        targets = [machine.target(element, part) for element in destination.elements]

        def unpack(mask: Mask) -> None:
            for target, value in zip(targets, parts.copy(), strict=True):
                np.copyto(target, value, where=mask)

        return unpack
    target = machine.target(destination, kind)
    if isinstance(operand, Vector):
        part = f"b{bits_of(kind) // len(operand.elements)}"
        sources = [machine.source(element, part) for element in operand.elements]
        return lambda mask: np.copyto(target, np.stack(sources, axis=1).view(target.dtype)[:, 0], where=mask)
    source = machine.source(operand, kind)
    return lambda mask: np.copyto(target, source, casting="unsafe", where=mask)


def convert_address(instruction: Instruction, machine: Machine) -> Step:
    """cvta: only shared memory has generic addresses other than its own."""
    opcode = Opcode(instruction.opcode)
    back = opcode.has("to")
    space = opcode.take("global", "shared", "const", "param")
    kind = opcode.take_type("u64")
    opcode.finish()
    shift = np.uint64(SHARED_WINDOW if space == "shared" else 0)
    target, source = (machine.target(instruction.operands[0], kind), machine.source(instruction.operands[1], kind))
    change = np.subtract if back else np.add
    return lambda mask: np.copyto(target, change(source, shift), where=mask)
