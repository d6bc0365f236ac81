"""sliding-window and streaming-llm read by position."""

from __future__ import annotations

import numpy as np
import pytest
from policy_cases import Block, denoise, make_block

from sparse_dlm_attn import Context


def test_a_worked_example() -> None:
    cache = np.ones((1, 1, 32, 8), np.float32)
    context = Context.from_dense(cache, cache, page_size=8, lengths=[27])  # pages of 8, 8, 8 and 3
    block = make_block(0, batch=1, q_heads=1, kv_heads=1)
    block = Block(block.q, block.k, block.v, context, block.newly)
    # Of the last 12 tokens, 15 to 26, the first lies in page 1; of 4 sinks all lie in page 0.
    for policy, expected in (
        ("sliding-window:window=12", [0, 1, 1, 1]),
        ("sliding-window:window=11", [0, 0, 1, 1]),
        ("sliding-window:window=3", [0, 0, 0, 1]),
        ("streaming-llm:sinks=4,window=3", [1, 0, 0, 1]),
        ("streaming-llm:sinks=9,window=3", [1, 1, 0, 1]),
    ):
        _, memory = next(denoise(policy, block))
        np.testing.assert_array_equal(memory.selection.mask[0, 0, 0], np.array(expected, bool))


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_window_reads_at_most_one_page_less_a_token_too_much(page_size: int) -> None:
    block = make_block(3, page_size=page_size, pages=20, segments=False)
    for window in (1, 3, 8):
        _, memory = next(denoise(f"sliding-window:window={window}", block))
        read = np.asarray(memory.traffic.tokens_read) / 2  # two KV heads
        total = block.context.page_lengths.sum(axis=1)
        assert (read >= np.minimum(window, total)).all()
        assert (read <= window + page_size - 1).all()
