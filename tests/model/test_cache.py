from __future__ import annotations

import numpy as np
import pytest

from sparse_dlm_attn import Context, InvalidArgumentError, PassInfo, PrefixAttention
from sparse_dlm_attn_reference import ReferenceBackend
from sparse_dlm_attn_small_model.cache import KVCache
from sparse_dlm_attn_small_model.config import TinyConfig
from sparse_dlm_attn_small_model.model import TinyModel

CONFIG = TinyConfig(layers=2, kv_heads=2, head_dim=8)
PAGE_SIZES = [1, 5, 16, 64]


def kv_of(tokens: int, seed: int) -> np.ndarray:
    """Keys and values ``(layers, 2, 1, kv_heads, tokens, head_dim)``."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((CONFIG.layers, 2, 1, 2, tokens, 8), dtype=np.float32)


def append(cache: KVCache, tokens: int, seed: int) -> KVCache:
    cache.reserve(tokens)
    for layer, (keys, values) in enumerate(kv_of(tokens, seed)):
        cache.write(layer, slice(cache.length, cache.length + tokens), keys, values)
    cache.advance([[seed] * tokens])
    return cache


def filled(sizes: list[int], page_size: int = 16) -> KVCache:
    cache = KVCache(CONFIG, ReferenceBackend(), page_size=page_size)
    for seed, tokens in enumerate(sizes):
        append(cache, tokens, seed)
    return cache


def check(cache: KVCache, parts: list[tuple[int, int]]) -> None:
    """The contexts hold these (tokens, seed), and the bounds of exactly their pages."""
    expected = np.concatenate([kv_of(tokens, seed) for tokens, seed in parts], axis=4)
    for layer, context in enumerate(cache.contexts()):
        context.check_contents()
        for pages, wanted in zip((context.k_pages, context.v_pages), expected[layer], strict=True):
            np.testing.assert_array_equal(tokens_of(context, pages), wanted[0])
        bounds = ReferenceBackend().page_bounds(context)
        assert context.bounds is not None
        np.testing.assert_array_equal(context.bounds.lower, bounds.lower)
        np.testing.assert_array_equal(context.bounds.upper, bounds.upper)


def tokens_of(context: Context, pages: np.ndarray) -> np.ndarray:
    parts = zip(context.page_table[0], context.page_lengths[0], strict=True)
    return np.concatenate([pages[page, :, :length] for page, length in parts], axis=1)


@pytest.mark.clause("CONTEXT-1", "CONTEXT-5", "BOUNDS-1")
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("sizes", [[1], [16, 1], [3, 16, 1, 44, 16], [300, 32]])
def test_contexts_hold_the_appended_tokens_in_order_with_their_bounds(sizes: list[int], page_size: int) -> None:
    cache = filled(sizes, page_size)
    check(cache, [(tokens, seed) for seed, tokens in enumerate(sizes)])
    assert cache.contexts()[0].pages == -(-sum(sizes) // page_size)


def test_building_bounds_reads_every_key_once_and_a_grown_page_again() -> None:
    assert filled([32, 16, 16], page_size=16).bounds_key_bytes == 64 * 4 * 2 * 8
    assert filled([32, 16, 16], page_size=64).bounds_key_bytes == (32 + 48 + 64) * 4 * 2 * 8


def test_pages_that_begin_in_the_prompt_are_prompt_and_the_others_generated(model: TinyModel) -> None:
    cache = model.prefill(bytes(40), page_size=8)  # 32 bytes cached, 8 in the first block
    block = [[0] * 16]
    model.forward(block, cache, PrefixAttention("dense"), PassInfo(0))
    cache.advance(block)
    assert cache.contexts()[0].page_segments.tolist() == [[0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize(("page_size", "prompt"), [(4, 30), (8, 30), (64, 30), (16, 32)])
def test_segments_of_a_whole_sequence_are_prompt_generated_and_suffix(page_size: int, prompt: int) -> None:
    cache = KVCache(CONFIG, ReferenceBackend(), whole=True, capacity=46, prompt_tokens=prompt, page_size=page_size)
    first = np.arange(0, 46, page_size)
    expected = np.where(first < prompt, 0, np.where(first < 38, 1, 2))
    expected[-1] = max(expected[-1], 1)  # the last page is never of the prompt
    context = cache.contexts(window_end=38)[0]
    assert context.page_segments.tolist() == [expected.tolist()]
    assert context.bounds is None and int(context.tokens[0]) == 46


@pytest.mark.parametrize("page_size", [16, 64])
def test_forks_and_their_prefix_do_not_disturb_one_another(page_size: int) -> None:
    prefix = filled([40], page_size)
    forks = [append(prefix.fork(), 16, seed) for seed in (1, 2, 3)]
    nested = [append(fork.fork(), 16, 10 + seed) for seed, fork in enumerate(forks, start=1)]
    check(prefix, [(40, 0)])
    for seed, (fork, inner) in enumerate(zip(forks, nested, strict=True), start=1):
        check(fork, [(40, 0), (16, seed)])
        check(inner, [(40, 0), (16, seed), (16, 10 + seed)])
    assert prefix.tokens == ((0,) * 40,)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_fork_may_have_another_page_size(page_size: int) -> None:
    prefix = filled([16, 16, 3])
    fork = prefix.fork(page_size=page_size)
    check(fork, [(16, 0), (16, 1), (3, 2)])
    assert fork.contexts()[0].page_size == page_size and prefix.page_size == 16


@pytest.mark.clause("ERROR-1")
def test_bad_writes_are_refused_and_change_nothing(model: TinyModel, text: bytes) -> None:
    cache = filled([16])
    keys, values = kv_of(16, 1)[0]
    with pytest.raises(InvalidArgumentError, match="reserve"):
        cache.write(0, slice(16, 32), keys, values)
    with pytest.raises(InvalidArgumentError, match="reserve"):
        cache.advance([[0] * 16])
    cache.reserve(16)
    for bad in ((keys, values[:, :1]), (keys.astype(np.float64), values), (keys[:, :, :8], values)):
        with pytest.raises(InvalidArgumentError):
            cache.write(0, slice(16, 32), *bad)
    with pytest.raises(InvalidArgumentError, match="rows"):
        cache.write(0, slice(0, 16), keys, values)  # finished tokens are not written again
    with pytest.raises(InvalidArgumentError, match="equally many"):
        cache.advance([[1], [2, 3]])
    assert (cache.length, cache.version) == (16, 1)
    with pytest.raises(InvalidArgumentError, match="page_size"):
        cache.fork(page_size=0)
    with pytest.raises(InvalidArgumentError, match=r"same length.*equal length"):
        KVCache.together([model.prefill(text[:64]), model.prefill(text[:40])])
    with pytest.raises(InvalidArgumentError, match="at least one"):
        KVCache.together([])
