"""Executes the PTX that a kernel compiles to, on the CPU: the second route beside emulator.py.

It sees what the emulator cannot: the inline assembly and what the compiler made of the source. All threads of a batch
of blocks go through each instruction together, in numpy. Where threads part, those at the lowest basic block go first;
barriers, shuffles and matrix instructions wait for all threads of their block or warp, and it is a fault if these
cannot all come. Blocks of a batch run in lock-step, so races do not show: that is the emulator's part.
(spec: kernel_technology.md 3.5)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge.errors import UsageError
from plugins.build.nvrtc import ptx
from plugins.launch import Kernel, Launch, divide_up
from plugins.simt import Report
from plugins.simt.ptx_accesses import atomic, copy_async, load, store
from plugins.simt.ptx_collectives import load_matrices, matrix_multiply, shuffle, vote
from plugins.simt.ptx_machine import WARP, Machine, Mask, Step, convert_address, elementwise, move
from plugins.simt.ptx_memory import GlobalMemory
from plugins.simt.ptx_operations import FAMILIES
from plugins.simt.ptx_parser import Entry, Immediate, Instruction, Name, Negated, PtxFault, parse

__all__ = ["PtxFault", "execute", "run"]

THREADS_AT_ONCE = 8192  # of a batch: numpy's cost of a call is then small beside its work
MOST_STEPS = 3_000_000  # basic blocks of a batch, before it is taken for an endless loop

STEPS: dict[str, Callable[[Instruction, Machine], Step]] = {
    **dict.fromkeys(FAMILIES, elementwise),
    "mov": move,
    "cvta": convert_address,
    "ld": load,
    "st": store,
    **dict.fromkeys(("atom", "red"), atomic),
    "cp": copy_async,
    "shfl": shuffle,
    "vote": vote,
    "ldmatrix": load_matrices,
    "mma": matrix_multiply,
}
COLLECTIVES = ("shfl", "vote", "ldmatrix", "mma")
FENCES = ("membar", "fence")  # nothing is out of order here
EXITS = ("ret", "exit")


def run(
    launches: Sequence[Launch],
    buffers: Mapping[str, np.ndarray],
    transform: Callable[[str], str] | None = None,
) -> Report:
    """Compiles the launches' kernels to PTX for sm_87 and executes them in order; `buffers` are changed in place.

    A launch's arguments name buffers; reads and writes must stay inside them. transform: changes the PTX first
    (tests plant errors). Raises PtxFault; the buffers are then unchanged.
    """
    kernels = dict.fromkeys(launch.kernel for launch in launches)
    texts = {kernel: ptx([kernel], architecture="sm_87") for kernel in kernels}
    return execute(launches, buffers, {k: transform(text) if transform else text for k, text in texts.items()})


def execute(launches: Sequence[Launch], buffers: Mapping[str, np.ndarray], texts: Mapping[Kernel, str]) -> Report:
    """`run` for kernels whose PTX is at hand."""
    for name, buffer in buffers.items():
        if not buffer.flags.c_contiguous:
            raise UsageError(f"buffer '{name}' is not C-contiguous: pass a contiguous copy")
    memory = GlobalMemory(buffers)
    with np.errstate(all="ignore"):
        counts = [_launch(launch, parse(texts[launch.kernel], launch.kernel.symbol), memory) for launch in launches]
    memory.copy_back()
    return Report(memory.bytes_read, memory.bytes_written, sum(c for c, _ in counts), sum(m for _, m in counts))


def _launch(launch: Launch, entry: Entry, memory: GlobalMemory) -> tuple[int, int]:
    """Executes one launch, some blocks at a time. -> bank conflicts, matrix instructions"""
    threads, packed, size = launch.kernel.threads, launch.pack(memory.addresses()), entry.parameter_bytes
    if threads % WARP or not 0 < threads <= 1024:
        raise UsageError(f"{entry.name}: blocks of {threads} threads; they must be a multiple of 32 up to 1024")
    if len(packed) != size:
        raise UsageError(f"{entry.name}: the launch's arguments take {len(packed)} bytes, the kernel's struct {size}")
    blocks = int(np.prod(launch.grid))
    size = divide_up(blocks, divide_up(blocks, max(1, THREADS_AT_ONCE // threads))) if blocks else 1
    conflicts = mma = 0
    for start in range(0, blocks, size):
        if start == 0 or start + size > blocks:  # the last batch may be smaller
            machine = Machine(entry, launch, memory, packed, min(size, blocks - start))
            program = _basic_blocks(entry, machine)
        machine.begin(start)
        _execute(program, machine)
        conflicts, mma = conflicts + machine.bank_conflicts, mma + machine.mma
    return conflicts, mma


@dataclass
class BasicBlock:
    """Steps without a jump into or out of them, then perhaps a jump.

    first: the instruction it begins with; group: threads that must be here together (1, a warp, a block).
    """

    first: Instruction
    group: int
    steps: list[Step] = field(default_factory=list)
    target: int | None = None
    guard: Callable[[], np.ndarray] | None = None

    def next(self, position: int) -> int | np.ndarray:
        """Where its threads go, all or each; it is block `position` itself."""
        if self.target is None:
            return position + 1
        if self.guard is None:
            return self.target
        taken = self.guard()
        return np.where(taken, self.target, position + 1)


def _basic_blocks(entry: Entry, machine: Machine) -> list[BasicBlock]:
    """The entry's instructions as steps on `machine`."""
    starts = _block_starts(entry, machine.block_threads)
    numbers = {index: number for number, index in enumerate(sorted(starts))}
    blocks: list[BasicBlock] = []
    for index, instruction in enumerate(entry.instructions):
        try:
            if index in numbers:
                blocks.append(BasicBlock(instruction, starts[index]))
            _append(blocks[-1], instruction, machine, entry, numbers)
        except PtxFault as fault:
            raise PtxFault(f"{entry.name}: {fault} in {instruction.where}") from None
    return blocks


def _block_starts(entry: Entry, block_threads: int) -> dict[int, int]:
    """Indices of instructions that begin a basic block -> the group of threads that must enter it together."""
    jumps = [i + 1 for i, instruction in enumerate(entry.instructions) if instruction.base in ("bra", *EXITS)]
    starts = dict.fromkeys([0, *entry.labels.values(), *jumps], 1)
    group = 1
    for index, instruction in enumerate(entry.instructions):
        if index in starts:
            group = 1
        needed = 1 if instruction.predicate else _group(instruction, block_threads)
        if needed > group:
            starts[index] = group = needed
    return {index: group for index, group in starts.items() if index < len(entry.instructions)}


def _group(instruction: Instruction, block_threads: int) -> int:
    """How many threads execute the instruction together."""
    if instruction.base in ("bar", "barrier"):
        return WARP if ".warp" in instruction.opcode else block_threads
    return WARP if instruction.base in COLLECTIVES else 1


def _append(
    block: BasicBlock, instruction: Instruction, machine: Machine, entry: Entry, numbers: dict[int, int]
) -> None:
    """Adds the instruction's step, or makes it the block's jump."""
    base = instruction.base
    end = len(numbers)
    if base == "bra":
        label = instruction.operands[0]
        if not isinstance(label, Name) or label.name not in entry.labels:
            raise PtxFault("unknown label")
        block.target = numbers.get(entry.labels[label.name], end)
        block.guard = _guard(instruction, machine)
    elif base in EXITS:
        block.steps.append(_guarded(lambda mask: machine.copies.check_none(machine.active(mask)), instruction, machine))
        block.target = end
        block.guard = _guard(instruction, machine)
    elif base in ("bar", "barrier"):
        _check_barrier(instruction)
        if instruction.predicate:
            block.steps.append(_guarded(lambda mask: None, instruction, machine))
    elif base in STEPS:
        block.steps.append(_guarded(STEPS[base](instruction, machine), instruction, machine))
    elif base not in FENCES:
        raise PtxFault(f"unknown opcode {instruction.opcode}")


def _check_barrier(instruction: Instruction) -> None:
    """Only __syncthreads and __syncwarp of whole warps: no named, counted or reducing barriers."""
    modifiers = set(instruction.opcode.split(".")[1:])
    expected = (Immediate(-1), Immediate(0xFFFFFFFF)) if "warp" in modifiers else (Immediate(0),)
    if not modifiers <= {"sync", "aligned", "warp", "cta"} or "sync" not in modifiers:
        raise PtxFault(f"unknown opcode {instruction.opcode}")
    if len(instruction.operands) != 1 or instruction.operands[0] not in expected:
        raise PtxFault("a barrier of only some threads")


def _guard(instruction: Instruction, machine: Machine) -> Callable[[], np.ndarray] | None:
    predicate = instruction.predicate
    if predicate is None:
        return None
    if isinstance(predicate, Negated):
        inverted = machine.source(predicate.register, "pred")
        return lambda: ~inverted
    values = machine.source(predicate, "pred")
    return lambda: values


def _guarded(step: Step, instruction: Instruction, machine: Machine) -> Step:
    """The step for the threads whose guard holds; its faults name the instruction."""
    guard = _guard(instruction, machine)
    if guard is None and STEPS.get(instruction.base) in (elementwise, move):
        return step  # which cannot fail
    group = _group(instruction, machine.block_threads)

    def located(mask: Mask) -> None:
        try:
            if guard is not None:
                mask = guard() & mask
                if group > 1:
                    _check_whole(mask, group)
            step(mask)
        except PtxFault as fault:
            who = "" if fault.thread is None else f", {machine.thread_name(fault.thread)}"
            raise PtxFault(f"{machine.entry.name}{who}: {fault} in {instruction.where}") from None

    return located


def _check_whole(mask: np.ndarray, group: int) -> None:
    rows = mask.reshape(-1, group)
    if (rows.any(axis=1) != rows.all(axis=1)).any():
        raise PtxFault(f"only some of the {group} threads of a {'warp' if group == WARP else 'block'} execute it")


def _execute(blocks: list[BasicBlock], machine: Machine) -> None:
    """Runs all threads of `machine` to their end."""
    end, position = len(blocks), 0
    mask: Mask = True
    at = np.zeros(machine.threads, np.int64)  # the basic block each thread is to execute, if they are apart
    waiting = np.zeros(machine.threads, bool)  # for others of their warp or block
    for _ in range(MOST_STEPS):
        block = blocks[position]
        for step in block.steps:
            step(mask)
        following = block.next(position)
        if mask is True and isinstance(following, np.ndarray) and (following == following[0]).all():
            following = int(following[0])
        if mask is not True or isinstance(following, np.ndarray):
            np.copyto(at, following, where=mask)
            position, mask = _choose(blocks, at, waiting, machine)
        else:
            position = following
        if position == end:
            return
    raise PtxFault(f"{machine.entry.name}: no end after {MOST_STEPS} basic blocks")


def _choose(blocks: list[BasicBlock], at: np.ndarray, waiting: np.ndarray, machine: Machine) -> tuple[int, Mask]:
    """The lowest basic block that threads can execute, and these threads; len(blocks) when all have ended."""
    while True:
        position = int(np.min(at, where=~waiting, initial=len(blocks)))
        if position == len(blocks):
            if waiting.any():
                raise _divergence(blocks, at, waiting, machine)
            return position, True
        active = at == position
        group = blocks[position].group
        if group > 1:
            whole = np.repeat(active.reshape(-1, group).all(axis=1), group)
            waiting[active] = ~whole[active]
            active &= whole
            if not active.any():
                continue
        return position, bool(active.all()) or active


def _divergence(blocks: list[BasicBlock], at: np.ndarray, waiting: np.ndarray, machine: Machine) -> PtxFault:
    """The fault of threads that wait for others which cannot come."""
    thread = int(np.flatnonzero(waiting)[0])
    block = blocks[at[thread]]
    members = slice(thread // block.group * block.group, (thread // block.group + 1) * block.group)
    count = int((at[members] == at[thread]).sum())
    what = "warp" if block.group == WARP else "block"
    return PtxFault(
        f"{machine.entry.name}: in divergent code, reached by {count} of {block.group} threads of a {what}: "
        f"{block.first.where}"
    )
