"""Divide, map, collapse, reduce."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from edge.errors import EdgeError, UsageError
from edge.mapreduce.documents import Chunk, Document, TokenStarts, split_document
from edge.mapreduce.structured import (
    ANSWER_OPENING,
    FINDING_OPENING,
    NO_INFORMATION,
    Finding,
    collapse_prompt,
    map_prompt,
    parse_finding,
    reduce_prompt,
)
from edge.session import Progress

_FEWEST_CHUNK_TOKENS = 32


@dataclass(frozen=True)
class Reader:
    """The model, as far as this needs it."""

    ask: Callable[[str, str], str]  # a user's message and the reply's first words -> the reply, with these
    prompt_tokens: Callable[[str], int]  # tokens of that message in its prompt
    token_starts: TokenStarts
    context: int  # tokens of a prompt and its reply together
    reply: int  # most tokens of a reply

    def fits(self, message: str) -> bool:
        """Whether the message leaves room for a reply."""
        return self.prompt_tokens(message) + self.reply <= self.context


@dataclass(frozen=True)
class Result:
    """The answer, what every chunk said, and how many replies each stage took (one number a round of collapsing)."""

    finding: Finding
    chunks: tuple[Chunk, ...]
    mapped: tuple[Finding, ...]
    collapsed: tuple[int, ...]

    @property
    def sources(self) -> list[tuple[Chunk, Finding]]:
        """The chunks that the answer rests on, in order."""
        return [(self.chunks[i], self.mapped[i]) for i in self.finding.chunks]


def answer_question(
    documents: Sequence[Document],
    question: str,
    reader: Reader,
    progress: Progress,
    *,
    chunk_tokens: int | None = None,
) -> Result:
    """Read all documents chunk by chunk and answer from what was found.

    `progress(done, total)` counts replies; the total grows if findings must be collapsed.
    """
    chunks = tuple(divide(documents, question, reader, chunk_tokens))
    check_room(len(chunks), question, reader)
    done = 0

    def ask(message: str, following: int, opening: str = FINDING_OPENING) -> str:
        nonlocal done
        progress(done, done + following)
        reply = reader.ask(message, opening)
        done += 1
        progress(done, done + following - 1)
        return reply

    mapped = []
    for i, chunk in enumerate(chunks):
        reply = ask(map_prompt(question, chunk.document.name, chunk.text), len(chunks) - i + 1)
        mapped.append(parse_finding(reply, (i,)))
    findings = [finding for finding in mapped if not finding.is_empty]
    rounds = []
    while findings and not reader.fits(reduce_prompt(question, findings)):
        groups = list(group(findings, question, reader))
        asked = [len(members) > 1 for members in groups]
        if not any(asked):
            raise EdgeError(
                f"two findings do not fit into the context of {reader.context} tokens; "
                "raise --context, or lower --max-tokens"
            )
        findings = []
        for n, members in enumerate(groups):
            if not asked[n]:
                findings += members
                continue
            reply = ask(collapse_prompt(question, members), sum(asked[n:]) + 1)
            findings.append(parse_finding(reply, tuple(i for member in members for i in member.chunks)))
        findings = [finding for finding in findings if not finding.is_empty]
        rounds.append(sum(asked))
    if not findings:
        return Result(Finding("", "", NO_INFORMATION, 0.0), chunks, tuple(mapped), tuple(rounds))
    used = tuple(i for finding in findings for i in finding.chunks)
    final = parse_finding(ask(reduce_prompt(question, findings), 1, ANSWER_OPENING), used)
    if not final.answer:  # cut short, or not in the format: what there is
        final = replace(final, answer=final.rationale or NO_INFORMATION)
    return Result(final, chunks, tuple(mapped), tuple(rounds))


def divide(documents: Sequence[Document], question: str, reader: Reader, chunk_tokens: int | None) -> Iterator[Chunk]:
    """All chunks of all documents; UsageError if the context leaves too little room for them, or there is no text."""
    found = False
    for document in documents:
        taken = reader.prompt_tokens(map_prompt(question, document.name, ""))
        room = reader.context - reader.reply - taken
        if room < _FEWEST_CHUNK_TOKENS:
            raise UsageError(
                f"a context of {reader.context} tokens leaves {max(0, room)} for text, beside a prompt of {taken} and "
                f"a reply of {reader.reply}; raise --context, or lower --max-tokens"
            )

        def fits(text: str, name: str = document.name) -> bool:
            return reader.fits(map_prompt(question, name, text))

        most = room if chunk_tokens is None else min(room, chunk_tokens)
        for chunk in split_document(document, most, reader.token_starts, fits):
            found = True
            yield chunk
    if not found:
        raise UsageError("the documents hold no text; give at least one that does")


def check_room(chunks: int, question: str, reader: Reader) -> None:
    """UsageError, before hours of work, if the longest replies could not be put together in the end."""
    nothing = Finding("", "", "", None)
    several = chunks > 1
    prompt = collapse_prompt(question, [nothing, nothing]) if several else reduce_prompt(question, [nothing])
    needed = reader.prompt_tokens(prompt) + (3 if several else 2) * reader.reply
    if needed > reader.context:
        raise UsageError(
            f"putting findings together takes up to {needed} tokens, with replies of {reader.reply}, and the context "
            f"has {reader.context}; raise --context, or lower --max-tokens"
        )


def group(findings: Sequence[Finding], question: str, reader: Reader) -> Iterator[list[Finding]]:
    """Neighbours that fit into one prompt together, as many as possible."""
    members: list[Finding] = []
    for finding in findings:
        if members and not reader.fits(collapse_prompt(question, [*members, finding])):
            yield members
            members = []
        members.append(finding)
    yield members
