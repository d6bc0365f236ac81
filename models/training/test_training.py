"""Tests of the training code on a CPU: ``PYTHONPATH=.:models:models/training pytest models/training``."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from data import DocumentBuilder, Mixture, TextSource, make_batch
from evaluate import make_layout
from layout import TILE, Rows, _tiles, block_training_rows, decoding_rows, full_rows
from torch_model import PackedModel, initial_weights

from sparse_dlm_attn_small_model import retrieval
from sparse_dlm_attn_small_model.config import MASK_ID, TinyConfig

LENGTHS = (256, 128, 256)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> PackedModel:
    """Return a narrow model whose every layer changes the residual stream."""
    config = TinyConfig(layers=3, width=64, head_dim=32, hidden=96)
    weights = initial_weights(config, 0)
    generator = torch.Generator().manual_seed(1)
    for name in weights:
        if name.endswith(("output", "down")):
            weights[name] = torch.randn(weights[name].shape, generator=generator) * 0.1
    return PackedModel(config, weights, compiled=False)


@pytest.fixture(scope="module")
def source() -> TextSource:
    """Return the held-out text: any English will do here."""
    return TextSource(retrieval.haystack_text())


def draw_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Return random bytes and a copy with half of them masked."""
    generator = torch.Generator().manual_seed(2)
    clean = torch.randint(256, (sum(LENGTHS),), generator=generator)
    masked = torch.rand(len(clean), generator=generator) < 0.5
    return clean, torch.where(masked, MASK_ID, clean)


def row_logits(model: PackedModel, noisy: torch.Tensor, clean: torch.Tensor, block: int) -> torch.Tensor:
    """Return all logits of a block-training row."""
    layout = make_layout(model, block_training_rows(LENGTHS, block), CPU)
    return model.logits(model.hidden(torch.cat([noisy, clean]), layout))


@pytest.mark.parametrize("block", [8, 16, 32])
@pytest.mark.parametrize("index", [0, 3, -1])
def test_a_noisy_block_sees_no_clean_token_of_its_own_or_later_blocks(
    model: PackedModel, block: int, index: int
) -> None:
    """Changing them leaves the same bits."""
    clean, noisy = draw_tokens()
    index %= LENGTHS[0] // block
    changed = clean.clone()
    changed[index * block : LENGTHS[0]] = (changed[index * block : LENGTHS[0]] + 1) % 256
    before = row_logits(model, noisy, clean, block)
    after = row_logits(model, noisy, changed, block)
    end = (index + 1) * block
    assert torch.equal(before[:end], after[:end])
    assert torch.equal(before[LENGTHS[0] : sum(LENGTHS)], after[LENGTHS[0] : sum(LENGTHS)])
    if end < LENGTHS[0]:
        assert not torch.equal(before[end : LENGTHS[0]], after[end : LENGTHS[0]])


def test_a_noisy_block_is_seen_by_itself_only(model: PackedModel) -> None:
    """Masking block 2 changes block 2's logits and no others."""
    clean, noisy = draw_tokens()
    changed = noisy.clone()
    changed[32:48] = MASK_ID
    difference = row_logits(model, noisy, clean, 16) != row_logits(model, changed, clean, 16)
    rows = difference.any(dim=1).nonzero().flatten()
    assert rows.min() >= 32
    assert rows.max() < 48


@pytest.mark.parametrize("block", [8, 16, 32])
def test_training_logits_are_those_of_decoding(model: PackedModel, block: int) -> None:
    """A noisy block after clean ones gives what decoding computes from the same tokens."""
    clean, noisy = draw_tokens()
    training = row_logits(model, noisy, clean, block)
    layout = make_layout(model, decoding_rows(LENGTHS[:1], block), CPU)
    here = slice(4 * block, 5 * block)
    tokens = clean[: LENGTHS[0]].clone()
    tokens[here] = noisy[here]
    decoding = model.logits(model.hidden(tokens, layout))
    torch.testing.assert_close(decoding[here], training[here], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "rows",
    [
        block_training_rows((512, 256, 128), 16),
        block_training_rows((512, 256), 32),
        full_rows((512, 256)),
        full_rows((512, 256), used=400),
        decoding_rows((512, 128), 8),
    ],
)
def test_tiles_are_those_of_the_whole_mask(model: PackedModel, rows: Rows) -> None:
    """What FlexAttention skips is masked, and what it does not mask is wholly visible."""
    mask = make_layout(model, rows, CPU).dense_mask().numpy()
    count = len(mask) // TILE
    tiles = mask.reshape(count, TILE, count, TILE).transpose(0, 2, 1, 3).reshape(count, count, -1)
    partial, full = _tiles(rows)
    np.testing.assert_array_equal(full, tiles.all(-1))
    np.testing.assert_array_equal(partial, tiles.any(-1) & ~tiles.all(-1))


@pytest.mark.parametrize("length", [512, 1024, 4096, 16384])
@pytest.mark.parametrize("block", [8, 16, 32])
def test_documents_fill_their_length_without_held_out_names(source: TextSource, length: int, block: int) -> None:
    """Every document has the right size, ends with an answer, and keeps the held-out names out."""
    for seed in range(5):
        mixture = Mixture((length,), repeat=0.5 * (seed % 2), max_episodes=2)
        rng = random.Random(seed)
        text, kinds = DocumentBuilder(source, rng, length, block, mixture).build()
        assert len(text) == len(kinds) == length
        assert text[-1] == 0
        names = re.findall(rb"codes? of ([A-Z][a-z]{4})", bytes(text))
        assert names
        assert not any(retrieval.is_held_out_name(name.decode()) for name in names)


def test_every_answer_follows_from_the_facts_before_it(source: TextSource) -> None:
    """Resolving the facts of a document by hand gives each answer in it."""
    mixture = Mixture((4096,), max_episodes=2)
    for seed in range(20):
        text, _ = DocumentBuilder(source, random.Random(seed), 4096, 16, mixture).build()
        answered = 0
        for match in re.finditer(rb"code of (\w+)\?\nAnswer: ([^\0]+)\0", bytes(text)):
            facts = dict(re.findall(rb"The code of (\w+) is (\w+)\.", bytes(text[: match.start()])))
            value = facts[match[1]]
            expected = value if value.isdigit() else value + b" is " + facts[value]
            assert match[2] == expected + b"."
            answered += 1
        assert answered


def test_a_batch_is_a_function_of_its_seed(source: TextSource) -> None:
    """The same seed gives the same bytes."""
    mixture = Mixture((512, 512))
    first, second = (make_batch(source, "seed", 0, mixture) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.kinds, second.kinds)
