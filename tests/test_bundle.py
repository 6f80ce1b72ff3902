"""A bundle is what it says it is: every kind of damage is named, and nothing damaged is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge.bundle import GRAPH, MANIFEST, SCHEMA_VERSION, WEIGHTS, Manifest, open_bundle
from edge.errors import EdgeError, UsageError
from tests.synthetic import tiny_config


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(bundle: Path, **changes: Any) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_intact_bundle_opens_also_through_a_link(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(bundle)
    opened = open_bundle(link)
    assert opened.config == tiny_config(tie_word_embeddings=False)
    assert set(opened.manifest.files) == {p.name for p in bundle.iterdir()} - {MANIFEST}


def test_the_manifest_survives_json(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, "tokenizer.json", "chat_template.jinja"])
def test_one_changed_byte_is_found_and_the_file_named(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(EdgeError, match=f"{name} is damaged: its sha256"):
        open_bundle(bundle)


def test_a_truncated_file_is_named_with_both_sizes(bundle: Path) -> None:
    data = (bundle / WEIGHTS).read_bytes()
    (bundle / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(EdgeError, match=f"{WEIGHTS} is damaged: {len(data) - 1} bytes instead of {len(data)}"):
        open_bundle(bundle, verify=False)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / GRAPH).unlink()
    with pytest.raises(EdgeError, match=f"{GRAPH} is missing"):
        open_bundle(bundle)


def test_extra_files_do_no_harm(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    open_bundle(bundle)


@pytest.mark.parametrize(
    ("version", "remedy"), [(SCHEMA_VERSION + 1, "update minicpm-edge"), (0, "export it again"), ("x", "export it")]
)
def test_another_schema_is_refused_with_the_remedy(bundle: Path, version: object, remedy: str) -> None:
    edit(bundle, schema_version=version)
    with pytest.raises(EdgeError, match=remedy):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "elsewhere"},
        {"limits": {"max_context": 10**9}},
        {"files": {}},
        {"model": None},
        {"model": []},
        {"files": {"x": 3}},
        {"files": []},
        {"surprise": 1},
    ],
)
def test_an_edited_manifest_is_refused(bundle: Path, changes: dict[str, Any]) -> None:
    edit(bundle, **changes)
    with pytest.raises(EdgeError, match=r"manifest\.json is damaged"):
        open_bundle(bundle)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"text"', "\x00\xff", "{}"])
def test_a_manifest_that_is_none_is_refused(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(EdgeError, match=r"manifest\.json is damaged"):
        open_bundle(bundle)


def test_what_is_no_bundle_says_so(tmp_path: Path, bundle: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", bundle / MANIFEST):
        with pytest.raises(UsageError, match="edge export"):
            open_bundle(path)
