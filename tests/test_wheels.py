"""The wheels as others get them: tags, contents, symbol versions, and the command from a fresh environment."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from deploy import wheels
from plugins.build.registry import kernels_for
from tests.operators import KERNELS, library_path
from tests.synthetic import tiny_config, write_hf_checkpoint

# JetPack 6.2 is Ubuntu 22.04: glibc 2.35, libstdc++ of GCC 12.
NEWEST = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}
LIBRARIES = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
LOADERS = {"ld-linux-aarch64.so.1", "ld-linux-x86-64.so.2"}
HERE = platform.machine()
CUBINS = {"MiniCPM4-8B-sm_87.cubin": b"8B", "MiniCPM4-0.5B-sm_87.cubin": b"0.5B"}
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh", ".toml", ".json", ".txt", ".html", ".css", ".js", ".svg")


def build(cpu: str, folder: Path) -> Path:
    if (package := wheels.missing_package(cpu)) is not None:
        pytest.skip(f"the wheel for {cpu} needs the Debian package {package}")
    return wheels.build_wheel(cpu, folder, CUBINS)


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("none", tmp_path_factory.mktemp("pure"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For this machine's processor; takes a minute."""
    return build(HERE, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For boards."""
    return build("aarch64", tmp_path_factory.mktemp("crossed"))


# ---- what is in them -------------------------------------------------------------------------------------------


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def sources() -> set[str]:
    """Every file of the packages that a wheel must have, as the repository names it."""
    folders = (wheels.ROOT / package for package in wheels.PACKAGES)
    files = (path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES)
    return {str(path.relative_to(wheels.ROOT)) for path in files if "__pycache__" not in path.parts}


def cubins() -> set[str]:
    return {f"edge/selftest/{name}" for name in CUBINS}


def test_the_pure_wheel_has_all_sources_no_library_and_the_boards_kernels(pure: Path) -> None:
    assert re.fullmatch(r"minicpm_edge-[\d.]+-py3-none-any\.whl", pure.name)
    assert names(pure) == sources() | cubins()


@pytest.mark.long
@pytest.mark.parametrize("cpu", ["x86_64", "aarch64"])
def test_a_wheel_with_the_library_has_it_for_every_instruction_set(cpu: str, tmp_path: Path) -> None:
    wheel = build(cpu, tmp_path)
    assert wheel.name.endswith(f"-py3-none-manylinux_2_35_{cpu}.whl")
    sets = {"x86_64": ("x86_64_v3", "x86_64_v4", "x86_64_v4_bf16"), "aarch64": ("armv8_2",)}[cpu]
    libraries = {f"plugins/ort/libedge_ops_{name}.so" for name in sets}
    assert names(wheel) == sources() | cubins() | libraries
    with zipfile.ZipFile(wheel) as archive:
        for library in libraries:
            check_library(Path(archive.extract(library, tmp_path)))


def test_one_source_twice_is_one_wheel(pure: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        again = build("none", tmp_path)
    finally:
        os.umask(before)
    assert again.read_bytes() == pure.read_bytes()


@pytest.mark.long
def test_one_source_twice_is_one_library(crossed: Path, tmp_path: Path) -> None:
    assert build("aarch64", tmp_path).read_bytes() == crossed.read_bytes()


def test_a_processor_that_nobody_knows_is_refused() -> None:
    environment = {**os.environ, "EDGE_CPU": "riscv64"}
    command = [sys.executable, "setup.py", "--version"]
    told = subprocess.run(command, cwd=wheels.ROOT, env=environment, capture_output=True, text=True)
    assert told.returncode == 1 and told.stderr.startswith("EDGE_CPU is 'riscv64'; choose from x86_64, aarch64, none")


def test_without_a_compiler_the_others_are_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wheels, "compile_cubins", lambda: CUBINS)
    monkeypatch.setitem(wheels.COMPILERS, "aarch64", ("g++-aarch64-linux-gnu", "a-compiler-that-is-not-there"))
    monkeypatch.setattr(wheels, "CPUS", ("aarch64", "none"))
    assert wheels.main(["--out", str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["minicpm_edge-0.1.0-py3-none-any.whl"]
    said = capfd.readouterr().err
    assert said == "no wheel for aarch64: its compiler is missing; apt-get install g++-aarch64-linux-gnu\n"


@pytest.mark.long
def test_the_boards_kernels_are_those_of_the_selftest() -> None:
    from edge.selftest.vectors import PUBLISHED

    modules = wheels.compile_cubins()
    assert modules.keys() == CUBINS.keys()
    for module, m in zip(modules.values(), PUBLISHED.values(), strict=True):
        for kernel in kernels_for(m.config, m.element, m.kv_element, m.weights, m.head):
            assert b"\0" + kernel.symbol.encode() + b"\0" in module


# ---- what the library asks of a system -------------------------------------------------------------------------


def check_library(path: Path) -> None:
    """It loads on JetPack 6.2: no newer symbols, no other libraries, no folders of this machine."""
    told = subprocess.run(["readelf", "--version-info", "--dynamic", "--wide", path], capture_output=True, text=True)
    for kind, version in set(re.findall(r"Name: (\w+?)_([\d.]+) ", told.stdout)):
        assert tuple(map(int, version.split("."))) <= NEWEST[kind], f"{path.name} needs {kind} {version}"
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", told.stdout))
    assert needed and needed <= LIBRARIES | LOADERS
    assert "RPATH" not in told.stdout and "RUNPATH" not in told.stdout
    assert str(wheels.ROOT).encode() not in path.read_bytes()


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf, of Debian's binutils")
def test_the_library_loads_on_ubuntu_22_04() -> None:
    from plugins.ort.library import INSTRUCTION_SETS

    for name in INSTRUCTION_SETS[HERE]:
        check_library(library_path(name))
        wheels.check_symbols(library_path(name))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf, of Debian's binutils")
def test_a_library_that_asks_for_more_is_no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(wheels.NEWEST, "GLIBCXX", (3, 4, 20))
    with pytest.raises(SystemExit, match=r"asks for GLIBCXX 3\.4\.\d+, which Ubuntu 22\.04 and JetPack 6 do not have"):
        wheels.check_symbols(library_path(KERNELS[0]))


# ---- from an environment of its own ----------------------------------------------------------------------------


def run_from(wheel: Path, folder: Path) -> None:
    """Install into a fresh venv that has the packages of this one, but not this source tree; export and run there."""
    venv, outside = folder / "venv", folder / "outside"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(venv), "platbase": str(venv)}))
    python = venv / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, env=environment, check=True)
    # A path alone: .pth files in there, as that of an editable install, are not read.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    outside.mkdir()
    write_hf_checkpoint(folder / "checkpoint", tiny_config(tie_word_embeddings=False), tokenizer=True)

    def run(*command: object) -> str:
        words = list(map(str, command))
        done = subprocess.run(words, cwd=outside, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = run(python, "-c", "import edge, plugins, build_engine; print(edge.__file__)")
    assert Path(found.strip()).is_relative_to(venv)
    kernels = run(python, "-c", "from plugins.ort.library import find_library; print(find_library())")
    assert kernels.startswith("None" if wheel.stem.endswith("-any") else f"{site}/plugins/ort/libedge_ops_")
    edge = venv / "bin" / "edge"
    assert "Usage: edge" in run(edge, "--help")
    run(edge, "export", folder / "checkpoint", "--out", "bundle", "--weights", "exact")
    said = run(edge, "run", "bundle", "--prompt", "the fox", "--temperature", "0", "--max-tokens", "8")
    assert said.strip()


def test_the_pure_wheel_runs_by_itself(pure: Path, tmp_path: Path) -> None:
    run_from(pure, tmp_path)


@pytest.mark.long
def test_the_wheel_for_this_machine_runs_by_itself(built: Path, tmp_path: Path) -> None:
    run_from(built, tmp_path)
