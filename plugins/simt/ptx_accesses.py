"""Loads, stores, atomics and asynchronous copies (PTX ISA 9.7.9, 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from plugins.simt.ptx_machine import Machine, Mask, Step
from plugins.simt.ptx_memory import SHARED_WINDOW, SHARED_WINDOW_BYTES, Space
from plugins.simt.ptx_numbers import DTYPES
from plugins.simt.ptx_opcode import Function, Opcode
from plugins.simt.ptx_parser import Immediate, Instruction, Operand, PtxFault, Vector

Locate = Callable[[np.ndarray], tuple[Space, np.ndarray]]  # addresses -> the memory they are in, the addresses there

# Says nothing about values in one thread after the other: ordering, scope, caching.
HINTS = (
    *("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys"),
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"),
)


def take_space(opcode: Opcode, machine: Machine) -> Locate:
    """The memory that the opcode names; without a name the addresses decide."""
    if opcode.has("local"):
        raise PtxFault("spilled or indexed local memory")
    if opcode.has("param"):
        return lambda addresses: (machine.parameters, addresses)
    if opcode.one_of("shared", "shared::cta"):
        return lambda addresses: (machine.shared, addresses)
    if opcode.has("global"):
        return lambda addresses: (machine.memory, addresses)

    def generic(addresses: np.ndarray) -> tuple[Space, np.ndarray]:
        shared = (addresses >= SHARED_WINDOW) & (addresses < SHARED_WINDOW + SHARED_WINDOW_BYTES)
        if shared.all():
            return machine.shared, addresses - SHARED_WINDOW
        if shared.any():
            raise PtxFault("one access to both shared and global memory")
        return machine.memory, addresses

    return generic


def take_hints(opcode: Opcode) -> None:
    opcode.left = [m for m in opcode.left if m not in HINTS and not m.startswith(("L1::", "L2::"))]


def elements(operand: Operand, count: int) -> tuple[Operand, ...]:
    """The registers of a vector of `count`, or a scalar alone."""
    parts = operand.elements if isinstance(operand, Vector) else (operand,)
    if len(parts) != count:
        raise PtxFault(f"a vector of {count} expected")
    return parts


def empty(lanes: slice | np.ndarray) -> bool:
    return isinstance(lanes, np.ndarray) and lanes.size == 0


def read_access(instruction: Instruction, machine: Machine) -> tuple[str, int, Locate]:
    """ld and st: type, number of elements, and the memory."""
    opcode = Opcode(instruction.opcode)
    space = take_space(opcode, machine)
    take_hints(opcode)
    count = int((opcode.one_of("v2", "v4") or "v1")[1])
    kind = opcode.take_type()
    opcode.finish()
    if count * DTYPES[kind].itemsize > 16:
        raise opcode.unknown()
    return kind, count, space


def load(instruction: Instruction, machine: Machine) -> Step:
    kind, count, space = read_access(instruction, machine)
    targets = [machine.target(element, kind) for element in elements(instruction.operands[0], count)]
    addresses = machine.addresses(instruction.operands[1])
    dtype, size = DTYPES[kind], DTYPES[kind].itemsize * count

    def step(mask: Mask) -> None:
        lanes = machine.active(mask)
        if empty(lanes):
            return
        memory, at = space(addresses(lanes))
        values = memory.load(memory.locate(at, size, lanes, False), size).view(dtype)
        for i, target in enumerate(targets):
            target[lanes] = values[:, i]

    return step


def store(instruction: Instruction, machine: Machine) -> Step:
    kind, count, space = read_access(instruction, machine)
    sources = [machine.source(element, kind) for element in elements(instruction.operands[1], count)]
    addresses = machine.addresses(instruction.operands[0])
    size = DTYPES[kind].itemsize * count

    def step(mask: Mask) -> None:
        lanes = machine.active(mask)
        if empty(lanes):
            return
        memory, at = space(addresses(lanes))
        values = np.stack([source[lanes] for source in sources], axis=1)
        memory.store(memory.locate(at, size, lanes, True), values.view(np.uint8))

    return step


ATOMIC: dict[str, Function] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}


def in_turn(places: np.ndarray) -> Iterator[np.ndarray]:
    """Sets of accesses without two to one place; those to the same place come in order."""
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    number = np.arange(len(places))
    first = np.append(True, ordered[1:] != ordered[:-1])
    turn = number - np.maximum.accumulate(np.where(first, number, 0))
    for i in range(int(turn.max()) + 1):
        yield order[turn == i]


def atomic(instruction: Instruction, machine: Machine) -> Step:
    """atom d, [a], b[, c] and red [a], b: threads of one address one after the other, the lowest first."""
    opcode = Opcode(instruction.opcode)
    name = opcode.take(*ATOMIC)
    space = take_space(opcode, machine)
    take_hints(opcode)
    kind = opcode.take_type("b32", "u32", "s32", "f32", "b64", "u64")
    opcode.finish()
    if kind == "f32" and name != "add":
        raise opcode.unknown()
    returns = opcode.base == "atom"
    location, *operands = instruction.operands[returns:]
    target = machine.target(instruction.operands[0], kind) if returns else None
    addresses = machine.addresses(location)
    sources = [machine.source(operand, kind) for operand in operands]
    dtype, function = DTYPES[kind], ATOMIC[name]

    def step(mask: Mask) -> None:
        lanes = machine.active(mask)
        if empty(lanes):
            return
        memory, at = space(addresses(lanes))
        places = memory.locate(at, dtype.itemsize, lanes, True) // dtype.itemsize
        words = memory.words[dtype.itemsize].view(dtype)
        values = [source[lanes] for source in sources]
        old = np.empty(len(places), dtype)
        for turn in in_turn(places):
            old[turn] = words[places[turn]]
            words[places[turn]] = function(old[turn], *(value[turn] for value in values))
        if target is not None:
            target[lanes] = old

    return step


def copy_async(instruction: Instruction, machine: Machine) -> Step:
    """cp.async.<ca|cg>.shared.global [to], [from], size[, bytes read], .commit_group, .wait_group n, .wait_all"""
    opcode = Opcode(instruction.opcode)
    if opcode.base != "cp" or not opcode.has("async"):
        raise opcode.unknown()
    action = opcode.one_of("commit_group", "wait_group", "wait_all")
    copies = machine.copies
    if action:
        opcode.finish()
        allowed = instruction.operands[0] if action == "wait_group" else Immediate(0)
        if not isinstance(allowed, Immediate):
            raise PtxFault("cp.async.wait_group needs a number")

        def end(mask: Mask) -> None:
            if action != "wait_group":
                copies.commit(machine.active(mask))
            if action != "commit_group":
                copies.wait(allowed.value, machine.active(mask))

        return end
    opcode.take("ca", "cg")
    opcode.take("shared", "shared::cta")
    opcode.take("global")
    take_hints(opcode)
    opcode.finish()
    to, source, size, *rest = instruction.operands
    if not isinstance(size, Immediate) or size.value not in (4, 8, 16):
        raise PtxFault("cp.async copies 4, 8 or 16 bytes")
    targets, sources = machine.addresses(to), machine.addresses(source)
    taken = machine.source(rest[0] if rest else size, "u32")

    def begin(mask: Mask) -> None:
        lanes = machine.active(mask)
        if not empty(lanes):
            copies.start(targets(lanes), sources(lanes), taken[lanes], size.value, lanes)

    return begin
