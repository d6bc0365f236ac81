"""quest against its rule, computed key by key."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from policy_cases import Block, denoise, make_block, rows_read

from sparse_dlm_attn import Context


def test_a_worked_example() -> None:
    # One head of one channel, pages of two keys: boxes [1, 2], [-5, 0], [0, 3] and, of one key, [2, 2].
    keys = np.array([1, 2, -5, 0, 0, 3, 2, -100], np.float32).reshape(1, 1, 8, 1)
    context = Context.from_dense(keys, keys, page_size=2, lengths=[7])
    q = np.array([1, -1], np.float32).reshape(1, 1, 2, 1)
    block = Block(q[None], q, q, context, np.zeros((1, 1, 2), bool))
    _, memory = next(denoise("quest:budget=2,pages=own", block))
    np.testing.assert_array_equal(rows_read(memory, 1, 2)[0, 0], [[0, 0, 1, 0], [0, 1, 0, 0]])
    _, memory = next(denoise("quest:budget=4,pages=own", block))  # 1 scores 2, 0, 3, 2: the tie to page 0
    np.testing.assert_array_equal(rows_read(memory, 1, 2)[0, 0], [[1, 0, 1, 0], [0, 1, 1, 0]])
    _, memory = next(denoise("quest:budget=2", block))
    np.testing.assert_array_equal(rows_read(memory, 1, 2)[0, 0], [[0, 1, 1, 0]] * 2)
    assert float(memory.traffic.density[0]) == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("parameters", "pages"),
    [
        ("budget=7", 1),
        ("budget=8", 2),
        ("budget=7,page_count=ceil", 2),
        ("budget=3", 1),
        ("budget=3,min_pages=3", 3),
        ("budget=9,min_pages=99", 99),
        ("budget=9,newest=true", 2),
    ],
)
def test_a_row_reads_as_many_pages_as_its_budget_buys(parameters: str, pages: int) -> None:
    block = make_block(22)
    for _, memory in denoise(f"quest:pages=own,{parameters}", block):
        existing = (block.context.page_lengths > 0).sum(axis=1)
        read = rows_read(memory, 4, 6).sum(axis=-1)
        np.testing.assert_array_equal(read, np.minimum(pages, existing)[:, None, None] * np.ones_like(read))


def test_a_context_that_fits_into_the_budget_is_read_to_its_last_partial_page() -> None:
    cache = make_block(0, batch=1, page_size=8, pages=4).context.k_pages[:4].transpose(1, 0, 2, 3)
    cache = cache.reshape(1, 2, 32, 8)
    block = make_block(0, batch=1)
    for length, read in ((26, 4), (27, 4), (28, 3)):  # 27 / 8 alone would buy 3 pages of 4
        context = Context.from_dense(cache, cache, page_size=8, lengths=[length])
        _, memory = next(denoise("quest:budget=27,pages=own", replace(block, context=context)))
        assert (rows_read(memory, 4, 6).sum(axis=-1) == read).all()


def test_without_a_page_before_the_block_the_whole_budget_goes_to_the_best_pages() -> None:
    block = make_block(24)
    suffix = np.full_like(block.context.page_segments, 2)
    block = replace(block, context=replace(block.context, page_segments=suffix))
    forced, free = (
        rows_read(next(denoise(f"quest:budget=8,pages=own,newest={newest}", block))[1], 4, 6)
        for newest in ("true", "false")
    )
    assert (forced == free).all() and (forced.sum(axis=-1) == 2).all()
