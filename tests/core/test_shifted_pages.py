"""Views of padded caches: pages that begin where tokens begin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from problems import block

from sparse_dlm_attn import Context, InvalidArgumentError, InvalidTypeError, PassInfo, PrefixAttention, get_backend
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn.runs import largest_page_size

Array = np.ndarray[Any, Any]
TOKENS = 37


def ragged(batch: int = 3) -> Array:
    """Padding in front, none, and in front and behind with a hole; the last run reaches the end."""
    valid = np.zeros((batch, TOKENS), dtype=bool)
    valid[0, 11:] = True
    valid[1, :] = True
    valid[2, 2:9] = valid[2, 16:] = True
    return valid


def tokens_of(context: Context, sequence: int) -> Array:
    """The context's keys of one sequence in reading order, ``(kv_heads, tokens, head_dim)``."""
    pairs = zip(context.page_table[sequence].tolist(), context.page_lengths[sequence].tolist(), strict=True)
    parts = [to_numpy(context.k_pages[x])[:, :count] for x, count in pairs if count]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("page_size", [1, 4, 12, 16])
@pytest.mark.parametrize("layout", ["contiguous", "tokens before heads", "slice"])
def test_valid_tokens_are_viewed_whatever_the_padding(library: str, page_size: int, layout: str) -> None:
    k, v = np.random.default_rng(0).standard_normal((2, 3, 2, TOKENS, 8)).astype(np.float32)
    dense = [k, v]
    if layout == "tokens before heads":
        dense = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in dense]
    if layout == "slice":
        dense = [np.pad(x, ((0, 0), (0, 0), (5, 3), (0, 0)))[:, :, 5:-3] for x in dense]
    if library == "torch":
        torch = pytest.importorskip("torch")
        dense = [torch.from_numpy(x) for x in dense]
    context = Context.from_dense(*dense, page_size, valid=ragged())
    context.check_contents()
    for b in range(3):
        assert np.array_equal(tokens_of(context, b), k[b][:, ragged()[b]])
    dense[0][1, 1, TOKENS - 1, 7] = 42.0  # a token written later is seen
    assert tokens_of(context, 1)[1, -1, 7] == 42.0


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("policy", ["dense", "quest:budget=8", "losa:budget=8,active=2"])
def test_a_padded_sequence_gets_what_it_gets_alone(name: str, policy: str) -> None:
    if name == "torch":
        pytest.importorskip("torch")
    backend = get_backend(name)
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((2, 3, 2, TOKENS, 8)).astype(np.float32)
    k[~ragged()[:, None, :].repeat(2, 1)] = np.nan  # padding that is read would show
    q, bk, bv = block(2, batch=3)
    attention = PrefixAttention(policy, backend)

    def run(rows: slice, keys: Array, values: Array, valid: Array) -> Array:
        context = Context.from_dense(backend.asarray(keys), backend.asarray(values), 4, valid=valid)
        memory = None
        for index in range(2):
            part = [backend.asarray(x[rows] + 0.5 * index) for x in (q, bk, bv)]
            out, memory = attention(*part, context, memory, PassInfo(index))
        return to_numpy(out)

    together = run(slice(0, 3), k, v, ragged())
    for b in range(2):  # the third has a hole, which no dense cache of its own would have
        mine = ragged()[b]
        alone = run(
            slice(b, b + 1),
            k[b : b + 1][:, :, mine],
            v[b : b + 1][:, :, mine],
            np.ones((1, int(mine.sum())), dtype=bool),
        )
        np.testing.assert_allclose(together[b], alone[0], rtol=0, atol=1e-6)


def test_a_page_that_would_reach_behind_the_memory_is_refused_with_one_that_does_not() -> None:
    k = np.zeros((2, 1, 32, 4), dtype=np.float32)
    valid = np.ones((2, 32), dtype=bool)
    valid[1, :27] = False
    with pytest.raises(InvalidArgumentError, match=r"end of the memory.* 11 too many\. Use page_size=4"):
        Context.from_dense(k, k, 16, valid=valid)
    assert largest_page_size(valid, 16) == 4
    assert Context.from_dense(k, k, 4, valid=valid).page_lengths[1].tolist() == [1, 4, 0, 0, 0, 0, 0, 0]
    assert largest_page_size(valid[::-1].copy(), 16) == 16  # a longer sequence last
    short = np.zeros((2, 4), dtype=bool)
    short[0] = True
    with pytest.raises(InvalidArgumentError, match="8 too many"):
        Context.from_dense(k[:, :, :4].copy(), k[:, :, :4].copy(), 16, valid=short)


def test_valid_tokens_are_viewed_in_numpy_and_pytorch_only() -> None:
    strict, k = pytest.importorskip("array_api_strict"), np.zeros((2, 1, 8, 4), dtype=np.float32)
    with pytest.raises(InvalidTypeError, match="NumPy array or PyTorch tensor"):
        Context.from_dense(strict.asarray(k), strict.asarray(k), 4, valid=np.ones((2, 8), bool))


def test_nothing_valid_is_an_empty_context() -> None:
    k = np.zeros((2, 1, 8, 4), dtype=np.float32)
    context = Context.from_dense(k, k, 4, valid=np.zeros((2, 8), dtype=bool))
    assert context.pages == 0 and context.tokens.tolist() == [0, 0]
