"""How close the measured speeds come to what the memory and the arithmetic of the hardware allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge.bench.bandwidth import Limits, cpu_limits, device_limits
from edge.bench.samples import BenchCase, CaseResult, Summary
from edge.bench.step_bytes import StepBytes, pool_bytes, prompt_flops, weight_bytes
from edge.engine import Engine
from edge.errors import EdgeError
from edge.memory.weights import StoredWeights

FORMULAS = (
    "decode bound = batch x bandwidth / (weights + head + batch x (keys and values + compressed keys)), "
    "bytes as stored, averaged over the steps of the reply",
    "prefill bound = peak / (2 x weights + 4 x query heads x head size x layers x keys attended to) operations a token",
    "% of roofline = median speed / bound",
)
ON_CPU = "onnxruntime"


@dataclass(frozen=True)
class RooflineRow:
    """One case. step: bytes that a decode step of the whole batch reads; flops: operations a prompt token, at least.

    bounds in tokens a second of all sequences; shares (1 is the bound) None where nothing was measured or no peak is
    known.
    """

    case: BenchCase
    step: StepBytes
    decode_bound_tok_s: float
    decode_share: float | None
    flops: float
    prefill_bound_tok_s: float | None
    prefill_share: float | None


@dataclass(frozen=True)
class Roofline:
    """The hardware's limits, a row for each case, and the formulas in words. problem: why there is none, or "".

    With speculation a verified step gives several tokens, so that decode may exceed its bound, which is that of plain
    decoding.
    """

    limits: Limits | None
    rows: tuple[RooflineRow, ...] = ()
    problem: str = ""
    formulas: tuple[str, ...] = FORMULAS


def make_roofline(engine: Engine, cases: Sequence[CaseResult], board_model: str) -> Roofline:
    """Of measured cases. Finds the hardware's limits first, which takes about a second on a CPU."""
    try:
        limits = find_limits(engine, board_model)
    except EdgeError as error:
        return Roofline(None, problem=f"No roofline: {error}.")
    return Roofline(limits, tuple(_row(engine, result, limits) for result in cases))


def find_limits(engine: Engine, board_model: str) -> Limits:
    """Of what the engine runs on."""
    if is_on_cpu(engine):
        return cpu_limits(engine.plan.run.threads)
    from edge.cuda import open_device

    return device_limits(open_device(), board_model)


def is_on_cpu(engine: Engine) -> bool:
    """Whether it runs on ONNX Runtime's CPU provider."""
    return engine.bundle.manifest.target == ON_CPU


def mean_step(engine: Engine, case: BenchCase) -> StepBytes:
    """Bytes of a decode step of all sequences of a case, averaged over its steps: the context grows by each."""
    config, manifest, sparse = engine.bundle.config, engine.bundle.manifest, engine.plan.sparse
    weights = StoredWeights.from_manifest(manifest.weights, manifest.types)
    projections, head = weight_bytes(config, weights, on_cpu=is_on_cpu(engine))
    contexts = range(case.prompt_tokens + 1, max(case.context, case.prompt_tokens + 2))
    pools = np.mean([pool_bytes(config, manifest.types, context, sparse) for context in contexts], axis=0)
    kv, compressed = (case.batch * float(size) for size in pools)
    return StepBytes(projections, head, kv, compressed)


def _row(engine: Engine, result: CaseResult, limits: Limits) -> RooflineRow:
    case = result.case
    step = mean_step(engine, case)
    flops = prompt_flops(engine.bundle.config, case.prompt_tokens, engine.plan.sparse)
    decode_bound = case.batch * limits.gb_s * 1e9 / step.total
    prefill_bound = None if limits.tflops is None else limits.tflops * 1e12 / flops
    return RooflineRow(
        case,
        step,
        decode_bound,
        _share(result.decode_tok_s, decode_bound),
        flops,
        prefill_bound,
        _share(result.prefill_tok_s, prefill_bound),
    )


def _share(measured: Summary | None, bound: float | None) -> float | None:
    return None if measured is None or bound is None else measured.median / bound
