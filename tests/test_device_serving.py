"""Several requests at once on the emulated device: bursts, prompts between them, and pages that are shared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from build_engine.selftest_model import CONFIG, selftest_checkpoint
from edge.bundle import Bundle
from edge.errors import EdgeError
from edge.sampler import SamplingParams
from edge.serving.batcher import Batcher, BatchLimits
from edge.serving.request import Request
from tests.device_engine import OPTIONS, device_bundle, kernels_of, open_on_device
from tests.emulated import emulated_gpu
from tests.test_tensorrt_executor import prompt


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return device_bundle(selftest_checkpoint(), tmp_path_factory.mktemp("serving") / "bundle")


def test_a_batch_on_the_device_gives_the_tokens_of_single_requests(bundle: Bundle) -> None:
    """One joins while others decode; the engine was built for four, so of eight wanted only four run at once."""
    with emulated_gpu("sm_86", kernels_of(CONFIG)):
        engine = open_on_device(bundle, replace(OPTIONS, sequences=8))
        assert engine.plan.run.sequences == 4 and engine.plan.num_pages == 4 * 512 // 64
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        requests = [
            Request(tuple(prompt(30, 1)), params),
            Request(tuple(prompt(45, 2)), replace(params, temperature=0.8, seed=3, max_tokens=9)),
            Request(tuple(prompt(70, 3)), replace(params, max_tokens=6)),
        ]
        batcher = Batcher(engine, BatchLimits(sequences=8))
        tickets = [batcher.ticket(request) for request in requests]
        for ticket in tickets[:2]:
            batcher.add(ticket)
        for number in range(40):
            batcher.step()
            if number == 1:
                batcher.add(tickets[2])
        for ticket in tickets:
            found = [event.token_id for output in ticket.outbox.take() for event in output.tokens]
            alone = [event.token_id for event in engine.generate(ticket.request.prompt_ids, ticket.request.params)]
            assert found == alone
        assert engine.cache.free_pages == engine.cache.num_pages
        with pytest.raises(EdgeError, match="limited to 512"):
            batcher.check(Request(tuple(prompt(500)), params))
