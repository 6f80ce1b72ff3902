"""A table of a report or of a comparison, and its forms in a terminal and in Markdown; table.html is the third."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

from edge.bench.numbers import plain_markdown


@dataclass(frozen=True)
class Section:
    """A table under a heading.

    headings: of columns, the first `words` of which are words and the others figures; a line break in one is a space
    where there is only one line. A cell's second line is the figure's spread. identity: of the heading in the page, ""
    if nothing refers to it.
    """

    heading: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    caption: str = ""
    identity: str = ""


def empty_table() -> Table:
    """As all tables look in a terminal: a rule under the headings, no frame."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def terminal_table(section: Section, may_wrap: Sequence[str] = ()) -> Table:
    """Words wrap, figures do not, except those under headings that may: between the two numbers of a spread."""
    table = empty_table()
    for index, heading in enumerate(section.headings):
        is_words = index < section.words
        wraps = is_words or heading in may_wrap
        table.add_column(heading, justify="left" if is_words else "right", no_wrap=not wraps)
    for row in section.rows:
        table.add_row(*map(escape, row))
    return table


def markdown_table(section: Section) -> list[str]:
    """Lines of the table alone; words are to the left, spreads in brackets."""
    headings = [heading.replace("\n", " ").strip() for heading in section.headings]
    rows = [[_one_line(cell) for cell in row] for row in section.rows]
    lines = [f"| {' | '.join(map(plain_markdown, row))} |" for row in (headings, *rows)]
    rule = [":---" if i < section.words else "---:" for i in range(len(headings))]
    return [lines[0], f"| {' | '.join(rule)} |", *lines[1:]]


def _one_line(cell: str) -> str:
    figure, _, spread = cell.partition("\n")
    return f"{figure} ({spread})" if spread else figure
