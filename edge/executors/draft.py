"""The CPU executor of a draft model: a session of its own over draft.onnx, its KV pool bound once like the base's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge.bundle import DRAFT_GRAPH, DRAFT_VOCAB, Bundle
from edge.errors import EdgeError, UsageError
from edge.executors.ort_session import GraphSession, Reserved, load_errors
from edge.executors.pools import MemoryPages
from edge.kv_cache import pool_layout
from edge.speculation.draft import DraftBatch, DraftResult


class OnnxRuntimeDraft:
    """See edge/speculation/draft.py. num_pages: of the base's pool. reserved: what the session may allocate, to the
    byte, and the rows whose results have a buffer; None leaves that to ONNX Runtime.
    """

    def __init__(self, bundle: Bundle, num_pages: int, threads: int, reserved: Reserved | None = None) -> None:
        section = bundle.manifest.draft
        if section is None:
            raise UsageError(f"{bundle.path} has no draft model; export it again with --draft FOLDER")
        layer = section.model.layer_config(bundle.config)
        self.vocab: np.ndarray | None = None
        if section.model.vocab_size is not None:
            self.vocab = _read_vocab(bundle)
        rows = 0 if reserved is None else reserved.rows
        self._logits = np.zeros((rows, layer.vocab_size), np.float32)
        self._hidden = np.zeros((rows, layer.hidden_size), np.float32)
        self._most_rows = 0  # that a step gave
        graph = bundle.file(DRAFT_GRAPH)
        with load_errors(
            graph,
            "the draft's memory cannot be had ({error}); ask for a smaller --context",
            f"the draft of {bundle.path} does not fit in its part of the plan",
        ):
            self._graph = GraphSession(graph, threads, reserved, takes_turns=True)
            self._pool = self._graph.bind_pool("kv_pool", 0, num_pages, pool_layout(layer, section.types)["kv_pool"])

    def step(self, batch: DraftBatch) -> DraftResult:
        """Run one ragged step; see edge/speculation/draft.py."""
        self._graph.bind_inputs(batch.inputs())
        rows, has_buffers = len(batch.rows), len(batch.rows) <= len(self._logits)
        self._most_rows = max(self._most_rows, rows)
        for name, buffer in (("logits", self._logits), ("hidden_out", self._hidden)):
            self._graph.bind_output(name, buffer[:rows] if has_buffers else None)
        self._graph.run(f"a draft's step of {len(batch.input_ids)} tokens", "run without the draft")
        if has_buffers:  # the next step overwrites them
            return DraftResult(self._logits[:rows].copy(), self._hidden[:rows].copy())
        return DraftResult(self._graph.output("logits"), self._graph.output("hidden_out"))

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages; see edge/speculation/draft.py."""
        sources, targets = map(list, zip(*pairs, strict=True))
        pages = MemoryPages(self._pool.values)
        pages.write(targets, pages.read(sources))

    def memory(self) -> dict[str, int]:
        """See edge/speculation/draft.py. Of regions it is the most there were."""
        results = (self._logits, self._hidden)
        copied = sum(self._most_rows * values.itemsize * values.shape[1] for values in results)
        logits = copied + sum(values.nbytes for values in results)
        measured = {"draft kv": self._pool.values.nbytes, "draft logits": logits}
        return measured | self._graph.taken("draft weights", "draft activations")


def _read_vocab(bundle: Bundle) -> np.ndarray:
    path = bundle.file(DRAFT_VOCAB)
    try:
        vocab: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise EdgeError(f"{path} cannot be read ({error}); export the bundle again") from None
    return vocab
