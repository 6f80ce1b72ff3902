"""What TensorRT is given: the shapes of its profiles and the numbers of the float16 graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_engine.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.graph import GraphTypes, graph_inputs
from build_engine.quantize import quantize_symmetric
from build_engine.tensorrt import BuildOptions, build_profiles
from edge.config import LongRope
from edge.executor import StepBatch
from edge.kv_cache import KVCache, pages_for
from edge.scheduler import Scheduler, Sequence
from tests.graph_steps import ragged_steps, run_steps
from tests.synthetic import write_hf_checkpoint
from tests.tensorrt_samples import CONFIG, FORMATS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_hf_checkpoint(tmp_path_factory.mktemp("hf") / "tiny", CONFIG))


# Profiles


@given(
    max_context=st.integers(1, 9000),
    chunk=st.integers(1, 600),
    batch=st.integers(1, 9),
    prompts=st.lists(st.integers(1, 9000), min_size=1, max_size=9),
    all_logits=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_profiles_hold_every_step_of_the_scheduler(
    max_context: int, chunk: int, batch: int, prompts: list[int], all_logits: bool
) -> None:
    config = replace(CONFIG, max_position_embeddings=9000)
    prefill, decode = build_profiles(config, BuildOptions("rtx", max_context, chunk, batch))
    cache = KVCache(pages_for(max_context) * batch)
    scheduler = Scheduler(cache, min(chunk, max_context))

    def check(profile_shapes: dict[str, tuple], step: StepBatch) -> None:
        for name in ("input_ids", "positions", "query_start", "page_table", "logits_rows", "switch_length"):
            least, typical, most = profile_shapes[name]
            shape = getattr(step, name).shape
            if name == "logits_rows":
                shape = (min(*shape, batch),)  # the executor runs a step of more rows in parts
            assert len(least) == len(typical) == len(most) == len(shape)
            assert all(a <= size <= c for a, size, c in zip(least, shape, most, strict=True)), name
            assert all(a <= b <= c for a, b, c in zip(least, typical, most, strict=True)), name

    sequences = []
    for length in prompts[:batch]:
        length = min(length, max_context - 1) or 1
        wanted = 0 if all_logits else None
        sequences.append(Sequence(cache.open(), [1] * length, prompt_length=length, logits_from=wanted))
    # Prompts of all sequences together, those that are done decoding beside the rest.
    for _ in range(1 + sum(s.pending for s in sequences)):
        for sequence in sequences:
            if not sequence.pending and len(sequence.tokens) < max_context:
                sequence.tokens.append(1)
        step = scheduler.next_step(sequences)
        if step is None:
            break
        check(prefill.shapes, step.batch)
        if all(count == 1 for count in step.counts):
            check(decode.shapes, step.batch)
        for sequence, count in zip(step.sequences, step.counts, strict=True):
            sequence.computed += count


@pytest.mark.parametrize("rope", [None, CONFIG.long_rope], ids=["one rope", "two ropes"])
def test_profiles_name_exactly_the_inputs_of_the_graph(rope: LongRope | None) -> None:
    config = replace(CONFIG, long_rope=rope)
    for profile in build_profiles(config, BuildOptions(chunk=32, batch=4)):
        inputs = {value.name: value.type.tensor_type.shape.dim for value in graph_inputs(config, GraphTypes())}
        assert profile.shapes.keys() == inputs.keys()
        for name, dims in inputs.items():
            for shape in profile.shapes[name]:
                assert len(shape) == len(dims)
                fixed = [(dim.dim_value, size) for dim, size in zip(dims, shape, strict=True) if dim.dim_value]
                assert all(wanted == size for wanted, size in fixed)


def test_profile_bounds_of_the_default_options_on_minicpm4() -> None:
    prefill, decode = build_profiles(replace(CONFIG, max_position_embeddings=32768), BuildOptions())
    assert prefill.shapes["input_ids"] == ((1,), (512,), (520,))
    assert prefill.shapes["page_table"] == ((1, 1), (1, 64), (8, 512))
    assert decode.shapes["query_start"] == ((2,), (2,), (9,))
    assert decode.shapes["page_table"] == ((1, 1), (1, 64), (8, 512))
    for profile in (prefill, decode):
        most = (2**31 - 1) // (2 * 2 * 64 * 16)  # pages of a tensor, whatever context and batch are
        assert profile.shapes["kv_pool.0"] == ((1, 2, 2, 64, 16), (64, 2, 2, 64, 16), (most, 2, 2, 64, 16))


# The numbers of the graph


def rounded_to_int4(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint whose projections are the values that int4 codes and float16 scales stand for."""
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        values = tensor.read(slice(None)).astype(np.float32)
        if "_proj" in name:
            rows = quantize_symmetric(values, 32, bits=4)
            scales = rows.scales.astype(np.float16).astype(np.float32)
            values = ((rows.codes.astype(np.float32) - 8) * scales[..., None]).reshape(values.shape)
        tensors[name] = LazyTensor(name, tensor.shape, values.dtype, "F32", values.__getitem__)
    return replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("weights", FORMATS)
def test_the_float16_graph_computes_what_the_float32_graph_does(
    checkpoint: Checkpoint, tmp_path: Path, weights: str
) -> None:
    lowered = export_bundle(checkpoint, tmp_path / "rtx", ExportOptions("rtx", FORMATS[weights]))
    same = checkpoint if weights == "exact" else rounded_to_int4(checkpoint)
    reference = export_bundle(same, tmp_path / "cpu", ExportOptions("onnxruntime", FORMATS["exact"]))
    steps, num_pages = ragged_steps(CONFIG.vocab_size, (100, 30))  # one on each side of the LongRoPE switch
    assert len(steps) == 5
    results = zip(run_steps(lowered, steps, num_pages), run_steps(reference, steps, num_pages), strict=True)
    for half, single in results:
        assert half.keys() == single.keys() == {"logits"}
        assert half["logits"].dtype == single["logits"].dtype == np.float32
        assert single["logits"].std() > 1
        # a few roundings of a float16 logit near 2
        assert np.abs(half["logits"] - single["logits"]).max() < 5e-3
