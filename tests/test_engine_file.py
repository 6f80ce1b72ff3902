"""Engine files: what their .json must say, and which one a device takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import plugins
from edge import engine_file
from edge.bundle import Bundle, hash_file, open_bundle
from edge.engine_file import (
    EngineFile,
    Measured,
    Profile,
    Recipe,
    choose_engine,
    engine_path,
    plugin_hash,
    read_engine,
    read_engines,
    this_platform,
)
from edge.errors import EdgeError

ORIN = {"tensorrt": "TensorRT 10.3.0", "architecture": "sm_87"}
PROFILE = Profile("decode", {"input_ids": ((1,), (1,), (8,)), "kv_pool.0": ((1, 2, 64), (4, 2, 64), (99, 2, 64))})


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A folder of its own for engines, around the shared bundle's files."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in tiny_bundle.iterdir():
        (folder / file.name).symlink_to(file)
    return open_bundle(folder, verify=False)


def recipe_of(bundle: Bundle, /, **changes: Any) -> Recipe:
    return replace(
        Recipe(
            bundle=bundle.manifest.key,
            target="jetson",
            tensorrt="TensorRT 10.3.0",
            platform=this_platform(),
            compute_capabilities=("sm87",),
            driver="12.6",
            plugins=plugin_hash(),
            profiles=(PROFILE,),
        ),
        **changes,
    )


def write(bundle: Bundle, recipe: Recipe, built_at: int = 1_000_000_000, contents: bytes = b"engine") -> EngineFile:
    path = engine_path(bundle.path, recipe)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(contents + recipe.key.encode())
    engine = EngineFile(path, recipe, Measured(hash_file(path), path.stat().st_size, 1.5, 2 << 30, 1 << 30))
    path.with_suffix(".json").write_text(json.dumps(engine.to_dict()))
    os.utime(path.with_suffix(".json"), (built_at, built_at))
    return engine


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.with_suffix(".json").read_text())
    change(values)
    path.with_suffix(".json").write_text(json.dumps(values))


# Reading


def test_what_was_written_is_read(bundle: Bundle) -> None:
    engine = write(bundle, recipe_of(bundle))
    assert read_engine(engine.path) == engine and engine.is_intact()
    assert read_engines(bundle) == [engine]


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("sha256"),
        lambda values: values.pop("driver"),
        lambda values: values.update(driver="13.0"),
        lambda values: values.update(profiles=[]),
        lambda values: values.update(profiles=7),
        lambda values: values["profiles"][0]["shapes"]["input_ids"].pop(),
        lambda values: values.update(engine="another.engine"),
        lambda values: values.clear(),
    ],
)
def test_a_json_that_was_changed_is_no_engine(bundle: Bundle, change: Callable[[dict[str, Any]], Any]) -> None:
    engine = write(bundle, recipe_of(bundle))
    edit(engine.path, change)
    assert read_engine(engine.path) is None and read_engines(bundle) == []


@given(st.binary(max_size=40))
def test_any_bytes_instead_of_a_json_are_no_engine(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.engine"
    path.with_suffix(".json").write_bytes(data)
    assert read_engine(path) is None


def test_a_json_without_its_engine_does_not_count(bundle: Bundle) -> None:
    engine = write(bundle, recipe_of(bundle))
    engine.path.unlink()
    assert read_engines(bundle) == [] and not engine.is_intact()


# The key


def test_every_part_of_a_recipe_changes_its_key(bundle: Bundle) -> None:
    recipe = recipe_of(bundle)
    wider = Profile("decode", {**PROFILE.shapes, "input_ids": ((1,), (1,), (9,))})
    changes: dict[str, Any] = {
        "bundle": "0" * 64,
        "target": "rtx",
        "tensorrt": "TensorRT 10.3.1",
        "platform": "linux-riscv",
        "compute_capabilities": ("sm86", "sm87"),
        "driver": "12.8",
        "plugins": "",
        "profiles": (wider,),
    }
    assert set(changes) == {field.name for field in fields(Recipe)}
    keys = {replace(recipe, **{name: value}).key for name, value in changes.items()}
    assert len(keys | {recipe.key}) == 1 + len(changes)


def test_the_plugins_sources_are_in_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(plugins.__file__).parent
    sources = [root / name for name in ("launch.py", "plugin.py", "tensorrt.py")]
    sources += [path for path in root.glob("*/*.py") if path.name in ("trt.py", "launch.py")]
    assert len(sources) > 12
    for source in sources:
        copy = tmp_path / source.relative_to(root)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(source.read_bytes())
    here = plugin_hash()
    monkeypatch.setattr(engine_file.plugins, "__file__", str(tmp_path / "__init__.py"))
    assert plugin_hash() == here
    for source in sources:
        copy = tmp_path / source.relative_to(root)
        text = copy.read_bytes()
        copy.write_bytes(text + b"#")
        assert plugin_hash() != here, source
        copy.write_bytes(text)
    assert plugin_hash() == here


# Choosing


def test_the_newest_intact_engine_that_fits_is_taken(bundle: Bundle) -> None:
    old = write(bundle, recipe_of(bundle), built_at=100)
    new = write(bundle, recipe_of(bundle, driver="12.8"), built_at=200)
    write(bundle, recipe_of(bundle, tensorrt="TensorRT 10.16.1"), built_at=300)
    assert choose_engine(bundle, **ORIN) == new
    new.path.write_bytes(b"x" * new.measured.bytes)
    assert choose_engine(bundle, **ORIN) == old


def test_an_engine_of_functions_is_for_checks(bundle: Bundle) -> None:
    functions = write(bundle, recipe_of(bundle, plugins=""), built_at=200)
    assert choose_engine(bundle, **ORIN) == functions
    with_plugins = write(bundle, recipe_of(bundle), built_at=100)
    assert read_engines(bundle) == [functions, with_plugins]
    assert choose_engine(bundle, **ORIN) == with_plugins


def test_an_engine_for_several_gpus_fits_each(bundle: Bundle) -> None:
    engine = write(bundle, recipe_of(bundle, compute_capabilities=("sm86", "sm120"), plugins=""))
    for architecture in ("sm_86", "sm_120"):
        assert choose_engine(bundle, tensorrt="TensorRT 10.3.0", architecture=architecture) == engine
    with pytest.raises(EdgeError, match="is for sm86, sm120"):
        choose_engine(bundle, tensorrt="TensorRT 10.3.0", architecture="sm_12")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bundle": "0" * 64}, "built from another export"),
        ({"tensorrt": "TensorRT 10.16.1"}, "built by TensorRT 10.16.1"),
        ({"platform": "linux-riscv"}, "for linux-riscv"),
        ({"compute_capabilities": ("sm86",)}, "for sm86"),
        ({"plugins": "0" * 64}, "other plugins"),
    ],
)
def test_why_no_engine_fits_is_said_with_the_command_to_run(
    bundle: Bundle, changes: dict[str, Any], words: str
) -> None:
    engine = write(bundle, recipe_of(bundle, **changes))
    with pytest.raises(EdgeError, match=rf"{engine.path.name} (was|is) .*{words}") as caught:
        choose_engine(bundle, **ORIN)
    assert "TensorRT 10.3.0 on sm_87" in str(caught.value)
    assert str(caught.value).endswith(f"edge build {bundle.path} --target {bundle.manifest.target}")


def test_a_damaged_engine_is_named_and_no_engine_is_said(bundle: Bundle) -> None:
    with pytest.raises(EdgeError, match=r"none yet\); run: edge build"):
        choose_engine(bundle, **ORIN)
    engine = write(bundle, recipe_of(bundle))
    engine.path.write_bytes(b"")
    with pytest.raises(EdgeError, match=rf"{engine.path.name} is damaged\); run: edge build"):
        choose_engine(bundle, **ORIN)


def test_nothing_of_tensorrt_is_imported() -> None:
    code = "import sys, edge.engine_file, edge.tensorrt; print(*(n for n in sys.modules if n.startswith('tensorrt')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
