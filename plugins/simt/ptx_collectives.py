"""Instructions of whole warps: shuffles, votes, matrices (PTX ISA 9.7.9.6, 9.7.13, 9.7.14). Barriers need no step.

The fragment maps are those of the ISA's figures for mma.m16n8k16 and ldmatrix; lane 4g + q is row (or column) g.
"""

from __future__ import annotations

import numpy as np

from plugins.simt.ptx_accesses import elements, empty
from plugins.simt.ptx_machine import WARP, Machine, Mask, Step
from plugins.simt.ptx_numbers import decode
from plugins.simt.ptx_opcode import Function, Opcode
from plugins.simt.ptx_parser import Instruction, Negated, Operand, Pair, PtxFault

ALL_LANES = 0xFFFFFFFF


def check_members(members: np.ndarray) -> None:
    if (members != ALL_LANES).any():
        raise PtxFault("a collective names only some lanes of its warp: use the mask 0xffffffff")


def shuffle(instruction: Instruction, machine: Machine) -> Step:
    """shfl.sync.<up|down|bfly|idx>.b32 d[|p], a, b, c, mask; p: whether the source lane is in the segment."""
    opcode = Opcode(instruction.opcode)
    opcode.take("sync")
    mode = opcode.take("up", "down", "bfly", "idx")
    kind = opcode.take_type("b32")
    opcode.finish()
    destination, *operands = instruction.operands
    pair = destination if isinstance(destination, Pair) else None
    target = machine.target(pair.first if pair else destination, kind)
    inside = machine.target(pair.second, "pred") if pair else None
    value, b, c, members = (machine.source(operand, "u32") for operand in operands)

    def step(mask: Mask) -> None:
        lanes = machine.active(mask)
        if empty(lanes):
            return
        check_members(members[lanes])
        rows = value[lanes].reshape(-1, WARP)
        source, valid = source_lanes(mode, b[lanes].reshape(-1, WARP), c[lanes].reshape(-1, WARP))
        target[lanes] = np.take_along_axis(rows, source, axis=1).reshape(-1)
        if inside is not None:
            inside[lanes] = valid.reshape(-1)

    return step


def source_lanes(mode: str, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[warps, 32] lane that each lane reads, and whether it is in the lane's segment (else it reads itself)."""
    lane = np.arange(WARP)
    b, clamp, segment = (v.astype(np.int64) & 31 for v in (b, c, c >> np.uint32(8)))
    lowest = lane & segment
    last = lowest | (clamp & ~segment)
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
    valid = source >= last if mode == "up" else source <= last
    return np.where(valid, source, lane), valid


VOTES: dict[str, Function] = {  # [warps, 32] -> [warps]
    "all": lambda votes: votes.all(axis=1),
    "any": lambda votes: votes.any(axis=1),
    "uni": lambda votes: votes.all(axis=1) | ~votes.any(axis=1),
    "ballot": lambda votes: np.packbits(votes, axis=1, bitorder="little").view(np.uint32)[:, 0],
}


def vote(instruction: Instruction, machine: Machine) -> Step:
    """vote.sync.<all|any|uni>.pred p, a, mask and vote.sync.ballot.b32 d, a, mask"""
    opcode = Opcode(instruction.opcode)
    opcode.take("sync")
    mode = opcode.take(*VOTES)
    kind = opcode.take_type("b32" if mode == "ballot" else "pred")
    opcode.finish()
    destination, operand, mask_operand = instruction.operands
    target = machine.target(destination, kind)
    inverted = isinstance(operand, Negated)
    predicate = machine.source(operand.register if isinstance(operand, Negated) else operand, "pred")
    members = machine.source(mask_operand, "u32")

    def step(mask: Mask) -> None:
        lanes = machine.active(mask)
        if empty(lanes):
            return
        check_members(members[lanes])
        votes = (predicate[lanes] ^ inverted).reshape(-1, WARP)
        target[lanes] = np.repeat(VOTES[mode](votes), WARP)

    return step


def load_matrices(instruction: Instruction, machine: Machine) -> Step:
    """ldmatrix.sync.aligned.m8n8.x<n>[.trans].shared.b16 {r...}, [row]: lane 8 k + i gives row i of matrix k."""
    opcode = Opcode(instruction.opcode)
    for modifier in ("sync", "aligned", "m8n8"):
        opcode.take(modifier)
    count = int(opcode.take("x1", "x2", "x4")[1])
    transposed = opcode.has("trans")
    opcode.take("shared", "shared::cta")
    opcode.take_type("b16")
    opcode.finish()
    targets = [machine.target(element, "b32") for element in elements(instruction.operands[0], count)]
    addresses = machine.addresses(instruction.operands[1])

    def step(mask: Mask) -> None:
        lanes = np.arange(machine.threads)[machine.active(mask)]
        if not lanes.size:
            return
        givers = lanes[lanes % WARP < 8 * count]
        rows = addresses(givers)
        index = machine.shared.locate(rows, 16, givers, False)
        machine.bank_conflicts += extra_wavefronts(rows)
        matrices = machine.shared.load(index, 16).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, WARP)  # word 4 g + q: two columns
        for i, target in enumerate(targets):
            target[lanes] = words[:, i].reshape(-1)

    return step


def extra_wavefronts(rows: np.ndarray) -> int:
    """Eight rows of 16 bytes are one wavefront if they lie in different banks."""
    banks = rows.reshape(-1, 8, 1) // 16 % 8 == np.arange(8)
    return int((banks.sum(axis=1).max(axis=1) - 1).sum())


def matrix_multiply(instruction: Instruction, machine: Machine) -> Step:
    """mma.sync.aligned.m16n8k16.row.col.f32.<f16|bf16>.<same>.f32 d, a, b, c: sums in float64, rounded once."""
    opcode = Opcode(instruction.opcode)
    for modifier in ("sync", "aligned", "m16n8k16", "row", "col", "f32"):
        opcode.take(modifier)
    kind = opcode.take_type("f16", "bf16")
    opcode.take_type(kind)
    opcode.take_type("f32")
    opcode.finish()
    d, a, b, c = instruction.operands
    targets = [machine.target(element, "f32") for element in elements(d, 4)]
    rows, columns = fragment(machine, a, 4, "b32"), fragment(machine, b, 2, "b32")
    start = fragment(machine, c, 4, "f32")

    def step(mask: Mask) -> None:
        lanes = machine.active(mask)
        if empty(lanes):
            return
        left, right, plus = (np.stack([r[lanes] for r in registers]) for registers in (rows, columns, start))
        # a: register (upper column half, upper row half), lane (g, q), 16-bit half -> [warp, row, column]
        left = decode(kind, left).reshape(2, 2, -1, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)
        # b: register (upper row half), lane (g, q), 16-bit half -> [warp, row, column g]
        right = decode(kind, right).reshape(2, -1, 8, 4, 2).transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)
        # c, d: register (lower row half, odd column), lane (g, q) -> [warp, row, column]
        plus = plus.reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
        sums = (np.matmul(left, right) + plus).astype(np.float32)
        result = sums.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for target, values in zip(targets, result, strict=True):
            target[lanes] = values
        machine.mma += len(sums)

    return step


def fragment(machine: Machine, operand: Operand, count: int, kind: str) -> list[np.ndarray]:
    return [machine.source(element, kind) for element in elements(operand, count)]
