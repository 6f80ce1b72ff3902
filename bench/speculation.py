"""Speculative decoding of a real model: SmolLM2-135M with its trained draft, plain, by lookup and with the draft.

    python -m bench.speculation                          # weights as the checkpoint has them, and int4
    python -m bench.speculation --weights exact --tokens 256 --rounds 5

Three kinds of text: answers to held-out questions of a chat, to their end, copying (a passage that the prompt has begun
to repeat) and prose sampled at temperature 1 from the 40 likeliest tokens. The ways of decoding take turns, round by
round; a figure is the median of its rounds. Replies must be the same tokens whichever way they were decoded; those that
are not are counted. Then what a step of several tokens costs, and the draft's step with the full head and FR-Spec's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from build_engine.checkpoint import open_checkpoint
from build_engine.draft_export import choose_draft
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import choose_format
from edge.bench.machine import describe_machine
from edge.bundle import open_bundle
from edge.cli.generate import load_tokenizer
from edge.engine import Engine, open_engine
from edge.executor import StepBatch
from edge.executors.draft import OnnxRuntimeDraft
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.speculation.draft import DraftBatch
from edge.speculation.statistics import Speculated
from edge.text import Tokenizer
from tests.draft.prompts import prompts
from tests.synthetic import smollm2_gguf_path
from tests.text import english_text

DRAFT = Path("tests/draft/model")
WAYS = ("off", "lookup", "eagle")
TEXTS = ("chat", "copying", "prose")
PASSAGE = 1200  # characters that are to be copied
STEPS = 60  # of a draft, timed
ROWS = (1, 2, 3, 5, 8, 16)  # tokens of timed steps of the model
CONTEXT = 256  # tokens before them


@dataclass(frozen=True)
class Task:
    """A kind of text: prompts, and how replies to them are drawn."""

    name: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams


@dataclass
class Measured:
    """One way of one kind of text: tok/s of each round, what was verified, and replies unlike those without it."""

    speeds: list[float] = field(default_factory=list)
    unlike: int = 0
    speculated: Speculated = field(default_factory=Speculated)


def export(folder: Path, kind: str, ids: np.ndarray | None) -> Path:
    """The bundle with its draft, made once."""
    place = folder / f"smollm2-{kind}-{'full' if ids is None else len(ids)}"
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = open_checkpoint(smollm2_gguf_path())
        weights = choose_format(checkpoint, "onnxruntime", kind)
        # Guesses need no exact weights, and a draft of int4 is read in a fraction of the time.
        draft = choose_draft(DRAFT, checkpoint, weights, "onnxruntime", ids, kind="w4a16", head="int8")
        export_bundle(checkpoint, place, ExportOptions(weights=weights, draft=draft))
    return place


def make_tasks(tokenizer: Tokenizer, tokens: int, count: int) -> list[Task]:
    """`count` prompts of each kind, and replies of `tokens` tokens."""
    questions = prompts("held-out", count)
    chat = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in questions]
    text = english_text()
    copies, stories = [], []
    for i in range(count):
        passage = text[i * 5000 : i * 5000 + PASSAGE]
        copies.append(tokenizer.encode(f"{passage}\n\n{passage}\n\n{passage[:80]}", add_bos=False))
        stories.append(tokenizer.encode(text[i * 5000 : i * 5000 + 400], add_bos=False))
    greedy = SamplingParams(max_tokens=tokens)
    copied = SamplingParams(max_tokens=tokens, ignore_eos=True)
    # Among all tokens a draw would now and then fall on the edge between two, which rounding moves.
    drawn = SamplingParams(temperature=1.0, top_k=40, seed=7, max_tokens=tokens, ignore_eos=True)
    return [Task("chat", chat, greedy), Task("copying", copies, copied), Task("prose", stories, drawn)]


def run(engine: Engine, task: Task, into: Measured) -> list[list[int]]:
    """All replies of a task; the speed counts their tokens after the first."""
    replies, seconds = [], 0.0
    for ids in task.prompts:
        session = engine.open_session()
        times, reply = [], []
        for event in session.generate(ids, task.params):
            times.append(time.perf_counter())
            reply.append(event.token_id)
        seconds += times[-1] - times[0]
        replies.append(reply)
        if session.speculated is not None:
            into.speculated.merge(session.speculated)
        session.close()
    into.speeds.append(sum(len(reply) - 1 for reply in replies) / seconds)
    return replies


def measure(
    bundle: Path, texts: Sequence[str], tokens: int, count: int, rounds: int, threads: int
) -> dict[tuple[str, str], Measured]:
    """Every task of `texts` in every way, which take turns."""
    engines = {
        way: open_engine(
            bundle, EngineOptions(context=2048, memory=4 << 30, threads=threads, prefix_cache=False, speculative=way)
        )
        for way in WAYS
    }
    tasks = [task for task in make_tasks(load_tokenizer(engines["off"]), tokens, count) if task.name in texts]
    found = {(task.name, way): Measured() for task in tasks for way in WAYS}
    for way in WAYS:  # warm up, and let the pace learn what steps cost
        run(engines[way], tasks[0], Measured())
    for _ in range(rounds):
        for task in tasks:
            replies = {way: run(engines[way], task, found[task.name, way]) for way in WAYS}
            for way, found_replies in replies.items():
                pairs = zip(found_replies, replies["off"], strict=True)
                found[task.name, way].unlike += sum(reply != plain for reply, plain in pairs)
    return found


def draft_seconds(bundle: Path, threads: int) -> float:
    """Median of the draft's steps of one row."""
    opened = open_bundle(bundle)
    draft = OnnxRuntimeDraft(opened, 4, threads)
    zero = np.zeros(1, np.int32)
    hidden = np.random.default_rng(0).standard_normal((1, opened.config.hidden_size), dtype=np.float32)
    seconds = []
    for step in range(STEPS):
        position = np.array([step], np.int32)
        batch = DraftBatch(
            zero, hidden, position, np.array([0, 1], np.int32), np.arange(4, dtype=np.int32)[None], zero, position + 1
        )
        started = time.perf_counter()
        draft.step(batch)
        seconds.append(time.perf_counter() - started)
    return median(seconds[STEPS // 4 :])


def step_seconds(engine: Engine) -> dict[int, float]:
    """Medians of steps of ROWS tokens of one sequence, all of whose logits are wanted; sizes take turns."""
    cache = engine.cache.open()
    engine.cache.reserve(cache, CONTEXT + max(ROWS), 0)
    table = np.asarray(engine.cache.pages(cache), np.int32)[None]

    def step(first: int, count: int) -> float:
        places = np.arange(first, first + count, dtype=np.int32)
        start, length = np.array([0, count], np.int32), np.array([first + count], np.int32)
        batch = StepBatch(places % engine.vocab_size, places, start, table, places[-16:] - first, length)
        started = time.perf_counter()
        engine.executor.step(batch)
        return time.perf_counter() - started

    step(0, CONTEXT)
    found: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(STEPS // 2):
        for rows, seconds in found.items():
            seconds.append(step(CONTEXT, rows))
    engine.cache.close(cache)
    return {rows: median(seconds) for rows, seconds in found.items()}


def main(
    weights: Annotated[str, typer.Option(help="Formats of the base, separated by commas.")] = "exact,w4a16",
    texts: Annotated[str, typer.Option(help="Kinds of text, separated by commas.")] = ",".join(TEXTS),
    tokens: Annotated[int, typer.Option(help="Tokens of a reply.", min=16)] = 192,
    count: Annotated[int, typer.Option(help="Prompts of each kind.", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    folder: Annotated[Path, typer.Option(help="Where bundles are kept.")] = Path("build/bench"),
) -> None:
    """Measure and print."""
    console = Console(width=110, highlight=False)
    console.print(f"{describe_machine().cpu_model}, {threads} threads; SmolLM2-135M, draft {DRAFT}")
    if unknown := set(texts.split(",")) - set(TEXTS):
        raise typer.BadParameter(
            f"unknown {', '.join(sorted(unknown))}; choose of {', '.join(TEXTS)}", param_hint="--texts"
        )
    ids = np.load(next(DRAFT.glob("freq_*.npy")))
    for kind in weights.split(","):
        bundle = export(folder, kind, ids)
        print_table(console, kind, measure(bundle, texts.split(","), tokens, count, rounds, threads), count * rounds)
        costs = step_seconds(open_engine(bundle, EngineOptions(context=512, threads=threads)))
        relative = ", ".join(f"{rows}: {seconds / costs[1]:.2f}" for rows, seconds in costs.items())
        console.print(f"a step of one token: {1e3 * costs[1]:.1f} ms; of so many tokens, relative to it: {relative}")
        full, pruned, least = (draft_seconds(export(folder, kind, rows), threads) for rows in (None, ids, ids[:64]))
        console.print(
            f"a draft's step: {1e3 * full:.2f} ms with the full head, {1e3 * pruned:.2f} with FR-Spec's {len(ids)} "
            f"tokens, {1e3 * least:.2f} with 64: the head alone is {(full - least) / (pruned - least):.1f}x cheaper"
        )


def print_table(console: Console, kind: str, found: dict[tuple[str, str], Measured], replies: int) -> None:
    """A row for each kind of text and way."""
    table = Table(title=f"weights: {kind}", title_justify="left")
    for column in ("text", "speculation", "tok/s", "ratio", "tokens a verified step", "accepted", "unlike"):
        table.add_column(column, justify="left" if column in ("text", "speculation") else "right")
    for (task, way), measured in found.items():
        speed, done = median(measured.speeds), measured.speculated
        ratio = median(a / b for a, b in zip(measured.speeds, found[task, "off"].speeds, strict=True))
        table.add_row(
            task,
            way,
            f"{speed:.1f}",
            f"{ratio:.2f}x",
            f"{done.mean_accept_length:.2f}" if done.steps else "",
            f"{done.accepted / done.proposed:.0%}" if done.proposed else "",
            f"{measured.unlike} of {replies}",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
