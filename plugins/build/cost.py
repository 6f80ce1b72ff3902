"""What machine code costs at best: occupancy, and cycles of each pipe in the hot loop (spec: kernel_technology.md 6).

Registers, occupancy, instructions and bytes are exact. Cycles are a bound under assumed rates: latencies, the L2 and
the clock's changes are not in them. None of it is a measurement.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from plugins.build.sass import SYSTEM_SHARED, Instruction, KernelCode, Loop
from plugins.launch import Launch

WARP = 32
PARTITIONS = 4  # of an SM; each issues one instruction a cycle
SM_REGISTERS, REGISTER_GRANULE = 65536, 256  # 32-bit; of a warp
SHARED_GRANULE = 128


@dataclass(frozen=True)
class SmLimits:
    """An SM's limits (spec: kernel_technology.md 6.2). shared: bytes."""

    shared: int
    blocks: int
    warps: int = 48


LIMITS = {
    "sm_86": SmLimits(100 << 10, 16),
    "sm_87": SmLimits(164 << 10, 16),
    "sm_89": SmLimits(100 << 10, 24),
    "sm_120": SmLimits(100 << 10, 24),
}


@dataclass(frozen=True)
class Board:
    """A device by its data sheet: bandwidth in GB/s, clock in GHz."""

    name: str
    architecture: str
    bandwidth: float
    sms: int
    clock: float

    def dram_cycles(self, size: float) -> float:
        """Cycles until one partition's share of the bandwidth has brought `size` bytes."""
        return size * self.sms * PARTITIONS * self.clock / self.bandwidth


BOARDS = (
    Board("Jetson AGX Orin", "sm_87", 204.8, 16, 1.3),
    Board("RTX 3060", "sm_86", 360, 28, 1.78),
    Board("RTX 4090", "sm_89", 1008, 128, 2.52),
    Board("RTX 5090", "sm_120", 1792, 170, 2.41),
)


@dataclass(frozen=True)
class Occupancy:
    """Thread blocks that an SM holds at once, and what keeps it from more: warps, registers, shared or blocks."""

    blocks: int
    limit: str


@dataclass(frozen=True)
class Cost:
    """A launch's kernel on one architecture, per warp and iteration of its hot loop (the whole kernel without loops).

    shared: bytes of a block. hmma, ldsm, ldgsts: instructions. pipes: cycles of a partition. stalls: the sum of ptxas'
    stall counts, which one warp alone needs. read_bytes: asked of global memory; once_bytes: those by load_once of
    simt/ptx.h, which no cache has.
    """

    kernel: str
    architecture: str
    registers: int
    spills: int
    stack: int
    shared: int
    ctas_per_sm: int
    limit: str
    has_loop: bool
    instructions: int
    hmma: int
    ldsm: int
    ldgsts: int
    pipes: dict[str, int]
    stalls: int
    read_bytes: int
    once_bytes: int

    @property
    def bound(self) -> str:
        """The pipe with most to do."""
        return max(self.pipes, key=lambda pipe: self.pipes[pipe])

    @property
    def instructions_per_hmma(self) -> float | None:
        """None without tensor instructions."""
        return self.instructions / self.hmma if self.hmma else None

    @property
    def instructions_per_byte(self) -> float | None:
        """Per byte that a warp reads; None if the loop reads no global memory."""
        return self.instructions / self.read_bytes if self.read_bytes else None

    def memory_bound_ratio(self, board: Board) -> float:
        """Cycles that DRAM needs for what is read once (for all that is read, if nothing is marked so), over those of
        the slowest pipe: above 1 the bandwidth decides."""
        return board.dram_cycles(self.once_bytes or self.read_bytes) / max(self.pipes.values())


def board_of(architecture: str) -> Board:
    """The board that stands for an architecture."""
    return next(board for board in BOARDS if board.architecture == architecture)


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> Occupancy:
    """Blocks an SM holds, by threads and shared bytes of a block and registers of a thread (spec:
    kernel_technology.md 6.2)."""
    limits = LIMITS[architecture]
    warps = -(-threads // WARP)
    warp_registers = -(-registers * WARP // REGISTER_GRANULE) * REGISTER_GRANULE
    block_shared = -(-(shared + SYSTEM_SHARED) // SHARED_GRANULE) * SHARED_GRANULE
    blocks = {
        "warps": limits.warps // warps,
        "registers": SM_REGISTERS // PARTITIONS // warp_registers * PARTITIONS // warps,
        "shared": limits.shared // block_shared,
        "blocks": limits.blocks,
    }
    limit = min(blocks, key=lambda name: blocks[name])
    return Occupancy(blocks[limit], limit)


def hot_loop(code: KernelCode) -> Loop | None:
    """The innermost loop with most tensor instructions; without any, with most bytes of global memory, then with most
    instructions. Of two that do the same work it is the shorter: the longer one masks, for a few blocks at the edge.
    None if the kernel has no loop.
    """
    measures = (_tensor_count, _total_bytes)
    measure = next((m for m in measures if any(m(loop.instructions) for loop in code.loops)), len)
    working = [loop for loop in code.loops if measure(loop.instructions)]
    innermost = [loop for loop in working if not any(loop.contains(other) for other in working)]

    def rank(loop: Loop) -> tuple[int, int, int]:
        size = len(loop.instructions)
        return _tensor_count(loop.instructions), _total_bytes(loop.instructions), size if measure is len else -size

    return max(innermost, key=rank, default=None)


def cost(code: KernelCode, launch: Launch) -> Cost:
    """What `launch` costs with this code."""
    shared = code.shared + launch.shared_bytes
    held = occupancy(code.architecture, launch.kernel.threads, code.registers, shared)
    loop = hot_loop(code)
    work = loop.instructions if loop else tuple(i for i in code.instructions if i.name != "NOP")
    names = Counter(instruction.name for instruction in work)
    return Cost(
        kernel=code.name,
        architecture=code.architecture,
        registers=code.registers,
        spills=code.spills,
        stack=code.stack,
        shared=shared,
        ctas_per_sm=held.blocks,
        limit=held.limit,
        has_loop=loop is not None,
        instructions=len(work),
        hmma=_tensor_count(work),
        ldsm=names["LDSM"],
        ldgsts=names["LDGSTS"],
        pipes=pipe_cycles(work, code.architecture),
        stalls=sum(instruction.stall for instruction in work),
        read_bytes=_total_bytes(work),
        once_bytes=sum(_read_bytes(i) for i in work if "NA" in i.opcode.split(".")),
    )


def pipe_cycles(work: Sequence[Instruction], architecture: str) -> dict[str, int]:
    """Cycles that each pipe of a partition is busy with a warp's instructions (spec: kernel_technology.md 6.3)."""
    cycles = Counter({"issue": len(work)})
    for instruction in work:
        pipe, count = _pipe(instruction, architecture)
        if pipe is not None:
            cycles[pipe] += count
    return dict(cycles)


def _is_tensor(instruction: Instruction) -> bool:
    return instruction.name in ("HMMA", "IMMA")


def _tensor_count(work: Sequence[Instruction]) -> int:
    return sum(map(_is_tensor, work))


def _total_bytes(work: Sequence[Instruction]) -> int:
    return sum(map(_read_bytes, work))


def _read_bytes(instruction: Instruction) -> int:
    return instruction.width * WARP if instruction.name in ("LDG", "LDGSTS") else 0


_FLOAT = {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"}
_HALF = {"HFMA2", "HADD2", "HMUL2"}
_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"}
_LOAD_STORE = {"LDG", "STG", "LDS", "STS", "LDSM", "LDGSTS", "LDL", "STL", "LD", "ST", "ATOM", "ATOMG", "ATOMS", "RED"}
# Issue slots only: control flow, the uniform data path, constants and special registers.
_ISSUE_ONLY = re.compile(
    r"(U[A-Z0-9]+|R2U|S2R|S2UR|CS2R|LDC|LDCU|BAR|BRA|BRX|BSSY|BSYNC|BREAK|BMOV|CALL|RET|EXIT|NOP|DEPBAR|LDGDEPBAR|"
    r"WARPSYNC|VOTE|VOTEU|MEMBAR|ERRBAR|CCTL|YIELD|ACQBULK|NANOSLEEP)$"
)


def _pipe(instruction: Instruction, architecture: str) -> tuple[str | None, int]:
    """The pipe that takes an instruction, and for how many cycles."""
    name, half_rate = instruction.name, 1 if architecture == "sm_120" else 2
    if _is_tensor(instruction):
        return "tensor", _tensor_cycles(instruction, architecture)
    if name in _FLOAT:
        return "fma", 1
    if name in _HALF:
        # Twice float32's rate in values only on Orin (as on A100), and there for fp16 alone.
        return "fma", 1 if architecture == "sm_87" and "BF16" not in instruction.opcode else 2
    if name.startswith("IMAD"):
        return "fma", half_rate
    if name in _SPECIAL:
        return "special", 8
    if name in _LOAD_STORE:
        # One data path of 128 bytes a clock for the SM's four partitions.
        return "memory", max(instruction.width, 4) * _matrices(instruction)
    if name == "SHFL":
        return "memory", 4
    if _ISSUE_ONLY.match(name):
        return None, 0
    return "alu", half_rate


def _matrices(instruction: Instruction) -> int:
    """LDSM: its count of 8 x 8 matrices, each a 32-bit register per lane; others: 1."""
    modifiers = instruction.opcode.split(".")
    return int(modifiers[-1]) if instruction.name == "LDSM" and modifiers[-1] in ("2", "4") else 1


def _tensor_cycles(instruction: Instruction, architecture: str) -> int:
    """GeForce adds float32 at half the rate (spec: kernel_technology.md 6.3)."""
    if architecture == "sm_87":
        full = 8
    else:
        full = 32 if ".F32" in instruction.opcode else 16
    # m16n8k16 of 16-bit values, m16n8k32 of int8; other shapes are half of these
    return full if re.search("16816|16832", instruction.opcode) else full // 2
