"""`edge run`: text in, text out; and what it shares with `edge chat`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from edge.cli import options as opt
from edge.cli.console import note, print_json, progress_bar, write
from edge.engine import Engine, Session
from edge.errors import UsageError
from edge.sampler import SamplingParams, sampling_params
from edge.speculation.statistics import Speculated
from edge.stream import TextStream
from edge.text import TextSettings, Tokenizer


@dataclass
class Reply:
    """A reply as it grows, and when its tokens came."""

    prompt_tokens: int
    text: str = ""
    tokens: int = 0
    finish_reason: str = "length"
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    speculated: Speculated | None = None

    def summary(self) -> str:
        """Tokens and speeds in a line."""
        decode = self.total_seconds - self.first_token_seconds
        speed = f", {(self.tokens - 1) / decode:.1f} tok/s" if self.tokens > 1 and decode > 0 else ""
        guessed = ""
        if self.speculated is not None and self.speculated.steps:
            guessed = f", {self.speculated.mean_accept_length:.2f} tokens a verified step"
        return (
            f"{self.prompt_tokens} prompt tokens, first token after {self.first_token_seconds:.2f} s; "
            f"{self.tokens} tokens{speed}{guessed}"
        )

    def values(self) -> dict[str, Any]:
        """Plain JSON values."""
        speculated = None if self.speculated is None else self.speculated.values()
        return {**vars(self), "speculated": speculated}


def run(
    bundle: opt.BundlePath,
    prompt: Annotated[str | None, typer.Option(help="The question; - reads it from standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this UTF-8 file.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is, without the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message for the chat template.")] = None,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    seed: opt.Seed = None,
    max_tokens: opt.MaxTokens = 512,
    stop: opt.Stop = None,
    thinking: opt.Thinking = None,
    context: opt.Context = None,
    memory: opt.Memory = None,
    threads: opt.Threads = None,
    chunk: opt.Chunk = 512,
    attention: opt.Attention = None,
    sparse: opt.Sparse = None,
    offload: opt.Offload = None,
    speculative: opt.Speculative = None,
    save: opt.Save = None,
    restore: opt.Restore = None,
    json: opt.Json = False,
) -> None:
    """Answer one prompt; the text streams to standard output.

    Examples:

      edge run bundle --prompt "What is the capital of France?" --temperature 0

      cat notes.txt | edge run bundle --raw --max-tokens 100

      edge run bundle --file report.txt --save report.session

      edge run bundle --restore report.session --prompt "And in one sentence?"
    """
    check_session_options(save, restore, system, raw)
    text = read_prompt(prompt, file)
    engine = opt.load_engine(bundle, context, memory, threads, chunk, attention, sparse, offload, speculative)
    tokenizer, defaults = load_tokenizer(engine), engine.bundle.manifest.generation
    chosen = {"repetition_penalty": repetition_penalty, "seed": seed, "max_tokens": max_tokens, "stop": stop}
    params = sampling_params(defaults, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, **chosen)
    session, messages = begin(engine, restore, system)
    messages.append(question(text))
    ids = encode_prompt(tokenizer, text, None if raw else messages, thinking)
    reply = Reply(len(ids))
    print_pieces(stream_reply(session, tokenizer, ids, params, reply, after_prompt=raw), quiet=json)
    keep(session, save, [] if raw else [*messages, answer(reply)])
    report_reply(reply, engine, as_json=json)


def encode_prompt(
    tokenizer: Tokenizer, text: str, messages: list[dict[str, str]] | None, thinking: bool | None
) -> list[int]:
    """The messages through the chat template, or the text as it is if there are none."""
    if messages is None:
        return tokenizer.encode_prompt(text)
    return tokenizer.encode_chat(messages, enable_thinking=thinking)


def print_pieces(pieces: Iterator[str], *, quiet: bool) -> None:
    """A reply as it comes, and the line's end after it, whatever ends it."""
    printed = False
    try:
        for piece in pieces:
            if not quiet:
                write(piece)
                printed = True
    finally:
        if printed:
            write("\n")


def report_reply(reply: Reply, engine: Engine, *, as_json: bool) -> None:
    """How it went, in a line or, with the text, as JSON."""
    if as_json:
        print_json({**reply.values(), "bundle": engine.describe()})
    else:
        note(reply.summary())


def check_session_options(save: Path | None, restore: Path | None, system: str | None, raw: bool = False) -> None:
    """Raise before the model is loaded if the options contradict each other or FILE cannot be written."""
    if raw and system is not None:
        raise UsageError("--system is part of the chat template, which --raw leaves out; drop one of them")
    if save is not None:
        opt.check_output(save)
    if restore is not None and system is not None:
        raise UsageError("--system begins a conversation and --restore goes on with one; drop one of them")


def begin(engine: Engine, restore: Path | None, system: str | None) -> tuple[Session, list[dict[str, str]]]:
    """A session, new or restored, and the messages so far."""
    if restore is None:
        return engine.open_session(), opening(system)
    session = engine.restore_session(restore)
    return session, list(session.notes.get("messages", []))


def keep(session: Session, path: Path | None, messages: list[dict[str, str]]) -> None:
    """Save a session with its messages, if there is a file for it."""
    if path is None:
        return
    session.notes["messages"] = messages
    session.save(path)
    note(f"conversation kept in {path}")


def opening(system: str | None) -> list[dict[str, str]]:
    """The messages before the first question."""
    return [] if system is None else [{"role": "system", "content": system}]


def question(text: str) -> dict[str, str]:
    """The user's message; the line end of a file or of echo is no part of it."""
    return {"role": "user", "content": text.removesuffix("\n")}


def answer(reply: Reply) -> dict[str, str]:
    """The model's message."""
    return {"role": "assistant", "content": reply.text}


def stream_reply(
    session: Session,
    tokenizer: Tokenizer,
    ids: list[int],
    params: SamplingParams,
    reply: Reply,
    *,
    after_prompt: bool = False,
) -> Iterator[str]:
    """Pieces of text as they become certain; `reply` is kept up to date."""
    stream = TextStream(tokenizer, params.stop, after_prompt=after_prompt)
    started = time.perf_counter()
    with progress_bar("reading the prompt") as progress:
        # The bar must be gone before the first piece of text is written.
        events = session.generate(ids, params, progress)
        first = next(events)
    reply.first_token_seconds = time.perf_counter() - started
    reply.speculated = session.speculated
    with contextlib.closing(events):
        event = first
        while True:
            reply.tokens += 1
            reply.total_seconds = time.perf_counter() - started
            ended = event.finish_reason == "stop"
            piece = "" if ended else stream.push(event.token_id)
            if event.finish_reason is not None and stream.stopped is None:
                piece += stream.finish()
                reply.finish_reason = event.finish_reason
            if stream.stopped is not None:
                reply.finish_reason = "stop"
            reply.text += piece
            if piece:
                yield piece
            if event.finish_reason is not None or stream.stopped is not None:
                return
            event = next(events)


def load_tokenizer(engine: Engine) -> Tokenizer:
    """The bundle's tokenizer, or a sentence that it has none."""
    text = engine.bundle.manifest.text
    if text is None:
        raise UsageError(
            f"{engine.bundle.path} holds no tokenizer, because its checkpoint had none; export a checkpoint with "
            "tokenizer.json, or use `edge logits` with token ids"
        )
    return Tokenizer.load(engine.bundle.path, TextSettings.from_dict(text))


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """From --prompt, --file or standard input, exactly one of them."""
    if prompt is not None and file is not None:
        raise UsageError("--prompt and --file were both given; choose one")
    if file is not None and str(file) != "-":
        text = read_text(file)
    elif prompt is not None and prompt != "-":
        text = prompt
    elif sys.stdin is None or (prompt is None and file is None and sys.stdin.isatty()):
        raise UsageError("there is no prompt; give --prompt TEXT or --file PATH, or pipe text in")
    else:
        text = decode_input(sys.stdin.buffer.read(), "standard input")
    if not text.strip():
        raise UsageError("the prompt is empty; give at least one word")
    return text


def read_text(path: Path) -> str:
    """A file's text, or a sentence why there is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); give a readable text file") from None
    return decode_input(data, str(path))


def decode_input(data: bytes, source: str) -> str:
    """UTF-8 from a file or a pipe, or a sentence that it is none."""
    try:
        return data.decode("utf-8-sig")  # the mark that some editors put first is no text
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8 (byte {error.start}); convert it first") from None
