"""The container files, read: nothing here can build them, since their base images come from a registry."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from deploy.wheels import GLIBC, ROOT
from edge.cli.app import app

FOLDER = ROOT / "deploy" / "containers"
FILES = sorted(FOLDER.glob("*.Dockerfile"))
WHEELS = [
    f"minicpm_edge-0.1.0-py3-none-{tag}.whl"
    for tag in ("any", *(f"manylinux_{GLIBC}_{cpu}" for cpu in ("x86_64", "aarch64")))
]
PROCESSORS = {"jetpack6": "aarch64", "jetpack7": "aarch64", "x86": "x86_64"}

Instruction = tuple[str, str]


def instructions(path: Path) -> list[Instruction]:
    """(name, the rest) in order, lines that end in a backslash joined; comments left out."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines()]
    return [(line.split()[0].upper(), line.partition(" ")[2]) for line in lines if line]


def values(path: Path, name: str) -> list[str]:
    return [rest for found, rest in instructions(path) if found == name]


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert {path.name.partition(".")[0] for path in FILES} == PROCESSORS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_a_small_image_that_serves_as_nobody_special(path: Path) -> None:
    names = [name for name, _ in instructions(path)]
    assert names.count("FROM") == 1 and names[0] == "FROM"
    image, _, tag = values(path, "FROM")[0].rpartition(":")
    assert image and re.search(r"\d", tag), "a base image without a version changes by itself"
    assert values(path, "USER") == ["edge"] and "useradd --create-home" in " ".join(values(path, "RUN"))
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert json.loads(values(path, "VOLUME")[0]) == ["/bundle", "/cache"]
    assert "EDGE_CACHE=/cache" in values(path, "ENV")[0]
    for script in values(path, "RUN"):
        subprocess.run([shutil.which("sh") or "/bin/sh", "-n", "-c", script], check=True)
        assert "apt-get install" not in script or script.endswith("rm -rf /var/lib/apt/lists/*")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_copies_the_one_wheel_for_its_processor(path: Path) -> None:
    (copied,) = values(path, "COPY")
    pattern, folder = copied.split()
    (wheel,) = fnmatch.filter(WHEELS, pattern)
    assert wheel.endswith(f"_{PROCESSORS[path.name.partition('.')[0]]}.whl")
    assert folder == "/wheels/"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_extras_that_it_installs_exist(path: Path) -> None:
    text = path.read_text()
    (installed,) = re.findall(r"/wheels/\*\.whl\)\[(.+?)\]", text)
    choices = re.findall(r"EXTRAS=(\S+)", text) if installed == "$EXTRAS" else [installed]
    known = re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for extras in choices:
        assert "serve" in extras.split(",") and set(extras.split(",")) <= set(known)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_command_is_one_and_its_check_asks_where_the_server_answers(path: Path) -> None:
    assert json.loads(values(path, "ENTRYPOINT")[0]) == ["edge"]
    command, *arguments = json.loads(values(path, "CMD")[0])
    group = typer.main.get_command(app)
    parsed = group.get_command(typer.Context(group), command).make_context(command, arguments).params
    assert parsed["host"] == "0.0.0.0" and values(path, "EXPOSE") == [str(parsed["port"])]
    assert str(parsed["bundle"]) in json.loads(values(path, "VOLUME")[0])
    (check,) = values(path, "HEALTHCHECK")
    interpreter, option, code = json.loads(check.partition("CMD ")[2])
    assert (interpreter, option) == ("python", "-c") and f"http://127.0.0.1:{parsed['port']}/ready" in code
    compile(code, "HEALTHCHECK", "exec")
