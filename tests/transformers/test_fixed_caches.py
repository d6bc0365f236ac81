"""Caches that stay where they are in memory, and whole forward passes as graphs over them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from plain_backends import TorchOperators as PlainTorch
from tape import Tape
from tiny_models import cache_name, causal_shape, in_double, new_cache, tokens
from transformers import StaticCache

from sparse_dlm_attn import InvalidArgumentError, UnsupportedError
from sparse_dlm_attn_cuda_graphs import CapturedPasses
from sparse_dlm_attn_transformers import PagedCache, PassReport, SparseAttention, passes

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
BLOCK, PREFIX, ROOM, SIZE = 8, 40, 120, 4
ON_5 = pytest.mark.skipif(VERSION < (5, 0), reason="a StaticCache of transformers 5 counts its tokens on the device")
ON_4_54 = pytest.mark.skipif(VERSION < (4, 54), reason="caches of layers came with transformers 4.54")
KINDS = [pytest.param("paged", marks=ON_4_54), pytest.param("static", marks=ON_5)]


@pytest.fixture(scope="module")
def model() -> Any:
    return causal_shape("Qwen3")


def fixed_cache(model: Any, kind: str, batch: int = 1, room: int = ROOM) -> Any:
    if kind == "paged":
        return PagedCache(model.config, batch, room, page_size=SIZE)
    return StaticCache(config=model.config, max_cache_len=room)


def prefill(model: Any, cache: Any, text: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    with torch.no_grad():
        model(text, attention_mask=mask, **{cache_name(model): cache})


def blocks(
    model: Any, cache: Any, sparse: SparseAttention, count: int = 3, passes: int = 4, mask: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Denoise blocks one after the other; return all logits."""
    batch, found = cache.layers[0].keys.shape[0], []
    for number in range(count):
        with torch.no_grad(), sparse.block():
            start = PREFIX + number * BLOCK
            places = torch.arange(start, start + BLOCK)[None].expand(batch, -1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(batch, BLOCK)], dim=1)
            for index in range(passes):
                decoded = (torch.arange(BLOCK) < 2 * index)[None].expand(batch, -1)
                sparse.next_pass(decoded, is_save=index == passes - 1)
                ids = tokens(batch, BLOCK, seed=100 * number + index)
                found.append(model(ids, position_ids=places, attention_mask=mask, **{cache_name(model): cache}).logits)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["dense", "losa:budget=16,active=2"])
def test_a_cache_that_stays_gives_what_one_that_grows_gives(model: Any, kind: str, policy: str) -> None:
    text, found = tokens(2, PREFIX), []
    for cache in (new_cache(model), fixed_cache(model, kind, 2)):
        with SparseAttention(model, policy, page_size=SIZE) as sparse:
            prefill(model, cache, text)
            found.append(blocks(model, cache, sparse))
        assert int(cache.get_seq_length()) == PREFIX + 3 * BLOCK
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_saved_in_place(model: Any, kind: str) -> None:
    cache = fixed_cache(model, kind)
    with SparseAttention(model, "dense", page_size=SIZE) as sparse:
        prefill(model, cache, tokens(1, PREFIX))
        places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        before = cache.layers[1].keys[:, :, :PREFIX].clone()
        blocks(model, cache, sparse, count=2)
    assert places == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    assert torch.equal(cache.layers[1].keys[:, :, :PREFIX], before)
    assert cache.layers[1].keys[:, :, PREFIX : PREFIX + 2 * BLOCK].abs().amin(dim=(0, 1, 3)).min() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_is_not_read_whatever_it_holds(model: Any, kind: str, side: str) -> None:
    double, lengths = in_double(model), [PREFIX, 25, 3]
    mask = torch.zeros(3, PREFIX, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        first = {"left": PREFIX - length, "right": 0, "both": (PREFIX - length) // 2}[side]
        row[first : first + length] = 1
    cache = fixed_cache(double, kind, 3)
    with torch.no_grad(), SparseAttention(double, "quest:budget=4096", page_size=SIZE) as sparse:
        prefill(double, cache, tokens(3, PREFIX), mask)
        for layer in cache.layers:
            hidden = ~mask.bool()[:, None, :, None]
            for part in (layer.keys, layer.values):
                part[:, :, :PREFIX].masked_fill_(hidden, torch.nan)
                part[:, :, PREFIX:] = torch.nan
        (logits,) = blocks(double, cache, sparse, count=1, passes=1, mask=mask)
        for b in range(3):
            alone = new_cache(double)
            for number, layer in enumerate(cache.layers):
                seen = mask[b].bool()
                alone.update(
                    layer.keys[b : b + 1, :, :PREFIX][:, :, seen],
                    layer.values[b : b + 1, :, :PREFIX][:, :, seen],
                    number,
                )
            with sparse.block():
                places = torch.arange(PREFIX, PREFIX + BLOCK)[None]
                name = cache_name(double)
                own = double(tokens(3, BLOCK, seed=0)[b : b + 1], position_ids=places, **{name: alone}).logits
            torch.testing.assert_close(logits[b : b + 1], own, rtol=0, atol=1e-5)


@ON_4_54
def test_a_cache_without_room_says_so_and_stays_as_it_was(model: Any) -> None:
    cache = PagedCache(model.config, 1, PREFIX + BLOCK, page_size=SIZE)
    prefill(model, cache, tokens(1, PREFIX))
    with SparseAttention(model, "dense", page_size=SIZE) as sparse:
        blocks(model, cache, sparse, count=1)
        with pytest.raises(InvalidArgumentError, match="must have room for 56 tokens"):
            blocks(model, cache, sparse, count=1)
    assert cache.get_seq_length() == PREFIX + BLOCK
    cache.crop(-BLOCK)
    assert cache.get_seq_length() == PREFIX
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(InvalidArgumentError, match="must get its 1 sequences"):
        PagedCache(model.config, 1, 8, page_size=SIZE).update(torch.zeros(2, 2, 4, 16), torch.zeros(2, 2, 4, 16), 0)
    for wrong in ({"batch": 0}, {"tokens": 0}, {"page_size": 0}):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            PagedCache(model.config, **{"batch": 1, "tokens": 8, **wrong})


@ON_4_54
def test_sequences_of_a_paged_cache_can_be_reordered(model: Any) -> None:
    cache = PagedCache(model.config, 2, ROOM, page_size=SIZE)
    prefill(model, cache, tokens(2, PREFIX))
    before = cache.layers[0].keys[:, :, :PREFIX].clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys[:, :, :PREFIX], before.flip(0))


# Graphs: recorded by a tape, as a CUDA graph would be.


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(passes, "CapturedPasses", functools.partial(CapturedPasses, graph=Tape))
    yield


@ON_5
@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize(
    ("policy", "kind", "padding"),
    [
        ("losa:budget=16,active=2", "paged", 0),
        ("losa:budget=16,active=2", "static", 0),
        ("flashblock", "paged", 0),
        ("quest:budget=16", "paged", 15),
        ("mage:budget=16,dense_layers=1", "paged", 0),
        ("snapkv:capacity=24,window=4", "static", 0),
        ("sparsed:warmup=1", "paged", 0),
    ],
)
def test_graphs_give_the_bits_and_the_reports_of_plain_passes(model: Any, policy: str, kind: str, padding: int) -> None:
    found: list[list[torch.Tensor]] = []
    reports: list[list[PassReport]] = [[], []]
    mask = torch.ones(2, PREFIX, dtype=torch.long)
    mask[1, :padding] = 0
    for cuda_graph in (False, True):
        cache = fixed_cache(model, kind, 2)
        with SparseAttention(
            model, policy, PlainTorch(), page_size=SIZE, on_pass=reports[cuda_graph].append, cuda_graph=cuda_graph
        ) as sparse:
            sparse.decoder.attention.check_contents = False
            prefill(model, cache, tokens(2, PREFIX), mask)
            found.append(blocks(model, cache, sparse, count=3, passes=5, mask=mask))
        assert int(cache.get_seq_length()) == PREFIX + 3 * BLOCK
    for number, (plain, graphed) in enumerate(zip(*found, strict=True)):
        assert torch.equal(plain, graphed), number
    for one, other in zip(*reports, strict=True):
        assert (one.block, one.index, one.is_save) == (other.block, other.index, other.is_save)
        assert (one.density, one.bytes_read) == (other.density, other.bytes_read)
    assert sparse.graphs is not None and sparse.graphs.captures >= 3
    assert "forward" not in vars(model)


@ON_5
@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("policy", ["losa:budget=16,active=2", "mage:budget=16"])
def test_one_set_of_graphs_serves_blocks_and_prompts(model: Any, policy: str) -> None:
    """Four captures at most, while the context stays within an eighth; and none for the next prompt."""
    cache = fixed_cache(model, "paged", room=400)
    text = tokens(1, 260)
    with SparseAttention(model, policy, PlainTorch(), page_size=SIZE, cuda_graph=True) as sparse:
        for _ in range(2):
            cache.reset()
            prefill(model, cache, text)
            blocks(model, cache, sparse, count=2, passes=5)
        assert sparse.graphs is not None
        assert 2 <= sparse.graphs.captures <= 4
        other = fixed_cache(model, "paged", room=400)
        prefill(model, other, text)
        before = sparse.graphs.captures
        blocks(model, other, sparse, count=1, passes=5)
        assert sparse.graphs.captures == before + 1  # elsewhere in memory


@ON_5
@pytest.mark.usefixtures("taped")
def test_what_changes_under_graphs_is_refused(model: Any) -> None:
    cache, name = fixed_cache(model, "paged", room=PREFIX + 2 * BLOCK), cache_name(model)
    block, mask = tokens(1, BLOCK), torch.ones(1, PREFIX + BLOCK, dtype=torch.long)
    with torch.no_grad(), SparseAttention(model, "losa", PlainTorch(), page_size=SIZE, cuda_graph=True) as sparse:
        prefill(model, cache, tokens(1, PREFIX))
        with sparse.block():
            for _ in range(4):
                model(block, attention_mask=mask, **{name: cache})
            with pytest.raises(InvalidArgumentError, match="same tokens of the cache"):
                model(block, attention_mask=mask * (torch.arange(PREFIX + BLOCK) > 3), **{name: cache})
        with sparse.block(), pytest.raises(InvalidArgumentError, match=r"PagedCache or a StaticCache.*DynamicCache"):
            grown = new_cache(model)
            grown.update(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), 0)
            model(block, **{name: grown})
        with sparse.block(), pytest.raises(InvalidArgumentError, match="an empty one"):
            model(block, **{name: fixed_cache(model, "paged")})
        refusal = pytest.raises(InvalidArgumentError, match=r"torch\.autocast")
        with sparse.block(), torch.autocast("cpu", torch.bfloat16), refusal:
            model(block, **{name: cache})
        blocks(model, cache, sparse, count=2)
        with pytest.raises(InvalidArgumentError, match="room for"):
            blocks(model, cache, sparse, count=1)
    assert cache.get_seq_length() == PREFIX + 2 * BLOCK


@pytest.mark.parametrize(
    ("policy", "reason"), [("losa", "computes on cpu"), ("dkv-cache", "counts_passes = False"), ("fast-dllm", "on cpu")]
)
def test_the_switch_is_refused_with_reasons_before_the_model_is_touched(model: Any, policy: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        SparseAttention(model, policy, "torch", cuda_graph=True)
    assert SparseAttention.of(model) is None
    with pytest.raises(UnsupportedError, match="whole sequence"):
        SparseAttention(model, "dense", "torch", scope="sequence", cuda_graph=True)
    SparseAttention(model, "dense").detach()
