"""Questions that may crash or hang whoever asks: a child process of `edge doctor` asks them and prints JSON."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
from dataclasses import asdict
from typing import Any

from edge.errors import EdgeError


def main(name: str) -> None:
    """Answer "gpu", or import a TensorRT package; the last line of stdout is the answer."""
    answer = gpu() if name == "gpu" else package(name)
    print(f"\n{json.dumps(answer)}", flush=True)
    os._exit(0)  # what a driver or TensorRT prints or breaks while it is unloaded is no answer


def gpu() -> dict[str, Any]:
    """The fields of edge.cuda.Device and `free_memory`, or `error` and its `code`; in any case `bindings`."""
    from edge.cuda import open_device

    try:
        bindings = importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        return {"error": "cuda-bindings is missing", "code": "no bindings", "bindings": None}
    try:
        device = open_device()
        free, _ = device.memory()
    except EdgeError as error:
        return {"error": str(error), "code": getattr(error, "code", "no bindings"), "bindings": bindings}
    return {**asdict(device), "free_memory": free, "bindings": bindings}


def package(name: str) -> dict[str, Any]:
    """Its `version`, or `error` and the code "missing" or "broken"."""
    if importlib.util.find_spec(name) is None:
        return {"error": f"{name} is not installed", "code": "missing"}
    try:
        return {"version": str(importlib.import_module(name).__version__)}
    except Exception as error:  # whatever an extension module raises while it loads
        return {"error": f"{type(error).__name__}: {error}", "code": "broken"}
