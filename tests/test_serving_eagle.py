"""Requests at once, each with the trees of one draft model, whose pages they share."""

from __future__ import annotations

from pathlib import Path

from build_engine.formats import WeightFormat
from edge.engine import open_engine
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.serving.batcher import Batcher, BatchLimits
from edge.serving.request import Request
from tests.ledger_run import paced
from tests.synthetic import tiny_config
from tests.test_serving import SPARSE, Reader, drive, prompt_ids, submit
from tests.test_speculation import Eager, export


def test_drafts_of_several_requests_change_nothing(tmp_path: Path) -> None:
    """The first four fit at once and begin alike; the draft is random, so next to nothing is accepted."""
    config = tiny_config(tie_word_embeddings=False, sparse=SPARSE)
    path = export(tmp_path, config, WeightFormat("exact"))
    single = open_engine(path, EngineOptions(context=320, chunk=64, threads=2, prefix_cache=False))
    options = EngineOptions(context=320, chunk=64, threads=2, sequences=4, speculative="eagle", logits_rows=48)
    engine = open_engine(path, options)
    assert engine.speculation is not None
    engine.speculation = paced(engine.speculation, Eager())
    batcher = Batcher(engine, BatchLimits(sequences=4))
    lengths = ((100, 0), (150, 0), (30, 1), (210, 0), (64, 2))
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    readers: list[Reader] = [submit(batcher, Request(prompt_ids(*one), params)) for one in lengths]
    drive(batcher, readers)
    for reader in readers:
        wanted = [event.token_id for event in single.generate(reader.ticket.request.prompt_ids, params)]
        assert reader.tokens == wanted
        speculated = reader.ticket.statistics.speculated
        assert speculated is not None and speculated.steps > 20 and speculated.proposed > 60
    assert engine.cache.free_pages == engine.cache.num_pages
