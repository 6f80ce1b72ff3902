"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from build_engine.checkpoint import Checkpoint, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from tests.synthetic import smollm2_gguf_path, tiny_config, write_hf_checkpoint

# A suite started in the background inherits an ignored Ctrl-C, and so would the commands it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Hundreds of commands are started, and the sources need not be compiled for each of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_configure() -> None:
    """Each of pytest-xdist's workers keeps to its share of the cores, and so do the commands that it starts.

    Threads of a step spin while they wait for one another; on a core that another worker has, that is most of the time.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if share := cores[int(worker.removeprefix("gw")) :: count]:
            os.sched_setaffinity(0, share)


# Minutes each: first, so that two workers end together.
LONGEST = ("test_recall.py", "test_smollm2.py", "test_cuda_attention.py", "test_tensorrt_build.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; all others in their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


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


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random model with a tokenizer, exported exactly. Read-only: copy it to damage it."""
    folder = tmp_path_factory.mktemp("tiny")
    # A tied head makes a random model repeat its input; an untied one gives replies that differ.
    write_hf_checkpoint(folder / "checkpoint", tiny_config(tie_word_embeddings=False), tokenizer=True)
    checkpoint = open_checkpoint(folder / "checkpoint")
    return export_bundle(checkpoint, folder / "bundle", ExportOptions(weights=WeightFormat("exact")))
