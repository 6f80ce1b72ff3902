"""From a bundle to its TensorRT executor: find the device, the engine built for it and the kernels, and plan memory."""

from __future__ import annotations

from dataclasses import replace

from edge.bundle import Bundle
from edge.config import SparseConfig
from edge.cuda import Device, Kernels, open_device
from edge.engine_file import EngineFile, choose_engine
from edge.errors import EdgeError, NoRoomError, UsageError
from edge.executors.tensorrt import TensorRTExecutor
from edge.executors.tensorrt_engine import LoadedEngine, load_engine
from edge.executors.tensorrt_sizes import Sizes, pinned_bytes, pool_bytes
from edge.kv_cache import pages_for
from edge.machine import available_memory
from edge.memory.attended import least_slots
from edge.memory.fit import Ledger, fit_offloaded, fit_plan
from edge.memory.ledger import HOST, MEMORY, Line, cache_lines, total
from edge.memory.run import Run
from edge.plan import EngineOptions, Plan, resolve_sparse, subject_of
from edge.tensorrt import Flavour, load_flavour
from plugins import PAGE_TOKENS
from plugins.plugin import PluginHost


def open_tensorrt(bundle: Bundle, options: EngineOptions) -> tuple[TensorRTExecutor, Plan, int]:
    """-> the executor, its plan, and how many prompt tokens a step may have. EdgeError says what is missing here."""
    _refuse_other_attention(bundle, options)
    try:
        device = open_device()
    except EdgeError as error:
        raise EdgeError(
            f"{bundle.path} was exported for {bundle.manifest.target}, which needs a GPU ({error}); to run on the CPU "
            "export with --target onnxruntime"
        ) from None
    flavour = load_flavour(bundle.manifest.target)
    file = choose_engine(bundle, tensorrt=flavour.name, architecture=device.architecture)
    return open_executor(bundle, options, device, flavour, file)


def open_executor(
    bundle: Bundle, options: EngineOptions, device: Device, flavour: Flavour, file: EngineFile
) -> tuple[TensorRTExecutor, Plan, int]:
    """The rest of `open_tensorrt`, on a device and with an engine that were chosen."""
    if not file.recipe.plugins:
        raise EdgeError(
            f"{file.path.name} was built from functions, which cannot update the KV cache in place; run: edge build "
            f"{bundle.path}, without --functions, of an export that has kernels"
        )
    sizes = _step_sizes(file, options)
    longest = sizes.table_width * PAGE_TOKENS
    limit = min(bundle.manifest.limits["max_context"], longest)
    if options.context is not None and options.context > longest:
        raise NoRoomError(
            f"--context {options.context} exceeds the {longest} tokens that {file.path.name} was built for; ask for "
            f"less, or run: edge build --max-context {options.context}",
            longest,
            "the engine's context",
        )
    if options.offload is not None:
        _refuse_offload(device)
    free = _free_memory(device)
    kernels = Kernels(bundle.kernels(device.architecture), device)
    before, _ = device.memory()
    engine = load_engine(file, flavour, PluginHost(kernels))
    engine = replace(engine, device_bytes=max(0, before - device.memory()[0]))
    sequences = min(options.sequences, sizes.sequences)
    run = Run(
        options.context or limit,
        sequences,
        chunk=options.chunk,
        rows=max(sizes.rows, sizes.verify),
        spare=0 if sequences > 1 else None,
    )
    host = MEMORY if device.is_integrated else HOST
    ledger = _ledger(bundle, options, engine, sizes, file.measured.bytes, host)
    if options.offload is None:
        plan = fit_plan(bundle, options, ledger, run, free=free)
    else:
        least = least_slots(bundle.config, _sparse(bundle), run.context)
        room = int(available_memory() * 0.9)
        plan = fit_offloaded(bundle, options, ledger, run, free=free, least=least, room=room)
    width = pages_for(plan.max_context)
    sizes = replace(sizes, pages=plan.num_pages, table_width=width, slots=plan.resident_pages)
    return TensorRTExecutor(bundle, engine, kernels, sizes), plan, sizes.tokens - sizes.sequences


def _ledger(
    bundle: Bundle, options: EngineOptions, engine: LoadedEngine, sizes: Sizes, weights: int, host: str
) -> Ledger:
    """What a run takes: the executor's pool by purpose, the engine's weights, memory of the host (which is `host`)."""
    subject = subject_of(bundle, options)

    def lines(run: Run) -> tuple[Line, ...]:
        cache = cache_lines(subject, run, HOST)
        width = pages_for(run.context)
        made = replace(sizes, pages=run.pages, table_width=width, slots=run.resident)
        whole = pool_bytes(bundle, engine, made)
        return (
            Line("weights", weights, "the engine's, which TensorRT allocates"),
            *cache,
            Line("working memory", engine.working_bytes, "of the engine's layers and plugins"),
            Line("inputs and logits", whole - total(cache) - engine.working_bytes, f"{sizes.most_rows} rows of logits"),
            Line("pinned buffers", pinned_bytes(bundle.config, made), "of the host: inputs, tokens, logits", host),
        )

    return lines


def _sparse(bundle: Bundle) -> SparseConfig:
    if bundle.config.sparse is None:
        raise UsageError(
            f"{bundle.path} has dense attention, which reads every page for every token; leave out --offload, or "
            "export a checkpoint with sparse attention"
        )
    return bundle.config.sparse


def _refuse_other_attention(bundle: Bundle, options: EngineOptions) -> None:
    """An engine holds its sparse settings, since the operator's function must know the size of its top-k."""
    if resolve_sparse(bundle, options) != bundle.config.sparse:
        raise UsageError(
            f"{bundle.path} is an engine of fixed attention settings; leave out --attention and --sparse, or export "
            "the checkpoint with the ones you want"
        )


def _refuse_offload(device: Device) -> None:
    if device.is_integrated:
        raise UsageError(
            f"{device.name} shares its memory with the host, so that pages offloaded to it would free nothing; leave "
            "out --offload"
        )


def _free_memory(device: Device) -> int:
    """Bytes that can be had. A Jetson's GPU shares the system's memory, and its driver counts cached files as used."""
    free, _ = device.memory()
    return available_memory() if device.is_integrated else free


def _step_sizes(file: EngineFile, options: EngineOptions) -> Sizes:
    """What a step may have, without pages yet: the engine's limits, or less where the user wants less."""
    shapes = {profile.name: profile.shapes for profile in file.recipe.profiles}
    sequences = shapes["decode"]["input_ids"][2][0]
    tokens = min(shapes["prefill"]["input_ids"][2][0], options.chunk + sequences)
    width = shapes["prefill"]["page_table"][2][1]
    verify = shapes["verify"]["logits_rows"][2][0] // sequences if "verify" in shapes else 0
    return Sizes(tokens=tokens, sequences=sequences, rows=sequences, table_width=width, pages=0, verify=verify)
