"""Build the wheels into a folder: python -m deploy.wheels --out dist [none x86_64 aarch64].

Each is built from a fresh copy of the sources, so that it has neither an older build's files nor the libraries of an
editable install, and twice the same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("build_engine", "edge", "plugins")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
# What is made, not written.
MADE = shutil.ignore_patterns("__pycache__", "*.so", "*.cubin")
# EDGE_CPU -> the Debian package of its compiler, and the compiler.
COMPILERS = {
    "x86_64": ("g++-x86-64-linux-gnu", "x86_64-linux-gnu-g++"),
    "aarch64": ("g++-aarch64-linux-gnu", "aarch64-linux-gnu-g++"),
}
CPUS = ("none", *COMPILERS)
# Ubuntu 22.04's C library, which JetPack 6 has; pip refuses the wheel on older systems.
GLIBC = "2_35"
# Symbol versions of its libraries, and of GCC 12's: a newer compiler may ask for more than the wheel's tag says.
NEWEST = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}
# The first day that a zip file can have: a wheel's bytes depend on its contents only.
FIRST_DAY = "315532800"


def copy_sources(folder: Path, cubins: Mapping[str, bytes]) -> None:
    """The packages' sources, with `cubins` (file name -> module) beside `edge selftest`."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=MADE)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    for name, module in cubins.items():
        (folder / "edge" / "selftest" / name).write_bytes(module)
    for path in folder.rglob("*"):  # a wheel keeps them, and they depend on who checked the sources out
        path.chmod(0o755 if path.is_dir() else 0o644)


def compile_cubins() -> dict[str, bytes]:
    """The kernels of `edge selftest` for boards, by the compilers of the extra `kernels`."""
    from edge.selftest.modules import ARCHITECTURES, module_name
    from edge.selftest.vectors import PUBLISHED
    from plugins.build.nvrtc import cubin
    from plugins.build.registry import kernels_for

    return {
        module_name(title, architecture): cubin(
            kernels_for(m.config, m.element, m.kv_element, m.weights, m.head), architecture
        )
        for title, m in PUBLISHED.items()
        for architecture in ARCHITECTURES
    }


def build_wheel(cpu: str, out: Path, cubins: Mapping[str, bytes]) -> Path:
    """One wheel, for EDGE_CPU = `cpu`; CalledProcessError, after pip's own words, if it fails."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        sources, made = Path(name) / "sources", Path(name) / "made"
        sources.mkdir()
        copy_sources(sources, cubins)
        environment = {"SOURCE_DATE_EPOCH": FIRST_DAY, **os.environ, "EDGE_CPU": cpu}
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        if cpu != "none":
            command += ["--config-settings", f"--build-option=--plat-name=manylinux_{GLIBC}_{cpu}"]
        subprocess.run([*command, "--wheel-dir", str(made), str(sources)], env=environment, umask=0o022, check=True)
        (wheel,) = made.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for library in (name for name in archive.namelist() if name.endswith(".so")):
                check_symbols(Path(archive.extract(library, made)))
        return Path(shutil.copy(wheel, out / wheel.name))


def check_symbols(library: Path) -> None:
    """SystemExit with a sentence if a library asks for symbols that Ubuntu 22.04 does not have."""
    command = ["readelf", "--version-info", "--wide", str(library)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for kind, version in sorted(set(re.findall(r"Name: ([A-Z]+)_([\d.]+) ", told))):
        if tuple(map(int, version.split("."))) > NEWEST[kind]:
            raise SystemExit(
                f"{library.name} asks for {kind} {version}, which Ubuntu 22.04 and JetPack 6 do not have; "
                "build it with the compiler of Debian 12 or Ubuntu 22.04"
            )


def missing_package(cpu: str) -> str | None:
    """The Debian package without which this machine cannot build for `cpu`."""
    if cpu == "none":
        return None
    package, compiler = COMPILERS[cpu]
    if cpu == os.uname().machine:
        package, compiler = "g++", "g++"
    return None if shutil.which(compiler) else package


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds all that can be built; 1 if one could not."""
    parser = argparse.ArgumentParser(description="Build the wheels of minicpm-edge.")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder for the wheels")
    parser.add_argument("cpus", nargs="*", choices=[*CPUS, []], help="none: pure Python; default: all")
    chosen = parser.parse_args(arguments)
    cubins, left_out = compile_cubins(), 0
    for cpu in chosen.cpus or CPUS:
        package = missing_package(cpu)
        if package is None:
            wheel = build_wheel(cpu, chosen.out, cubins)
            print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        else:
            print(f"no wheel for {cpu}: its compiler is missing; apt-get install {package}", file=sys.stderr)
            left_out += 1
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
