from __future__ import annotations

import numpy as np
import pytest

from sparse_dlm_attn import Context, InvalidArgumentError, PassInfo, PrefixAttention, StaleMemoryError
from sparse_dlm_attn_reference import ReferenceBackend
from sparse_dlm_attn_tiny.cache import PrefixCache
from sparse_dlm_attn_tiny.config import TinyConfig
from sparse_dlm_attn_tiny.model import TinyModel

PAGE_SIZES = [1, 5, 16, 64]


def block_of(config: TinyConfig, tokens: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    shape = (1, config.kv_heads, tokens, config.head_dim)
    keys, values = ([rng.standard_normal(shape, dtype=np.float32) for _ in range(config.layers)]
                    for _ in range(2))
    return keys, values


def filled(config: TinyConfig, sizes: list[int], page_size: int = 16) -> PrefixCache:
    cache = PrefixCache(config, ReferenceBackend(), page_size=page_size)
    for seed, tokens in enumerate(sizes):
        cache.append(*block_of(config, tokens, seed), [list(range(tokens))])
    return cache


def appended(config: TinyConfig, sizes: list[int], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values that `filled` appends, side by side."""
    blocks = [block_of(config, tokens, seed) for seed, tokens in enumerate(sizes)]
    keys = np.concatenate([block[0][layer] for block in blocks], axis=2)
    return keys, np.concatenate([block[1][layer] for block in blocks], axis=2)


def tokens_of(context: Context, pages: np.ndarray) -> np.ndarray:
    parts = [pages[page, :, :length] for page, length
             in zip(context.page_table[0], context.page_lengths[0], strict=True)]
    return np.concatenate(parts, axis=1)[None]


@pytest.mark.clause("CONTEXT-1", "CONTEXT-5")
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("sizes", [[1], [16], [16, 1], [48, 16, 8], [300, 32]])
def test_a_context_holds_the_appended_tokens_in_order(
    small_config: TinyConfig, sizes: list[int], page_size: int
) -> None:
    cache = filled(small_config, sizes, page_size)
    for layer in range(small_config.layers):
        context = cache.context(layer)
        context.check_contents()
        keys, values = appended(small_config, sizes, layer)
        np.testing.assert_array_equal(tokens_of(context, context.k_pages), keys)
        np.testing.assert_array_equal(tokens_of(context, context.v_pages), values)
        assert int(context.tokens[0]) == sum(sizes)
        assert context.pages == -(-sum(sizes) // page_size)


@pytest.mark.clause("BOUNDS-1")
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_bounds_kept_from_append_to_append_equal_bounds_built_at_once(
    small_config: TinyConfig, page_size: int
) -> None:
    cache = PrefixCache(small_config, ReferenceBackend(), page_size=page_size)
    for seed, tokens in enumerate([3, 16, 1, 44, 16, 16]):
        cache.append(*block_of(small_config, tokens, seed), [[0] * tokens])
        for context in cache.contexts():
            expected = ReferenceBackend().page_bounds(context)
            assert context.bounds is not None
            np.testing.assert_array_equal(context.bounds.lower, expected.lower)
            np.testing.assert_array_equal(context.bounds.upper, expected.upper)


def test_building_bounds_reads_every_key_once_and_a_grown_page_again(small_config: TinyConfig) -> None:
    key_bytes = 4 * small_config.kv_heads * small_config.head_dim
    whole_pages = filled(small_config, [32, 16, 16], page_size=16)
    assert whole_pages.bounds_key_bytes == (64 * key_bytes,) * small_config.layers
    grown = filled(small_config, [32, 16, 16], page_size=64)
    assert grown.bounds_key_bytes == ((32 + 48 + 64) * key_bytes,) * small_config.layers


@pytest.mark.clause("CONTEXT-4")
def test_contexts_share_memory_with_the_cache_and_page_arrays_among_layers(
    small_config: TinyConfig,
) -> None:
    cache = filled(small_config, [48])
    contexts = cache.contexts()
    for layer, context in enumerate(contexts):
        keys, values = cache.read(layer, cache.length)
        assert np.shares_memory(context.k_pages, keys)
        assert np.shares_memory(context.v_pages, values)
        assert context.page_table is contexts[0].page_table
        assert cache.context(layer) is context


def test_an_empty_cache_gives_one_absent_page(small_config: TinyConfig) -> None:
    context = PrefixCache(small_config, ReferenceBackend()).context(0)
    assert context.page_lengths.tolist() == [[0]]
    assert context.bounds is not None
    assert not context.bounds.upper.any()


def test_pages_that_begin_in_the_prompt_are_prompt_and_the_others_generated(model: TinyModel) -> None:
    cache = model.prefill(bytes(40), page_size=8)  # 32 bytes cached, 8 in the first block
    cache.append(*block_of(model.config, 16, 0), [[0] * 16])
    assert cache.context(0).page_segments.tolist() == [[0, 0, 0, 0, 0, 1]]


def test_every_append_bumps_the_version(small_config: TinyConfig) -> None:
    cache = filled(small_config, [16])
    before = cache.context(0)
    cache.append(*block_of(small_config, 16, 1), [[0] * 16])
    assert cache.context(0).version > before.version
    assert before.page_lengths.tolist() == [[16]]  # a context taken earlier is not touched


@pytest.mark.clause("MEMORY-2")
def test_memory_of_one_fork_is_refused_by_another(model: TinyModel, text: bytes) -> None:
    prefix = model.prefill(text[:32])
    attention = PrefixAttention("losa", model.backend)
    memories = []
    for start in (32, 48):
        fork = prefix.fork()
        block = list(text[start : start + 16])
        first = model.forward_block([block], 32, fork.contexts(), attention, PassInfo(0))
        fork.append(first.keys, first.values, [block])
        if memories:
            with pytest.raises(StaleMemoryError, match="version"):
                model.forward_block([block], 48, fork.contexts(), attention, PassInfo(1), memories)
        second = model.forward_block([block], 48, fork.contexts(), attention, PassInfo(0))
        memories = list(second.memories)


@pytest.mark.clause("CONTEXT-4")
def test_a_fork_copies_nothing_until_it_has_to(small_config: TinyConfig) -> None:
    prefix = filled(small_config, [48])
    first, second = prefix.fork(), prefix.fork()
    for fork in (first, second):
        assert np.shares_memory(fork.context(1).k_pages, prefix.context(1).k_pages)
    first.append(*block_of(small_config, 16, 5), [[0] * 16])
    assert np.shares_memory(first.context(1).k_pages, prefix.context(1).k_pages)
    second.append(*block_of(small_config, 16, 6), [[0] * 16])
    assert not np.shares_memory(second.context(1).k_pages, prefix.context(1).k_pages)


def test_a_lent_fork_gives_its_room_back_unless_others_took_it(small_config: TinyConfig) -> None:
    prefix = filled(small_config, [48])

    def shared(fork: PrefixCache) -> bool:
        fork.append(*block_of(small_config, 16, 5), [[0] * 16])
        return np.shares_memory(fork.context(1).k_pages, prefix.context(1).k_pages)

    for _ in range(2):
        with prefix.forked() as fork:
            assert shared(fork)
            assert not shared(prefix.fork())  # while it is lent, its room is taken
    with pytest.raises(ZeroDivisionError), prefix.forked() as fork:
        assert shared(fork)
        raise ZeroDivisionError
    kept = prefix.fork()
    with prefix.forked() as fork:
        assert shared(kept)
        assert not shared(fork)
    assert not shared(prefix.fork())  # what belongs to a fork that was not lent is never given away


@pytest.mark.parametrize("page_size", [16, 64])
def test_forks_and_their_prefix_do_not_disturb_one_another(
    small_config: TinyConfig, page_size: int
) -> None:
    prefix = filled(small_config, [40], page_size)
    forks = [prefix.fork() for _ in range(3)]
    nested = []
    for seed, fork in enumerate(forks, start=1):
        fork.append(*block_of(small_config, 16, seed), [[seed] * 16])
        nested.append(fork.fork())
        nested[-1].append(*block_of(small_config, 16, 10 + seed), [[seed] * 16])
    for layer in range(small_config.layers):
        start = block_of(small_config, 40, 0)[0][layer]
        context = prefix.context(layer)
        np.testing.assert_array_equal(tokens_of(context, context.k_pages), start)
        for seed, cache in enumerate(nested, start=1):
            context = cache.context(layer)
            parts = [start, block_of(small_config, 16, seed)[0][layer],
                     block_of(small_config, 16, 10 + seed)[0][layer]]
            np.testing.assert_array_equal(
                tokens_of(context, context.k_pages), np.concatenate(parts, axis=2)
            )
        for cache in (prefix, *forks, *nested):
            context = cache.context(layer)
            expected = ReferenceBackend().page_bounds(context)
            assert context.bounds is not None
            np.testing.assert_array_equal(context.bounds.upper, expected.upper)
    assert prefix.tokens == (tuple(range(40)),)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_fork_may_have_another_page_size(small_config: TinyConfig, page_size: int) -> None:
    prefix = filled(small_config, [16, 16, 3])
    fork = prefix.fork(page_size=page_size)
    context, expected = fork.context(2), filled(small_config, [35], page_size).context(2)
    assert context.page_lengths.tolist() == expected.page_lengths.tolist()
    np.testing.assert_array_equal(
        tokens_of(context, context.k_pages), tokens_of(prefix.context(2), prefix.context(2).k_pages)
    )
    bounds = ReferenceBackend().page_bounds(context)
    assert context.bounds is not None
    np.testing.assert_array_equal(context.bounds.lower, bounds.lower)
    assert prefix.page_size == 16


@pytest.mark.clause("ERROR-1")
def test_a_bad_append_is_refused_and_changes_nothing(small_config: TinyConfig) -> None:
    cache = filled(small_config, [16])
    keys, values = block_of(small_config, 16, 1)
    bad = [
        (keys[:-1], values, [[0] * 16]), (keys, values[:-1], [[0] * 16]), (keys, values, [[0] * 15]),
        (keys, [value[:, :1] for value in values], [[0] * 16]),
        ([key.astype(np.float64) for key in keys], values, [[0] * 16]),
    ]
    for arguments in bad:
        with pytest.raises(InvalidArgumentError):
            cache.append(*arguments)
    assert (cache.length, cache.version) == (16, 1)
    with pytest.raises(InvalidArgumentError, match="reserve"):
        cache.write(0, 16, keys[0], values[0])
    for page_size in (0, -1):
        with pytest.raises(InvalidArgumentError, match="page_size"):
            cache.fork(page_size=page_size)


@pytest.mark.clause("MEMORY-1", "MEMORY-2")
def test_memory_does_not_survive_an_append_in_mid_block_and_is_dropped_at_pass_0(
    model: TinyModel, text: bytes
) -> None:
    cache = model.prefill(text[:64])
    attention = PrefixAttention("losa", model.backend)
    block = list(text[64:80])
    first = model.forward_block([block], 64, cache.contexts(), attention, PassInfo(0))
    cache.append(first.keys, first.values, [block])
    following = list(text[80:96])
    with pytest.raises(StaleMemoryError):
        model.forward_block(
            [following], 80, cache.contexts(), attention, PassInfo(1), first.memories
        )
    kept = model.forward_block([following], 80, cache.contexts(), attention, PassInfo(0), first.memories)
    fresh = model.forward_block([following], 80, cache.contexts(), attention, PassInfo(0))
    np.testing.assert_array_equal(kept.logits, fresh.logits)
