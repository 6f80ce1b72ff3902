"""`edge mapreduce`: a question about documents longer than any context."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from edge.chat_format.reply import Content, opened_reasoning, parse_reply
from edge.cli import options as opt
from edge.cli.console import note, print_json, progress_bar, write
from edge.cli.generate import load_tokenizer, read_text
from edge.engine import Engine
from edge.errors import UsageError
from edge.mapreduce.documents import Document
from edge.mapreduce.run import Reader, Result, answer_question
from edge.mapreduce.state import Replies, key_of
from edge.mapreduce.structured import FINDING_OPENING, MOST_CONFIDENCE
from edge.sampler import SamplingParams, sampling_params
from edge.stream import TextStream
from edge.text import Tokenizer

Documents = Annotated[list[Path], typer.Argument(metavar="DOC...", help="UTF-8 text files.")]
ChunkTokens = Annotated[
    int | None, typer.Option(min=1, max=2**31 - 1, help="Tokens of text read at once. Default: what the context holds.")
]
State = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Keep replies in this file. Default: one here that is deleted when the answer is there."
    ),
]


def mapreduce(
    bundle: opt.BundlePath,
    documents: Documents,
    question: Annotated[str, typer.Option(help="What to find out.")],
    max_tokens: Annotated[int, typer.Option(min=16, help="Longest reply about a chunk, in tokens.")] = 512,
    chunk_tokens: ChunkTokens = None,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    seed: opt.Seed = None,
    thinking: opt.Thinking = None,
    context: opt.Context = None,
    memory: opt.Memory = None,
    threads: opt.Threads = None,
    attention: opt.Attention = None,
    sparse: opt.Sparse = None,
    offload: opt.Offload = None,
    speculative: opt.Speculative = None,
    state: State = None,
    json: opt.Json = False,
) -> None:
    """Answer a question about documents of any length: read them chunk by chunk, put together what was found.

    This is LLMxMapReduce: of every chunk the model writes down information, a rationale, an answer and a confidence
    score; these findings are collapsed until they fit into the context, and the last prompt answers from them. After
    Ctrl-C the same command goes on where it was.

    Examples:

      edge mapreduce bundle book.txt --question "Who is the narrator's brother?"

      edge mapreduce bundle logs/*.txt --question "Which valve failed first?" --chunk-tokens 4096 --json
    """
    if not question.strip():
        raise UsageError("--question is empty; give at least one word")
    texts = [Document(str(path), read_text(path)) for path in documents]
    if state is not None:
        opt.check_output(state)  # before the model is loaded
    engine = opt.load_engine(
        bundle, context, memory, threads, attention=attention, sparse=sparse, offload=offload, speculative=speculative
    )
    chosen = {"repetition_penalty": repetition_penalty, "seed": seed, "max_tokens": max_tokens}
    params = sampling_params({}, temperature=temperature, top_p=top_p, **chosen)
    key = _key(engine, texts, question, params, chunk_tokens, thinking)
    path = state or Path(f"edge-mapreduce-{key[:12]}.state")
    opt.check_output(path)
    replies = Replies(path, key)
    if len(replies):
        note(f"{replies.path} has {len(replies)} replies already")
    model = EngineReader(engine, load_tokenizer(engine), params, thinking, replies)
    try:
        with progress_bar("reading", quiet=json) as progress:
            result = answer_question(texts, question, model.reader(), progress, chunk_tokens=chunk_tokens)
    except KeyboardInterrupt:
        if len(replies):
            note(f"{replies.path} keeps {len(replies)} replies; the same command goes on from there")
        raise
    _print(result, question, replies, engine, as_json=json)
    if state is None:
        replies.remove()


def _key(
    engine: Engine,
    documents: list[Document],
    question: str,
    params: SamplingParams,
    chunk_tokens: int | None,
    thinking: bool | None,
) -> str:
    """Of all that a reply depends on."""
    facts = engine.describe()
    return key_of(
        {
            "documents": [[doc.name, hashlib.sha256(doc.text.encode()).hexdigest()] for doc in documents],
            "question": question,
            "bundle": engine.bundle.manifest.key,
            "sampling": asdict(params),
            "chunk_tokens": chunk_tokens,
            "thinking": thinking,
            "context": engine.max_context,
            "attention": facts["attention"],
        }
    )


@dataclass
class EngineReader:
    """Replies of the engine, or those that were kept."""

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams
    thinking: bool | None
    replies: Replies

    def reader(self) -> Reader:
        """What answer_question asks."""
        context = self.engine.max_context
        return Reader(self.ask, self.prompt_tokens, self.tokenizer.token_starts, context, self.params.max_tokens)

    def prompt_tokens(self, message: str) -> int:
        """Tokens of the message's prompt, with the longest opening."""
        prompt = self.prompt(message) + FINDING_OPENING
        return len(self.tokenizer.encode_prompt(prompt))

    def ask(self, message: str, opening: str) -> str:
        """The reply to a message, without the reasoning that may come first, which takes the place of an opening."""
        prompt = self.prompt(message)
        opening = "" if self.tokenizer.may_think(self.thinking) or opened_reasoning(prompt) else opening
        reply = self.replies.get(prompt + opening)
        if reply is None:
            reply = self._generate(prompt + opening)
            self.replies.keep(prompt + opening, reply)
        events = parse_reply(reply, prompt=prompt + opening)
        return opening + "".join(event.text for event in events if isinstance(event, Content))

    def prompt(self, message: str) -> str:
        """The message in the chat template; what it says of special tokens stays text."""
        content = self.tokenizer.without_special_tokens(message)
        return self.tokenizer.render_chat([{"role": "user", "content": content}], enable_thinking=self.thinking)

    def _generate(self, prompt: str) -> str:
        ids = self.tokenizer.encode_prompt(prompt)
        stream, text = TextStream(self.tokenizer, after_prompt=True), ""
        with contextlib.closing(self.engine.generate(ids, self.params)) as events:
            for event in events:
                text += "" if event.finish_reason == "stop" else stream.push(event.token_id)
        return text + stream.finish()


def _print(result: Result, question: str, replies: Replies, engine: Engine, *, as_json: bool) -> None:
    finding = result.finding
    sources = [
        {
            "document": chunk.document.name,
            "lines": list(chunk.lines),
            "characters": [chunk.start, chunk.end],
            "answer": found.answer,
            "confidence": found.confidence,
        }
        for chunk, found in result.sources
    ]
    if as_json:
        values: dict[str, Any] = {
            "question": question,
            "answer": finding.answer,
            "confidence": finding.confidence,
            "most_confidence": MOST_CONFIDENCE,
            "rationale": finding.rationale,
            "sources": sources,
            "chunks": len(result.chunks),
            "collapsed": list(result.collapsed),
            "resumed": replies.resumed,
            "bundle": engine.describe(),
        }
        print_json(values)
        return
    write(finding.answer + "\n")
    confidence = "no confidence given" if finding.confidence is None else f"confidence {finding.confidence:g} of 5"
    note(f"{confidence}; from {len(sources)} of {len(result.chunks)} chunks")
    for chunk, _ in result.sources:
        first, last = chunk.lines
        note(f"  {chunk.document.name}, lines {first} to {last}")
