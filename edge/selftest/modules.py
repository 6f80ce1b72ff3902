"""Machine code of the published models' kernels, which wheels carry for boards: those have no compiler."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
ARCHITECTURES = ("sm_87",)  # of boards; GeForce hosts install the compilers


def module_name(title: str, architecture: str) -> str:
    """The file for a model of `PUBLISHED`, as MiniCPM4-8B-sm_87.cubin."""
    return f"{title.partition(',')[0]}-{architecture}.cubin"


def shipped_module(title: str, architecture: str) -> bytes | None:
    """The module that this installation has for a model; None in a source tree and for other architectures.

    `deploy/wheels.py` compiles it from the sources that it packs, so that both are of one version.
    """
    try:
        return (FOLDER / module_name(title, architecture)).read_bytes()
    except FileNotFoundError:
        return None
