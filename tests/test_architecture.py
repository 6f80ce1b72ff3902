"""The cut of the code that the design promises, checked: who may import whom, and how long things may get."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("build_engine", "plugins", "edge")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
KERNELS = sorted(p for p in (ROOT / "plugins").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
# What the host may know of the device's package: the vocabulary both share, and the format it writes.
SHARED = {
    "edge.bundle",
    "edge.config",
    "edge.cuda",
    "edge.engine_file",
    "edge.errors",
    "edge.kv_cache",
    "edge.machine",
    "edge.tensorrt",
    "edge.torch_file",
}
MOST_LINES = 60  # of a function


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """Modules imported at the top level, or anywhere in the file."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    everywhere = imports(path, everywhere=True)
    if package == "plugins":
        # plugins/build and plugins/simt are host tools: no operator needs them on a device.
        host_tool = path.relative_to(ROOT).parts[1] in ("build", "simt")
        others = {name for name in everywhere if name.split(".")[0] in ("edge", "build_engine")}
        assert others <= ({"edge.errors", "edge.config"} if host_tool else {"edge.errors"})
        assert host_tool or not {name for name in everywhere if name.startswith(("plugins.build", "plugins.simt"))}
    if package == "build_engine":
        assert {name for name in everywhere if name.split(".")[0] == "edge"} <= SHARED
    if package == "edge":
        host = {name for name in everywhere if name.split(".")[0] == "build_engine"}
        at_top = {name for name in imports(path, everywhere=False) if name.split(".")[0] == "build_engine"}
        assert not at_top
        assert not host or path.parent.name == "cli", "only the host's commands may reach build_engine"


# Who may import these folders of `edge`, besides themselves: everything below knows nothing of them.
ABOVE = {"serving": ("server", "cli"), "server": ("cli",), "cli": ()}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "edge")], ids=lambda p: p.name)
def test_engine_serving_server_and_commands_are_layers(path: Path) -> None:
    folder = path.relative_to(ROOT / "edge").parts[0]
    for layer, above in ABOVE.items():
        used = {name for name in imports(path, everywhere=True) if name.startswith(f"edge.{layer}")}
        allowed = folder in (layer, *above) or path == ROOT / "edge" / "__main__.py"
        assert not used or allowed, f"{sorted(used)} is above {folder}"


@pytest.mark.parametrize("path", [*SOURCES, *KERNELS], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno < MOST_LINES, node.name


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in memory after a statement."""
    code = f"import sys; {statement}; print(' '.join(name.split('.')[0] for name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_the_command_starts_light() -> None:
    """No inference library, exporter or GPU stack before a command needs it; no torch ever."""
    heavy = {
        "torch",
        "transformers",
        "tensorrt",
        "tensorrt_rtx",
        "onnx",
        "onnxruntime",
        "gguf",
        "build_engine",
        "fastapi",
    }
    assert not loaded_by("import edge.cli.app") & heavy


def test_a_run_loads_nothing_of_the_host() -> None:
    heavy = {"torch", "transformers", "tensorrt", "tensorrt_rtx", "onnx", "gguf", "build_engine"}
    assert not loaded_by("import edge.cli.app, edge.executors.onnxruntime, edge.perplexity, edge.bench.report") & heavy
