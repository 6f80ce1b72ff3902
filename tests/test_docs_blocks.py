"""A stranger's path: every code block of README.md and docs/ is typed as written, or says why it is not.

Each page begins in a fresh folder with the files that its text takes for granted, a small model under the names of
large ones among them. What a page makes is there for its later blocks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from edge.bench.report import to_json
from edge.cli.app import run_command
from edge.config import SparseConfig
from tests.bench_samples import sample_report
from tests.docs_blocks import PARSED, REASONS, ROOT, RUN, SHOWN, Block, Reader, blocks, is_printed, pages, transcript
from tests.draft_samples import draft_config, draft_weights, write_draft
from tests.synthetic import tiny_config, write_hf_checkpoint
from tests.test_toolbox import sample_server

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = "The ship belongs to Ada. It left the harbour of Brest in May.\n\n" * 40
# What a page's text takes for granted, besides TEXT_FILES: names of the small checkpoint, and of things made of it.
GIVEN = {
    "README.md": ("CHECKPOINT", "clone"),
    "docs/applications.md": ("bundle",),
    "docs/benchmarks.md": ("clone",),
    "docs/evaluation.md": ("bundle",),
    "docs/compare.md": ("bundle",),
    "docs/memory.md": ("bundle",),
    "docs/power.md": ("bundle",),
    "docs/quantization.md": ("MiniCPM4-0.5B",),
    "docs/quickstart.md": ("MiniCPM4-0.5B",),
    "docs/report.md": ("bundle",),
    "docs/serving.md": ("bundle",),
    "docs/speculation.md": ("bundle", "MiniCPM4-8B", "MiniCPM4-8B-Eagle-FRSpec"),
    "docs/tensorrt.md": ("MiniCPM4-0.5B",),
}
TEXT_FILES = ("text.txt", "book.txt", "notes.txt", "chats.txt", "manuals.txt", "my-text.txt")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of sizes that have kernels and a large vocabulary; a draft; a bundle."""
    folder = tmp_path_factory.mktemp("shelf")
    config = tiny_config(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=33024,
        max_position_embeddings=32768,
        sparse=SparseConfig(),
    )
    write_hf_checkpoint(folder / "checkpoint", config, tokenizer=True)
    draft = draft_config(config)
    write_draft(folder / "draft", draft, draft_weights(draft))
    words = ["export", "checkpoint", "--out", "bundle", "--draft", "draft"]
    assert (
        run_command([str(folder / w) if w in ("checkpoint", "bundle", "draft") else w for w in words], debug=True) == 0
    )
    files = folder / "files"
    files.mkdir()
    for name in TEXT_FILES:
        (files / name).write_text(TEXT)
    np.save(files / "ids.npy", np.arange(5, 40))
    for name in ("before.json", "after.json"):
        (files / name).write_text(to_json(sample_report()))
    server = sample_server()
    servers = {"sums": {"command": server.command, "args": list(server.args), "env": dict(server.env or {})}}
    (files / "servers.json").write_text(json.dumps({"mcpServers": servers}))
    return folder


@pytest.fixture
def reader(request: pytest.FixtureRequest, shelf: Path, tmp_path: Path) -> Iterator[Reader]:
    """Somebody who opens the page that the test is about."""
    names = GIVEN.get(request.param, ())
    given = {name: shelf / _kind(name) for name in names if name != "clone"}
    reader = Reader(tmp_path, given | {file.name: file for file in (shelf / "files").iterdir()})
    if "clone" in names:
        reader.clone()
    yield reader
    reader.close()


def _kind(name: str) -> str:
    return name if name == "bundle" else "draft" if "Eagle" in name else "checkpoint"


BLOCKS = {str(page.relative_to(ROOT)): blocks(page) for page in pages()}
TYPED = [name for name, found in BLOCKS.items() if any(b.language in RUN and not b.reasons for b in found)]


@pytest.mark.parametrize("reader,page", [(page, page) for page in TYPED], indirect=["reader"], ids=TYPED)
def test_what_a_page_says_to_type_works(reader: Reader, page: str) -> None:
    for block in BLOCKS[page]:
        if block.language in RUN and not block.reasons:
            reader.type(block)


@pytest.mark.parametrize("page", BLOCKS)
def test_no_block_is_left_out_unsaid(page: str) -> None:
    """Every block is run, parsed, shown as text, or says by a known word why not."""
    for block in BLOCKS[page]:
        assert block.language in (*RUN, *PARSED, *SHOWN), f"{block} is of no language that is known here"
        assert set(block.reasons) <= set(REASONS), f"{block} has a reason that is unknown"
        assert not block.reasons or block.language in RUN, f"{block} would not be run anyway"


@pytest.mark.parametrize("page", [p for p, found in BLOCKS.items() if any(b.language in PARSED for b in found)])
def test_files_that_a_page_shows_can_be_read(page: str) -> None:
    read = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}
    for block in BLOCKS[page]:
        if block.language in PARSED:
            assert read[block.language](block.text) is not None, str(block)


def block_of(language: str, text: str) -> Block:
    return Block("page.md", 1, language, (), text)


@pytest.mark.parametrize("reader", ["none"], indirect=True)
def test_a_page_that_is_wrong_fails(reader: Reader) -> None:
    """A command that fails in the middle, output that does not come, an extra that there is not, wrong Python."""
    reader.type(block_of("sh", "mkdir folder && cd folder"))
    reader.type(block_of("console", "$ pwd\n.../folder\n$ echo 3.5 s; echo more\n7.25 s\nmore"))
    for wrong in (
        block_of("sh", "false\ntrue"),
        block_of("sh", "edge run nothing --prompt x"),
        block_of("sh", "pip install 'minicpm-edge[wings]'"),
        block_of("console", "$ echo one\ntwo"),
        block_of("python", "import nothing_of_that_name"),
    ):
        with pytest.raises(AssertionError):
            reader.type(wrong)


def test_transcripts_are_commands_and_what_they_print() -> None:
    assert transcript("$ a \\\n> b\nout\n\nmore\n$ c") == [("a \\\nb", ["out", "more"]), ("c", [])]
    assert is_printed("written in 1.2 s", "it was written in  93.75 s, at once")
    assert not is_printed("written in 1.2 s", "written in 1.2 tons")
