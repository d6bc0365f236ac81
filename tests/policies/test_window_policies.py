"""sliding-window and streaming-llm read by position."""

from __future__ import annotations

import numpy as np
import pytest
from policy_cases import Array, Block, denoise, make_block, rows_read

from sparse_dlm_attn import Context


def pages_with(block: Block, wanted: set[int], segment_of_interest: bool, sequence: int) -> Array:
    """Walk through the tokens one by one; mark pages that hold a wanted position."""
    c = block.context
    marked = np.zeros(c.pages, bool)
    position = 0
    for page in range(c.pages):
        if (c.page_segments[sequence, page] == 2) != segment_of_interest:
            continue
        for _ in range(c.page_lengths[sequence, page]):
            marked[page] |= position in wanted
            position += 1
    return marked


def tokens_before(block: Block, sequence: int) -> int:
    c = block.context
    return int(c.page_lengths[sequence][c.page_segments[sequence] != 2].sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("policy", "sinks", "window", "after"),
    [("sliding-window:window=1", 0, 1, 0), ("sliding-window:window=6", 0, 6, 0),
     ("sliding-window:window=5,after=3", 0, 5, 3), ("streaming-llm:sinks=1,window=3", 1, 3, 0),
     ("streaming-llm:sinks=5,window=4,after=1", 5, 4, 1), ("streaming-llm:sinks=0,window=9", 0, 9, 0)],
)
def test_exactly_the_pages_with_a_token_in_reach_are_read(
    policy: str, sinks: int, window: int, after: int, seed: int
) -> None:
    block = make_block(seed)
    for _, memory in denoise(policy, block):
        for sequence in range(2):
            total = tokens_before(block, sequence)
            wanted = set(range(sinks)) | set(range(max(total - window, 0), total))
            expected = pages_with(block, wanted, False, sequence)
            expected |= pages_with(block, set(range(after)), True, sequence)
            read = rows_read(memory, 4, 6)[sequence]
            np.testing.assert_array_equal(read, np.broadcast_to(expected, read.shape))


def test_a_worked_example() -> None:
    cache = np.ones((1, 1, 32, 8), np.float32)
    context = Context.from_dense(cache, cache, page_size=8, lengths=[27])  # pages of 8, 8, 8 and 3
    block = make_block(0, batch=1, q_heads=1, kv_heads=1)
    block = Block(block.q, block.k, block.v, context, block.newly)
    # Of the last 12 tokens, 15 to 26, the first lies in page 1; of 4 sinks all lie in page 0.
    for policy, expected in (("sliding-window:window=12", [0, 1, 1, 1]),
                             ("sliding-window:window=11", [0, 0, 1, 1]),
                             ("sliding-window:window=3", [0, 0, 0, 1]),
                             ("streaming-llm:sinks=4,window=3", [1, 0, 0, 1]),
                             ("streaming-llm:sinks=9,window=3", [1, 1, 0, 1])):
        _, memory = next(denoise(policy, block))
        np.testing.assert_array_equal(memory.selection.mask[0, 0, 0], np.array(expected, bool))


@pytest.mark.clause("POLICY-6")
@pytest.mark.parametrize("page_size", [1, 4])
def test_a_window_reads_at_most_one_page_less_a_token_too_much(page_size: int) -> None:
    block = make_block(3, page_size=page_size, pages=20, segments=False)
    for window in (1, 3, 8):
        _, memory = next(denoise(f"sliding-window:window={window}", block))
        read = np.asarray(memory.traffic.tokens_read) / 2  # two KV heads
        total = block.context.page_lengths.sum(axis=1)
        assert (read >= np.minimum(window, total)).all()
        assert (read <= window + page_size - 1).all()
