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
from edge.bundle import GRAPH
from tests.synthetic import tiny_config, write_hf_checkpoint

LAYERS = 3
# Builds the graph of argv[1] with a pool of 512 pages at most -> programs of the engine, largest region it plans.
BUILD = """
import json, re, sys
from pathlib import Path
from build_engine.tensorrt_compile import parse
from build_engine.tensorrt_profiles import BuildOptions, build_profiles
from edge.bundle import open_bundle
from edge.tensorrt import error_logger, load_flavour
from plugins import tensorrt as plugins
from plugins.plugin import PluginHost

graph, declared = Path(sys.argv[1]), sys.argv[2] == "declared"
flavour, errors = load_flavour("rtx"), []
trt = flavour.api
if declared:
    trt.IPluginV3OneBuild = trt.IPluginV3OneBuildV2

    def get_aliased_input(self, index):
        source = self.operator.SAME_MEMORY.get(self.operator.OUTPUTS[index])
        return -1 if source is None else self.operator.INPUTS.index(source)

    plugins._Plugin.get_aliased_input = get_aliased_input
builder = trt.Builder(error_logger(trt, errors))
creators = plugins.register_plugins(trt, PluginHost())
network, _ = parse(flavour, builder, error_logger(trt, errors), graph, {creator.name for creator in creators})
config = builder.create_builder_config()
config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, declared)
options = BuildOptions(max_context=512, chunk=32, batch=1)
for shapes in (profile.shapes for profile in build_profiles(open_bundle(graph.parent).config, options)):
    profile = builder.create_optimization_profile()
    for name, (smallest, typical, largest) in shapes.items():
        profile.set_shape(name, smallest, typical, (512, *largest[1:]) if "pool" in name else largest)
    config.add_optimization_profile(profile)
engine = bytes(builder.build_serialized_network(network, config))
regions = re.findall(rb"region = \\{ name=devmem\\S* size=(\\d+)", engine)
print(json.dumps([engine.count(b"alias_graph_io_mem="), max(map(int, regions))]))
"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aliasing")
    config = tiny_config(hidden_size=128, intermediate_size=256, head_dim=64, num_hidden_layers=LAYERS)
    checkpoint = open_checkpoint(write_hf_checkpoint(folder / "hf", config))
    weights = WeightFormat("w4a16", 64, symmetric=True, head="int8", linear="packed")
    return export_bundle(checkpoint, folder / "bundle", ExportOptions("rtx", weights)) / GRAPH


def build(graph: Path, alias: str) -> tuple[int, int]:
    command = [sys.executable, "-c", BUILD, str(graph), alias]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    programs, largest = json.loads(run.stdout)
    return programs, largest


def test_a_declared_alias_cuts_the_engine_at_every_layer_and_saves_nothing(graph: Path) -> None:
    pool = 512 * 2 * 2 * 64 * 64 * 2  # bytes of one layer's
    undeclared, largest = build(graph, "undeclared")
    assert undeclared == 2 and largest < pool  # a program for each profile, and no second pool
    declared, largest = build(graph, "declared")
    assert declared >= 2 * LAYERS and largest < pool
