"""snapkv: who observes, what is kept, and that nothing is chosen twice."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from policy_cases import Array, make_block

from sparse_dlm_attn import Context, PassInfo, PrefixAttention
from sparse_dlm_attn.policies.snapkv import SnapKV


def token_context(tokens: int, seed: int, q_heads: int = 4) -> tuple[Array, Context]:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, q_heads, tokens, 8)).astype(np.float32) * 2
    k = rng.standard_normal((1, 2, tokens, 8)).astype(np.float32)
    return q, Context.from_dense(k, k, 1)


def keep_of(weights: Array, window: int, capacity: int, kernel: int, pooling: str) -> Array:
    """The rule on tokens: weights of the tokens before the window, pooled, best ones first."""
    before = weights[: len(weights) - window]
    fill = 0.0 if pooling == "avg" else -np.inf
    padded = np.pad(before, kernel // 2, constant_values=fill)
    reduce = np.mean if pooling == "avg" else np.max
    pooled = np.array([reduce(padded[place : place + kernel]) for place in range(len(before))])
    best = np.argsort(-pooled, kind="stable")[: capacity - window]
    kept = np.zeros(len(weights), bool)
    kept[best] = kept[len(weights) - window :] = True
    return kept


@pytest.mark.parametrize(("window", "capacity", "kernel", "pooling"), [(4, 12, 1, "avg"), (3, 9, 5, "max")])
def test_the_last_prompt_rows_choose_tokens_for_each_query_head(
    window: int, capacity: int, kernel: int, pooling: str
) -> None:
    tokens, prompt = 28, 22
    q, context = token_context(tokens, 0)
    context = replace(context, page_segments=(np.arange(tokens) >= prompt).astype(np.int8)[None])
    policy = SnapKV(capacity=capacity, window=window, kernel=kernel, pooling=pooling)  # type: ignore[arg-type]
    attention = PrefixAttention(policy)
    _, memory = attention(q, None, None, context)
    np.testing.assert_array_equal(memory.traffic.density, 1)
    _, memory = attention(-q, None, None, context, memory, PassInfo(1))
    chosen = np.asarray(memory.selection.mask)[0, :, 0]
    keys = np.asarray(context.k_pages)[:, :, 0].astype(float)
    for head in range(4):
        asked = q[0, head, prompt - window : prompt].astype(float) / math.sqrt(8)
        scores = asked @ keys[:prompt, head // 2].T
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        mass = (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0)
        np.testing.assert_array_equal(chosen[head, :prompt], keep_of(mass, window, capacity, kernel, pooling))
    assert chosen[:, prompt:].all()  # what is not of the prompt is always read
    assert (chosen[:, :prompt].sum(axis=1) == capacity).all()


def test_a_prompt_that_fits_stays_whole() -> None:
    q, context = token_context(20, 1)
    for capacity, whole in ((20, True), (19, False)):
        attention = PrefixAttention(SnapKV(capacity=capacity, window=4))
        _, memory = attention(q, None, None, context)
        _, memory = attention(q, None, None, context, memory, PassInfo(1))
        assert bool(np.asarray(memory.selection.mask).all()) == whole


def test_later_blocks_read_the_first_choice_and_everything_that_came_after_it() -> None:
    block = make_block(2, batch=1, pages=10, segments=False)
    full = np.array([[4] * 6 + [2] + [0] * 3], np.int32)
    first = replace(block.context, page_lengths=full)
    attention, memory = PrefixAttention("snapkv:capacity=10,window=2,kernel=1"), None
    for number in range(2):
        _, memory = attention(block.q[number], block.k, block.v, first, memory, PassInfo(number))
    kept = np.asarray(memory.selection.mask)[0, :, 0]
    assert (kept[:, :6].sum(axis=1) == 2).all()  # floor((10 - 2) / 4)
    longer = full.copy()
    longer[0, 6:9] = (4, 4, 1)
    later = replace(first, page_lengths=longer, version=1)
    _, memory = attention(-block.q[2], block.k, block.v, later, memory, PassInfo(0))
    again = np.asarray(memory.selection.mask)[0, :, 0]
    np.testing.assert_array_equal(again[:, :7], kept[:, :7])
    assert again[:, 7:9].all()
    assert memory.traffic.key_reads == 0
