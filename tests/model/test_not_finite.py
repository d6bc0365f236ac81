"""Logits that are not finite end a decoding with an error, or with text: never in a loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import InvalidArgumentError
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn_tiny.cache import PrefixCache
from sparse_dlm_attn_tiny.config import MASK_ID, STOP_BYTE
from sparse_dlm_attn_tiny.decoding import decode_blocks, decode_full_sequence, decode_together
from sparse_dlm_attn_tiny.model import BlockPass, TinyModel
from sparse_dlm_attn_tiny.schedule import Schedule, confidences

Spoil = Callable[[np.ndarray, np.ndarray, int], None]


class Spoiled(TinyModel):
    """The small model with its logits changed: ``spoil(logits, masked, pass)``, all of a batch."""

    def __init__(self, base: TinyModel, spoil: Spoil) -> None:
        self.__dict__.update(base.__dict__)
        self.spoil, self.passes = spoil, 0

    def changed(self, logits: Any, tokens: Any) -> Any:
        self.passes += 1
        assert self.passes < 100, "the loop does not end"
        values = np.array(to_numpy(logits), copy=True)
        self.spoil(values, np.asarray(tokens) == MASK_ID, self.passes - 1)
        return values

    def forward_block(self, tokens: Any, *given: Any, **named: Any) -> BlockPass:
        result = super().forward_block(tokens, *given, **named)
        return replace(result, logits=self.changed(result.logits, tokens))

    def forward_sequence(self, tokens: Any, *given: Any, **named: Any) -> Any:
        logits, memories = super().forward_sequence(tokens, *given, **named)
        return self.changed(logits[None], [tokens])[0], memories


def together(model: TinyModel, prompt: bytes, **options: Any) -> list[Any]:
    prefix = PrefixCache.together([model.prefill(prompt, block_length=8)] * 2)
    return decode_together(
        model, [prompt] * 2, policy="dense", prefix=prefix, block_length=8, max_blocks=(1, 2), **options
    )


LOOPS: dict[str, Callable[[TinyModel, bytes], Any]] = {
    "block, steps": lambda model, prompt: decode_blocks(
        model, prompt, policy="dense", block_length=8, steps=4, max_blocks=2),
    "block, threshold": lambda model, prompt: decode_blocks(
        model, prompt, policy="losa:budget=8", block_length=8, threshold=0.9, max_blocks=2),
    "block, rows left out": lambda model, prompt: decode_blocks(
        model, prompt, policy="dkv-cache", block_length=8, steps=4, max_blocks=2),
    "sequence, steps": lambda model, prompt: decode_full_sequence(model, prompt, new_tokens=8, steps=4),
    "sequence, threshold": lambda model, prompt: decode_full_sequence(
        model, prompt, new_tokens=8, threshold=0.9),
    "sequence, random": lambda model, prompt: decode_full_sequence(
        model, prompt, policy="dkv-cache:mode=greedy", new_tokens=8, steps=4, order="random"),
    "together": lambda model, prompt: together(model, prompt, steps=4),
}
every_loop = pytest.mark.parametrize("loop", LOOPS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@every_loop
@pytest.mark.clause("ERROR-1")
def test_rows_without_a_softmax_are_an_error_that_says_where(
    model: TinyModel, text: bytes, loop: str, value: float
) -> None:
    def spoil(logits: np.ndarray, masked: np.ndarray, number: int) -> None:
        if number == 1:
            logits[masked] = value

    spoiled, message = Spoiled(model, spoil), r"^logits must be .* not finite in pass 1 of .*: rows \[\d"
    with pytest.raises(InvalidArgumentError, match=message):
        LOOPS[loop](spoiled, text[:32])
    assert spoiled.passes == 2


@every_loop
def test_one_nan_in_one_masked_row_is_enough(model: TinyModel, text: bytes, loop: str) -> None:
    def spoil(logits: np.ndarray, masked: np.ndarray, number: int) -> None:
        sequence, row = np.argwhere(masked)[-1]
        logits[sequence, row, 7] = np.nan

    with pytest.raises(InvalidArgumentError, match=r"got 1 of \d+ that are not finite in pass 0"):
        LOOPS[loop](Spoiled(model, spoil), text[:32])


@every_loop
def test_rows_that_are_decoded_already_may_hold_anything(
    model: TinyModel, text: bytes, loop: str
) -> None:
    def spoil(logits: np.ndarray, masked: np.ndarray, number: int) -> None:
        logits[~masked] = np.nan

    got, wanted = (LOOPS[loop](one, text[:32]) for one in (Spoiled(model, spoil), model))
    got, wanted = ([each] if loop != "together" else each for each in (got, wanted))
    assert [one.generated for one in got] == [one.generated for one in wanted]


@every_loop
def test_minus_infinity_keeps_a_byte_from_being_decoded(model: TinyModel, text: bytes, loop: str) -> None:
    def spoil(logits: np.ndarray, masked: np.ndarray, number: int) -> None:
        logits[..., :97] = logits[..., 105:] = -np.inf

    results = LOOPS[loop](Spoiled(model, spoil), text[:32])
    for result in results if loop == "together" else [results]:
        assert set(result.generated) <= set(b"abcdefgh")


def test_a_sequence_that_has_ended_may_go_wrong_while_another_is_decoded(
    model: TinyModel, text: bytes
) -> None:
    def spoil(logits: np.ndarray, masked: np.ndarray, number: int) -> None:
        logits[:, :, STOP_BYTE] = -np.inf
        if number > 4:  # the second block
            logits[0] = np.nan

    got = together(Spoiled(model, spoil), text[:32], steps=4)
    assert [len(one.generated) for one in got] == [8, 16]


@pytest.mark.parametrize("options", [{"steps": 2}, {"threshold": 0.5}])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 0.5, 1.0])
def test_a_schedule_chooses_a_masked_token_whatever_its_confidence(
    value: float, options: dict[str, Any]
) -> None:
    masked = np.array([False, True, True, False, False, True])
    schedule = Schedule(6, **options)
    for confidence in (np.full(6, value), np.where(masked, value, 0.9), np.where(masked, 0.1, value)):
        chosen = schedule.choose(0, masked, confidence)
        assert chosen.any() and not (chosen & ~masked).any()
    mixed = np.array([0.9, np.nan, 0.2, 0.9, 0.9, 0.3])
    assert np.flatnonzero(Schedule(6, steps=6).choose(0, masked, mixed)).tolist() == [5]
    assert np.flatnonzero(Schedule(6, steps=3).choose(0, masked, mixed)).tolist() == [2, 5]


def test_finite_logits_of_any_size_have_a_softmax() -> None:
    logits = np.zeros((1, 4, 256))
    logits[0, 0, 3] = logits[0, 1, 3] = np.finfo(float).max
    logits[0, 1, 4:] = np.finfo(float).min
    logits[0, 2] = np.finfo(float).min
    best, confidence = confidences(logits, np.ones((1, 4), bool), "a test")
    assert best.tolist() == [[3, 3, 0, 0]]
    np.testing.assert_array_equal(confidence, [[1, 1, 1 / 256, 1 / 256]])
    assert Schedule(4, threshold=0.5).choose(0, np.ones(4, bool), confidence[0]).tolist() == [1, 1, 0, 0]
