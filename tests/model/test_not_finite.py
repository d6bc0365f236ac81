"""Logits that are not finite end a decoding with an error, or with text: never in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn_small_model.cache import KVCache
from sparse_dlm_attn_small_model.config import STOP_BYTE
from sparse_dlm_attn_small_model.decoding import decode_blocks, decode_full_sequence, decode_together
from sparse_dlm_attn_small_model.model import TinyModel
from sparse_dlm_attn_small_model.records import Decoded
from sparse_dlm_attn_small_model.schedule import Schedule, confidences


def blocks(**options: Any) -> Callable[[TinyModel, bytes], list[Decoded]]:
    return lambda model, prompt: [decode_blocks(model, prompt, block_length=8, max_blocks=2, **options)]


def sequence(**options: Any) -> Callable[[TinyModel, bytes], list[Decoded]]:
    return lambda model, prompt: [decode_full_sequence(model, prompt, new_tokens=8, **options)]


def together(model: TinyModel, prompt: bytes) -> list[Decoded]:
    prefix = KVCache.together([model.prefill(prompt, block_length=8)] * 2)
    return decode_together(
        model, [prompt] * 2, policy="dense", prefix=prefix, block_length=8, max_blocks=(1, 2), steps=4
    )


LOOPS: dict[str, Callable[[TinyModel, bytes], list[Decoded]]] = {
    "block, threshold": blocks(policy="losa:budget=8", threshold=0.9),
    "block, rows left out": blocks(policy="dkv-cache", steps=4),
    "sequence, threshold": sequence(threshold=0.9),
    "sequence, random": sequence(policy="dkv-cache:mode=greedy", steps=4, order="random"),
    "together": together,
}
every_loop = pytest.mark.parametrize("loop", LOOPS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@every_loop
@pytest.mark.clause("ERROR-1")
def test_rows_without_a_softmax_are_an_error_that_says_where(
    model: TinyModel, changed: Any, text: bytes, loop: str, value: float
) -> None:
    def spoil(logits: np.ndarray, masked: np.ndarray, number: int) -> None:
        if number == 1:
            logits[masked] = value

    spoiled = changed(model, spoil)
    with pytest.raises(InvalidArgumentError, match=r"^logits .* not finite in pass 1 of block 0: rows \[\d"):
        LOOPS[loop](spoiled, text[:32])
    assert len(spoiled.infos) == 2


@every_loop
def test_rows_that_are_decoded_already_may_hold_anything(
    model: TinyModel, changed: Any, text: bytes, loop: str
) -> None:
    def spoil(logits: np.ndarray, masked: np.ndarray, number: int) -> None:
        logits[~masked] = np.nan

    got, wanted = (LOOPS[loop](one, text[:32]) for one in (changed(model, spoil), model))
    assert [one.generated for one in got] == [one.generated for one in wanted]


@every_loop
def test_minus_infinity_keeps_a_byte_from_being_decoded(model: TinyModel, changed: Any, text: bytes, loop: str) -> None:
    def spoil(logits: np.ndarray, masked: np.ndarray, number: int) -> None:
        logits[..., :97] = logits[..., 105:] = -np.inf

    for result in LOOPS[loop](changed(model, spoil), text[:32]):
        assert set(result.generated) <= set(b"abcdefgh")


def test_a_sequence_that_has_ended_may_go_wrong_while_another_is_decoded(
    model: TinyModel, changed: Any, text: bytes
) -> None:
    def spoil(logits: np.ndarray, masked: np.ndarray, number: int) -> None:
        logits[:, :, STOP_BYTE] = -np.inf
        if number > 4:  # the second block
            logits[0] = np.nan

    assert [len(one.generated) for one in together(changed(model, spoil), text[:32])] == [8, 16]


def test_finite_logits_of_any_size_have_a_softmax() -> None:
    logits = np.zeros((1, 4, 256))
    logits[0, 0, 3] = logits[0, 1, 3] = np.finfo(float).max
    logits[0, 1, 4:] = np.finfo(float).min
    logits[0, 2] = np.finfo(float).min
    best, confidence = confidences(logits, np.ones((1, 4), bool), "a test")
    assert best.tolist() == [[3, 3, 0, 0]]
    np.testing.assert_array_equal(confidence, [[1, 1, 1 / 256, 1 / 256]])
    assert Schedule(4, threshold=0.5).choose(0, np.ones(4, bool), confidence[0]).tolist() == [1, 1, 0, 0]
