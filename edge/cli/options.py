"""Options that several commands share, and how they become the library's option objects."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from edge.cli.console import note
from edge.engine import Engine, open_engine
from edge.errors import UsageError
from edge.machine import usable_cores
from edge.plan import EngineOptions

BundlePath = Annotated[Path, typer.Argument(help="Folder that `edge export` wrote.", metavar="BUNDLE")]
Context = Annotated[
    int | None,
    typer.Option(min=1, max=2**31 - 1, help="Tokens a conversation may hold. Default: the model's limit, if it fits."),
]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory budget, as 4GiB or 900MB. Default: 90 % of what is free.")
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads. Default: all this process may use.")]
Chunk = Annotated[int, typer.Option(min=1, max=2**20, help="Prompt tokens computed at once.")]
Attention = Annotated[
    str | None, typer.Option(metavar="dense|sparse", help="Attention of a sparse model. Default: as it was exported.")
]
Sparse = Annotated[
    str | None,
    typer.Option(metavar="KEY=N,...", help="Change sparse settings: dense_len, topk, window_size, init_blocks."),
]
Offload = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Keep what --memory has no room for of the KV cache in a file there."),
]
Speculative = Annotated[
    str | None,
    typer.Option(
        metavar="off|lookup|eagle",
        help="Guess several tokens and verify them at once, from the text so far or with the bundle's draft model; the "
        "reply is the same. Default: off.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's own setting, else 0.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability mass.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest one's probability.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 discourages tokens that already occurred.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
MaxTokens = Annotated[int, typer.Option(help="Longest reply, in tokens.")]
Sequences = Annotated[int, typer.Option(min=1, max=256, help="Requests computed at once, at most.")]
Save = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Keep the conversation and its KV cache in this file at the end.")
]
Restore = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Go on with a conversation that --save kept, its cache ready.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End the reply before this text; may be repeated.")]
Thinking = Annotated[
    bool | None, typer.Option("--thinking/--no-thinking", help="Thinking mode of templates that have one (MiniCPM4.1).")
]

MANY_ROWS = 128  # rows of logits a step, for commands that want those of every token
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """'4GiB', '900MB', '1.5G' or plain bytes -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    if match is None:
        raise UsageError(f"{text!r} is no size; write it as 4GiB, 900MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_sparse(text: str | None) -> dict[str, int]:
    """'topk=16,window_size=512' -> {'topk': 16, 'window_size': 512}."""
    settings = {}
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", part)
        if match is None:
            raise UsageError(f"--sparse has {part!r}; write settings as topk=16,window_size=512")
        settings[match[1]] = int(match[2])
    return settings


def load_engine(
    bundle: Path,
    context: int | None,
    memory: str | None,
    threads: int | None,
    chunk: int = EngineOptions.chunk,
    attention: str | None = None,
    sparse: str | None = None,
    offload: Path | None = None,
    speculative: str | None = None,
    **others: Any,
) -> Engine:
    """Open a bundle with what the user chose, and say so if the context is longer than the model was trained for.

    `others`: further fields of EngineOptions.
    """
    options = EngineOptions(
        context=context,
        memory=None if memory is None else parse_size(memory),
        threads=usable_cores() if threads is None else threads,
        chunk=chunk,
        attention=attention or EngineOptions.attention,
        sparse=parse_sparse(sparse),
        offload=offload,
        speculative=speculative or EngineOptions.speculative,
        **others,
    )
    engine = open_engine(bundle, options)
    trained = engine.bundle.manifest.limits["max_context"]
    if engine.max_context > trained:
        note(f"a context of {engine.max_context} tokens exceeds the {trained} the model was made for; quality may fall")
    return engine


def check_output(path: Path) -> None:
    """Raise before the work rather than after it if the file could not be written."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder, so {path.name} cannot be written there; create it or choose another")
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise UsageError(f"{path} is a folder or a device; give the name of a file to write")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} is not writable; choose another place for {path.name}")


def load_ids(path: Path) -> list[int]:
    """Token ids from a .npy file of whole numbers, any shape with one row."""
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give a .npy file of token ids") from None
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} is no readable .npy file ({error}); write it with numpy.save") from None
    if not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(f"{path} holds {ids.dtype} values; token ids must be whole numbers")
    if ids.size != max(ids.shape, default=0):
        raise UsageError(f"{path} has shape {ids.shape}; give one sequence of ids")
    if ids.size == 0:
        raise UsageError(f"{path} holds no ids; give at least one")
    return [int(i) for i in ids.reshape(-1)]
