"""Which names of TensorRT our code uses, found in its source."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for package in ("build_engine", "edge", "plugins") for p in (ROOT / package).rglob("*.py"))
USERS = [path for path in SOURCES if "tensorrt" in path.name]
API_NAMES = ("api", "trt")  # what our code calls the package
# What our code calls objects of the package -> their class.
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "registry": "IPluginRegistry",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "expr_builder": "IExprBuilder",
}


def uses(path: Path) -> set[str]:
    """Names of the package in one file: 'X.Y' for api.X.Y, and 'Builder.X' for builder.X."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner, *chain = _chain(node)
            if chain and owner in API_NAMES:
                found.add(".".join(chain))
            if len(chain) == 1 and owner in OBJECTS:
                found.add(f"{OBJECTS[owner]}.{chain[0]}")
    return found


def _chain(node: ast.Attribute) -> list[str]:
    """['api', 'X', 'Y'] of flavour.api.X.Y, ['builder', 'X'] of self.builder.X; the owner is '' if it has no name."""
    names: list[str] = []
    base: ast.expr = node
    while isinstance(base, ast.Attribute) and base.attr not in API_NAMES and not (names and base.attr in OBJECTS):
        names.append(base.attr)
        base = base.value
    owner = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
    return [owner, *reversed(names)]


@functools.cache
def all_uses() -> frozenset[str]:
    return frozenset().union(*(uses(path) for path in USERS))


@functools.cache
def own_names() -> frozenset[str]:
    """Fields and methods of our classes: objects of theirs may have the same name as objects of TensorRT."""

    def members(node: ast.ClassDef) -> Iterator[str]:
        for one in node.body:
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
                yield one.target.id
            if isinstance(one, ast.FunctionDef):
                yield one.name

    trees = (ast.parse(path.read_text()) for path in SOURCES)
    classes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return frozenset(name for node in classes for name in members(node))


def check_names(api: Any) -> list[str]:
    """What our code uses and this version lacks, among it attributes of our own objects."""

    def is_there(name: str) -> bool:
        try:
            functools.reduce(getattr, name.split("."), api)
        except AttributeError:
            return False
        return True

    return sorted(name for name in all_uses() if not is_there(name))
