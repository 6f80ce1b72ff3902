"""The device executor: a TensorRT engine with our plugins, its I/O bound once, decoding replayed as a CUDA graph.

Everything lives in one pool: KV pages, inputs, logits, and the working memory that both execution contexts share. A
decode step is captured with all of it: embedding, layers, head, the draw, and feeding the token back. A graph of
`burst` steps is one call; the host reads their tokens after it and does nothing for a token in between.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge.bundle import Bundle
from edge.cuda import DeviceArray, Graph, Kernels, Pool, Stream, pinned
from edge.errors import EdgeError
from edge.executor import DrawParams, StepBatch, StepResult
from edge.executors.staging import Layout, Staging, layout_bytes
from edge.executors.tensorrt_engine import BoundContext, LoadedEngine
from edge.kv_cache import pool_layout
from plugins.launch import Launch
from plugins.sampling.launch import advance, sample

BURST = 16  # decode steps between two looks of the host
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_HELD_AS = {"float16": np.uint16, "bfloat16": np.uint16, "int8": np.int8, "float32": np.float32}  # pools, by type
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """What the buffers are made for: tokens of a step, sequences, rows of logits, pages of a sequence and in all."""

    tokens: int
    sequences: int
    rows: int
    table_width: int
    pages: int


class TensorRTExecutor:
    """See edge/executor.py for the step and `decode`; a step of more rows than the buffers have is run in parts."""

    burst = BURST

    def __init__(self, bundle: Bundle, engine: LoadedEngine, kernels: Kernels, sizes: Sizes) -> None:
        self.num_pages = sizes.pages
        self._engine, self._kernels, self._sizes = engine, kernels, sizes
        self._vocabulary = bundle.config.vocab_size
        self._kv_type = bundle.manifest.types["kv"]
        self._stream = Stream()
        self._pool = Pool(pool_bytes(bundle, engine, sizes))
        self._staging = Staging(self._pool, _inputs(sizes, self._vocabulary))
        self._history = self._pool.take((BURST * sizes.sequences,), _INT32)
        # Pinned, so that a copy to the host is queued like all else and there is one wait for it.
        self._tokens = pinned(self._history.shape, _INT32)
        self._logits = pinned((sizes.rows, self._vocabulary), _FLOAT32)
        self._outputs = {
            "logits": self._pool.take((sizes.rows, self._vocabulary), _FLOAT32),
            "token": self._pool.take((sizes.rows,), _INT32),
        }
        self._kv = {
            f"{name}.{layer}": self._pool.take((sizes.pages, *page.shape), _HELD_AS[page.dtype])
            for layer in range(bundle.config.num_hidden_layers)
            for name, page in pool_layout(bundle.config, bundle.manifest.types).items()
        }
        working = self._pool.take((engine.working_bytes,), np.uint8)
        self._prefill, self._decode = (self._bind(profile, working) for profile in ("prefill", "decode"))
        # By sequences, the way to draw, and steps; None: this one cannot be captured.
        self._graphs: dict[tuple[int, str, int], Graph | None] = {}
        self._settled: set[tuple[int, str]] = set()

    def _bind(self, profile: str, working: DeviceArray) -> BoundContext:
        """Every input and output at the place where it will be for good; a pool is both."""
        context = self._engine.open_context(profile, working, self._stream)
        for name, array in (self._staging.device | self._outputs).items():
            context.bind(name, array)
        for name, array in self._kv.items():
            pool, _, layer = name.rpartition(".")
            context.bind(name, array)
            context.bind(f"{pool}_out.{layer}", array)
            context.set_shape(name, array.shape)
        return context

    def step(self, batch: StepBatch) -> StepResult:
        """Run one ragged step; see edge/executor.py."""
        is_decode = len(batch.input_ids) == len(batch.page_table) == len(batch.logits_rows)
        context = self._decode if is_decode else self._prefill
        parts, most = [], self._sizes.rows
        for first in range(0, len(batch.logits_rows), most):
            # Running it again for further rows writes the same keys and values to the same places.
            part = replace(batch, logits_rows=batch.logits_rows[first : first + most])
            self._stage(context, part)
            self._staging.upload(self._stream)
            context.run(self._stream)
            logits = self._logits[: len(part.logits_rows)]
            self._stream.download(logits, self._outputs["logits"].rows(len(logits)))
            self._stream.synchronize()
            parts.append(logits.copy())  # the next step overwrites it
        return StepResult(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def decode(self, batch: StepBatch, params: DrawParams, count: int) -> np.ndarray:
        """Run `count` decode steps on the device; see edge/executor.py."""
        sequences, way = len(batch.page_table), self._way(params)
        if not 0 < count <= BURST:
            raise ValueError(f"a burst of {count} steps; 1 to {BURST} are possible")
        self._stage(self._decode, batch)
        self._stage_params(params)
        self._staging.upload(self._stream)
        done = 0
        if (sequences, way) not in self._settled:
            # TensorRT settles a new shape in a call of its own, which cannot be captured; it is the first step.
            self._queue_step(sequences, way)
            self._settled.add((sequences, way))
            done = 1
        while done < count:
            steps = BURST if count - done == BURST else 1
            self._replay(sequences, way, steps)
            done += steps
        drawn = count * sequences  # `history` has a line for each step, of as many sequences as there are
        self._stream.download(self._tokens[:drawn], self._history.rows(drawn))
        self._stream.synchronize()
        return self._tokens[:drawn].reshape(count, sequences).copy()

    def _replay(self, sequences: int, way: str, steps: int) -> None:
        """Queue decode steps as one graph, or one by one where they cannot be captured."""
        key = (sequences, way, steps)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        if (graph := self._graphs[key]) is not None:
            graph.launch(self._stream)
            return
        for _ in range(steps):
            self._queue_step(sequences, way)

    def _way(self, params: DrawParams) -> str:
        """How tokens are drawn: which kernels a decode step ends in."""
        if params.seen is not None:
            return "penalised"
        is_greedy = self._decode.has("token") and not params.temperature.any()
        return "greedy" if is_greedy else "sampled"

    def _queue_step(self, sequences: int, way: str) -> None:
        """One decode step, from the ids on the device to those of the next."""
        self._decode.run(self._stream)
        if way != "greedy":  # the head has found the largest logit by itself
            self._launch(sample(sequences, self._vocabulary, penalised=way == "penalised"))
        self._launch(advance(sequences, BURST))

    def _launch(self, launch: Launch) -> None:
        buffers = {**self._staging.device, **self._outputs, "history": self._history}
        addresses = {name: buffers[name].address for _, name in launch.pointers()}
        self._kernels.launch(launch, launch.pack(addresses), int(self._stream.handle))

    def _capture(self, sequences: int, way: str, steps: int) -> Graph | None:
        try:
            with self._stream.capture() as graphs:
                for _ in range(steps):
                    self._queue_step(sequences, way)
            return graphs[0]
        except EdgeError as error:
            log.warning("decoding %d sequences without a CUDA graph, which costs time: %s", sequences, error)
            return None

    def _stage(self, context: BoundContext, batch: StepBatch) -> None:
        """Write a step's inputs to the pinned buffer and tell the context their shapes."""
        width, sequences = self._sizes.table_width, len(batch.page_table)
        table = np.zeros((sequences, width), np.int32)
        table[:, : batch.page_table.shape[1]] = batch.page_table
        for name in ("input_ids", "positions", "query_start", "logits_rows", "switch_length"):
            values = getattr(batch, name)
            self._staging.put(name, values)
            context.set_shape(name, values.shape)
        self._staging.put("page_table", table)
        context.set_shape("page_table", table.shape)

    def _stage_params(self, params: DrawParams) -> None:
        self._staging.host["count"][:] = 0
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "step", "penalty", "seen"):
            if (values := getattr(params, name)) is not None:
                self._staging.put(name, values)

    def describe(self) -> dict[str, str]:
        """TensorRT, device, KV type and how decoding runs, for reports."""
        uncaptured = any(graph is None for graph in self._graphs.values())
        return {
            "executor": f"{self._engine.tensorrt} on {self._kernels.device.name}",
            "kernels": f"plugins, {self._kernels.device.architecture}",
            "decode": "stream, not captured" if uncaptured else f"CUDA graph, host reads every {BURST} tokens",
            "kv": self._kv_type,
        }


def _inputs(sizes: Sizes, vocabulary: int) -> Layout:
    """What the host writes: a step's inputs, the parameters of the draw, and `count`, which a burst starts from 0."""
    sequences = (sizes.sequences,)
    integers: dict[str, tuple[int, ...]] = {
        "input_ids": (sizes.tokens,),
        "positions": (sizes.tokens,),
        "query_start": (sizes.sequences + 1,),
        "logits_rows": (sizes.rows,),
        "switch_length": sequences,
        "page_table": (sizes.sequences, sizes.table_width),
        "top_k": sequences,
        "step": sequences,
        "count": sequences,
    }
    reals = dict.fromkeys(("temperature", "top_p", "min_p", "penalty"), sequences)
    return {
        **{name: (shape, _INT32) for name, shape in integers.items()},
        **{name: (shape, _FLOAT32) for name, shape in reals.items()},
        "seed": (sequences, np.dtype(np.uint64)),
        "seen": ((sizes.sequences, -(-vocabulary // 32)), np.dtype(np.uint32)),
    }


def pool_bytes(bundle: Bundle, engine: LoadedEngine, sizes: Sizes) -> int:
    """Size of the executor's pool, to the byte: what it takes, in its order."""
    config = bundle.config
    pages = [sizes.pages * page.nbytes for page in pool_layout(config, bundle.manifest.types).values()]
    parts: Sequence[int] = [
        layout_bytes(_inputs(sizes, config.vocab_size)),
        4 * BURST * sizes.sequences,
        4 * sizes.rows * config.vocab_size,
        4 * sizes.rows,
        *pages * config.num_hidden_layers,
        engine.working_bytes,
    ]
    return Pool.bytes_for(parts)
