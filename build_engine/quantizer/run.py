"""`edge quantize`: a checkpoint becomes a GPTQ int4 checkpoint, layer by layer, within a memory limit, resumable."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from build_engine.checkpoint import Checkpoint
from build_engine.quantize import GROUP_SIZES
from build_engine.quantizer import gptq, place, write
from build_engine.quantizer.forward import STAGES, Layer, embed, layer_tensors, load_layer, rope_of_length
from build_engine.quantizer.gptq import Int4Matrix
from build_engine.quantizer.memory import hidden_states, require_memory
from build_engine.quantizer.report import LinearReport, QuantizationReport
from build_engine.ternary import is_ternary
from edge.bundle import hash_file
from edge.errors import EdgeError, UsageError
from edge.machine import available_memory

METHODS = ("pgptq", "gptq", "rtn")
PREFIXES = ("scale", "omit")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class QuantizeOptions:
    """rtn: rounding, without calibration. gptq: every token of the calibration text counts alike. pgptq: all but the
    first `skip_tokens` of every sequence, whose activations can be hundreds of times larger than all others.

    `prefix`: "omit" leaves them out, as published (spec: quantization_and_speculation.md 3.5); "scale" brings their
    inputs down to the size of the others', so that what only they use is not free to be rounded at will.
    `damping`: share of the Hessian's mean diagonal that is added to it.
    """

    method: str = "pgptq"
    group_size: int = 128
    skip_tokens: int = 4
    prefix: str = "scale"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(f"group size {self.group_size} is not offered; choose one of {GROUP_SIZES}")
        if self.prefix not in PREFIXES:
            raise UsageError(f"unknown --prefix {self.prefix!r}; choose scale or omit")
        if self.skip_tokens < 0:
            raise UsageError(f"--skip-tokens is {self.skip_tokens} but must be 0 or more")
        if not 0 < self.damping < 1:
            raise UsageError(f"--damping is {self.damping} but must lie between 0 and 1")

    @property
    def skipped(self) -> int:
        """Positions at the beginning of each sequence that do not count like the others."""
        return self.skip_tokens if self.method == "pgptq" else 0


def quantize_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    options: QuantizeOptions,
    sequences: np.ndarray | None,
    *,
    memory: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total, name: None,
) -> QuantizationReport:
    """Write the GPTQ checkpoint `out`; until it is whole, it grows in `OUT.partial`, which `resume` goes on with.

    sequences [S, L] of `calibration_sequences`, None for rtn. `memory` in bytes, None: 90 % of what is free. What was
    interrupted and resumed is, byte for byte, what one sitting gives. EdgeError, UsageError: see the parts.
    """
    place.check_place(out, overwrite)
    if is_ternary(checkpoint):
        raise UsageError(
            f"{checkpoint.path} is ternary, and int4 would only make it larger; export it as it is, which keeps its "
            "codes"
        )
    write.require_packable(checkpoint, options.group_size)
    if sequences is not None and sequences.shape[1] <= options.skipped:
        raise UsageError(
            f"sequences of {sequences.shape[1]} tokens leave nothing after the {options.skipped} of --skip-tokens; "
            "give a longer text or --length"
        )
    memory = available_memory() * 9 // 10 if memory is None else memory
    settings = _settings(checkpoint, options, sequences)
    with place.disk_errors(out), place.open_partial(out, settings, resume=resume, overwrite=overwrite) as unfinished:
        written = sum(path.stat().st_size for path in unfinished.folder.iterdir())
        place.require_space(out, write.output_bytes(checkpoint, options.group_size) - written)
        _layers(checkpoint, unfinished, options, sequences, memory, progress)
        report = _report(options, sequences, unfinished)
        write.write_rest(unfinished.folder, checkpoint)
        write.write_text_files(unfinished.folder, checkpoint)
        write.write_json(unfinished.folder / write.REPORT, report.to_dict())
        write.write_config(unfinished.folder, checkpoint, options.group_size)
        place.publish(unfinished, out)
    return report


def _settings(checkpoint: Checkpoint, options: QuantizeOptions, sequences: np.ndarray | None) -> dict[str, object]:
    """All that decides the result."""
    source = checkpoint.path
    files = [source] if source.is_file() else [source / "config.json", *sorted(source.glob("*.safetensors"))]
    digest = hashlib.sha256("".join(hash_file(path) for path in files).encode())
    tokens = None if sequences is None else [*sequences.shape, hashlib.sha256(sequences.tobytes()).hexdigest()]
    return {**asdict(options), "checkpoint": digest.hexdigest(), "calibration": tokens}


def _layers(
    checkpoint: Checkpoint,
    unfinished: place.Partial,
    options: QuantizeOptions,
    sequences: np.ndarray | None,
    memory: int,
    progress: Progress,
) -> None:
    """Quantise the layers that `unfinished` has not, after leading the calibration text through those that it has."""
    config = checkpoint.config
    calibration = None
    if sequences is None:
        require_memory(config, memory)
    else:
        states = hidden_states(config, sequences.shape, memory, unfinished.folder)
        embed(checkpoint, sequences, states)
        calibration = _Calibration(states, rope_of_length(config, sequences.shape[1]), options)
        for index in range(len(unfinished.layers)):
            progress(index * len(STAGES), config.num_hidden_layers * len(STAGES), f"layer {index}, done before")
            calibration.advance(_finished_layer(checkpoint, unfinished.folder, index))
    for index in range(len(unfinished.layers), config.num_hidden_layers):
        unfinished.add_layer(_quantize_layer(checkpoint, unfinished.folder, options, index, calibration, progress))


def _quantize_layer(
    checkpoint: Checkpoint,
    folder: Path,
    options: QuantizeOptions,
    index: int,
    calibration: _Calibration | None,
    progress: Progress,
) -> list[dict[str, object]]:
    """Quantise one layer and write its shard -> the reports of its linears. Nothing of it is held afterwards."""
    config, layer = checkpoint.config, load_layer(checkpoint, index)
    matrices: dict[str, Int4Matrix] = {}
    reports = []
    for number, stage in enumerate(STAGES):
        progress(index * len(STAGES) + number, config.num_hidden_layers * len(STAGES), f"layer {index}, {stage}")
        started = time.perf_counter()
        hessian = None if calibration is None else calibration.hessian(layer, index, stage)
        for name, (matrix, report) in _quantize_stage(layer, index, stage, hessian, options, started).items():
            matrices[name] = matrix
            reports.append(asdict(report))
        if calibration is not None:
            calibration.after(layer, stage)
    write.write_layer(folder, index, config, matrices)
    return reports


def _finished_layer(checkpoint: Checkpoint, folder: Path, index: int) -> Layer:
    layer = load_layer(checkpoint, index)
    matrices = write.read_layer(folder, index, checkpoint.config)
    return replace(layer, weights={name: matrix.dequantize() for name, matrix in matrices.items()})


@dataclass(frozen=True)
class _Calibration:
    """The residual stream of every sequence, states [S, L, H], between two stages of a layer; moved on in place."""

    states: np.ndarray
    rope: tuple[np.ndarray, np.ndarray]
    options: QuantizeOptions

    def hessian(self, layer: Layer, index: int, stage: str) -> np.ndarray:
        """2/n sum x x^T over what the stage's linears read, [K, K] float64."""
        read: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "qkv": layer.attention_input,
            "o": lambda hidden: layer.attended(hidden, self.rope),
            "gate_up": layer.mlp_input,
            "down": layer.gated,
        }
        with np.errstate(over="ignore", invalid="ignore"):  # found and named below
            hessian = mean_outer_product(self._counted(read[stage](hidden)) for hidden in self.states)
        if not np.isfinite(hessian.diagonal()).all():
            raise EdgeError(
                f"layer {index}: the calibration text drives activations beyond float32; the weights are damaged"
            )
        return hessian

    def _counted(self, inputs: np.ndarray) -> np.ndarray:
        """What a linear reads on one sequence, [L, K], as the Hessian counts it."""
        first, others = np.split(inputs, [self.options.skipped])
        if self.options.prefix == "omit" or not len(first):
            return others
        sizes = np.sqrt(np.mean(first * first, axis=1, keepdims=True))
        largest = np.sqrt(np.mean(others * others))
        shrinks = sizes > largest  # where all inputs are 0, nothing does
        return np.concatenate([first * np.divide(largest, sizes, out=np.ones_like(sizes), where=shrinks), others])

    def after(self, layer: Layer, stage: str) -> None:
        """Move on past a stage that is quantised, if it ends at the residual stream."""
        for hidden in self.states:
            if stage == "o":
                hidden[:] = layer.after_attention(hidden, layer.attended(hidden, self.rope))
            elif stage == "down":
                hidden[:] = layer.after_mlp(hidden, layer.gated(hidden))

    def advance(self, layer: Layer) -> None:
        """Move on past a whole layer."""
        for hidden in self.states:
            hidden[:] = layer.forward(hidden, self.rope)


def mean_outer_product(inputs: Iterable[np.ndarray]) -> np.ndarray:
    """2/n sum x x^T over the n rows of all `inputs` [., K] float32 -> [K, K]; products in float32, sums in float64."""
    total, count = np.zeros((0, 0)), 0
    for x in inputs:
        if not count:
            total = np.zeros((x.shape[1], x.shape[1]))
        total += x.T @ x
        count += len(x)
    total *= 2 / count
    return total


def _quantize_stage(
    layer: Layer, index: int, stage: str, hessian: np.ndarray | None, options: QuantizeOptions, started: float
) -> dict[str, tuple[Int4Matrix, LinearReport]]:
    """Quantise the linears of a stage and put their dequantised values into `layer`."""
    fit: Callable[[np.ndarray, np.ndarray], Int4Matrix] = gptq.round_to_nearest
    if hessian is not None:
        order = gptq.input_order(hessian)
        factor = gptq.inverse_factor(f"layer {index}, {stage}", hessian, order, options.damping)
        fit = partial(gptq.gptq, factor=factor, order=order)
    results = {}
    for name in STAGES[stage]:
        weight = layer.weights[name]
        scales = gptq.group_scales(layer_tensors(index)[name], weight, options.group_size)
        rounded = gptq.round_to_nearest(weight, scales).dequantize()
        matrix = fit(weight, scales)
        values = matrix.dequantize()
        report = LinearReport(
            layer=index,
            linear=name,
            output_error=None if hessian is None else gptq.output_error(weight, values, hessian),
            rtn_output_error=None if hessian is None else gptq.output_error(weight, rounded, hessian),
            weight_error=gptq.weight_error(weight, values),
            rtn_weight_error=gptq.weight_error(weight, rounded),
            seconds=time.perf_counter() - started,
        )
        started = time.perf_counter()
        layer.weights[name] = values
        results[name] = matrix, report
    return results


def _report(options: QuantizeOptions, sequences: np.ndarray | None, unfinished: place.Partial) -> QuantizationReport:
    linears = tuple(LinearReport(**linear) for layer in unfinished.layers for linear in layer)
    count, length = (0, 0) if sequences is None else sequences.shape
    seconds = sum(linear.seconds for linear in linears)
    return QuantizationReport(
        options.method,
        options.group_size,
        options.skipped,
        options.prefix,
        options.damping,
        count,
        length,
        seconds,
        linears,
    )
