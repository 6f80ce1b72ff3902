"""The raw facts that the checks judge: texts of files and outputs of commands. Gathering them changes nothing."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plugins
from edge.machine import available_memory

TIMEOUT = 30.0  # seconds a command may take; a Jetson's first import of TensorRT takes several
PROBES = ("gpu", "tensorrt", "tensorrt_rtx")  # see edge/doctor/probe.py
COMMANDS = {
    "nvpmodel": ("nvpmodel", "-q"),
    "nvidia-smi": ("nvidia-smi", "--query-gpu=driver_version,temperature.gpu", "--format=csv,noheader,nounits"),
    "groups": ("id", "-nG"),
    "g++": ("g++", "-dumpfullversion"),
}
FILES = (
    "proc/device-tree/model",
    "proc/device-tree/compatible",
    "etc/nv_tegra_release",
    "proc/meminfo",
    "proc/swaps",
    "sys/module/nvidia/version",
    "sys/bus/pci/devices/*/vendor",
    "sys/bus/pci/devices/*/class",
    "usr/lib/python3*/dist-packages/tensorrt/__init__.py",
    "etc/nvpmodel.conf",
    "var/lib/nvpmodel/status",
    # The memory's clock: JetPack 7, then JetPack 6, which shows it to root only.
    "sys/class/devfreq/*/*_freq",
    "sys/kernel/debug/bpmp/debug/clk/emc/*rate*",
    "sys/class/thermal/thermal_zone*/type",
    "sys/class/thermal/thermal_zone*/temp",
    "sys/class/hwmon/hwmon*/oc*_event_cnt",
)
DEVICES = ("dev/nvmap", "dev/nvhost-gpu", "dev/nvidiactl", "dev/nvidia-uvm", "dev/nvidia[0-9]*")


@dataclass(frozen=True)
class Output:
    """What a command said. code: negative if a signal ended it, None if it could not start or took too long."""

    code: int | None
    text: str


Run = Callable[[Sequence[str]], Output]


@dataclass(frozen=True)
class Machine:
    """Facts of one machine; sizes in bytes.

    files: text by absolute path, of those that could be read. outputs: of COMMANDS and PROBES, by name. devices:
    device files, and whether this user may open them. venv: its pyvenv.cfg (in `files` too), "" outside of one.
    operators: the compiled libraries of plugins/ort. cache_free: where `cache` is or would be.
    """

    architecture: str
    python: str
    venv: str
    files: Mapping[str, str]
    outputs: Mapping[str, Output]
    devices: Mapping[str, bool]
    operators: tuple[str, ...]
    available_memory: int
    cache: Path
    cache_free: int

    def said(self, name: str) -> str:
        """What a command printed; "" if it failed."""
        output = self.outputs[name]
        return output.text.strip() if output.code == 0 else ""

    def probed(self, name: str) -> dict[str, Any]:
        """The answer of a probe; a child that crashed or hung has "error" and "code" as a refused call has."""
        output = self.outputs[name]
        if output.code == 0:
            answer: dict[str, Any] = json.loads(output.text.strip().splitlines()[-1])
            return answer
        if output.code is None:
            return {"error": f"no answer within {TIMEOUT:.0f} s", "code": "timeout"}
        cause = signal.Signals(-output.code).name if output.code < 0 else f"exit code {output.code}"
        return {"error": f"the process that asked crashed ({cause})", "code": "crash"}

    @property
    def meminfo(self) -> dict[str, int]:
        """The sizes of /proc/meminfo in bytes, as {'MemTotal': ...}."""
        lines = re.findall(r"^(\w+):\s+(\d+) kB$", self.files.get("/proc/meminfo", ""), re.MULTILINE)
        return {name: int(number) * 1024 for name, number in lines}

    def matching(self, pattern: str) -> dict[Path, str]:
        """Files whose path matches, with their texts, sorted."""
        found = {Path(path): text for path, text in self.files.items()}
        return {path: found[path] for path in sorted(found) if path.match(pattern)}


def gather(root: Path = Path("/"), run: Run | None = None, only: Sequence[str] = ()) -> Machine:
    """Read the facts below `root` and ask the commands, or `only` some, each in a child process, all at once."""
    commands = {**COMMANDS, **{name: probe_command(name) for name in PROBES}}
    commands = {name: command for name, command in commands.items() if not only or name in only}
    with ThreadPoolExecutor(len(commands)) as pool:
        outputs = dict(zip(commands, pool.map(run or run_command, commands.values()), strict=True))
    files = {}
    for path in sorted(path for pattern in FILES for path in root.glob(pattern)):
        if (text := _text(path)) is not None:
            files[f"/{path.relative_to(root)}"] = text
    venv = Path(sys.prefix) / "pyvenv.cfg"
    if (text := _text(venv)) is not None:
        files[str(venv)] = text
    devices = sorted(path for pattern in DEVICES for path in root.glob(pattern))
    cache = cache_root()
    return Machine(
        architecture=platform.machine(),
        python=platform.python_version(),
        venv=str(venv) if text is not None else "",
        files=files,
        outputs=outputs,
        devices={f"/{path.relative_to(root)}": os.access(path, os.R_OK | os.W_OK) for path in devices},
        operators=tuple(sorted(path.name for path in Path(plugins.__path__[0]).glob("ort/libedge_ops_*.so"))),
        available_memory=available_memory(),
        cache=cache,
        cache_free=free_space(cache),
    )


def run_command(command: Sequence[str]) -> Output:
    """Run it without input, with a time limit and in English."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return Output(None, "")
    return Output(result.returncode, result.stdout.decode(errors="replace"))


def probe_command(name: str) -> tuple[str, ...]:
    """A child process that answers one of PROBES, with this one's packages."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from edge.doctor.probe import main; main({name!r})"
    return (sys.executable, "-c", code)


def cache_root() -> Path:
    """The folder that plugins/build/cache.py writes in, not created."""
    if own := os.environ.get("EDGE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minicpm-edge"


def free_space(folder: Path) -> int:
    """Bytes free where a folder is or would be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0 \n")
    except OSError:
        return None
