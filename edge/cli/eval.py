"""`edge eval`: long-context accuracy and perplexity of a bundle."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from edge.bench.report import write_text
from edge.cli import options as opt
from edge.cli.console import note, out, progress_bar
from edge.cli.generate import load_tokenizer, read_text
from edge.engine import Engine
from edge.errors import UsageError
from edge.eval.languages import ENGLISH, LANGUAGES
from edge.eval.picture import render_html
from edge.eval.report import EvalSettings, terminal, to_json
from edge.eval.run import has_chat_template, is_one_token, run_eval
from edge.eval.tasks import PERPLEXITY, TASKS, HaystackPlan, recognise_language, split_sentences
from edge.plan import ALWAYS_DENSE
from edge.text import Tokenizer

# Every prompt is to be timed as if it were the first, and perplexity wants the logits of all tokens.
_MEASURED: dict[str, Any] = {"prefix_cache": False, "logits_rows": opt.MANY_ROWS}


def evaluate(
    bundle: opt.BundlePath,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="niah_single, niah_multikey, niah_multivalue, variable_tracking, perplexity; separated by commas. "
            "Default: the first four, as far as the language has them."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and reply, separated by commas.")] = "4096",
    depths: Annotated[int, typer.Option(min=1, max=100, help="Equal parts of the haystack to place needles in.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Questions a task and length.")] = 20,
    questions_per_haystack: Annotated[int, typer.Option(min=1, help="Questions that share a prefilled haystack.")] = 8,
    haystack: Annotated[Path | None, typer.Option(help="UTF-8 text as filler instead of invented sentences.")] = None,
    language: Annotated[str | None, typer.Option(help="english or recall. Default: by the vocabulary.")] = None,
    raw: Annotated[bool, typer.Option(help="Ask without the chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Another seed makes other texts.")] = 0,
    file: Annotated[Path | None, typer.Option(help="UTF-8 text for the task perplexity.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of each window of that text.")] = 2048,
    html: Annotated[Path | None, typer.Option(help="Write the report as one self-contained page.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    attention: opt.Attention = None,
    sparse: opt.Sparse = None,
    offload: opt.Offload = None,
    context: opt.Context = None,
    memory: opt.Memory = None,
    threads: opt.Threads = None,
    chunk: opt.Chunk = 512,
    json: opt.Json = False,
) -> None:
    """Hide needles in long texts and ask for them (RULER's tasks, made offline); perplexity of a text.

    Examples:

      edge eval bundle --lengths 4096,8192 --html report.html

      edge eval bundle --tasks niah_single,variable_tracking --depths 10 --samples 50

      edge eval bundle --tasks perplexity --file text.txt --window 2048
    """
    names, plan = _task_names(tasks), HaystackPlan(_lengths(lengths), depths, samples, questions_per_haystack, seed)
    text = _perplexity_text(names, file)
    filler = None if haystack is None else (haystack.name, _sentences(haystack))
    for path in (html, output):
        if path is not None:
            opt.check_output(path)
    context = _context(names, plan, window, context)
    engine = opt.load_engine(bundle, context, memory, threads, chunk, attention, sparse, offload, **_MEASURED)
    tokenizer = load_tokenizer(engine)
    settings = _settings(engine, tokenizer, names, plan, language, raw, filler)
    with progress_bar("evaluating", quiet=json) as progress:
        report = run_eval(engine, tokenizer, settings, filler[1] if filler else (), text, window, progress)
    for path, render in ((html, render_html), (output, to_json)):
        if path is not None:
            write_text(path, render(report))
            note(f"report written to {path}")
    if json:
        print(to_json(report), end="")
    else:
        out.print(terminal(report))


def _task_names(text: str | None) -> tuple[str, ...] | None:
    """Each task once, in the order given; None if the user leaves it to the language."""
    if text is None:
        return None
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    known = (*TASKS, PERPLEXITY)
    for name in names:
        if name not in known:
            raise UsageError(f"--tasks has {name!r}, which is no task; choose from {', '.join(known)}")
    return names


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError(f"--lengths {text!r} is no list of whole numbers; write it as 4096,8192,16384") from None
    if lengths[0] < 1:
        raise UsageError(f"--lengths {text!r} holds a length below 1; ask for some hundreds of tokens at least")
    return lengths


def _context(names: tuple[str, ...] | None, plan: HaystackPlan, window: int, context: int | None) -> int:
    """Tokens that the context holds: --context, which must be enough, or what is needed."""
    needs = {f"--lengths {max(plan.lengths)}": max(plan.lengths)} if names != (PERPLEXITY,) else {}
    if names is not None and PERPLEXITY in names:
        needs[f"--window {window}"] = window
    for name, tokens in needs.items():
        if context is not None and tokens > context:
            raise UsageError(f"{name} is over the --context of {context} tokens; raise --context or ask for less")
    return context or max(needs.values())


def _perplexity_text(names: tuple[str, ...] | None, file: Path | None) -> tuple[str, str] | None:
    """The name and the text of --file, which the task perplexity and nothing else reads."""
    wanted = names is not None and PERPLEXITY in names
    if wanted and file is None:
        raise UsageError("the task perplexity needs a text; give --file PATH")
    if file is None:
        return None
    if not wanted:
        raise UsageError("--file is the text of the task perplexity; add it to --tasks, or give --haystack for filler")
    return file.name, _read_text(file)


def _sentences(path: Path) -> tuple[str, ...]:
    sentences = split_sentences(_read_text(path))
    if not sentences:
        raise UsageError(f"{path} holds no text; give a file of sentences")
    return sentences


def _read_text(path: Path) -> str:
    """The text with the line ends that the rest of the world has, so that they are worth one token everywhere."""
    return read_text(path).replace("\r\n", "\n").replace("\r", "\n")


def _settings(
    engine: Engine,
    tokenizer: Tokenizer,
    names: tuple[str, ...] | None,
    plan: HaystackPlan,
    language: str | None,
    raw: bool,
    filler: tuple[str, tuple[str, ...]] | None,
) -> EvalSettings:
    """What the user chose, and what follows from the bundle where nothing was chosen."""
    words = recognise_language(partial(is_one_token, tokenizer)) if language is None else LANGUAGES.get(language)
    if words is None:
        raise UsageError(f"--language {language!r} is unknown; choose from {', '.join(LANGUAGES)}")
    if filler is not None and words is not ENGLISH:
        raise UsageError(f"--haystack is filler for the language english, not for {words.name}; drop it")
    sparse = engine.plan.sparse
    return EvalSettings(
        tasks=tuple(words.wordings) if names is None else names,
        plan=plan,
        language=words.name,
        prompt="chat" if words.chat and not raw and has_chat_template(tokenizer) else "raw",
        haystack="invented" if filler is None else filler[0],
        sparse=None if sparse is None or sparse.dense_len == ALWAYS_DENSE else sparse,
    )
