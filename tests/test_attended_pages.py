"""How many pages must be on the device, against the blocks that tokens really choose."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.config import SparseConfig
from edge.memory.attended import least_slots, token_pages
from plugins.infllmv2.meaning import select_blocks
from tests.synthetic import tiny_config


def most_chosen(sparse: SparseConfig, heads: int, blocks: int) -> int:
    """The most blocks that any token's heads choose, if each likes others best."""
    scores = np.zeros((heads, 1, blocks), np.float32)
    most = 0
    for own in range(blocks):
        for head in range(heads):
            scores[head, 0] = (np.arange(blocks) - head * sparse.topk) % blocks + 1
        position = np.array([own * sparse.block_size])
        chosen = select_blocks(scores, position, sparse.init_blocks, sparse.local_blocks, sparse.selected_blocks)
        most = max(most, int(chosen.any(axis=0).sum()))
    return most


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    init=st.integers(0, 3), local=st.integers(0, 4), extra=st.integers(1, 4), heads=st.integers(1, 4), data=st.data()
)
def test_no_token_needs_more_and_some_need_as_many(
    init: int, local: int, extra: int, heads: int, data: st.DataObject
) -> None:
    sparse = SparseConfig(init_blocks=init, window_size=64 * local, topk=init + extra, dense_len=-1)
    config = tiny_config(num_attention_heads=heads, num_key_value_heads=heads, sparse=sparse)
    bound = token_pages(config, sparse, 1 << 17)
    blocks = data.draw(st.integers(1, 60))
    assert most_chosen(sparse, heads, blocks) <= bound
    assert max(most_chosen(sparse, heads, 60), 2) == bound  # 2: keys are averaged over a page's border


def test_a_dense_sequence_needs_all_of_its_pages() -> None:
    sparse = SparseConfig(topk=3, window_size=0, dense_len=1000)
    config = tiny_config(sparse=sparse)
    assert token_pages(config, sparse, 4096) == 16  # 999 tokens
    assert token_pages(config, sparse, 128) == 4  # no sequence is as long


def test_the_models_as_they_are_published() -> None:
    """MiniCPM4: 1 initial block, 32 local ones and a token's own, 62 others of each of two heads."""
    config = tiny_config(num_key_value_heads=2, sparse=SparseConfig())
    assert token_pages(config, SparseConfig(), 131072) == 34 + 2 * 62
    assert least_slots(config, SparseConfig(), 131072) == 192
