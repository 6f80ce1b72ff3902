"""A bundle is what it says it is: every kind of damage is named, and nothing damaged is run."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import GRAPH, MANIFEST, SCHEMA_VERSION, WEIGHTS, Manifest, open_bundle
from edge.engine import open_engine
from edge.errors import EdgeError, UsageError
from edge.plan import EngineOptions
from tests.synthetic import tiny_config, write_hf_checkpoint


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(bundle: Path, **changes: Any) -> None:
    """Change the manifest as an editor would, which does not know the key."""
    path = bundle / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def seal(bundle: Path, **changes: Any) -> None:
    """Change the manifest and give it the key that belongs to it, as a writer with a mistake would."""
    values = json.loads((bundle / MANIFEST).read_text()) | changes
    del values["key"]
    content = {name: value for name, value in values.items() if name not in ("name", "tools")}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps({**values, "key": key}))


def test_the_key_covers_all_but_names_and_tools(bundle: Path) -> None:
    key = open_bundle(bundle).manifest.key
    seal(bundle, name="another", tools={"onnx": "0"})
    assert open_bundle(bundle).manifest.key == key
    seal(bundle, generation={"temperature": 0.5})
    assert open_bundle(bundle).manifest.key != key


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
    (bundle / GRAPH).mkdir()
    with pytest.raises(EdgeError, match=f"{GRAPH} is damaged"):
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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"files": {}}, "unusable files"),
        ({"files": {"../model.onnx": {"sha256": "", "bytes": 0}}}, "unusable files"),
        ({"limits": {"max_context": "many"}}, "unusable limits"),
        ({"limits": {}}, "no 'max_context'"),
        ({"types": {"activation": "float32", "kv": "complex64"}}, "unusable types"),
        ({"weights": {"kind": "exact"}}, "no 'description'"),
        ({"text": "yes"}, "unusable text"),
        ({"generation": []}, "unusable generation"),
        ({"name": None}, "unusable name"),
        ({"model": {**tiny_config().to_dict(), "hidden_size": "64"}}, "hidden_size is '64'"),
        ({"model": {**tiny_config().to_dict(), "eos_token_ids": None}}, "manifest"),
    ],
)
def test_a_manifest_of_a_wrong_writer_is_refused(bundle: Path, changes: dict[str, Any], named: str) -> None:
    seal(bundle, **changes)
    with pytest.raises(EdgeError, match=named):
        open_bundle(bundle)


def test_a_manifest_that_cannot_be_read_is_named(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).symlink_to("/proc/self/mem")  # unreadable at its beginning, for root too
    with pytest.raises(EdgeError, match=r"manifest\.json cannot be read \(Input/output error\)"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (GRAPH, b"", "cannot load .*model.onnx"),
        (GRAPH, b"no graph", "cannot load .*model.onnx"),
        (WEIGHTS, b"short", "cannot load .*model.onnx"),
    ],
)
def test_what_was_damaged_before_it_was_hashed_is_met_by_the_executor(
    bundle: Path, name: str, content: bytes, said: str
) -> None:
    (bundle / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    seal(bundle, files=json.loads((bundle / MANIFEST).read_text())["files"] | {name: entry})
    open_bundle(bundle)
    with pytest.raises(EdgeError, match=said):
        open_engine(bundle, EngineOptions(context=64))


def test_a_graph_of_another_model_does_not_load(bundle: Path, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=False, num_hidden_layers=1)
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "checkpoint", config))
    other = export_bundle(checkpoint, tmp_path / "other", ExportOptions(weights=WeightFormat("exact")))
    for name in (GRAPH, WEIGHTS):
        shutil.copy(other / name, bundle / name)
    seal(bundle, files={n: asdict(open_bundle(other).manifest.files[n]) for n in (GRAPH, WEIGHTS)})
    with pytest.raises(EdgeError, match=r"cannot load .*model\.onnx .*kv_pool\.1"):
        open_engine(bundle, EngineOptions(context=64))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"text"', "\x00\xff", "{}", "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(EdgeError, match=r"manifest\.json is damaged"):
        open_bundle(bundle)


def test_what_is_no_bundle_says_so(tmp_path: Path, bundle: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", bundle / MANIFEST):
        with pytest.raises(UsageError, match="edge export"):
            open_bundle(path)
