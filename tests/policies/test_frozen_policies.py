"""mage and sparsed choose once and keep the choice for the block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from policy_cases import denoise, make_block

from sparse_dlm_attn import get_policy


def test_mage_scores_once_and_its_first_layers_stay_dense() -> None:
    block = make_block(71)
    reads = [memory.traffic.key_reads for _, memory in denoise("mage:budget=8", block, layer=2)]
    assert reads == [1, 0, 0, 0]
    for _, memory in denoise("mage:budget=8", block, layer=1):
        np.testing.assert_array_equal(memory.traffic.density, 1)
        assert memory.traffic.key_reads == 0


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
        return sum(
            bool((memory.traffic.density == 1).all()) for _, memory in denoise("sparsed", block, total_passes=total)
        )

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


def test_the_scale_of_attention_is_the_scale_of_the_choice() -> None:
    from sparse_dlm_attn import PrefixAttention

    block = make_block(78, batch=1, segments=False, pages=20)
    chosen = []
    for scale in (0.001, 5.0):  # nearly uniform masses, and nearly all mass on one token a row
        _, memory = PrefixAttention("sparsed:warmup=1")(block.q[0], block.k, block.v, block.context, scale=scale)
        chosen.append(np.asarray(memory.policy_memory.mask))
    assert (chosen[0] != chosen[1]).any()
    assert get_policy("sparsed").ratio == 0.3  # type: ignore[attr-defined]
