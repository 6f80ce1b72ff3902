"""Checks of a bundle on a machine: is it for it, does it fit, is its engine built."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from edge.bundle import WEIGHTS, Bundle, open_bundle
from edge.doctor.finding import CPU, Finding, Patient, gib, short
from edge.doctor.machine import free_space
from edge.doctor.software import TENSORRT, tensorrt_versions
from edge.errors import EdgeError, UsageError
from edge.kv_cache import pages_for
from edge.memory.fit import make_plan
from edge.memory.ledger import page_bytes
from edge.plan import EngineOptions, subject_of
from plugins import PAGE_TOKENS
from plugins.build.embed import TARGETS, module_file

ENGINES = "engines"  # where build_engine/tensorrt.py writes


def open_or_blame(path: Path) -> Bundle | Finding:
    """The bundle, its sizes checked but not its hashes; a damaged one is a finding, what is none a UsageError."""
    try:
        return open_bundle(path, verify=False)
    except UsageError:
        raise
    except EdgeError as error:
        what, _, remedy = str(error).rpartition("; ")
        return Finding("bundle", "problem", what, remedy)


def fits(bundle: Bundle, machine_target: str) -> bool:
    """Whether a machine of this target can run it; the CPU can be used anywhere, both PC targets have one hardware."""
    target = bundle.manifest.target
    return target in (CPU, machine_target) or {target, machine_target} == {"rtx", "tensorrt"}


def check_bundle(bundle: Bundle, patient: Patient, machine_target: str) -> list[Finding]:
    """All that is to be said of it; only that it does not fit, if so."""
    manifest = bundle.manifest
    found = f"{manifest.name} for {manifest.target}, {manifest.weights['description']}"
    if not fits(bundle, machine_target):
        remedy = f"edge export CHECKPOINT --out bundle --target {machine_target}"
        return [Finding("bundle", "problem", f"{found}; this machine is one for {machine_target}", remedy)]
    findings = [Finding("bundle", "ok", found), bundle_memory(bundle, patient)]
    if manifest.target != CPU:
        findings += [bundle_kernels(bundle, patient), bundle_engine(bundle, patient)]
    return findings


def bundle_kernels(bundle: Bundle, patient: Patient) -> Finding:
    """Whether it has machine code for this GPU."""
    files = bundle.manifest.files
    modules = sorted(name for name in files if name.endswith(".cubin"))
    if not modules:
        return Finding("kernels", "note", "none in the bundle: its model's size has none, ONNX functions run instead")
    architecture = patient.machine.probed("gpu").get("architecture")
    wanted = module_file(architecture) if architecture else ""
    if not architecture or wanted in files:
        return Finding("kernels", "ok", wanted or f"{', '.join(modules)}; which GPU is here is unknown")
    able = [target for target, architectures in TARGETS.items() if architecture in architectures]
    again = f"edge export CHECKPOINT --out bundle --target {able[0]}" if able else "use a supported GPU"
    return Finding("kernels", "problem", f"none for {architecture}, only {', '.join(modules)}", again)


def bundle_engine(bundle: Bundle, patient: Patient) -> Finding:
    """Whether one of its engines was built from it, by this TensorRT, for this GPU."""
    target = bundle.manifest.target
    build = f"edge build {short(bundle.path)} --target {target}"
    reasons = []
    for path in sorted((bundle.path / ENGINES).glob("*.json")):
        reason = _unfit(path, bundle, patient)
        if reason is None:
            return Finding("engine", "ok", path.with_suffix(".engine").name)
        reasons.append(f"{path.stem} {reason}")
    needed, free = 2 * bundle.manifest.files[WEIGHTS].bytes, free_space(bundle.path)
    if free < needed:
        words = f"none yet, and only {gib(free)} free beside the bundle where building takes {gib(needed)}"
        return Finding("engine", "problem", words, "copy the bundle to a larger disk")
    return Finding("engine", "warning", "; ".join(reasons) or "none yet", build)


def _unfit(path: Path, bundle: Bundle, patient: Patient) -> str | None:
    """Why an engine, told by its .json, is not the one to run here; None if it is."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        size = path.with_suffix(".engine").stat().st_size
        for key in ("bundle", "target", "tensorrt", "platform", "bytes"):
            values[key]
    except (OSError, ValueError, KeyError, TypeError):
        return "is damaged"
    if values["bundle"] != bundle.manifest.key or values["target"] != bundle.manifest.target:
        return "is of another export"
    if size != values["bytes"]:
        return "is damaged"
    here = f"{platform.system()}-{patient.machine.architecture}".lower()
    if values["platform"] != here:
        return f"is for {values['platform']}"
    _, name = TENSORRT[bundle.manifest.target]
    version = tensorrt_versions(patient.machine).get(name)
    if version and values["tensorrt"] != f"{name} {version}":
        return f"was built by {values['tensorrt']}, here is {version}"
    architecture = patient.machine.probed("gpu").get("architecture", "").replace("_", "")
    capabilities = values.get("compute_capabilities")
    if architecture and capabilities and architecture not in capabilities:
        return f"is for {', '.join(capabilities)}"
    return None


def bundle_memory(bundle: Bundle, patient: Patient) -> Finding:
    """Whether weights and cache fit, and the longest context that does."""
    limit = bundle.manifest.limits["max_context"]
    if bundle.manifest.target == CPU:
        try:
            plan = make_plan(bundle, EngineOptions(), free=patient.machine.available_memory)
        except EdgeError:
            words = f"does not fit in the {gib(patient.machine.available_memory)} that are available"
            remedy = "close other programs, export with --weights w4a16, or use a smaller model"
            return Finding("model in memory", "problem", words, remedy)
        return _context(plan.total, plan.max_context, limit)
    answer = patient.machine.probed("gpu")
    total = answer.get("total_memory", patient.machine.meminfo.get("MemTotal", 0))
    free = answer.get("free_memory", patient.machine.available_memory)
    subject = subject_of(bundle)
    weights, page = bundle.manifest.files[WEIGHTS].bytes, sum(page_bytes(subject.config, subject.types))
    if weights + page > total:
        words = f"{gib(weights)} of weights and a cache do not fit in {gib(total)}"
        return Finding("model in memory", "problem", words, "use a smaller model, or --weights w4a16")
    if weights + page > free:
        words = f"{gib(weights)} of weights and a cache do not fit in the {gib(free)} that are free of {gib(total)}"
        return Finding("model in memory", "warning", words, "close other programs")
    pages = min(pages_for(limit), (free - weights) // page)
    return _context(weights + pages * page, min(limit, pages * PAGE_TOKENS), limit)


def _context(size: int, context: int, limit: int) -> Finding:
    if context == limit:
        return Finding("model in memory", "ok", f"{gib(size)} with its whole context of {limit} tokens")
    words = f"{gib(size)} with a context of {context} tokens, of {limit} that the model has"
    return Finding("model in memory", "warning", words, f"--context {context}, or close other programs for more")
