"""Fixtures shared by the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_engine.checkpoint import Checkpoint, open_checkpoint
from tests.synthetic import smollm2_gguf_path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct; its absence is a failure that says what to install, not a skip."""
    try:
        return smollm2_gguf_path()
    except FileNotFoundError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Checkpoint:
    """The real model, opened; shared because its vocabulary takes seconds to parse."""
    return open_checkpoint(smollm2_gguf)
