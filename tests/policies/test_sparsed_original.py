"""sparsed over a whole sequence: the authors' block mask, recomputed here from the description alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import Context, PassInfo, PrefixAttention
from sparse_dlm_attn.policies.sparsed import SparseD, pages_of_ratio

Array = np.ndarray[Any, Any]


def sequence(
    seed: int, tokens: int, size: int, prompt: int, *, q_heads: int = 4, kv_heads: int = 2, head_dim: int = 8
) -> tuple[Array, Array, Context]:
    """Queries, keys and the pages of one whole sequence; a page is of the prompt if its first token is."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, q_heads, tokens, head_dim)).astype(np.float32) * 2
    pages = -(-tokens // size)
    k = rng.standard_normal((1, kv_heads, pages * size, head_dim)).astype(np.float32)
    context = Context.from_dense(k, rng.standard_normal(k.shape).astype(np.float32), size, [tokens])
    labels = (np.arange(pages) * size >= prompt).astype(np.int8)
    labels[-1] = 1
    return q, k[:, :, :tokens], replace(context, page_segments=labels[None])


def authors_mask(
    q: Array, k: Array, size: int, new_tokens: int, ratio: float, scale: float, isolated: bool = True
) -> Array:
    """Build the block mask as the authors' code does: two padded, tile-averaged softmaxes, then top-k."""
    heads, tokens, _ = q.shape
    blocks = -(-tokens // size)
    last = next((b for b in range(blocks) if tokens - b * size <= new_tokens), blocks - 1)
    mask = np.zeros((heads, blocks, blocks), bool)
    for h in range(heads):
        keys = k[h * len(k) // heads].astype(float)
        for block in range(blocks):
            rows = q[h, block * size : (block + 1) * size].astype(float)
            for first in (0, last * size):
                scores = scale * rows @ keys[first:].T
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                columns = blocks - first // size
                padded = np.zeros((size, columns * size))
                padded[: len(rows), : weights.shape[1]] = weights
                tiles = padded.reshape(size, columns, size).mean(axis=(0, 2))
                kept = max(1, math.floor(columns * ratio) + 1)
                best = np.argsort(-tiles, kind="stable")[:kept] + first // size
                mask[h, block, best] = True
                if first == 0:
                    if not isolated:
                        break
                    mask[h, block, last:] = False
    return mask


def choose(policy: SparseD, q: Array, context: Context) -> Array:
    attention = PrefixAttention(policy)
    _, memory = attention(q, None, None, context, None, PassInfo(0))
    _, memory = attention(q, None, None, context, memory, PassInfo(1))
    return np.asarray(memory.selection.mask)[0]


@pytest.mark.parametrize(("tokens", "prompt"), [(61, 37), (33, 30), (17, 4)])
@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_the_code_variant_gives_the_authors_block_mask(
    tokens: int, prompt: int, isolated: bool, heads: tuple[int, int]
) -> None:
    size = 8
    q, k, context = sequence(tokens, tokens, size, prompt, q_heads=heads[0], kv_heads=heads[1])
    for ratio in (0.3, 0.0):
        for score_scale, scale in (("attention", 8**-0.5), ("heads", heads[0] ** -0.5)):
            policy = SparseD(
                ratio=ratio,
                warmup=1,
                span=size,
                isolated=isolated,
                score_scale=score_scale,  # type: ignore[arg-type]
            )
            expected = authors_mask(q[0], k[0], size, tokens - prompt, ratio, scale, isolated)
            np.testing.assert_array_equal(choose(policy, q, context), expected)


def test_the_two_variants_differ_where_the_generation_ranks_high() -> None:
    """A prompt with little mass: the authors' code then keeps fewer of its pages than the share."""
    q, _, context = sequence(5, 64, 8, 32)
    keys = np.array(context.k_pages)
    q = np.abs(q)
    keys[4:] = np.abs(keys[4:]) + 1  # the generated half draws all rows
    context = replace(context, k_pages=keys)
    prompt_pages = {
        policy.variant: choose(policy, q, context)[..., :4].sum(axis=-1)
        for policy in (SparseD(ratio=0.5, warmup=1, span=8), SparseD(ratio=0.5, warmup=1, span=8, variant="paper"))
    }
    assert (prompt_pages["paper"] == 2).all()  # half of the prompt's four
    assert (prompt_pages["code"] == 1).all()  # five of all eight, four of them not of the prompt


@pytest.mark.parametrize(
    ("pages", "ratio", "code", "paper"),
    [
        (32, 0.3, 10, 9),
        (33, 0.3, 10, 9),
        (512, 0.3, 154, 153),
        (3, 0.3, 1, 1),
        (1, 0.3, 1, 1),
        (4, 0.5, 3, 2),
        (8, 0.5, 5, 4),
        (32, 1.0, 32, 32),
        (0, 0.3, 0, 0),
    ],
)
def test_counts_of_the_worked_examples(pages: int, ratio: float, code: int, paper: int) -> None:
    eligible = (np.arange(600) < pages)[None]
    assert pages_of_ratio(eligible, ratio, "code").tolist() == [code]
    assert pages_of_ratio(eligible, ratio, "paper").tolist() == [paper]


@pytest.mark.parametrize(
    ("total", "code", "paper"),
    [(128, 27, 25), (64, 14, 12), (256, 53, 51), (1024, 206, 204), (10, 4, 2), (4, 2, 1), (1, 2, 1)],
)
def test_dense_passes_of_the_worked_examples(total: int, code: int, paper: int) -> None:
    assert SparseD(skip=0.2).warmup_passes(total) == code
    sparse = {128: 101, 64: 50, 256: 203, 1024: 818, 10: 6}.get(total)
    assert sparse in (None, total - code)
    assert SparseD(skip=0.2, variant="paper").warmup_passes(total) == paper


@pytest.mark.parametrize("frozen", [True, False])
def test_the_ablations_choose_at_once_or_anew(frozen: bool) -> None:
    q, _, context = sequence(8, 40, 8, 24)
    other, _, _ = sequence(9, 40, 8, 24)
    attention = PrefixAttention(SparseD(warmup=0, ratio=0.2, span=8, frozen=frozen))
    _, first = attention(q, None, None, context)
    expected = authors_mask(
        q[0], np.asarray(context.k_pages).swapaxes(0, 1).reshape(2, -1, 8)[:, :40], 8, 16, 0.2, 8**-0.5
    )
    np.testing.assert_array_equal(np.asarray(first.selection.mask)[0], expected)
    _, second = attention(other, None, None, context, first, PassInfo(1))
    same = np.array_equal(np.asarray(second.selection.mask), np.asarray(first.selection.mask))
    assert same == frozen
