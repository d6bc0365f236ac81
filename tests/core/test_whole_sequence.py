"""A block that is the whole sequence, and rows that the model does not compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from problems import Array, block, ragged_context

from sparse_dlm_attn import (
    AttentionState,
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PassInfo,
    PassInputs,
    PrefixAttention,
    PrefixAttentionPolicy,
    Selection,
)

TOKENS = 13


def as_context(k: Array, v: Array, page_size: int = 4) -> Context:
    pages = -(-k.shape[2] // page_size)
    room = np.zeros((*k.shape[:2], pages * page_size, k.shape[3]), k.dtype)
    keys, values = room.copy(), room.copy()
    keys[:, :, : k.shape[2]], values[:, :, : k.shape[2]] = k, v
    return Context.from_dense(keys, values, page_size, [k.shape[2]] * len(k))


class EvenRows(PrefixAttentionPolicy[None]):
    """Compute every second row after pass 0."""

    name = "even-rows"

    def computed_tokens(self, info: PassInfo, rows: Any) -> Any:
        return rows if info.index == 0 else rows & (np.arange(rows.shape[1]) % 2 == 0)

    def select_pages(self, inputs: PassInputs[None], active: Any) -> Selection:
        return Selection.all_pages(inputs.context, inputs.tokens)


def test_a_context_of_another_length_is_refused() -> None:
    q, k, v = block(5, tokens=TOKENS)
    with pytest.raises(InvalidArgumentError, match="exactly the block's 13 tokens"):
        PrefixAttention("dense")(q, None, None, as_context(k[:, :, 1:], v[:, :, 1:]))
    with pytest.raises(InvalidTypeError, match="k must be"):
        PrefixAttention("dense")(q, None, v, as_context(k, v))
    with pytest.raises(InvalidTypeError, match="v must be"):
        PrefixAttention("dense")(q, k, None, as_context(k, v))
    with pytest.raises(InvalidTypeError, match="must be a Context"):
        PrefixAttention("dense")(q, None, None, None)  # type: ignore[arg-type]
    narrow = replace(as_context(k, v), k_pages=as_context(k, v).k_pages[..., :4],
                     v_pages=as_context(k, v).v_pages[..., :4])
    with pytest.raises(InvalidArgumentError, match="head_dim 8"):
        PrefixAttention("dense")(q, None, None, narrow)


@pytest.mark.parametrize("answer", [None, np.ones((2, 3), bool), np.ones((2, TOKENS))])
def test_an_answer_that_is_no_set_of_rows_is_refused(answer: Any) -> None:
    class Wrong(EvenRows):
        def computed_tokens(self, info: PassInfo, rows: Any) -> Any:
            return answer

    q, k, v = block(6, tokens=TOKENS)
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=r"computed_tokens\(\)"):
        PrefixAttention(Wrong())(q, k, v, ragged_context(7))


def test_the_place_in_a_window_is_checked() -> None:
    q, k, v = block(8, tokens=TOKENS)
    attention = PrefixAttention("dense")
    for wrong in (PassInfo(0, window=np.ones((2, 3), bool)), PassInfo(0, planned=np.ones((1, TOKENS), bool)),
                  PassInfo(0, window_index=np.array([0, 1, 2], np.int32))):
        with pytest.raises(InvalidArgumentError, match=r"info\.(window|planned)"):
            attention(q, k, v, ragged_context(9), None, wrong)
    for value in (-1, 2**31):
        with pytest.raises(InvalidArgumentError, match="window_index"):
            PassInfo(0, window_index=value)
    assert PassInfo(3).pass_in_window == 3
    assert PassInfo(3, window_index=np.array([1, 1], np.int32)).pass_in_window == 1


@pytest.mark.parametrize(
    ("order", "error"),
    [([[0, 2], [1, -1]], None), ([[2, 0, -1], [1, -1, -1]], None), ([[0, 1], [1, -1]], "planned once"),
     ([[0, 0], [1, -1]], "planned once"), ([[0, 2, 2], [1, -1, -1]], "planned once"),
     ([[0, 2], [-1, 1]], "planned once"), ([[0, 2], [1, -2]], "planned once"),
     ([[0, 2, 3], [1, -1, -1]], "planned once"), ([[0], [1]], "planned once"),
     ([[0, 2]], r"shape \(2, rows\)"), ([0, 2], r"shape \(2, rows\)"),
     ([[0.0, 2.0], [1.0, -1.0]], "dtype int8")],
)
def test_the_order_of_decoding_names_each_planned_row_once(order: Any, error: str | None) -> None:
    planned = np.array([[True, False, True], [False, True, False]])
    if error is None:
        assert PassInfo(0, planned=planned, planned_order=np.array(order)).planned is planned
        return
    with pytest.raises(InvalidArgumentError, match=f"planned_order.*{error}"):
        PassInfo(0, planned=planned, planned_order=np.array(order))


def test_an_order_of_decoding_needs_the_rows() -> None:
    with pytest.raises(InvalidArgumentError, match=r"planned_order.*Pass planned too"):
        PassInfo(0, planned_order=np.array([[0]]))


def test_a_state_is_known_to_remember_alone() -> None:
    seen: list[AttentionState | None] = []

    class Watching(EvenRows):
        def active_set(self, inputs: PassInputs[None]) -> Any:
            seen.append(inputs.state)
            return inputs.all_rows()

        def remember(self, inputs: PassInputs[None], active: Any, selection: Selection) -> None:
            seen.append(inputs.state)

    q, k, v = block(10, tokens=TOKENS)
    _, memory = PrefixAttention(Watching())(q, k, v, ragged_context(11))
    assert seen == [None, memory.state]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_pairs_count_what_active_rows_attend_to(heads: int) -> None:
    rng = np.random.default_rng(heads)
    context = ragged_context(12)
    q, k, v = block(13, tokens=TOKENS)
    spans = -(-TOKENS // 4)
    chosen = Selection(rng.random((2, heads, spans, context.pages)) < 0.5, 4)

    class Given(EvenRows):
        def computed_tokens(self, info: PassInfo, rows: Any) -> Any:
            return rows

        def active_set(self, inputs: PassInputs[None]) -> Any:
            return np.arange(TOKENS)[None].repeat(2, axis=0) % 3 != 1

        def select_pages(self, inputs: PassInputs[None], active: Any) -> Selection:
            return chosen

    _, memory = PrefixAttention(Given())(q, k, v, context)
    expected = np.zeros(2)
    for b, h, row in np.ndindex(2, 4, TOKENS):
        if row % 3 != 1:
            expected[b] += context.page_lengths[b][chosen.mask[b, h * heads // 4, row // 4]].sum()
    np.testing.assert_array_equal(memory.traffic.pairs, expected)
    np.testing.assert_array_equal(memory.traffic.dense_pairs, context.page_lengths.sum(axis=1) * 4 * TOKENS)
