"""mage and sparsed choose once and keep the choice for the block."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from policy_cases import Array, Block, denoise, make_block, rows_read

from sparse_dlm_attn import get_policy
from sparse_dlm_attn.policies.sparsed import SparseD, pages_of_ratio


def masses(block: Block, index: int, sequence: int, pages: Array) -> Array:
    """Softmax mass of each of the ``pages``, one row and token at a time, ``(q_heads, tokens, pages)``."""
    c = block.context
    q = block.q[index][sequence].astype(float)
    result = np.zeros((*q.shape[:2], c.pages))
    for h, row in np.ndindex(*q.shape[:2]):
        for page in np.flatnonzero(pages):
            for slot in range(c.page_lengths[sequence, page]):
                key = c.k_pages[c.page_table[sequence, page], h * c.kv_heads // q.shape[0], slot]
                result[h, row, page] += math.exp(q[h, row] @ key / math.sqrt(q.shape[2]))
        result[h, row] /= max(result[h, row].sum(), 1e-300)
    return result


def assert_best(chosen: Array, scores: Array, eligible: Array, count: int) -> None:
    """Assert that ``count`` eligible pages were chosen and none left out is clearly better."""
    assert not (chosen & ~eligible).any()
    assert chosen.sum() == min(count, eligible.sum())
    left_out = eligible & ~chosen
    if chosen.any() and left_out.any():
        assert scores[chosen].min() >= scores[left_out].max() - 1e-6


@pytest.mark.parametrize(("budget", "page_size", "count"), [(8, 4, 2), (11, 4, 2), (5, 1, 5), (2, 4, 1)])
@pytest.mark.parametrize("heads", [(4, 2), (7, 1), (2, 2)])
def test_mage_keeps_the_heaviest_pages_of_each_kv_head(
    heads: tuple[int, int], budget: int, page_size: int, count: int
) -> None:
    q_heads, kv_heads = heads
    block = make_block(70, q_heads=q_heads, kv_heads=kv_heads, page_size=page_size, pages=12)
    memories = [memory for _, memory in denoise(f"mage:budget={budget},dense_layers=0", block)]
    np.testing.assert_array_equal(memories[0].traffic.density, 1)
    later = [np.asarray(memory.selection.mask) for memory in memories[1:]]
    for mask in later[1:]:
        np.testing.assert_array_equal(mask, later[0])
    for sequence in range(2):
        exists = block.context.page_lengths[sequence] > 0
        mass = masses(block, 0, sequence, exists)  # of pass 0's queries
        by_group = mass.reshape(kv_heads, q_heads // kv_heads, 6, -1).mean(axis=2).sum(axis=1)
        assert later[0].shape[1:3] == (kv_heads, 1)
        for head in range(kv_heads):
            assert_best(later[0][sequence, head, 0], by_group[head], exists, count)


def test_mage_scores_once_and_its_first_layers_stay_dense() -> None:
    block = make_block(71)
    reads = [memory.traffic.key_reads for _, memory in denoise("mage:budget=8", block, layer=2)]
    assert reads == [1, 0, 0, 0]
    for _, memory in denoise("mage:budget=8", block, layer=1):
        np.testing.assert_array_equal(memory.traffic.density, 1)
        assert memory.traffic.key_reads == 0


@pytest.mark.parametrize(
    ("total", "skip", "dense"),
    [(128, 0.2, 27), (64, 0.2, 14), (256, 0.2, 53), (1024, 0.2, 206), (10, 0.2, 4), (4, 0.2, 2), (9, 0.0, 2)],
)
def test_sparsed_counts_dense_passes_as_the_authors_do(total: int, skip: float, dense: int) -> None:
    assert SparseD(skip=skip).warmup_passes(total) == dense


@pytest.mark.parametrize(
    ("pages", "ratio", "kept"),
    [(32, 0.3, 10), (33, 0.3, 10), (512, 0.3, 154), (3, 0.3, 1), (1, 0.3, 1), (4, 0.5, 3), (8, 0.5, 5),
     (100, 0.29, 29), (7, 1.0, 7), (7, 0.0, 1), (0, 0.3, 0)],
)
def test_sparsed_keeps_one_page_more_than_the_floor_and_never_more_than_there_are(
    pages: int, ratio: float, kept: int
) -> None:
    eligible = np.arange(600)[None, :] % 600 < pages
    assert pages_of_ratio(eligible, ratio).tolist() == [kept]


@pytest.mark.parametrize("span", [None, 1, 4])
@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("isolated", [True, False])
def test_sparsed_keeps_a_share_of_each_segment_for_each_query_head_and_span(
    isolated: bool, variant: str, span: int | None
) -> None:
    block = make_block(72, pages=16, passes=5)
    policy = SparseD(ratio=0.3, warmup=2, span=span, isolated=isolated, variant=variant)  # type: ignore[arg-type]
    memories = [memory for _, memory in denoise(policy, block)]
    assert [bool((memory.traffic.density == 1).all()) for memory in memories] == [True] * 2 + [False] * 3
    later = [np.asarray(memory.selection.mask) for memory in memories[2:]]
    rows = span or 6
    for mask in later:
        np.testing.assert_array_equal(mask, later[0])
        assert mask.shape[1:3] == (4, -(-6 // rows))
    for sequence in range(2):
        exists = block.context.page_lengths[sequence] > 0
        prompt = exists & (block.context.page_segments[sequence] == 0)
        others = exists & ~prompt
        ranked = exists if variant == "code" else prompt  # their code ranks all, then clears the others
        parts = [(exists, ranked, prompt), (others, others, others)] if isolated else [(exists,) * 3]
        for scored, eligible, kept in parts:
            mass = masses(block, 1, sequence, scored)  # of the last dense pass
            for head, start in np.ndindex(4, -(-6 // rows)):
                pooled = mass[head, start * rows : (start + 1) * rows].mean(axis=0)
                share = math.floor(int(eligible.sum()) * 0.3)
                count = share + 1 if variant == "code" else max(share, 1)
                best = [page for page in np.argsort(-pooled, kind="stable") if eligible[page]][:count]
                expected = np.isin(np.arange(len(exists)), best) & kept
                np.testing.assert_array_equal(later[0][sequence, head, start] & kept, expected)


def test_isolation_keeps_generated_pages_that_a_heavy_prompt_would_crowd_out() -> None:
    block = make_block(73, batch=1, pages=8)
    labels = np.array([[0, 0, 0, 0, 0, 0, 1, 1]], np.int8)
    lengths = np.full((1, 8), 4, np.int32)
    keys = block.context.k_pages * np.float32(0.01)
    keys[block.context.page_table[0, :6]] += 1
    q = np.abs(block.q) + 1
    context = replace(block.context, k_pages=keys, page_segments=labels, page_lengths=lengths)
    block = replace(block, q=q, context=context)

    def generated(policy: str) -> int:
        *_, (_, memory) = denoise(policy, block)
        return int(np.asarray(memory.selection.mask)[0, :, 0, 6:].sum(axis=-1).max())

    assert generated("sparsed:warmup=1,isolated=false") == 0
    assert generated("sparsed:warmup=1") == 1


def test_sparsed_takes_the_planned_passes_else_the_length_of_the_block() -> None:
    block = make_block(74, passes=5)  # 6 tokens: floor(6 x 0.2) + 2 = 3

    def dense_passes(total: int | None) -> int:
        return sum(bool((memory.traffic.density == 1).all())
                   for _, memory in denoise("sparsed", block, total_passes=total))

    assert dense_passes(None) == 3
    assert dense_passes(4) == 2
    assert dense_passes(10) == 4


def test_a_plan_that_changes_within_a_block_does_not_move_the_end_of_the_warmup() -> None:
    from sparse_dlm_attn import PassInfo, PrefixAttention

    block = make_block(75, passes=5)
    attention, memory, densities = PrefixAttention("sparsed"), None, []
    for index, total in enumerate([10, 2, 2, 2, 2]):  # 4 dense passes; the shorter plan comes too late
        info = PassInfo(index, total_passes=total)
        _, memory = attention(block.q[index], block.k, block.v, block.context, memory, info)
        densities.append(float(memory.traffic.density[0]))
    assert densities[:4] == [1, 1, 1, 1]
    assert 0 < densities[4] < 1


def test_sparsed_scores_keys_once_for_each_part_and_only_at_the_end_of_the_warmup() -> None:
    block = make_block(76)
    reads = [memory.traffic.key_reads for _, memory in denoise("sparsed:warmup=2", block)]
    assert reads == [0, 2, 0, 0]
    reads = [memory.traffic.key_reads for _, memory in denoise("sparsed:warmup=2,isolated=false", block)]
    assert reads == [0, 1, 0, 0]


@pytest.mark.parametrize("policy", ["mage:budget=8,dense_layers=0", "sparsed:warmup=1"])
def test_the_choice_does_not_follow_later_queries(policy: str) -> None:
    block = make_block(77)
    other = replace(block, q=np.concatenate([block.q[:1], -block.q[1:]]))
    for (_, one), (_, two) in zip(denoise(policy, block), denoise(policy, other), strict=True):
        np.testing.assert_array_equal(rows_read(one, 4, 6), rows_read(two, 4, 6))


def test_the_scale_of_attention_is_the_scale_of_the_choice() -> None:
    from sparse_dlm_attn import PrefixAttention

    block = make_block(78, batch=1, segments=False, pages=20)
    chosen = []
    for scale in (0.001, 5.0):  # nearly uniform masses, and nearly all mass on one token a row
        _, memory = PrefixAttention("sparsed:warmup=1")(
            block.q[0], block.k, block.v, block.context, scale=scale
        )
        chosen.append(np.asarray(memory.policy_memory.mask))
    assert (chosen[0] != chosen[1]).any()
    assert get_policy("sparsed").ratio == 0.3  # type: ignore[attr-defined]
