"""`edge freq`: the tokens that a draft model's head needs, counted in texts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from edge.bundle import TOKENIZER, is_bundle, open_bundle
from edge.cli import options as opt
from edge.cli.console import note, print_json, progress_bar
from edge.config import ModelConfig
from edge.errors import UsageError
from edge.frequencies import check_name, control_tokens, count_tokens, most_frequent, write_frequencies
from edge.text import TextSettings, Tokenizer


def freq(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="UTF-8 files as your users write and read.")],
    model: Annotated[Path, typer.Option(metavar="CHECKPOINT|BUNDLE", help="Whose tokenizer counts.")],
    out: Annotated[Path, typer.Option(help="File to write: .npy, .json or .txt.")],
    size: Annotated[int, typer.Option(min=1, help="Tokens to keep.")] = 32768,
    json: opt.Json = False,
) -> None:
    """List a model's most frequent tokens, the vocabulary of a draft model (FR-Spec).

    Tokens that end a reply, special tokens and those of the chat template are always in the list. A smaller head makes
    every guess cheaper; replies stay what they are, for the model itself checks guesses with all its tokens.

    Example:

      edge freq wiki.txt chats.txt --model MiniCPM4-8B --size 32768 --out freq_32768.npy
    """
    if missing := [path for path in texts if not path.is_file()]:
        raise UsageError(f"{missing[0]} is no file; give text files")
    opt.check_output(out)
    check_name(out)
    tokenizer, config = _open_tokenizer(model)
    with progress_bar("counting", quiet=json) as progress:
        counts = count_tokens(texts, tokenizer, config.vocab_size, progress)
    if not counts.any():
        raise UsageError("the texts hold no tokens; give files of ordinary text")
    found = most_frequent(counts, size, control_tokens(tokenizer, config.eos_token_ids))
    write_frequencies(out, found.ids)
    if json:
        print_json({"file": str(out), "size": size, "tokens": found.tokens, "coverage": found.coverage})
        return
    share = f"{100 * found.coverage:.1f} % of the {found.tokens} tokens counted"
    note(
        f"{out}: {size} of {config.vocab_size} tokens, {share}; edge export MODEL --draft DRAFT --frspec {out} uses it"
    )


def _open_tokenizer(model: Path) -> tuple[Tokenizer, ModelConfig]:
    if is_bundle(model):
        bundle = open_bundle(model, verify=False)
        if bundle.manifest.text is None:
            raise UsageError(f"{model} has no tokenizer; export it from a checkpoint that has one")
        return Tokenizer.load(bundle.path, TextSettings.from_dict(bundle.manifest.text)), bundle.config
    from build_engine.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    if (text := checkpoint.text) is None:
        raise UsageError(f"{model} has no tokenizer; add the checkpoint's tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TOKENIZER).write_text(text.tokenizer_json, encoding="utf-8")
        settings = TextSettings(text.add_bos, text.bos_token, text.eos_token, text.chat_template)
        return Tokenizer.load(Path(folder), settings), checkpoint.config
