"""The device executor: a TensorRT engine with our plugins, its I/O bound once, decoding replayed as a CUDA graph.

Everything lives in one pool: KV pages, inputs, logits, and the working memory that all execution contexts share. A
decode step is captured with all of it: embedding, layers, head, the draw, and feeding the token back. A graph of
`burst` steps is one call; the host reads their tokens after it and does nothing for a token in between. With KV pages
on the host (offload.py) nothing is captured: every layer asks the host for the pages that it chose.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace

import numpy as np

from edge.bundle import Bundle
from edge.cuda import CudaError, DeviceArray, Graph, Kernels, Pool, Stream, pinned
from edge.errors import EdgeError
from edge.executor import DrawParams, StepBatch, StepResult
from edge.executors.kept_tokens import ends_window, keep_launches, kept_shape
from edge.executors.offload import DeviceOffload
from edge.executors.staging import Staging
from edge.executors.tensorrt_engine import BoundContext, LoadedEngine
from edge.executors.tensorrt_sizes import BURST, Sizes, input_layout, offload_sizes, pages_of, pool_bytes
from edge.interrupts import deferred_interrupts
from edge.kv_cache import COMPRESSED_POOLS, pool_layout
from plugins import PAGE_TOKENS
from plugins.launch import Launch
from plugins.paged_attention import NO_TREE
from plugins.plugin import PackedLaunch
from plugins.sampling.launch import advance, sample

_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_HELD_AS = {"float16": np.uint16, "bfloat16": np.uint16, "int8": np.int8, "float32": np.float32}  # pools, by type
log = logging.getLogger(__name__)


class TensorRTExecutor:
    """See edge/executor.py for the step and `decode`; a step of more rows than the buffers have is run in parts."""

    burst = BURST

    def __init__(self, bundle: Bundle, engine: LoadedEngine, kernels: Kernels, sizes: Sizes) -> None:
        self.num_pages = sizes.pages
        self._engine, self._kernels, self._sizes = engine, kernels, sizes
        self._bundle, self._vocabulary = bundle, bundle.config.vocab_size
        self._kv_type = bundle.manifest.types["kv"]
        self._stream = Stream()
        self._pool = Pool(pool_bytes(bundle, engine, sizes))
        self._staging = Staging(self._pool, input_layout(sizes, self._vocabulary))
        self._history = self._pool.take((BURST * sizes.sequences,), _INT32)
        # Pinned, so that a copy to the host is queued like all else and there is one wait for it.
        self._tokens = pinned(self._history.shape, _INT32)
        self._logits = pinned((sizes.most_rows, self._vocabulary), _FLOAT32)
        self._outputs = {
            "logits": self._pool.take((sizes.most_rows, self._vocabulary), _FLOAT32),
            "token": self._pool.take((sizes.most_rows,), _INT32),
        }
        self._kv = {
            f"{name}.{layer}": self._pool.take((pages_of(name, sizes), *page.shape), _HELD_AS[page.dtype])
            for layer in range(bundle.config.num_hidden_layers)
            for name, page in pool_layout(bundle.config, bundle.manifest.types).items()
        }
        self.offload = self._open_offload(bundle)
        working = self._pool.take((engine.working_bytes,), np.uint8)
        self._prefill, self._decode = (self._bind(profile, working) for profile in ("prefill", "decode"))
        self._verify = self._bind("verify", working) if sizes.verify else None
        # A decode step has no tree: its tokens' places are their positions, and advance with them.
        self._decode.bind("slots", self._staging.device["positions"])
        # By sequences, the way to draw, and steps; None: this one cannot be captured.
        self._graphs: dict[tuple[int, str, int], Graph | None] = {}
        self._settled: set[tuple[int, str]] = set()

    def _open_offload(self, bundle: Bundle) -> DeviceOffload | None:
        """None if all pages are on the device."""
        config, sizes, sparse = bundle.config, self._sizes, bundle.config.sparse
        if sizes.slots is None or sparse is None:
            return None
        names = [name for name in pool_layout(config, bundle.manifest.types) if name not in COMPRESSED_POOLS]
        pools = [[self._kv[f"{name}.{layer}"] for name in names] for layer in range(config.num_hidden_layers)]
        most = offload_sizes(config, sparse, sizes)
        offload = DeviceOffload(self._pool, pools, sizes.pages, sparse, config.num_key_value_heads, most)
        self._engine.host.offload = offload
        return offload

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

    @contextmanager
    def _as_a_whole(self) -> Generator[None, None, None]:
        """Done or failed, nothing is queued afterwards: it would read the inputs of the next step."""
        with deferred_interrupts():
            try:
                yield
            except BaseException:
                with suppress(CudaError):  # what failed is the better reason
                    self._stream.synchronize()
                raise

    def step(self, batch: StepBatch) -> StepResult:
        """Run one ragged step; see edge/executor.py."""
        with self._as_a_whole():
            return self._step(batch)

    def _step(self, batch: StepBatch) -> StepResult:
        context, most = self._context_of(batch)
        parts = []
        for first in range(0, len(batch.logits_rows), most):
            # Running it again for further rows writes the same keys and values to the same places.
            part = replace(batch, logits_rows=batch.logits_rows[first : first + most])
            table = self._stage(context, part)
            if self.offload is not None:
                places = part.positions if part.tree is None else part.tree.slots
                self.offload.begin(places, part.query_start, table, trees=part.tree is not None)
            self._staging.upload(self._stream)
            context.run(self._stream)
            logits = self._logits[: len(part.logits_rows)]
            self._stream.download(logits, self._outputs["logits"].rows(len(logits)))
            self._stream.synchronize()
            parts.append(logits.copy())  # the next step overwrites it
        return StepResult(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _context_of(self, batch: StepBatch) -> tuple[BoundContext, int]:
        """The context for a step, and how many rows of logits it gives."""
        tokens, rows, sizes = len(batch.input_ids), len(batch.logits_rows), self._sizes
        if batch.tree is None and tokens == len(batch.page_table) == rows:
            return self._decode, sizes.rows
        if self._verify is not None and rows > sizes.rows and tokens <= sizes.verified:
            return self._verify, sizes.verified
        return self._prefill, sizes.rows

    def decode(self, batch: StepBatch, params: DrawParams, count: int) -> np.ndarray:
        """Run `count` decode steps on the device; see edge/executor.py."""
        way = self._way(params)
        if not 0 < count <= BURST:
            raise ValueError(f"a burst of {count} steps; 1 to {BURST} are possible")
        with self._as_a_whole():
            return self._burst(batch, params, count, way)

    def _burst(self, batch: StepBatch, params: DrawParams, count: int, way: str) -> np.ndarray:
        sequences = len(batch.page_table)
        table = self._stage(self._decode, batch)
        self._stage_params(params)
        self._staging.upload(self._stream)
        if self.offload is None:
            self._replay_burst(sequences, way, count)
        else:
            for i in range(count):  # one by one: between choosing pages and attending the host brings them
                self.offload.begin(batch.positions + np.int32(i), batch.query_start, table, trees=False)
                self._queue_step(sequences, way)
        drawn = count * sequences  # `history` has a line for each step, of as many sequences as there are
        self._stream.download(self._tokens[:drawn], self._history.rows(drawn))
        self._stream.synchronize()
        return self._tokens[:drawn].reshape(count, sequences).copy()

    def _replay_burst(self, sequences: int, way: str, count: int) -> None:
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

    def _stage(self, context: BoundContext, batch: StepBatch) -> np.ndarray:
        """Write a step's inputs to the pinned buffer and tell the context their shapes. -> its page table."""
        width, sequences = self._sizes.table_width, len(batch.page_table)
        table = np.zeros((sequences, width), np.int32)
        table[:, : batch.page_table.shape[1]] = batch.page_table
        for name, values in (batch.inputs() | {"page_table": table}).items():
            self._staging.put(name, values)
            context.set_shape(name, values.shape)
        return table

    def _stage_params(self, params: DrawParams) -> None:
        self._staging.host["count"][:] = 0
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "step", "penalty", "seen"):
            if (values := getattr(params, name)) is not None:
                self._staging.put(name, values)

    def keep_tokens(self, pages: Sequence[int], first: int, slots: Sequence[int]) -> None:
        """Move tokens in every layer, and wait: the next step is staged in the same buffer; see edge/executor.py."""
        count, kept = len(slots), np.arange(first, first + len(slots), dtype=np.int32)
        moves = bool(np.any(kept != np.asarray(slots)))
        averages = self._bundle.config.sparse is not None and ends_window(first, count)
        if not moves and not averages:
            return
        with self._as_a_whole():
            staged = {"slots": slots, "positions": kept, "query_start": [0, count], "tree_start": [NO_TREE]}
            for name, values in (staged | {"page_table": pages}).items():
                self._staging.put(name, np.asarray(values, np.int32))
            self._staging.upload(self._stream)
            shape = kept_shape(self._bundle, count, self._sizes.table_width)
            launches = keep_launches(shape, moves, averages, self.offload is not None)
            if self.offload is not None:
                self.offload.begin(kept, np.array([0, count]), np.array([pages], np.int32), trees=True)
            changed = pages[max(first // PAGE_TOKENS - 1, 0) : slots[-1] // PAGE_TOKENS + 1]  # and the one before
            for layer in range(self._bundle.config.num_hidden_layers):
                self._keep_in(layer, launches, changed)
            self._stream.synchronize()

    def _keep_in(self, layer: int, launches: Sequence[PackedLaunch], pages: Sequence[int]) -> None:
        """Queue the launches for one layer, of which these pages must be on the device."""
        addresses = {name: array.address for name, array in self._staging.device.items()}
        for name in pool_layout(self._bundle.config, self._bundle.manifest.types):
            addresses[name] = self._kv[f"{name}.{layer}"].address
        stream = int(self._stream.handle)
        held: AbstractContextManager[None] = nullcontext()
        if self.offload is not None:
            addresses["slot_table"] = self.offload.slot_table
            held = self.offload.changing(addresses["kv_pool"], pages, stream)
        with held:
            for one in launches:
                self._kernels.launch(one.launch, one.fill(addresses), stream)

    @deferred_interrupts()
    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pool by pool, before all later steps; see edge/executor.py."""
        if self.offload is not None:
            self.offload.save([source for source, _ in pairs])
            self.offload.drop([target for _, target in pairs])
        for pool in self._kv.values():
            home = self._home(pool)
            for source, target in pairs:
                if home is None:
                    self._stream.copy(pool.row(target), pool.row(source))
                else:
                    home[target] = home[source]

    @deferred_interrupts()
    def save_pages(self, pages: Sequence[int]) -> np.ndarray:
        """The pages' bytes, pool after pool; see edge/executor.py."""
        if self.offload is not None:
            self.offload.save(pages)
        data = np.empty((len(pages), self.page_bytes), np.uint8)
        for row, page in zip(data, pages, strict=True):
            for part, pool in self._parts(row):
                if (home := self._home(pool)) is None:
                    self._stream.download(part, pool.row(page))
                else:
                    part[:] = home[page].reshape(-1).view(np.uint8)
        self._stream.synchronize()
        return data

    @deferred_interrupts()
    def load_pages(self, pages: Sequence[int], data: np.ndarray) -> None:
        """Fill pages with saved bytes; see edge/executor.py."""
        if self.offload is not None:
            self.offload.drop(pages)
        for row, page in zip(data, pages, strict=True):
            for part, pool in self._parts(row):
                if (home := self._home(pool)) is None:
                    self._stream.upload(pool.row(page), part)
                else:
                    home[page].reshape(-1).view(np.uint8)[:] = part
        self._stream.synchronize()

    def _home(self, pool: DeviceArray) -> np.ndarray | None:
        """Where the host has all pages of a pool, [pages, ...]; None if they are on the device."""
        return None if self.offload is None else self.offload.homes.get(pool.address)

    def _parts(self, row: np.ndarray) -> Iterator[tuple[np.ndarray, DeviceArray]]:
        """A saved page's bytes pool by pool."""
        start = 0
        for pool in self._kv.values():
            end = start + pool.row(0).nbytes
            yield row[start:end], pool
            start = end

    @property
    def page_bytes(self) -> int:
        """Of one page; see edge/executor.py."""
        return sum(pool.row(0).nbytes for pool in self._kv.values())

    @property
    def page_format(self) -> str:
        """KV type, and the order of the GPU kernels, one for all devices; see edge/executor.py."""
        return f"{self._kv_type}, GPU kernels"

    def memory(self) -> dict[str, int]:
        """What the driver gave, by purpose; see edge/executor.py."""
        kv = dict.fromkeys(("kv cache", "compressed keys"), 0)
        for name, array in self._kv.items():
            kv["compressed keys" if name.partition(".")[0] in COMPRESSED_POOLS else "kv cache"] += array.nbytes
        working = self._engine.working_bytes
        measured = {
            "weights": self._engine.device_bytes,
            **{name: size for name, size in kv.items() if size},
            "working memory": working,
            "inputs and logits": self._pool.size - sum(kv.values()) - working,
            "pinned buffers": self._staging.pinned_bytes + self._tokens.nbytes + self._logits.nbytes,
        }
        if self.offload is not None:
            measured["offloaded kv"] = self.offload.home_bytes
            measured["pinned buffers"] += self.offload.staging_bytes
        return measured

    def describe(self) -> dict[str, str]:
        """TensorRT, device, KV type and how decoding runs, for reports."""
        decode = f"CUDA graph, host reads every {BURST} tokens"
        if any(graph is None for graph in self._graphs.values()):
            decode = "stream, not captured"
        kv, slots = self._kv_type, self._sizes.slots
        if slots is not None:
            decode = "stream, not captured: pages come from the host"
            kv += f", {slots} of {self._sizes.pages} pages on the device"
        return {
            "executor": f"{self._engine.tensorrt} on {self._kernels.device.name}",
            "kernels": f"plugins, {self._kernels.device.architecture}",
            "decode": decode,
            "kv": kv,
            "engine": self._engine.key,
        }
