from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import InvalidArgumentError, PassInfo, PrefixAttention
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn_small_model import model as model_module
from sparse_dlm_attn_small_model.cache import KVCache
from sparse_dlm_attn_small_model.config import MASK_ID
from sparse_dlm_attn_small_model.model import TinyModel
from sparse_dlm_attn_small_model.weights import load_weights


def kv_of(cache: KVCache) -> list[np.ndarray]:
    layers = range(cache.config.layers)
    return [to_numpy(part) for layer in layers for part in cache.read(layer, 0, cache.length)]


def run(model: TinyModel, block: list[int], cache: KVCache, policy: str = "dense") -> np.ndarray:
    return to_numpy(model.forward([block], cache, PrefixAttention(policy, model.backend), PassInfo(0))[0])[0]


def decoded_densely(model: TinyModel, text: bytes, block_length: int, page_size: int = 16) -> KVCache:
    """Cache the text's blocks one after the other, each by a pass of the dense policy."""
    cache = model.empty_cache(block_length=block_length, page_size=page_size)
    for start in range(0, len(text), block_length):
        block = list(text[start : start + block_length])
        run(model, block, cache)
        cache.advance([block])
    return cache


@pytest.mark.clause("CONTEXT-5", "ATTEND-4")
@pytest.mark.parametrize("block_length", [8, 16, 32])
@pytest.mark.parametrize("rows", [32, 512])
def test_prefill_equals_decoding_the_same_blocks_one_after_the_other(
    model: TinyModel, text: bytes, block_length: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "ROWS_AT_ONCE", rows)
    prefilled = model.prefill(text[:160], block_length=block_length)
    stepwise = decoded_densely(model, text[:160], block_length, page_size=5)
    assert prefilled.tokens == stepwise.tokens == (tuple(text[:160]),)
    for ours, theirs in zip(kv_of(prefilled), kv_of(stepwise), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_only_whole_blocks_are_prefilled_and_later_bytes_do_not_reach_them(model: TinyModel, text: bytes) -> None:
    shorter, longer = model.prefill(text[:64]), model.prefill(text[:79])
    assert (shorter.length, longer.length) == (64, 64)
    assert (shorter.prompt_tokens, longer.prompt_tokens) == (64, 79)
    changed = model.prefill(text[:48] + bytes(16))
    for whole, other in zip(kv_of(shorter), kv_of(changed), strict=True):
        np.testing.assert_allclose(whole[:, :, :48], other[:, :, :48], atol=1e-5)
        assert not np.allclose(whole[:, :, 48:], other[:, :, 48:])


@pytest.fixture(scope="module")
def torch_model() -> Any:
    """The training code's forward pass."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    import torch_model

    return torch_model


def torch_logits(torch_model: ModuleType, tokens: list[int], seen: np.ndarray) -> np.ndarray:
    """Logits of every token with the shipped weights, by the training code's dense attention."""
    import torch

    config, weights = load_weights()
    packed = torch_model.PackedModel(
        config, {name: torch.from_numpy(values) for name, values in weights.items()}, compiled=False
    )

    class Mask:
        cos, sin = torch_model.rope_tables(config, torch.arange(len(tokens)))

        @staticmethod
        def dense_mask() -> torch.Tensor:
            return torch.from_numpy(seen)

    with torch.no_grad():
        return np.asarray(packed.logits(packed.hidden(torch.tensor(tokens), Mask)))


@pytest.mark.parametrize("block_length", [8, 16, 32])
def test_block_logits_equal_those_of_the_training_code(torch_model: Any, text: bytes, block_length: int) -> None:
    tokens = [*text[:96], *text[96:99], *[MASK_ID] * (block_length - 3)]
    block = np.arange(len(tokens)) // block_length
    expected = torch_logits(torch_model, tokens, block[None, :] <= block[:, None])
    model = TinyModel.load()
    got = run(model, tokens[96:], model.prefill(text[:96], block_length=block_length))
    np.testing.assert_allclose(got, expected[96:], atol=1e-4)


def test_full_sequence_logits_equal_those_of_the_training_code(torch_model: Any, text: bytes) -> None:
    tokens = [*text[:90], *[MASK_ID] * 16]
    expected = torch_logits(torch_model, tokens, np.ones((106, 106), dtype=bool))
    model = TinyModel.load()
    np.testing.assert_allclose(run(model, tokens, model.empty_cache()), expected, atol=1e-4)


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"", "empty prompt"),
        (bytes(513), "at most 512 bytes"),
        ("text", "encode"),
        ([3, 256], "256"),
        ([-1], "-1"),
        ([True], "True"),
        ([1.5], "1.5"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_a_bad_prompt_is_refused(model: TinyModel, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        model.prefill(prompt)
    assert caught.value.argument == "prompt"
