"""`edge chat`: a conversation in a terminal, with the tools of MCP servers if there are any."""

from __future__ import annotations

import contextlib
import re
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from edge.chat_format.reply import Content, Event, Reasoning, ReplyParser, to_message
from edge.chat_format.tools import Tool
from edge.cli import options as opt
from edge.cli.console import err, note, write
from edge.cli.generate import (
    Reply,
    begin,
    check_session_options,
    decode_input,
    keep,
    load_tokenizer,
    opening,
    question,
    stream_reply,
)
from edge.cli.tool_use import ToolUse, open_tools
from edge.errors import EdgeError
from edge.sampler import SamplingParams, sampling_params
from edge.session import Session
from edge.text import Tokenizer
from edge.toolbox.config import read_config
from edge.toolbox.rounds import Message, take_rounds

Mcp = Annotated[
    Path | None,
    typer.Option("--mcp", metavar="FILE", help='MCP servers whose tools the model may use: {"mcpServers": {...}}.'),
]
ToolRounds = Annotated[int, typer.Option(min=1, max=1000, help="Most rounds of tool calls before the model answers.")]
ToolTokens = Annotated[int, typer.Option(min=16, max=2**20, help="Most tokens of one tool's result.")]
ToolSeconds = Annotated[float, typer.Option(min=0.1, max=86400, help="Longest time one call may take.")]


@dataclass(frozen=True)
class Speaker:
    """The model in a conversation: what its messages are made with."""

    session: Session
    tokenizer: Tokenizer
    params: SamplingParams
    thinking: bool | None = None
    tools: tuple[Tool, ...] = ()

    def speak(self, messages: list[Message]) -> Message | None:
        """Stream the model's next message; cut short by Ctrl-C it makes no calls. None, and why, if there was none."""
        prompt = self.tokenizer.render_chat(messages, tools=self.tools, enable_thinking=self.thinking)
        ids = self.tokenizer.encode_prompt(prompt)
        reply, parser = Reply(len(ids)), ReplyParser(self.tools, prompt=prompt)
        events: list[Event] = []
        stopped = False
        try:
            for piece in stream_reply(self.session, self.tokenizer, ids, self.params, reply):
                events += show(parser.push(piece), events)
        except KeyboardInterrupt:
            stopped = True
        events += show(parser.finish(), events)
        end_line(events)
        if not reply.tokens:
            note("stopped before the reply; the question is forgotten")
            return None
        if stopped:
            note("stopped")
            events = [event for event in events if isinstance(event, Content | Reasoning)]
        note(reply.summary())
        return to_message(events, iter(lambda: f"call_{uuid.uuid4().hex[:12]}", ""))


def show(new: list[Event], earlier: list[Event]) -> list[Event]:
    """Print what is for the person: content to stdout, reasoning dim to stderr. Returns `new`."""
    last = earlier[-1] if earlier else None
    for event in new:
        if isinstance(event, Reasoning):
            err.print(event.text, end="", style="dim", markup=False)
        elif isinstance(event, Content):
            if isinstance(last, Reasoning):
                err.print()
            write(event.text)
        last = event
    return new


def end_line(events: list[Event]) -> None:
    """The line's end after a reply; one that only calls tools has no line."""
    if any(isinstance(event, Content) for event in events) or not events:
        write("\n")
    elif any(isinstance(event, Reasoning) for event in events):
        err.print()


def chat(
    bundle: opt.BundlePath,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    seed: opt.Seed = None,
    max_tokens: opt.MaxTokens = 1024,
    thinking: opt.Thinking = None,
    context: opt.Context = None,
    memory: opt.Memory = None,
    threads: opt.Threads = None,
    attention: opt.Attention = None,
    sparse: opt.Sparse = None,
    offload: opt.Offload = None,
    speculative: opt.Speculative = None,
    save: opt.Save = None,
    restore: opt.Restore = None,
    mcp: Mcp = None,
    tool_rounds: ToolRounds = 8,
    tool_tokens: ToolTokens = 2048,
    tool_seconds: ToolSeconds = 60.0,
) -> None:
    """Talk over several turns; each turn computes only what is new. Ctrl-C stops a reply, Ctrl-D ends the chat.

    With --mcp the model may call tools of MCP servers; you are asked before each call, and Ctrl-C stops one.

    Commands: /reset forgets the conversation, /exit leaves.

    Examples:

      edge chat bundle --temperature 0.7

      edge chat bundle --save yesterday.session

      edge chat bundle --restore yesterday.session --save today.session

      edge chat bundle --mcp servers.json --tool-rounds 4
    """
    check_session_options(save, restore, system)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    sampling |= {"repetition_penalty": repetition_penalty, "max_tokens": max_tokens}
    servers = () if mcp is None else read_config(mcp)
    engine = opt.load_engine(
        bundle, context, memory, threads, attention=attention, sparse=sparse, offload=offload, speculative=speculative
    )
    tokenizer, params = load_tokenizer(engine), sampling_params(engine.bundle.manifest.generation, **sampling)
    session, messages = begin(engine, restore, system)
    with open_tools(servers, tokenizer, tool_rounds, tool_tokens, tool_seconds) as tools:
        note("Ctrl-D or /exit ends the chat, /reset forgets it, Ctrl-C stops a reply")
        speaker = Speaker(session, tokenizer, params, thinking, () if tools is None else tools.tools)
        try:
            talk(speaker, tools, messages, opening(system))
        finally:
            keep(session, save, messages)


def talk(speaker: Speaker, tools: ToolUse | None, messages: list[Message], first: list[Message]) -> None:
    """Turn after turn until the end of input or /exit. `messages` grows in place; /reset leaves `first` of it."""
    while (line := read_line()) is not None:
        command = line.strip()
        if command == "/exit":
            return
        if command == "/reset":
            messages[:] = first
            note("forgotten")
        elif re.fullmatch("/[a-z]+", command):
            note(f"{command} is no command; there are /reset and /exit")
        elif command:
            turn: list[Message] = [*messages, question(line)]
            if take_turn(speaker, tools, turn):
                messages[:] = turn


def take_turn(speaker: Speaker, tools: ToolUse | None, turn: list[Message]) -> bool:
    """The model's part of a turn, with its tools; False, and why, if the turn is to be forgotten."""
    before = len(turn)
    try:
        if tools is None:
            return take_rounds(turn, speaker.speak, lambda call: "", 0)
        return take_rounds(turn, speaker.speak, lambda call: tools.execute(call, ask), tools.rounds)
    except KeyboardInterrupt:
        write("\n")
        note("stopped")
        return len(turn) > before
    except EdgeError as error:
        hint = "; /reset starts over" if len(turn) > 2 else ""
        err.print(f"error: {error}{hint}", style="red", markup=False)
        return False


def read_line() -> str | None:
    """One line from the person, None at the end of input. Ctrl-C drops a half-written line."""
    if sys.stdin is None or not sys.stdin.isatty():
        return ask("")
    while True:
        try:
            return ask("> ")
        except KeyboardInterrupt:
            write("\n")
            note("Ctrl-D or /exit ends the chat")


def ask(prompt: str) -> str | None:
    """A line from the person, after a prompt if there is a terminal; None at the end of input."""
    if sys.stdin is None or not sys.stdin.isatty():
        line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        return decode_input(line, "standard input").rstrip("\r\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and remembers them
    try:
        return input(prompt)
    except EOFError:
        write("\n")
        return None
