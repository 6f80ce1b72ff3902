"""PTX text -> instructions with resolved operands: what a compiler for sm_87 writes, and the inline assembly in it.

Knows the syntax and no opcode. `parse` turns one `.entry` into an `Entry`; names that inline assembly declares inside
braces are local to them, as the language says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from plugins.simt import KernelFault


class PtxFault(KernelFault):
    """The compiled PTX cannot be executed or did something wrong; the message says which instruction, where.

    thread: index in its batch of the thread that did it, while the message does not name it yet.
    """

    def __init__(self, message: str, thread: int | None = None) -> None:
        super().__init__(message)
        self.thread = thread


@dataclass(frozen=True)
class Register:
    """A virtual register. `name` is unique in its entry; `bits` is 1 for a predicate."""

    name: str
    bits: int


@dataclass(frozen=True)
class Negated:
    """A predicate operand written with an exclamation mark."""

    register: Register


@dataclass(frozen=True)
class Immediate:
    """A number, as the bit pattern it stands for (negative integers as they are)."""

    value: int


@dataclass(frozen=True)
class Name:
    """A special register (%tid.x), a parameter, a shared array or a label."""

    name: str


Scalar = Register | Negated | Immediate | Name


@dataclass(frozen=True)
class Address:
    """[base + offset], offset in bytes."""

    base: Scalar
    offset: int


@dataclass(frozen=True)
class Pair:
    """Two destinations, written a|b."""

    first: Scalar
    second: Scalar


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    elements: tuple[Scalar, ...]


Operand = Register | Negated | Immediate | Name | Address | Pair | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction. base: the opcode up to its first dot; predicate: the @ guard; text: as written; source: file
    and line of the CUDA source, if known.
    """

    base: str
    opcode: str
    operands: tuple[Operand, ...]
    predicate: Register | Negated | None
    text: str
    source: str

    @property
    def where(self) -> str:
        return f"`{self.text}`" + (f" ({self.source})" if self.source else "")


@dataclass(frozen=True)
class Entry:
    """One kernel. parameters: name -> byte offset in the launch's struct; labels: name -> index of an instruction."""

    name: str
    parameters: dict[str, int]
    parameter_bytes: int
    shared: frozenset[str]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[bsuf](\d+)\s+(?:\.ptr\b[^,]*?\s)?([\w$]+)(?:\[(\d+)\])?")
_SHARED = re.compile(r"\.extern\s+\.shared\s[^;]*?([\w$]+)\s*\[\s*\]\s*;")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
# Statements of a body, tried in this order.
_STATEMENT = re.compile(
    r"\s+|(?P<open>\{)|(?P<close>\})|(?P<label>[\w$]+):|\.loc\s+(?P<location>\d+\s+\d+)[^\n]*"
    r"|\.reg\s+\.(?P<type>\w+)\s+(?P<registers>[^;]*);|(?P<directive>\.\w+[^;]*);|(?P<instruction>[@\w][^;]*);"
)
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_INTEGER = re.compile(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?")
_NAME = re.compile(r"[%$A-Za-z_][\w$.]*")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")


@dataclass
class _Body:
    """What is known while a body is read: the innermost scope's names come last."""

    files: dict[str, str]
    scopes: list[dict[str, Register]] = field(default_factory=lambda: [{}])
    scope_count: int = 0
    source: str = ""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@lru_cache(maxsize=64)
def parse(text: str, symbol: str) -> Entry:
    """The entry point `symbol` of a PTX module. PtxFault if it has none, or uses local or static shared memory."""
    text = _COMMENT.sub("", text)
    entry = next((match for match in _ENTRY.finditer(text) if match[1] == symbol), None)
    if entry is None:
        raise PtxFault(f"the PTX has no kernel '{symbol}': name one of its .entry points")
    parameters, size = _parameters(entry[2])
    shared = frozenset(_SHARED.findall(text))
    files = {number: path.rsplit("/", 1)[-1] for number, path in _FILE.findall(text)}
    body = _Body(files)
    for statement in _statements(text, entry.end(), symbol):
        _read(statement, body, symbol)
    return Entry(symbol, parameters, size, shared, tuple(body.instructions), body.labels)


def _parameters(text: str) -> tuple[dict[str, int], int]:
    """Parameter names -> offsets as C lays a struct out, and the size of all."""
    offsets, size, largest = {}, 0, 1
    for align, bits, name, count in _PARAMETER.findall(text):
        width = int(bits) // 8
        alignment = int(align or width)
        size += -size % alignment
        offsets[name] = size
        size += width * int(count or 1)
        largest = max(largest, alignment)
    return offsets, size + -size % largest


def _statements(text: str, position: int, symbol: str) -> Iterator[re.Match[str]]:
    """The statements of the body that begins at `position`, up to its closing brace."""
    depth = 1
    while depth:
        match = _STATEMENT.match(text, position)
        if match is None:
            raise PtxFault(f"{symbol}: this is no PTX statement: '{text[position : position + 60].strip()}'")
        depth += (match["open"] is not None) - (match["close"] is not None)
        if not match[0].isspace() and depth:
            yield match
        position = match.end()


def _read(statement: re.Match[str], body: _Body, symbol: str) -> None:
    if statement["open"]:
        body.scope_count += 1
        body.scopes.append({})
    elif statement["close"]:
        body.scopes.pop()
    elif statement["label"]:
        body.labels[statement["label"]] = len(body.instructions)
    elif statement["location"]:
        number, line = statement["location"].split()
        body.source = f"{body.files.get(number, '?')}:{line}"
    elif statement["registers"]:
        _declare(statement["type"], statement["registers"], body)
    elif statement["instruction"]:
        body.instructions.append(_instruction(statement["instruction"], body, symbol))
    elif not statement["directive"].startswith(".pragma"):
        kind = {".local": "spilled or indexed local memory", ".shared": "static shared memory"}
        directive = statement["directive"].split()[0]
        raise PtxFault(f"{symbol}: {kind.get(directive, directive)} is not allowed in a kernel: `{statement[0]}`")


def _declare(type_: str, names: str, body: _Body) -> None:
    """`.reg .b32 %r<10>, x;` in the innermost scope."""
    bits = {"pred": 1, "f16x2": 32, "bf16x2": 32}.get(type_) or int(type_.lstrip("bsuf"))
    suffix = f"@{body.scope_count}" if len(body.scopes) > 1 else ""
    for declared in names.split(","):
        prefix, _, count = declared.strip().rstrip(">").partition("<")
        for name in [f"{prefix}{i}" for i in range(int(count))] if count else [prefix]:
            body.scopes[-1][name] = Register(name + suffix, bits)


def _instruction(text: str, body: _Body, symbol: str) -> Instruction:
    text = " ".join(text.split())
    match = _INSTRUCTION.fullmatch(text)
    assert match is not None  # _STATEMENT matched a superset of its first characters
    negated, guard, opcode, rest = match.groups()
    operands = tuple(_operand(word, body, f"{symbol}: `{text}`") for word in _OPERAND.findall(rest))
    predicate = _scalar(("!" if negated else "") + guard, body, text) if guard else None
    if predicate is not None and not isinstance(predicate, Register | Negated):
        raise PtxFault(f"{symbol}: the guard of `{text}` is no predicate")
    return Instruction(opcode.partition(".")[0], opcode, operands, predicate, text, body.source)


def _operand(word: str, body: _Body, where: str) -> Operand:
    if word[0] == "{":
        return Vector(tuple(_scalar(part.strip(), body, where) for part in word[1:-1].split(",")))
    if word[0] == "[":
        match = _ADDRESS.fullmatch(word)
        if match is None:
            raise PtxFault(f"{where}: unknown form of address {word}")
        return Address(_scalar(match[1], body, where), int(match[2] or "0", 0))
    if "|" in word:
        first, second = word.split("|")
        return Pair(_scalar(first, body, where), _scalar(second, body, where))
    return _scalar(word, body, where)


def _scalar(word: str, body: _Body, where: str) -> Scalar:
    if word[0] == "!":
        register = _scalar(word[1:], body, where)
        if not isinstance(register, Register) or register.bits != 1:
            raise PtxFault(f"{where}: {word} is no predicate")
        return Negated(register)
    for scope in reversed(body.scopes):
        if word in scope:
            return scope[word]
    if match := _FLOAT.fullmatch(word):
        return Immediate(int(match[1] or match[2], 16))
    if match := _INTEGER.fullmatch(word):
        return Immediate(int(match[1], 0))
    if _NAME.fullmatch(word):
        return Name(word)
    raise PtxFault(f"{where}: unknown operand {word}")
