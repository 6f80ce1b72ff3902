"""The real Python bindings of TensorRT versions that need a GPU's libraries, imported over libraries that do nothing.

A bindings wheel links against libnvinfer, libnvonnxparser and libnvinfer_plugin by nine C functions. With empty ones it
imports: its classes, enums and signatures are the real ones, and Python plugins can be made and called. A builder, a
runtime or the plugin registry cannot be had (spec: tensorrt_without_gpu.md J).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from plugins.build.cache import cache_folder, source_key, write_atomically

# Version -> the wheel whose bindings the Makefile unpacks beside the environment, as tensorrt-10.3.
WHEELS = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",  # JetPack 6.2
    "10.16": "tensorrt-cu13-bindings==10.16.1.11",  # JetPack 7.2
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",  # a desktop's
}
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
ROOT = Path(__file__).parent.parent
Check = Callable[[Any], Any]


def bindings_folder(version: str) -> Path:
    """Where a version's bindings are; their absence is a failure that says what to do, not a skip."""
    folder = Path(sys.prefix) / f"tensorrt-{version}"
    if not (folder / "tensorrt_bindings").is_dir():
        mark = f"{Path(sys.prefix).name}/.dev"
        pytest.fail(f"{WHEELS[version]} is not in {folder}; run: rm -f {mark}; make {mark}", pytrace=False)
    return folder


def stub_folder(version: str) -> Path:
    """A folder with libraries of the names that a version's bindings load; every function returns null."""
    major = version.split(".")[0]
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
    folder = cache_folder("tensorrt_stubs") / source_key(source, [major])[:20]
    folder.mkdir(exist_ok=True)
    for library in LIBRARIES:
        path = folder / f"lib{library}.so.{major}"
        if not path.exists():
            with tempfile.TemporaryDirectory() as made_in:
                made = Path(made_in) / path.name
                command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-x", "c", "-", "-o", str(made)]
                subprocess.run(command, input=source, text=True, check=True)
                write_atomically(path, made.read_bytes())
    return folder


def run_over_stubs(version: str, checks: Sequence[Check]) -> dict[str, Any]:
    """{name of a check: {'result': of check(api)} or {'failure': traceback}}, from a child process."""
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(stub_folder(version)),
        "PYTHONPATH": os.pathsep.join([str(bindings_folder(version)), str(ROOT)]),
    }
    names = [f"{check.__module__}:{check.__name__}" for check in checks]
    command = [sys.executable, "-m", "tests.tensorrt_stubs", *names]
    child = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert not child.returncode, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def run_checks(api: Any, checks: Sequence[Check]) -> dict[str, Any]:
    """The same in this process, with any TensorRT."""
    results: dict[str, Any] = {}
    for check in checks:
        try:
            results[check.__name__] = {"result": check(api)}
        except Exception:
            results[check.__name__] = {"failure": traceback.format_exc()}
    return results


def check_version(api: Any) -> str:
    """What the package says that it is."""
    return str(api.__version__)


def main(names: Sequence[str]) -> None:
    """The child: run checks ('module:function') on the bindings, and print what they return as JSON."""
    api = importlib.import_module("tensorrt_bindings")
    checks = [getattr(importlib.import_module(module), name) for module, _, name in (n.partition(":") for n in names)]
    print(json.dumps(run_checks(api, checks)), flush=True)
    os._exit(0)  # at an ordinary exit Python drops the plugins, which 10.3 does not survive (tests/plugin_calls.py)


if __name__ == "__main__":
    main(sys.argv[1:])
