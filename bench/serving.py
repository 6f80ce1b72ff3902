"""What serving costs and gives: many streams, the server beside `edge run`, the prefix cache, a restart, and a soak.

    python -m bench.serving                              # MiniCPM4-0.5B shape, int4, 24 layers
    python -m bench.serving --layers 4 --soak 60         # quicker, and then 64 clients for a minute

Streams: as many clients at once as `--streams`, each with a prompt of its own, beside one client alone; tokens a second
are counted from the first token of all to the last of any. Overhead: a token's time of one client's reply, beside `edge
run` with the same prompt, in turn, median of the ratios; and the processor's time of the thread that speaks HTTP.
Restart: with the bundle out of memory, and again. Soak: clients with prompts of mixed lengths, some of which hang up,
and one that reads slowly; every whole reply is compared with the same request alone, and at the end pages and memory
must be what they were; memory is measured all the while.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.checkpoints import write_safetensors_once
from bench.serving_client import Streamed, complete, server
from bench.weight_bytes import prepare_bundle
from build_engine.export import ExportOptions
from build_engine.formats import WeightFormat
from edge.bench.machine import describe_machine
from edge.models import MINICPM4_05B

console = Console(width=120)


def prepare(folder: Path, layers: int, exact: bool) -> Path:
    """The bundle of random weights in the 0.5B shape, made once, with a tokenizer that has a text for every id."""
    config = replace(MINICPM4_05B, num_hidden_layers=layers)
    place = folder / f"serving-{layers}-layers"
    checkpoint = write_safetensors_once(place / "checkpoint", config)
    if not (checkpoint / "tokenizer.json").exists():
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = ["<unk>", "<s>", "</s>", *alphabet]
        words += [f"Ġw{i}" for i in range(len(words), config.vocab_size)]
        tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(checkpoint / "tokenizer.json"))
    weights = WeightFormat("exact") if exact else WeightFormat("w4a16", 64, symmetric=True, head="int8")
    return prepare_bundle(checkpoint, place / ("exact" if exact else "int4"), ExportOptions(weights=weights))


def text(length: int, seed: int) -> str:
    """A prompt of so many tokens: each letter is one."""
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=length))


def body(prompt: str, tokens: int) -> dict[str, Any]:
    """A greedy request."""
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


async def together(port: int, prompts: Sequence[str], tokens: int) -> list[Streamed]:
    """All at once."""
    return await asyncio.gather(*(complete(port, body(prompt, tokens)) for prompt in prompts))


def tokens_a_second(replies: Sequence[Streamed]) -> float:
    """From the first token of all to the last of any; the first ones came with the prompts."""
    began = min(reply.times[0] for reply in replies)
    return sum(reply.tokens - 1 for reply in replies) / (max(reply.times[-1] for reply in replies) - began)


def measure_streams(port: int, streams: int, length: int, tokens: int, repeat: int) -> None:
    """One stream and many, in turn."""
    one, many, first = [], [], list[float]()
    for turn in range(repeat):
        prompts = [text(length, 1000 * turn + i) for i in range(streams + 1)]
        one.append(tokens_a_second(asyncio.run(together(port, prompts[:1], tokens))))
        replies = asyncio.run(together(port, prompts[1:], tokens))
        many.append(tokens_a_second(replies))
        first += [reply.times[0] for reply in replies]
    table = Table(title=f"prompts of {length} tokens, replies of {tokens}", title_justify="left")
    for column in ("streams", "tokens/s", "beside one", "first token, median s"):
        table.add_column(column, justify="right")
    table.add_row("1", f"{median(one):.1f}", "", "")
    table.add_row(str(streams), f"{median(many):.1f}", f"{median(many) / median(one):.2f}x", f"{median(first):.2f}")
    console.print(table)


def run(bundle: Path, prompt: str, tokens: int, threads: int) -> float:
    """`edge run` -> seconds between two tokens."""
    command = [sys.executable, "-m", "edge", "run", bundle, "--raw", "--prompt", prompt, "--max-tokens", tokens]
    command += ["--temperature", 0, "--json", "--threads", threads, "--context", 2048]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    values = json.loads(done.stdout)
    return float((values["total_seconds"] - values["first_token_seconds"]) / (values["tokens"] - 1))


def request(port: int, prompt: str, tokens: int) -> float:
    """The same of one request to the server."""
    reply = asyncio.run(complete(port, body(prompt, tokens)))
    return (reply.times[-1] - reply.times[0]) / (reply.tokens - 1)


def measure_overhead(bundle: Path, length: int, tokens: int, threads: int, turns: int) -> None:
    """A token's time on the server beside the command's, in turn; and what the thread that speaks HTTP takes of it.

    The ratio is the median over the turns: between one turn and the next but one, the machine's speed changes by more
    than what is looked for.
    """
    with server(bundle, "--threads", threads, "--context", 2048) as (port, process):
        request(port, text(length, 3), 4)
        ways = {"edge run": partial(run, bundle, threads=threads), "server": partial(request, port)}
        found: dict[str, list[float]] = {name: [] for name in ways}
        before = loop_seconds(process)
        for turn in range(turns):
            for name in sorted(ways, reverse=turn % 2 == 1):
                found[name].append(1000 * ways[name](text(length, 77 + turn), tokens))
        spoken = 1000 * (loop_seconds(process) - before) / (turns * tokens)
    plain, ours = (np.array(found[name]) for name in ("edge run", "server"))
    low, middle, high = 100 * (np.percentile(ours / plain, (25, 50, 75)) - 1)
    console.print(
        f"a token, {turns} turns: edge run {np.median(plain):.2f} ms, server {np.median(ours):.2f} ms: {middle:+.1f} % "
        f"(half of the turns: {low:+.1f} to {high:+.1f} %)\n"
        f"  the server's HTTP thread: {spoken:.2f} ms of the processor, {100 * spoken / np.median(plain):.1f} %"
    )


def loop_seconds(process: psutil.Process) -> float:
    """Of the processor, by the thread that the process began with: it runs the event loop."""
    return sum(thread.user_time + thread.system_time for thread in process.threads() if thread.id == process.pid)


def measure_prefix(port: int) -> None:
    """The same long prompt again, with another end."""
    start = text(1024, 5)
    cold, warm = (asyncio.run(complete(port, body(start + end, 4))) for end in ("first", "other"))
    console.print(
        f"a prompt of 1029 tokens: first token after {cold.times[0]:.2f} s; another with the same beginning: "
        f"{warm.cached} cached tokens, {warm.times[0]:.2f} s"
    )


def measure_restart(bundle: Path, options: Sequence[object]) -> None:
    """From the command to the first token and what came from the disk: with the bundle out of memory, and restarted."""
    for path in bundle.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for name in ("started, with nothing of the bundle in memory", "stopped by SIGTERM and started again"):
        began = time.perf_counter()
        with server(bundle, *options) as (port, process):
            ready = time.perf_counter() - began
            asyncio.run(complete(port, body(text(8, 9), 1)))
            seconds, read = time.perf_counter() - began, process.io_counters().read_bytes
        console.print(f"{name}: ready in {ready:.1f} s, first token in {seconds:.1f} s, {read / 2**20:.0f} MiB read")


def gauge(port: int, name: str) -> float:
    """A value of /metrics."""
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name))


def memory(port: int) -> tuple[int, int, int]:
    """Bytes of the ledger's lines that count: budget, planned, measured (as planned where nothing measures a line)."""
    ledger = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/stats"))["memory"]
    lines = [line for line in ledger["lines"] if line["where"] == "memory"]
    taken = sum(line["planned"] if line["measured"] is None else line["measured"] for line in lines)
    return ledger["budget"], sum(line["planned"] for line in lines), taken


async def watch(port: int, end: float) -> int:
    """Most bytes that the ledger's lines took, measured every five seconds."""
    most = 0
    while time.perf_counter() < end:
        most = max(most, (await asyncio.to_thread(memory, port))[2])
        await asyncio.sleep(5)
    return most


async def soak(
    port: int, clients: int, seconds: float, kinds: Sequence[dict[str, Any]], wanted: Sequence[str]
) -> dict[str, Any]:
    """Until the time is over -> what the clients saw."""
    end = time.perf_counter() + seconds
    whole: list[Streamed] = []
    counts = {"whole": 0, "hung up": 0, "refused": 0, "differ": 0, "lost": 0}

    async def client(number: int) -> None:
        draw = random.Random(number)
        is_slow = number == 0
        while time.perf_counter() < end:
            kind = draw.randrange(len(kinds))
            hang_up = draw.randint(1, 10) if not is_slow and draw.random() < 0.25 else None
            asked = {**kinds[kind], "user": str(number)}
            reply = await complete(port, asked, hang_up_after=hang_up, read_pause=0.3 if is_slow else 0)
            if reply.status == 429:
                counts["refused"] += 1
                await asyncio.sleep(draw.random())
            elif hang_up is not None and reply.finish_reason is None:
                counts["hung up"] += 1
            elif reply.finish_reason != "length":
                counts["lost"] += 1
            else:
                counts["whole"] += 1
                counts["differ"] += reply.text != wanted[kind]
                if not is_slow:
                    whole.append(reply)

    taken, *_ = await asyncio.gather(watch(port, end), *map(client, range(clients)))
    return {"counts": counts, "replies": whole, "taken": taken}


def measure_soak(port: int, process: psutil.Process, clients: int, seconds: float) -> bool:
    """Print what came of it -> whether nothing was lost and everything was given back."""
    draw = random.Random(0)
    kinds = [body(text(draw.choice((8, 40, 150, 400)), 500 + i), draw.choice((5, 20, 80))) for i in range(24)]
    alone = [asyncio.run(complete(port, kind)) for kind in kinds]
    before = process.memory_info().rss
    found = asyncio.run(soak(port, clients, seconds, kinds, [reply.text for reply in alone]))
    deadline = time.perf_counter() + 30
    while gauge(port, 'edge_kv_pages{state="held"}') and time.perf_counter() < deadline:
        time.sleep(0.2)
    held, after = gauge(port, 'edge_kv_pages{state="held"}'), process.memory_info().rss
    replies, counts = found["replies"], found["counts"]
    console.print(f"soak: {clients} clients for {seconds:.0f} s, one of which reads slowly: {counts}")
    for name, values in (
        ("first token", [reply.times[0] for reply in replies]),
        ("between tokens", np.concatenate([np.diff(reply.times) for reply in replies])),
        ("whole reply", [reply.seconds for reply in replies]),
    ):
        half, most = np.percentile(values, [50, 99])
        console.print(f"  {name}: p50 {half:.3f} s, p99 {most:.3f} s")
    preemptions = gauge(port, "edge_preemptions_total")
    budget, planned, _ = memory(port)
    console.print(
        f"  memory by the ledger: {found['taken'] / 2**20:.0f} MiB at most, {planned / 2**20:.0f} planned, "
        f"budget {budget / 2**20:.0f}"
    )
    console.print(
        f"  pages held at the end: {held:.0f}; preemptions: {preemptions:.0f}; resident memory: "
        f"{before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after"
    )
    return not held and not counts["lost"] and not counts["differ"] and found["taken"] <= budget


def main(
    layers: Annotated[int, typer.Option(help="Layers of the shape.")] = MINICPM4_05B.num_hidden_layers,
    streams: Annotated[int, typer.Option(help="Clients at once.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of a reply.", min=2)] = 64,
    repeat: Annotated[int, typer.Option(help="Times each is measured.")] = 3,
    soak_seconds: Annotated[float, typer.Option("--soak", help="Seconds of the soak; 0 leaves it out.")] = 0,
    clients: Annotated[int, typer.Option(help="Clients of the soak.")] = 64,
    budget: Annotated[
        str, typer.Option(help="Memory budget of the soak: less than all places hold at once.")
    ] = "664MiB",
    threads: Annotated[int, typer.Option(help="Threads of the model.")] = 2,
    exact: Annotated[bool, typer.Option("--exact", help="32-bit weights instead of int4.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the model is kept.")] = Path("build/bench"),
) -> None:
    """Measure and print; exit code 1 if the soak lost, changed or kept something, or took more than its budget."""
    bundle = prepare(folder, layers, exact)
    kind = "float32" if exact else "int4"
    console.print(f"MiniCPM4-0.5B shape, {layers} layers, random weights, {kind}; {describe_machine().cpu_model}")
    options = ("--threads", threads, "--context", 2048, "--sequences", max(8, streams))
    with server(bundle, *options) as (port, _):
        asyncio.run(complete(port, body(text(length, 1), 8)))
        if repeat:
            measure_streams(port, streams, length, tokens, repeat)
            measure_prefix(port)
    if repeat:
        measure_overhead(bundle, length, tokens, threads, 5 * repeat)
        measure_restart(bundle, options)
    if soak_seconds:
        soaked = ("--threads", threads, "--context", 512, "--sequences", 8, "--queue", clients, "--memory", budget)
        with server(bundle, *soaked) as (port, process):
            if not measure_soak(port, process, clients, soak_seconds):
                raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
