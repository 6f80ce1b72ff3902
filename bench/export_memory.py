"""Peak memory of exporting an 8B-shaped checkpoint: the weights stream through, so it must not grow with them.

    python -m bench.export_memory                 # 2 and 4 layers of MiniCPM4-8B; prints the growth a layer

Anonymous memory is what the export needs; resident memory also counts pages of the mapped checkpoint, which the
kernel may drop at any time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Annotated

import typer

from bench.checkpoints import write_safetensors
from build_engine.checkpoint import open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.models import MINICPM4_8B

GIB = 1 << 30


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def export_and_report(checkpoint: Path, out: Path, weights: str) -> None:
    """Export in this process while sampling its anonymous memory; prints JSON."""
    peak, done = [0], Event()

    def sample() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], _status("RssAnon"))

    thread = Thread(target=sample)
    thread.start()
    started = time.perf_counter()
    try:
        export_bundle(open_checkpoint(checkpoint), out, ExportOptions(weights=WeightFormat(weights)))
    finally:
        done.set()
        thread.join()
    seconds = time.perf_counter() - started
    print(json.dumps({"anonymous": peak[0], "resident": _status("VmHWM"), "seconds": seconds}))


def main(
    layers: Annotated[str, typer.Option(help="Layer counts to compare; 32 is the whole model.")] = "2,4",
    folder: Annotated[Path | None, typer.Option(help="Where to put the checkpoints (16 GB for all layers).")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Write the checkpoints, export each in a process of its own, print peaks and the growth a layer."""
    if worker is not None:
        export_and_report(**{k: Path(v) if k != "weights" else v for k, v in json.loads(worker).items()})
        return
    counts = [int(n) for n in layers.split(",")]
    for weights in ("w4a16", "exact"):
        peaks = {}
        for count in counts:
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                checkpoint = write_safetensors(Path(temporary) / "8b", replace(MINICPM4_8B, num_hidden_layers=count))
                out = Path(temporary) / "bundle"
                task = json.dumps({"checkpoint": str(checkpoint), "out": str(out), "weights": weights})
                command = [sys.executable, "-m", "bench.export_memory", "--worker", task]
                peaks[count] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                shutil.rmtree(out)
            peak = peaks[count]
            print(
                f"{weights}: {count} layers of the 8B shape: peak {peak['anonymous'] / GIB:.2f} GiB anonymous, "
                f"{peak['resident'] / GIB:.2f} GiB resident with the mapped checkpoint, {peak['seconds']:.0f} s"
            )
        growth = (peaks[counts[-1]]["anonymous"] - peaks[counts[0]]["anonymous"]) / (counts[-1] - counts[0])
        whole = peaks[counts[-1]]["anonymous"] + growth * (MINICPM4_8B.num_hidden_layers - counts[-1])
        print(f"{weights}: growth {growth / 2**20:.1f} MiB a layer; all 32 layers: {whole / GIB:.2f} GiB anonymous")


if __name__ == "__main__":
    typer.run(main)
