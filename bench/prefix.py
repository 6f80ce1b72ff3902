"""What the prefix cache saves: time to the first token of a second turn and of a new request, cold and warm.

    python -m bench.prefix                               # MiniCPM4-0.5B shape, a prompt of 16K tokens, 24 layers
    python -m bench.prefix --layers 4                    # quicker

Cold: an engine without the prefix cache computes the whole prompt. Warm: an engine that has answered the first prompt
gets the same prompts in turn: the conversation's second one in its session, and a request of its own that begins like
the first. Random weights; replies are greedy, and must be the same tokens. A third row saves the session to a file and
restores it in a fresh engine. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.checkpoints import write_safetensors_once
from bench.weight_bytes import prepare_bundle
from build_engine.export import ExportOptions
from build_engine.formats import WeightFormat
from build_engine.long_context import LongContext
from edge.bench.machine import describe_machine
from edge.bundle import open_bundle
from edge.engine import Engine, TokenEvent, open_engine
from edge.models import MINICPM4_05B
from edge.plan import EngineOptions
from edge.sampler import SamplingParams


@dataclass(frozen=True)
class Timed:
    """A reply: its tokens, seconds to the first, and how many prompt tokens were computed for it."""

    tokens: tuple[int, ...]
    first_token_s: float
    computed: int


@dataclass(frozen=True)
class Case:
    """One prompt, cold and warm. load_s: restoring the cache from a file before it."""

    name: str
    prompt_tokens: int
    cold: Timed
    warm: Timed
    load_s: float = 0.0

    @property
    def ratio(self) -> float:
        """Cold over warm time to the first token; restoring is part of the latter."""
        return self.cold.first_token_s / (self.warm.first_token_s + self.load_s)


def prepare(folder: Path, layers: int) -> Path:
    """The bundle of random weights in the 0.5B shape, made once: int4, sparse from 8192 tokens on, bfloat16 cache."""
    place = folder if layers == MINICPM4_05B.num_hidden_layers else folder / f"{layers}-layers"
    checkpoint = write_safetensors_once(place / "checkpoint", replace(MINICPM4_05B, num_hidden_layers=layers))
    weights = WeightFormat("w4a16", 64, symmetric=True, head="int8")
    options = ExportOptions(weights=weights, long_context=LongContext("sparse"), kv="bfloat16")
    return prepare_bundle(checkpoint, place / "bundle-sparse-bfloat16-int8-head", options)


def timed(
    generate: Callable[..., Iterable[TokenEvent]], prompt: Sequence[int], new_tokens: int, computed: Callable[[], int]
) -> Timed:
    """One greedy reply."""
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    before, start, first, tokens = computed(), time.perf_counter(), 0.0, []
    for event in generate(prompt, params):
        first = first or time.perf_counter() - start
        tokens.append(event.token_id)
    return Timed(tuple(tokens), first, computed() - before - (new_tokens - 1))


def counted(engine: Engine) -> Callable[[], int]:
    """How many tokens the engine's executor has computed from now on."""
    step, total = engine.executor.step, [0]

    def count(batch):
        total[0] += len(batch.input_ids)
        return step(batch)

    engine.executor.step = count  # type: ignore[method-assign]
    return lambda: total[0]


def measure(bundle: Path, length: int, question: int, new_tokens: int, threads: int) -> list[Case]:
    """The cases, each prompt `length` tokens that are shared and `question` that are not."""
    draw = np.random.default_rng(0)
    vocabulary = open_bundle(bundle, verify=False).config.vocab_size

    def tokens(count: int) -> list[int]:
        return draw.integers(3, vocabulary, count).tolist()

    options = EngineOptions(context=2 * length, threads=threads)
    shared, other = tokens(length), tokens(question)
    engine = open_engine(bundle, options)
    computed = counted(engine)
    session = engine.open_session()
    first = timed(session.generate, [*shared, *tokens(question)], new_tokens, computed)
    second = [*session._sequence.tokens, *tokens(question)]
    request = [*shared, *other]
    with TemporaryDirectory(dir=bundle.parent) as folder:
        file = Path(folder) / "session"
        session.save(file)
        warm = {
            "second turn": timed(session.generate, second, new_tokens, computed),
            "new request": timed(engine.generate, request, new_tokens, computed),
        }
        del engine, session
        restored = open_engine(bundle, options)
        start = time.perf_counter()
        session = restored.restore_session(file)
        load_s, name = time.perf_counter() - start, f"second turn, restored from {file.stat().st_size / 2**20:.0f} MiB"
        warm[name] = timed(session.generate, second, new_tokens, counted(restored))
        del restored, session
    engine = open_engine(bundle, replace(options, prefix_cache=False))
    computed = counted(engine)
    cold = {len(p): timed(engine.generate, p, new_tokens, computed) for p in (second, request)}
    assert first.computed == length + question
    prompts = [second, request, second]
    return [
        Case(name, len(prompt), cold[len(prompt)], reply, load_s if "restored" in name else 0.0)
        for (name, reply), prompt in zip(warm.items(), prompts, strict=True)
    ]


def main(
    length: Annotated[int, typer.Option(help="Tokens that the prompts share.")] = 16384,
    question: Annotated[int, typer.Option(help="Tokens that are new in each.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each reply.", min=2)] = 32,
    layers: Annotated[int, typer.Option(help="Layers of the shape.")] = MINICPM4_05B.num_hidden_layers,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    folder: Annotated[Path, typer.Option(help="Where the model is kept.")] = Path("build/bench"),
    output: Annotated[Path | None, typer.Option(help="Also write all figures as JSON.")] = None,
) -> None:
    """Measure and print; exit code 1 if a warm reply differs from the cold one."""
    cases = measure(prepare(folder, layers), length, question, new_tokens, threads)
    machine = describe_machine()
    title = f"MiniCPM4-0.5B shape, {layers} layers, random weights, int4; {machine.cpu_model}, {threads} threads"
    table = Table(title=title, title_justify="left")
    for column in ("", "prompt", "cold s", "warm computes", "load s", "warm s", "ratio", f"{new_tokens} tokens"):
        table.add_column(column, justify="left" if not column else "right")
    for case in cases:
        same = case.cold.tokens == case.warm.tokens
        numbers = [f"{case.cold.first_token_s:.2f}", str(case.warm.computed), f"{case.load_s:.2f}"]
        numbers += [f"{case.warm.first_token_s:.3f}", f"{case.ratio:.0f}x", "the same" if same else "DIFFER"]
        table.add_row(case.name, str(case.prompt_tokens), *numbers)
    Console(width=140).print(table)
    if output is not None:
        output.write_text(json.dumps({"machine": asdict(machine), "cases": [asdict(case) for case in cases]}, indent=1))
    if any(case.cold.tokens != case.warm.tokens for case in cases):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
