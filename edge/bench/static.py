"""`edge bench --static`: what the compiled CUDA kernels cost, and the decode speed that memory bandwidth allows.

All of it is computed from machine code, shapes and data sheets; no device is used (spec: kernel_technology.md 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edge.bench.step_bytes import StepBytes, attended
from edge.bench.tables import format_number
from edge.config import ModelConfig, SparseConfig
from edge.models import MINICPM4_05B, MINICPM4_8B
from plugins.build.cost import BOARDS, Cost, board_of

NOTE = (
    "Bounds computed from compiled code and data sheets, not measurements: these kernels have not run on a device. "
    "Latencies, caches, gaps between launches and changes of the clock are not in them; real speed is lower."
)
KV_BYTES = 2  # of a 16-bit value
HEAD_BITS = 4 + 16 / 128
WEIGHTS = {"int4": 4 + 16 / 128, "ternary": 2.0}  # bits of a weight: int4 with a 16-bit scale for every 128
CONTEXTS = (4096, 32768, 131072)
MODELS = {"MiniCPM4-0.5B": MINICPM4_05B, "MiniCPM4-8B": MINICPM4_8B}


@dataclass(frozen=True)
class Bound:
    """The decode speed that no step can exceed: bandwidth over bytes. tok_s: by board."""

    model: str
    weights: str
    attention: str
    context: int
    step: StepBytes
    tok_s: dict[str, float]


def step_bytes(config: ModelConfig, context: int, weight_bits: float, sparse: SparseConfig | None) -> StepBytes:
    """What a step at `context` tokens reads (spec: kernel_technology.md 6.6); dense if `sparse` is None."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (config.head_dim * heads + 3 * config.intermediate_size)
    row = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * KV_BYTES
    tokens, windows = attended(context, sparse)
    return StepBytes(
        weights=config.num_hidden_layers * layer * weight_bits / 8,
        head=config.vocab_size * config.hidden_size * HEAD_BITS / 8,
        kv=2 * row * tokens,
        compressed=row * windows,
    )


def bounds(models: Mapping[str, ModelConfig] = MODELS) -> list[Bound]:
    """Every model, weight format and context; sparse where it differs from dense."""
    sparse = SparseConfig()
    found = []
    for name, config in models.items():
        for weights, bits in WEIGHTS.items():
            for context in CONTEXTS:
                for attention, settings in (("dense", None), ("sparse", sparse)):
                    if settings is None or settings.is_sparse(context):
                        step = step_bytes(config, context, bits, settings)
                        tok_s = {board.name: board.bandwidth * 1e9 / step.total for board in BOARDS}
                        found.append(Bound(name, weights, attention, context, step, tok_s))
    return found


def to_values(costs: dict[str, dict[str, Cost]], roofline: Sequence[Bound]) -> dict[str, Any]:
    """Plain JSON values. kernels: per architecture; roofline: bytes a token, and tokens a second at most."""
    return {
        "schema_version": 1,
        "note": NOTE,
        "kernels": [_kernel_values(cost) for by_architecture in costs.values() for cost in by_architecture.values()],
        "boards": [
            {"name": board.name, "arch": board.architecture, "gb_s": board.bandwidth, "sms": board.sms}
            for board in BOARDS
        ],
        "roofline": [
            {
                "model": bound.model,
                "weights": bound.weights,
                "attention": bound.attention,
                "context": bound.context,
                "bytes": {**vars(bound.step), "total": bound.step.total},
                "tok_s_at_most": bound.tok_s,
            }
            for bound in roofline
        ],
    }


def _kernel_values(cost: Cost) -> dict[str, Any]:
    return {
        "name": cost.kernel,
        "arch": cost.architecture,
        "registers": cost.registers,
        "spills": cost.spills,
        "stack": cost.stack,
        "smem": cost.shared,
        "ctas_per_sm": cost.ctas_per_sm,
        "limited_by": cost.limit,
        "instructions": cost.instructions,
        "hmma": cost.hmma,
        "instructions_per_hmma": cost.instructions_per_hmma,
        "instructions_per_byte": cost.instructions_per_byte,
        "pipe_cycles": cost.pipes,
        "bound": cost.bound,
        "memory_bound_ratio": cost.memory_bound_ratio(board_of(cost.architecture)),
    }


def terminal(costs: dict[str, dict[str, Cost]], roofline: Sequence[Bound]) -> RenderableType:
    """Both tables for a terminal of 80 columns; readable without colour and when piped into a file."""
    return Group(
        Text("Compiled CUDA kernels", style="bold"),
        Text(f"{fill(NOTE, 80)}\n"),
        _kernel_table(costs),
        Text(
            "\nShared: bytes of a block. Blocks: that an SM holds. /HMMA, /byte: instructions\n"
            "of the hot loop, per tensor instruction and per byte read. Busiest: the pipe\n"
            "with most to do there. DRAM: its time over that pipe's; above 1 it decides.\n",
            style="dim",
        ),
        Text("Decode speed of MiniCPM4 that the bandwidth allows, one sequence", style="bold"),
        Text("Tokens a second at most: a bound, not a measurement. 16-bit KV cache, int4 head.\n"),
        _roofline_table(roofline),
    )


def _table(headings: Sequence[tuple[str, bool]]) -> Table:
    """headings: text, and whether its cells are words."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, words in headings:
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    return table


def _kernel_table(costs: dict[str, dict[str, Cost]]) -> RenderableType:
    """A line with each kernel's name, which may be long, and below it a row for each architecture."""
    numbers = ("Regs", "Spills", "Stack", "Shared", "Blocks", "/HMMA", "/byte")
    headings = [("Arch", True), *((heading, False) for heading in numbers), ("Busiest", True), ("DRAM", False)]

    def rows(found: Iterable[Cost]) -> Table:
        table = _table(headings)
        for column in table.columns:
            column.width = 7  # in all tables alike
        for cost in found:
            table.add_row(*_kernel_cells(cost))
        table.show_header = table.row_count == 0
        return table

    parts: list[RenderableType] = [rows(())]
    for name, by_architecture in costs.items():
        parts += [Text(name, style="bold"), rows(by_architecture.values())]
    return Group(*parts)


def _kernel_cells(cost: Cost) -> list[str]:
    return [
        cost.architecture,
        str(cost.registers),
        str(cost.spills),
        str(cost.stack),
        f"{cost.shared:,}",
        str(cost.ctas_per_sm),
        format_number(cost.instructions_per_hmma),
        format_number(cost.instructions_per_byte),
        cost.bound,
        f"{format_number(cost.memory_bound_ratio(board_of(cost.architecture)))}x",
    ]


def _roofline_table(roofline: Sequence[Bound]) -> Table:
    words = [("\nModel", True), ("\nWeights", True), ("\nAttention", True)]
    boards = [("\n".join(board.name.rsplit(" ", 1)).replace("Jetson AGX", "AGX"), False) for board in BOARDS]
    table = _table([*words, ("\nContext", False), ("GB a\ntoken", False), *boards])
    for bound in roofline:
        table.add_row(
            bound.model.removeprefix("MiniCPM4-"),
            bound.weights,
            bound.attention,
            f"{bound.context:,}",
            format_number(bound.step.total / 1e9),
            *(format_number(bound.tok_s[board.name]) for board in BOARDS),
        )
    return table
