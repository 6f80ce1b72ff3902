"""A folder in which an ARM Python runs: Debian's arm64 packages, and PyPI's wheels for aarch64.

Nothing of it is installed on this machine: apt keeps its state in the folder, and packages are only unpacked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("python3", "libstdc++6")
TOOLS = {
    "qemu-aarch64": "qemu-user",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
}
TESTERS = ("pytest", "hypothesis")  # beside what the wheel itself asks for
# Of processors that QEMU knows the nearest to Orin's Cortex-A78AE, and no newer: ARMv8.2 with half precision and dot
# products, without SVE.
PROCESSOR = "cortex-a76"
# What Linux says on an Orin. QEMU 7 shows this machine's own file, from which ONNX Runtime reads nonsense.
CPUINFO = """\
processor\t: {number}
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp uscat \
ilrcpc flagm
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd42
CPU revision\t: 1
"""


def missing_tool() -> str | None:
    """What to install, of the first tool that is not there."""
    return next((package for tool, package in TOOLS.items() if shutil.which(tool) is None), None)


def make_root(folder: Path, wheel: Path) -> None:
    """Fill `folder` once with the system and the packages that `wheel` needs; put `wheel` into it every time."""
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _unpack_system(folder)
        _write_cpuinfo(folder / "system")
        _install(folder, str(wheel), *TESTERS)
        (folder / "made").touch()
    _install(folder, "--no-deps", "--upgrade", str(wheel))


def command(folder: Path, *arguments: str) -> list[str]:
    """How to run the folder's Python with `arguments`."""
    system = folder / "system"
    return ["qemu-aarch64", "-cpu", PROCESSOR, "-L", str(system), str(_python(system)), *arguments]


def environment(folder: Path) -> dict[str, str]:
    """Of such a process: it must find no package of this machine's Python."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return kept | {"PYTHONPATH": str(folder / "site"), "PYTHONDONTWRITEBYTECODE": "1"}


def _python(system: Path) -> Path:
    (python,) = system.glob("usr/bin/python3.[0-9]*[0-9]")
    return python


def _unpack_system(folder: Path) -> None:
    apt = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()  # nothing is installed: all that is needed comes
    options = [
        f"Dir::State={apt}",
        f"Dir::State::status={apt / 'status'}",
        f"Dir::State::lists={apt / 'lists'}",
        f"Dir::Cache={apt / 'cache'}",
        "APT::Architecture=arm64",
        "APT::Architectures=arm64",
        f"APT::Sandbox::User={os.environ.get('USER', 'root')}",
        "Debug::NoLocking=1",
    ]
    get = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    subprocess.run([*get, "update"], check=True)
    install = ["install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES]
    subprocess.run([*get, *install], check=True, stdout=subprocess.DEVNULL)
    for archive in sorted((apt / "cache" / "archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", str(archive), str(folder / "system")], check=True)
    shutil.rmtree(apt)


def _write_cpuinfo(system: Path) -> None:
    """QEMU prefers a file in its system to this machine's of that name."""
    (system / "proc").mkdir(exist_ok=True)
    processors = (CPUINFO.format(number=i) for i in range(os.cpu_count() or 1))
    (system / "proc" / "cpuinfo").write_text("\n".join(processors))


def _install(folder: Path, *what: str) -> None:
    version = _python(folder / "system").name.removeprefix("python")
    options = ["--quiet", "--target", str(folder / "site"), "--only-binary=:all:", "--python-version", version]
    platforms = [word for tag in _platforms() for word in ("--platform", tag)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *platforms, *what], check=True)


def _platforms() -> Iterator[str]:
    """Tags of wheels that run with the C library of Ubuntu 22.04, 2.35."""
    yield "manylinux2014_aarch64"
    yield from (f"manylinux_2_{minor}_aarch64" for minor in range(35, 16, -1))
