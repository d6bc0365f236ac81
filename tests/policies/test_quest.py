"""quest against its rule, computed key by key."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from policy_cases import Array, Block, denoise, inputs_for, make_block, rows_read

from sparse_dlm_attn import Context, get_policy


def box_scores(block: Block, index: int, sequence: int) -> Array:
    """Return the largest q.x over the corners of each page's box, ``(q_heads, tokens, pages)``.

    The maximum over a box is taken at a corner; with 2 channels there are 4 of them.
    """
    c = block.context
    q = block.q[index][sequence].astype(float)
    scores = np.full((*q.shape[:2], c.pages), -np.inf)
    for page, length in enumerate(c.page_lengths[sequence]):
        for h in range(q.shape[0]):
            keys = c.k_pages[c.page_table[sequence, page], h * c.kv_heads // q.shape[0], :length]
            if length:
                sides = [(column.min(), column.max()) for column in keys.T]
                corners = np.array(list(product(*sides)), float)
                scores[h, :, page] = (q[h] @ corners.T).max(axis=1)
    return scores


def best(scores: Array, count: int) -> Array:
    """Mark the best pages that exist, the lowest first among equals."""
    mask = np.zeros(scores.shape, bool)
    for position in np.ndindex(scores.shape[:-1]):
        ranked = sorted(range(scores.shape[-1]), key=lambda page, at=position: (-scores[at][page], page))
        for page in [page for page in ranked if np.isfinite(scores[position][page])][:count]:
            mask[position][page] = True
    return mask


def expected_pages(
    block: Block, index: int, count: int, group_scores: str, pages: str, union_over: str
) -> Array:
    """Return what rows read under the given parameters, ``(batch, q_heads, tokens, pages)``."""
    read = []
    for sequence in range(2):
        scores = box_scores(block, index, sequence)
        heads, tokens, width = scores.shape
        grouped = scores.reshape(2, heads // 2, tokens, width)
        if group_scores == "mean":
            scores = np.repeat(grouped.mean(axis=1), heads // 2, axis=0)
        elif group_scores == "max":
            scores = np.repeat(grouped.max(axis=1), heads // 2, axis=0)
        own = best(scores, count)
        if pages == "union":
            rows = own.any(axis=1, keepdims=True)
            if union_over == "layer":
                rows = rows.any(axis=0, keepdims=True)
            elif union_over == "kv_head":
                rows = np.repeat(rows.reshape(2, heads // 2, 1, width).any(axis=1), heads // 2, axis=0)
            own = np.broadcast_to(rows, own.shape)
        read.append(own)
    return np.stack(read)


@pytest.mark.parametrize("group_scores", ["query_head", "mean", "max"])
@pytest.mark.parametrize(
    ("pages", "union_over"),
    [("own", "kv_head"), ("union", "kv_head"), ("union", "query_head"), ("union", "layer")],
)
@pytest.mark.clause("SCORES-1", "TOP-1", "TOP-2", "GQA-2", "POLICY-1")
def test_every_row_reads_what_the_rule_says(group_scores: str, pages: str, union_over: str) -> None:
    block = make_block(21, head_dim=2, tokens=3, pages=12, segments=False)
    policy = f"quest:budget=11,group_scores={group_scores},pages={pages},union_over={union_over}"
    for index, (_, memory) in enumerate(denoise(policy, block)):
        expected = expected_pages(block, index, 2, group_scores, pages, union_over)  # floor(11 / 4)
        np.testing.assert_array_equal(rows_read(memory, 4, 3), expected)


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


@pytest.mark.clause("POLICY-6")
@pytest.mark.parametrize(
    ("parameters", "pages"),
    [("budget=7", 1), ("budget=8", 2), ("budget=7,page_count=ceil", 2), ("budget=3", 1),
     ("budget=3,min_pages=3", 3), ("budget=9,min_pages=99", 99), ("budget=9,newest=true", 2)],
)
def test_a_row_reads_as_many_pages_as_its_budget_buys(parameters: str, pages: int) -> None:
    block = make_block(22)
    for _, memory in denoise(f"quest:pages=own,{parameters}", block):
        existing = (block.context.page_lengths > 0).sum(axis=1)
        read = rows_read(memory, 4, 6).sum(axis=-1)
        np.testing.assert_array_equal(read, np.minimum(pages, existing)[:, None, None] * np.ones_like(read))


@pytest.mark.clause("POLICY-6")
def test_a_context_that_fits_into_the_budget_is_read_to_its_last_partial_page() -> None:
    cache = make_block(0, batch=1, page_size=8, pages=4).context.k_pages[:4].transpose(1, 0, 2, 3)
    cache = cache.reshape(1, 2, 32, 8)
    block = make_block(0, batch=1)
    for length, read in ((26, 4), (27, 4), (28, 3)):  # 27 / 8 alone would buy 3 pages of 4
        context = Context.from_dense(cache, cache, page_size=8, lengths=[length])
        _, memory = next(denoise("quest:budget=27,pages=own", replace(block, context=context)))
        assert (rows_read(memory, 4, 6).sum(axis=-1) == read).all()


@pytest.mark.parametrize("page_size", [1, 4, 8])
@pytest.mark.clause("POLICY-6")
def test_with_floor_no_row_reads_more_tokens_than_its_budget(page_size: int) -> None:
    block = make_block(23, page_size=page_size, pages=12)
    for budget in (page_size, 13, 30):
        _, memory = next(denoise(f"quest:pages=own,budget={max(budget, page_size)}", block))
        tokens = (rows_read(memory, 4, 6) * block.context.page_lengths[:, None, None, :]).sum(axis=-1)
        assert tokens.max() <= max(budget, page_size)


def test_the_newest_page_is_the_last_before_the_block_and_counts_in_the_budget() -> None:
    block = make_block(24)
    c = block.context
    for sequence in range(2):
        before = np.flatnonzero((c.page_lengths[sequence] > 0) & (c.page_segments[sequence] != 2))
        _, memory = next(denoise("quest:budget=4,pages=own,newest=true", block))
        read = rows_read(memory, 4, 6)[sequence]
        assert read[..., before[-1]].all()
        assert (read.sum(axis=-1) == 1).all()


def test_without_a_page_before_the_block_the_whole_budget_goes_to_the_best_pages() -> None:
    block = make_block(24)
    suffix = np.full_like(block.context.page_segments, 2)
    block = replace(block, context=replace(block.context, page_segments=suffix))
    forced, free = (
        rows_read(next(denoise(f"quest:budget=8,pages=own,newest={newest}", block))[1], 4, 6)
        for newest in ("true", "false")
    )
    assert (forced == free).all() and (forced.sum(axis=-1) == 2).all()


def test_the_first_pass_is_dense_only_on_request_and_dense_layers_always_are() -> None:
    block = make_block(25)

    def densities(policy: str, layer: int) -> list[float]:
        return [float(memory.traffic.density[0]) for _, memory in denoise(policy, block, layer=layer)]

    assert max(densities("quest:budget=4", 1)) < 1
    dense_first = densities("quest:budget=4,first_pass=dense", 1)
    assert dense_first[0] == 1 and max(dense_first[1:]) < 1
    assert densities("quest:budget=4,dense_layers=2", 1) == [1, 1, 1, 1]
    assert max(densities("quest:budget=4,dense_layers=2", 2)) < 1


@pytest.mark.clause("ATTEND-5")
def test_reading_the_union_finds_at_least_the_mass_of_the_own_pages() -> None:
    block = make_block(26)
    own = denoise("quest:budget=4,pages=own", block)
    union = denoise("quest:budget=4", block)
    for (_, less), (_, more) in zip(own, union, strict=True):
        assert (more.state.lse >= less.state.lse - 1e-6).all()
        np.testing.assert_array_equal(less.traffic.loaded, more.traffic.loaded)  # for the same load


@pytest.mark.clause("DENSITY-1")
def test_density_counts_the_union_over_rows_and_group_for_each_kv_head() -> None:
    block = make_block(27)
    lengths = block.context.page_lengths
    for policy in ("quest:budget=4", "quest:budget=4,pages=own", "quest:budget=4,union_over=query_head"):
        _, memory = next(denoise(policy, block))
        read = rows_read(memory, 4, 6).any(axis=2)
        of_kv_heads = read[:, 0::2] | read[:, 1::2]  # group of 2: heads 0, 1 and 2, 3
        tokens = (of_kv_heads * lengths[:, None, :]).sum(axis=(1, 2))
        np.testing.assert_allclose(memory.traffic.density, tokens / (2 * lengths.sum(axis=1)), rtol=1e-6)
        assert memory.traffic.metadata_reads == 1


@pytest.mark.parametrize("policy", ["quest:budget=8", "losa:budget=8", "quest:budget=8,pages=own"])
@pytest.mark.clause("POLICY-4")
def test_the_selection_does_not_depend_on_queries_of_inactive_rows(policy: str) -> None:
    block = make_block(28)
    active = np.random.default_rng(0).random((2, 6)) < 0.5
    memory = None
    if policy.startswith("losa"):
        memory = get_policy(policy).remember(inputs_for(block, 0), np.ones((2, 6), bool), None)  # type: ignore[arg-type]
    clean = inputs_for(block, 1, memory, restarts=False)
    poisoned = replace(clean, q=np.where(active[:, None, :, None], clean.q, np.float32(np.nan)))
    chosen = get_policy(policy)
    np.testing.assert_array_equal(
        chosen.select_pages(clean, active).mask, chosen.select_pages(poisoned, active).mask
    )


@pytest.mark.clause("POLICY-1")
def test_reordering_the_context_reorders_the_selection_and_nothing_else() -> None:
    block = make_block(29, head_dim=16, segments=False)
    rng = np.random.default_rng(0)
    keys = rng.standard_normal(block.context.k_pages.shape).astype(np.float32)  # no ties
    block = replace(block, context=replace(block.context, k_pages=keys))
    c = block.context
    order = rng.permutation(c.pages)
    moved = replace(block, context=replace(
        c, page_table=c.page_table[:, order].copy(), page_lengths=c.page_lengths[:, order].copy()))
    for (out, memory), (other_out, other) in zip(
        denoise("quest:budget=8", block), denoise("quest:budget=8", moved), strict=True
    ):
        np.testing.assert_array_equal(memory.selection.mask[..., order], other.selection.mask)
        np.testing.assert_allclose(out, other_out, atol=1e-6)


@pytest.mark.clause("TOP-4")
def test_a_query_of_nan_shows_in_the_output() -> None:
    block = make_block(30)
    q = block.q.copy()
    q[0, 0, 0, 0, 0] = np.nan
    out, _ = next(denoise("quest:budget=8", replace(block, q=q)))
    assert np.isnan(out[0, 0, 0]).all() and np.isfinite(out[1]).all()
