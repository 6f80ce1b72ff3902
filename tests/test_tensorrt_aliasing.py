"""Why plugins do not declare that the KV pool's output is its input (plugins/paged_attention/trt.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from tests.synthetic import tiny_config, write_hf_checkpoint

LAYERS = 3
POOL = 2**31 - 1  # values of the largest pool that the profiles allow
# In a process of its own, since it registers plugins that declare aliases.
CUT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from bench.engine_build import cut_of_engine
print(json.dumps(asdict(cut_of_engine(Path(sys.argv[1]), aliased=sys.argv[2] == "declared"))))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aliasing")
    config = tiny_config(hidden_size=128, intermediate_size=256, head_dim=64, num_hidden_layers=LAYERS)
    checkpoint = open_checkpoint(write_hf_checkpoint(folder / "hf", config))
    weights = WeightFormat("w4a16", 64, symmetric=True, head="int8", linear="packed")
    return export_bundle(checkpoint, folder / "bundle", ExportOptions("rtx", weights))


def cut(bundle: Path, alias: str) -> dict[str, int]:
    command = [sys.executable, "-c", CUT, str(bundle), alias]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_declared_alias_cuts_the_engine_at_every_layer_and_saves_nothing(bundle: Path) -> None:
    undeclared, declared = cut(bundle, "undeclared"), cut(bundle, "declared")
    assert undeclared["programs"] == 2  # one for each profile
    assert declared["programs"] >= 2 * (LAYERS + 1)
    for engine in (undeclared, declared):
        assert engine["largest_region"] < POOL / 100  # no second pool either way
