"""`edge bench compare`: reports beside each other, with significance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge.cli import options as opt
from edge.cli.console import note, out
from edge.cli.report_files import wanted_forms, write_forms
from edge.errors import EdgeError

if TYPE_CHECKING:
    from edge.bench.options import PeerRow

Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        metavar="[NAME=]FILE",
        help="Another engine's results beside ours: of llama-bench, CPM.cu, TensorRT Edge-LLM or `edge bench`; may be "
        "repeated.",
    ),
]


def compare(
    reports: Annotated[
        list[str],
        typer.Argument(
            metavar="REPORT",
            help="Two or more JSON reports, the baseline first. NAME=FILE names one; FILE,FILE,... are runs of one "
            "thing.",
        ),
    ],
    peer: Peers = None,
    fail_if_slower: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT", min=0, help="Exit with 1 if any case is significantly slower, and by more than this."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the comparison as one self-contained page.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the comparison as Markdown.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the comparison as JSON.")] = None,
    json: opt.Json = False,
) -> None:
    """Compare benchmark reports: boards, versions, engines or options, case by case, with significance.

    Write reports with `edge bench BUNDLE --output FILE`.

    Examples:

      edge bench compare old.json new.json

      edge bench compare old.json new.json --fail-if-slower 5

      edge bench compare orin=a.json rtx=b.json --html page.html

      edge bench compare a1.json,a2.json,a3.json b1.json,b2.json,b3.json
    """
    from edge.bench.compare.comparison import compare_sides, load_sides, slower_rows
    from edge.bench.compare.page import render_html
    from edge.bench.compare.text import failure, terminal, to_json
    from edge.bench.compare.text import markdown as as_markdown

    wanted = wanted_forms((html, render_html), (markdown, as_markdown), (output, to_json))
    comparison = compare_sides(load_sides(reports), load_peers(peer))
    slower = [] if fail_if_slower is None else slower_rows(comparison, fail_if_slower)
    write_forms(wanted, comparison, "comparison")
    print(to_json(comparison), end="") if json else out.print(terminal(comparison))
    if slower and fail_if_slower is not None:
        raise EdgeError(failure(slower, fail_if_slower))


def load_peers(words: list[str] | None) -> list[PeerRow]:
    """The rows of all --peer files; what none of them can hold is noted."""
    from edge.bench.compare.comparison import split_name
    from edge.bench.importers import read_peers

    rows: list[PeerRow] = []
    for word in words or ():
        name, path = split_name(word)
        found = read_peers(Path(path), name)
        rows += found.rows
        for sentence in found.notes:
            note(sentence)
    return rows
