"""Engine builds without a GPU: seconds, peak memory and size, the first beside its bars of 30 s and 2.0 GiB.

    python -m bench.engine_build                 # takes ten minutes and 10 GB of disk
    python -m bench.engine_build --only plugins  # the builds whose name has this in it
    python -m bench.engine_build --aliased       # what declaring the pools' outputs as aliases does to an engine

Random weights in the shapes of MiniCPM4; TensorRT-RTX compiles for RTX 30, 40 and 50, for prefill and decode.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from bench.checkpoints import write_safetensors
from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from build_engine.tensorrt import BuildOptions, build_engine, build_profiles
from build_engine.tensorrt_compile import parse
from build_engine.tensorrt_memory import estimate_memory, graph_sizes
from edge.bundle import GRAPH, open_bundle
from edge.config import ModelConfig
from edge.engine_file import ENGINES
from edge.models import MINICPM4_05B, MINICPM4_8B
from edge.tensorrt import error_logger, load_flavour
from plugins.plugin import PluginHost
from plugins.tensorrt import register_plugins

BAR_SECONDS, BAR_GIB = 30, 2.0
MIB, GIB = 1 << 20, 1 << 30
PACKED = WeightFormat("w4a16", 64, symmetric=True, head="int8", linear="packed")
NATIVE = WeightFormat("w4a16", 64, symmetric=True, head="exact")


@dataclass(frozen=True)
class Build:
    """One row; the median of `rounds` builds counts."""

    name: str
    config: ModelConfig
    weights: WeightFormat
    plugins: bool = True
    rounds: int = 1


BUILDS = (
    Build("0.5B, packed int4, plugins", MINICPM4_05B, PACKED, rounds=3),
    Build("0.5B, native int4, plugins", MINICPM4_05B, NATIVE),
    Build("0.5B, native int4, functions", MINICPM4_05B, NATIVE, plugins=False),
    Build("8B with 4 layers, packed int4, plugins", replace(MINICPM4_8B, num_hidden_layers=4), PACKED),
)


def bundle_of(folder: Path, config: ModelConfig, weights: WeightFormat) -> Path:
    """The bundle of random weights; its checkpoint is made once for all formats."""
    shape = f"{config.hidden_size}x{config.num_hidden_layers}"
    checkpoint, bundle = folder / f"checkpoint-{shape}", folder / f"bundle-{shape}-{weights.linear}"
    if not checkpoint.exists():
        write_safetensors(checkpoint, config)
    if not bundle.exists():
        export_bundle(open_checkpoint(checkpoint), bundle, ExportOptions("rtx", weights))
    return bundle


def measure(bundle: Path, build: Build) -> str:
    """A row of the table."""
    runs = []
    for _ in range(build.rounds):
        shutil.rmtree(bundle / ENGINES, ignore_errors=True)
        runs.append(build_engine(bundle, BuildOptions(plugins=build.plugins)).measured)
    seconds = median(run.seconds for run in runs)
    resident = median(run.peak_rss_bytes for run in runs)
    anonymous = median(run.peak_anonymous_bytes for run in runs)
    estimate = estimate_memory(graph_sizes(bundle / GRAPH), plugins=build.plugins)
    row = f"| {build.name} | {seconds:.1f} s | {resident / GIB:.2f} GiB | {anonymous / GIB:.2f} GiB "
    row += f"| {estimate / GIB:.2f} GiB | {runs[0].bytes / MIB:.0f} MiB |"
    if build is BUILDS[0]:
        reached = seconds <= BAR_SECONDS and resident <= BAR_GIB * GIB
        row += f"\n| bar: {'reached' if reached else 'MISSED'} | {BAR_SECONDS} s | {BAR_GIB} GiB | | | |"
    return row


@dataclass(frozen=True)
class Cut:
    """How an engine is cut into programs, what it copies between them, and bytes of the largest region it plans."""

    programs: int
    plugins_inside: int
    copies: int
    largest_region: int


def cut_of_engine(bundle: Path, *, aliased: bool) -> Cut:
    """Build the engine, with plugins that declare that a pool's output is its input, or as they are."""
    flavour, errors = load_flavour("rtx"), list[str]()
    trt, logger = flavour.api, error_logger(flavour.api, errors)
    builder = trt.Builder(logger)
    creators = register_plugins(_with_aliases(trt) if aliased else trt, PluginHost())
    network, parser = parse(flavour, builder, logger, bundle / GRAPH, {creator.name for creator in creators})
    if network is None:
        raise SystemExit(f"not parsed: {[parser.get_error(i).desc() for i in range(parser.num_errors)]}")
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, aliased)
    for shapes in build_profiles(open_bundle(bundle).config, BuildOptions()):
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.shapes.items():
            profile.set_shape(name, *bounds)
        config.add_optimization_profile(profile)
    engine = bytes(builder.build_serialized_network(network, config))
    regions = re.findall(rb"region = \{ name=devmem\S* size=(\d+)", engine)
    return Cut(
        programs=len(re.findall(rb"region = \{ name=devmem_topdown_0 ", engine)),
        plugins_inside=len(re.findall(rb"custom_layer=\{", engine)),
        copies=len(re.findall(rb"Reformatting CopyNode for ", engine)),
        largest_region=max(map(int, regions)),
    )


def _with_aliases(trt: Any) -> Any:
    """The package with a plugin base class that knows SAME_MEMORY as TensorRT's aliases."""

    class AliasedBuild(trt.IPluginV3OneBuildV2):
        def get_aliased_input(self, output: int) -> int:
            operator = self.operator
            source = operator.SAME_MEMORY.get(operator.OUTPUTS[output])
            return operator.INPUTS.index(source) if source else -1

    class Api:
        IPluginV3OneBuild = AliasedBuild

        def __getattr__(self, name: str) -> Any:
            return getattr(trt, name)

    return Api()


def main(
    only: Annotated[str, typer.Option(help="Part of a build's name.")] = "",
    aliased: Annotated[bool, typer.Option("--aliased", help="Compare engines with and without aliases.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Where to keep checkpoints and bundles.")] = None,
) -> None:
    """Print one row a build."""
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        if aliased:
            bundle = bundle_of(place, MINICPM4_05B, PACKED)
            for how, aliased in (("undeclared", False), ("declared aliases", True)):
                cut = cut_of_engine(bundle, aliased=aliased)
                print(
                    f"{how}: {cut.programs} compiled programs with {cut.plugins_inside} plugin layers inside, "
                    f"{cut.copies} copies between them, largest region {cut.largest_region / MIB:.1f} MiB",
                    flush=True,
                )
            return
        print("| build | time | peak resident | of it anonymous | estimated | engine |\n|---|---|---|---|---|---|")
        for build in BUILDS:
            if only in build.name:
                print(measure(bundle_of(place, build.config, build.weights), build), flush=True)


if __name__ == "__main__":
    typer.run(main)
