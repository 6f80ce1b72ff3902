"""`edge plan`: what a run takes, whether it fits, and what would fit, before anything is exported or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.table import Table

from edge.bench.report import write_text
from edge.bundle import is_bundle, open_bundle
from edge.cli import options as opt
from edge.cli.console import note, out, print_json
from edge.config import ModelConfig, SparseConfig
from edge.errors import EdgeError, UsageError
from edge.machine import usable_cores
from edge.memory.advice import Change, Largest, Ledger, changes, largest_of_each
from edge.memory.attended import least_resident
from edge.memory.device import device_ledger
from edge.memory.devices import Device, find_device
from edge.memory.fit import most_resident
from edge.memory.ledger import Line, Subject, cpu_ledger, total
from edge.memory.picture import render_svg
from edge.memory.run import Run
from edge.memory.weights import StoredWeights
from edge.models import PUBLISHED, published
from edge.plan import EngineOptions, subject_of

if TYPE_CHECKING:
    from build_engine.formats import WeightFormat

MIB = 1 << 20
CPU_TARGET = "onnxruntime"
_BAR = 16  # columns of the longest bar


@dataclass(frozen=True)
class Planned:
    """The answer: what was planned, for what, and whether and how it fits."""

    name: str
    device: str
    target: str
    subject: Subject
    run: Run
    budget: int
    lines: tuple[Line, ...]
    largest: Largest
    changes: tuple[Change, ...]

    @property
    def fits(self) -> bool:
        """Whether the ledger is within the budget."""
        return total(self.lines) <= self.budget


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|CHECKPOINT|BUNDLE", help=f"A bundle, a checkpoint, or one of {', '.join(PUBLISHED)}."
        ),
    ],
    device: Annotated[
        str | None, typer.Option(help="AGX Orin 64GB, Orin NX 16GB, RTX 4090, ... or cpu (default: what is here).")
    ] = None,
    budget: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory there is, as 12GiB, instead.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens a sequence. Default: the model's limit.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Sequences at once.")] = 1,
    chunk: opt.Chunk = 512,
    weights: Annotated[
        str | None, typer.Option(metavar="exact|fp16|w4a16|ternary", help="Weights, unless it is a bundle.")
    ] = None,
    head: Annotated[str | None, typer.Option(metavar="exact|int8|int4", help="Output head, likewise.")] = None,
    kv: Annotated[str | None, typer.Option(help="Type of the KV cache, likewise. Default: 16 bits.")] = None,
    attention: opt.Attention = None,
    offload: Annotated[bool, typer.Option(help="Keep what does not fit of the KV cache elsewhere.")] = False,
    threads: opt.Threads = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the ledger into this file.")] = None,
    json: opt.Json = False,
) -> None:
    """Say what a run takes, line by line, and what fits at most; exit with 1 and the cheapest changes if it does not.

    Examples:

      edge plan MiniCPM4-8B --device "AGX Orin 32GB" --context 131072

      edge plan BitCPM4-0.5B --budget 2GiB --weights ternary --kv int8 --json

      edge plan bundle --context 32768
    """
    where, target = _place(device, budget)
    wish = _Wish(weights, head, kv, attention)
    name, target, subject = _subject(model, target, wish)
    run = Run(context or subject.config.max_position_embeddings, batch, chunk, batch, threads or usable_cores())
    if target == CPU_TARGET:
        from plugins.ort.library import multiplies_packed

        run = replace(run, rows=max(EngineOptions.logits_rows, batch), packed=multiplies_packed())
    answer = _answer(name, target, subject, run, where, offload)
    if svg is not None:
        opt.check_output(svg)
        write_text(svg, render_svg(answer.name, answer.device, answer.lines, answer.budget))
        note(f"picture written to {svg}")
    if json:
        print_json(_values(answer))
        raise typer.Exit(0 if answer.fits else 1)
    out.print(_terminal(answer))
    if not answer.fits:
        raise EdgeError(_refusal(answer))


_Exported = tuple[str, ModelConfig, StoredWeights, Mapping[str, str]]  # name, shape, weights, types


@dataclass(frozen=True)
class _Wish:
    """What the user says of a model that is no bundle yet."""

    weights: str | None
    head: str | None
    kv: str | None
    attention: str | None


def _place(device: str | None, budget: str | None) -> tuple[Device, str | None]:
    """-> where it is to run, and for what target, if that follows from it."""
    if budget is None:
        place = find_device("cpu" if device is None else device)
        return place, None if device is None else place.target
    if device is None:
        return Device("the budget", CPU_TARGET, opt.parse_size(budget)), None
    place = find_device(device)
    return replace(place, memory=opt.parse_size(budget), system=0), place.target


def _subject(model: str, target: str | None, wish: _Wish) -> tuple[str, str, Subject]:
    """-> its name, its target and what it stores."""
    path = Path(model)
    if is_bundle(path):
        if any(value is not None for value in vars(wish).values()):
            raise UsageError(
                f"{path} is a bundle, which has its formats; leave out --weights, --head, --kv, --attention"
            )
        bundle = open_bundle(path, verify=False)
        if target is not None and (target == CPU_TARGET) != (bundle.manifest.target == CPU_TARGET):
            raise UsageError(f"{path} was exported for {bundle.manifest.target}; plan it for such a device")
        return bundle.manifest.name, bundle.manifest.target, subject_of(bundle)
    target = target or CPU_TARGET
    known = published(model)
    name, config, stored, types = (_of_checkpoint if known is None or path.exists() else _of_name)(model, target, wish)
    return name, target, Subject(_attending(config, wish.attention), stored, types)


def _of_name(model: str, target: str, wish: _Wish) -> _Exported:
    """What `edge export` would make of a published checkpoint."""
    from build_engine.formats import WeightFormat, make_target

    known = published(model)
    assert known is not None
    name, config = known
    kind = wish.weights or ("ternary" if name.startswith("BitCPM") else "w4a16")
    is_low_bit = kind in ("w4a16", "ternary")
    weights = WeightFormat(
        kind,
        0 if kind == "ternary" else 64,
        symmetric=True,
        head=wish.head or ("int8" if is_low_bit else "exact"),
        linear="packed" if is_low_bit and target != CPU_TARGET else "native",
    )
    table = "bfloat16" if target == CPU_TARGET else "float16"
    return name, config, _stored(weights, table), make_target(target, weights, wish.kv).types.names


def _of_checkpoint(model: str, target: str, wish: _Wish) -> _Exported:
    """What `edge export` would make of a checkpoint that is here."""
    from build_engine.formats import choose_format, make_target
    from build_engine.lowering import EMBEDDING, table_type
    from edge.cli.export import best_kind, open_source

    path = Path(model)
    if not path.exists():
        raise UsageError(f"{path} is no file or folder and no model known by name; known are {', '.join(PUBLISHED)}")
    source = open_source(path)
    weights = choose_format(source, target, wish.weights or best_kind(source, None), head=wish.head)
    made_for = make_target(target, weights, wish.kv)
    table = table_type(source.tensors[EMBEDDING], made_for, weights).name
    return path.name, source.config, _stored(weights, table), made_for.types.names


def _stored(weights: WeightFormat, table: str) -> StoredWeights:
    return StoredWeights(
        weights.kind, weights.group_size, weights.symmetric, weights.head, weights.head_group_size, table
    )


def _attending(config: ModelConfig, attention: str | None) -> ModelConfig:
    if attention not in (None, "dense", "sparse"):
        raise UsageError(f"unknown attention {attention!r}; choose dense or sparse")
    if attention == "dense":
        return replace(config, sparse=None)
    return replace(config, sparse=config.sparse or SparseConfig()) if attention == "sparse" else config


def _answer(name: str, target: str, subject: Subject, run: Run, place: Device, offload: bool) -> Planned:
    ledger: Ledger = cpu_ledger if target == CPU_TARGET else lambda s, r: device_ledger(s, r, place)
    least = None if place.is_integrated else least_resident(subject.config, run, on_cpu=target == CPU_TARGET)
    if offload:
        run = _offloaded(ledger, subject, run, place, least)
    budget, lines = place.budget, ledger(subject, run)
    found = () if total(lines) <= budget else changes(ledger, subject, run, budget, least=least)
    most = largest_of_each(ledger, subject, run, budget)
    return Planned(name, place.name, target, subject, run, budget, lines, most, tuple(found))


def _offloaded(ledger: Ledger, subject: Subject, run: Run, place: Device, least: int | None) -> Run:
    """With as many pages in memory as fit, `least` at least."""
    if place.is_integrated:
        raise UsageError(
            f"{place.name} shares its memory with the host, so that --offload would free nothing; leave it out"
        )
    if least is None:
        raise UsageError(
            "dense attention needs every page on the GPU for every token; leave out --offload, or add --attention "
            "sparse"
        )
    if least >= run.pages or total(ledger(subject, run)) <= place.budget:
        return run
    return most_resident(lambda r: ledger(subject, r), run, place.budget, least)


def _refusal(answer: Planned) -> str:
    short = total(answer.lines) - answer.budget
    sentence = f"{answer.name} needs {_size(total(answer.lines))} and {answer.device} has {_size(answer.budget)}"
    if not answer.changes or not answer.changes[-1].fits:
        return f"{sentence}; {_size(short)} too little even with all of the changes above, so choose a smaller model"
    options = {change.option.split()[0]: change.option for change in answer.changes}  # the last --chunk counts
    return f"{sentence}; make the changes above: {' '.join(options.values())}"


def _terminal(answer: Planned) -> Group:
    """The ledger as a table, what fits at most, and the changes that would help."""
    lines, run = answer.lines, answer.run
    table = Table(box=box.SIMPLE_HEAD, title=_title(answer), title_justify="left")
    table.add_column("line")
    table.add_column("MiB", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    longest = max(line.bytes for line in lines)
    for line in lines:
        bar = "█" * round(_BAR * line.bytes / longest)
        where = f"on the {line.where}, not counted: " if line.is_elsewhere else ""
        table.add_row(line.name, f"{line.bytes / MIB:.1f}", bar, where + line.note)
    table.add_section()
    verdict = "fits" if answer.fits else "does not fit"
    table.add_row("total", f"{total(lines) / MIB:.1f}", "", f"{verdict} in {answer.budget / MIB:.1f}")
    most = answer.largest
    parts: list[Any] = [table]
    if answer.fits:
        parts.append(
            f"At most: a context of {most.context} tokens, or {most.sequences} sequences, or a chunk of {most.chunk} "
            "(each while the others stay as they are)"
        )
    elif answer.changes:
        helps = Table(
            box=box.SIMPLE_HEAD, title="Cheapest changes, each on top of those before it", title_justify="left"
        )
        for name in ("change", "saves MiB", "then MiB", ""):
            helps.add_column(name, justify="right" if "MiB" in name else "left")
        for change in answer.changes:
            fits = "fits" if change.fits else ""
            helps.add_row(change.option, f"{change.saves / MIB:.1f}", f"{change.total / MIB:.1f}", fits)
        parts.append(helps)
    if run.context > answer.subject.config.max_position_embeddings:
        limit = answer.subject.config.max_position_embeddings
        parts.append(f"The model was made for {limit} tokens; see edge export --rope for more.")
    return Group(*parts)


def _title(answer: Planned) -> str:
    weights, run = answer.subject.weights, answer.run
    attention = "dense" if answer.subject.config.sparse is None else "sparse"
    head = "" if weights.kind in ("exact", "fp16") else f", {weights.head} head"
    sequences = "" if run.sequences == 1 else f"{run.sequences} x "
    return (
        f"{answer.name} on {answer.device}\n{weights.kind}{head}, {answer.subject.kv} cache, {attention} attention, "
        f"{sequences}{run.context} tokens"
    )


def _values(answer: Planned) -> dict[str, Any]:
    return {
        "model": answer.name,
        "device": answer.device,
        "target": answer.target,
        "weights": vars(answer.subject.weights),
        "kv": answer.subject.kv,
        "attention": "dense" if answer.subject.config.sparse is None else "sparse",
        "run": vars(answer.run),
        "budget": answer.budget,
        "total": total(answer.lines),
        "fits": answer.fits,
        "lines": [vars(line) for line in answer.lines],
        "largest": vars(answer.largest),
        "changes": [vars(change) for change in answer.changes],
    }


def _size(count: int) -> str:
    return f"{count / (1 << 30):.2f}GiB" if count >= 1 << 30 else f"{count // MIB}MiB"
