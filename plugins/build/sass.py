"""Machine code as data: what a cubin's kernels use, their instructions with ptxas' stall counts, and their loops."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edge.errors import EdgeError
from plugins.build.cache import cache_folder, write_atomically
from plugins.build.wheels import wheel_file, wheel_version

INSTRUCTION_BYTES = 16  # since sm_70
SYSTEM_SHARED = 1024  # bytes of shared memory that a block takes besides its own, since sm_80


@dataclass(frozen=True)
class Instruction:
    """address: bytes from the kernel's start; predicate: '@P0' or ''; stall: cycles until the warp's next issue."""

    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a memory instruction moves per lane."""
        modifiers = self.opcode.split(".")[1:]
        if "128" in modifiers or "64" in modifiers:
            return 16 if "128" in modifiers else 8
        return next((size for size, names in _NARROW.items() if names & set(modifiers)), 4)

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for other instructions and for computed targets."""
        match = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name in ("BRA", "BRX", "JMP") else None
        return int(match[1], 16) if match else None


_NARROW = {1: {"U8", "S8"}, 2: {"U16", "S16"}}


@dataclass(frozen=True)
class Loop:
    """A natural loop: its header's address and all instructions on a way from the header back to it."""

    header: int
    instructions: tuple[Instruction, ...]

    def contains(self, other: Loop) -> bool:
        """Whether `other` is nested in this loop."""
        return self != other and {i.address for i in other.instructions} <= {i.address for i in self.instructions}


@dataclass(frozen=True)
class KernelCode:
    """One kernel of a cubin. registers: of a thread; stack, shared (static): bytes of a thread and of a block."""

    name: str
    architecture: str
    registers: int
    stack: int
    shared: int
    instructions: tuple[Instruction, ...]

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return sum(instruction.name in ("LDL", "STL") for instruction in self.instructions)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Natural loops, in order of their headers; back edges to one header make one loop."""
        return tuple(find_loops(self.instructions))


def read_cubin(cubin: bytes) -> dict[str, KernelCode]:
    """The kernels of a cubin, by name."""
    code = _tool("nvidia-cuda-nvdisasm", "nvdisasm", "--emit-json", cubin)
    resources = _tool("nvidia-cuda-cuobjdump", "cuobjdump", "-res-usage", cubin)
    return parse_code(code, parse_resources(resources), _sections(cubin))


def parse_resources(text: str) -> dict[str, dict[str, int]]:
    """`cuobjdump -res-usage` -> {kernel: {'REG': 26, 'STACK': 0, 'SHARED': 0, ...}}."""
    found = re.findall(r"Function (\S+?):\s+(REG:.*)", text)
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


def parse_code(text: str, resources: dict[str, dict[str, int]], sections: dict[str, bytes]) -> dict[str, KernelCode]:
    """`nvdisasm --emit-json` with the kernels' resources and their machine code, which holds the stall counts."""
    header, functions = json.loads(text[text.index("[") :])
    version = header["SM"]["version"]
    kernels = {}
    for function in functions:
        name = function["function-name"]
        code = sections[f".text.{name}"][function["start"] :]
        instructions = tuple(_instruction(i, values, code) for i, values in enumerate(function["sass-instructions"]))
        used = resources[name]
        # From sm_90 on the kibibyte that every block loses to the system is counted too, if a kernel has any.
        shared = max(used["SHARED"] - (SYSTEM_SHARED if version["major"] >= 9 else 0), 0)
        architecture = f"sm_{version['major']}{version['minor']}"
        kernels[name] = KernelCode(name, architecture, used["REG"], used["STACK"], shared, instructions)
    return kernels


def find_loops(instructions: tuple[Instruction, ...]) -> Iterable[Loop]:
    """Loops of a kernel: a branch to a block that dominates its own closes one.

    (Code that ptxas moved behind the kernel's end jumps backwards too, and is no loop.)
    """
    blocks, successors = _flow(instructions)
    dominators = _dominators(successors)
    predecessors: dict[int, set[int]] = defaultdict(set)
    bodies: dict[int, set[int]] = defaultdict(set)
    for block, following in successors.items():
        for successor in following:
            predecessors[successor].add(block)
    for block in dominators:
        for header in successors[block] & dominators[block]:
            bodies[header] |= {header}
            open_blocks = [block]
            while open_blocks:
                if (inside := open_blocks.pop()) not in bodies[header]:
                    bodies[header].add(inside)
                    open_blocks += predecessors[inside] & dominators.keys()
    for header, body in sorted(bodies.items()):
        work = tuple(i for block in sorted(body) for i in blocks[block] if i.name != "NOP")
        if work != (blocks[header][-1],):  # a branch to itself fills the end of a kernel
            yield Loop(header, work)


def _flow(instructions: tuple[Instruction, ...]) -> tuple[dict[int, list[Instruction]], dict[int, set[int]]]:
    """Basic blocks and their successors, by first address."""
    starts = {0}
    for instruction in instructions:
        if instruction.name in _ENDS:
            starts.add(instruction.address + INSTRUCTION_BYTES)
            starts |= {instruction.target} if instruction.target is not None else set()
    blocks: dict[int, list[Instruction]] = {}
    for instruction in instructions:
        if instruction.address in starts:
            block = blocks[instruction.address] = []
        block.append(instruction)
    successors: dict[int, set[int]] = {}
    for start, block in blocks.items():
        last = block[-1]
        following = {last.target} if last.target is not None else set()
        # BRA with a predicate operand ('BRA P0, 0x..', 'BRA.DIV UR4, 0x..') may fall through as well
        if last.name not in _ENDS or last.predicate or "," in last.operands:
            following.add(last.address + INSTRUCTION_BYTES)
        successors[start] = following & blocks.keys()
    return blocks, successors


_ENDS = ("BRA", "BRX", "JMP", "EXIT", "RET")  # of basic blocks; a CALL comes back


def _dominators(successors: dict[int, set[int]]) -> dict[int, set[int]]:
    """For each block that is reached from address 0, the blocks that every way to it passes."""
    predecessors: dict[int, set[int]] = defaultdict(set)
    reached, open_blocks = {0}, [0]
    while open_blocks:
        block = open_blocks.pop()
        for successor in successors[block]:
            predecessors[successor].add(block)
            if successor not in reached:
                reached.add(successor)
                open_blocks.append(successor)
    dominators = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators


def _instruction(index: int, values: dict[str, str], code: bytes) -> Instruction:
    address = index * INSTRUCTION_BYTES
    (control,) = struct.unpack_from("<Q", code, address + 8)
    operands = values.get("operands", "")
    return Instruction(address, values.get("predicate", ""), values["opcode"], operands, control >> 41 & 15)


def _sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file by name."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    strings = headers[names][4]
    sections = {}
    for name, _, _, _, offset, length in headers:
        start = strings + name
        sections[elf[start : elf.index(b"\0", start)].decode()] = elf[offset : offset + length]
    return sections


def _tool(package: str, program: str, option: str, cubin: bytes) -> str:
    """What a program of a wheel prints about a cubin; cached."""
    key = hashlib.sha256(f"{wheel_version(package)} {option}".encode() + cubin).hexdigest()[:32]
    cached = cache_folder("sass") / f"{key}.{program}"
    if not cached.exists():
        with tempfile.TemporaryDirectory() as folder:
            module = Path(folder) / "module.cubin"
            module.write_bytes(cubin)
            write_atomically(cached, _run(package, program, option, str(module)))
    return cached.read_text(encoding="utf-8")


def _run(package: str, program: str, *arguments: str) -> bytes:
    path = wheel_file(package, f"nvidia/cu13/bin/{program}")
    try:
        return subprocess.run([path, *arguments], capture_output=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        words = (error.stderr or error.stdout).decode(errors="replace").strip().splitlines()
        reason = words[-1] if words else f"exit code {error.returncode}"
    except OSError as error:
        reason = str(error.strerror)
    raise EdgeError(f"{program} cannot read a cubin ({reason}); install {package} again")
