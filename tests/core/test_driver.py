"""The driver: what a policy is asked, in which order, and what it may answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from problems import Array, block, ragged_context

from sparse_dlm_attn import (
    AttentionState,
    InvalidArgumentError,
    InvalidTypeError,
    PassInfo,
    PassInputs,
    PrefixAttention,
    PrefixAttentionPolicy,
    Selection,
    UnsupportedError,
)


def test_a_problem_that_the_backend_does_not_declare_is_refused_with_every_reason() -> None:
    from sparse_dlm_attn.capabilities import Capabilities
    from sparse_dlm_attn_reference import ReferenceBackend

    class Narrow(ReferenceBackend):
        @property
        def capabilities(self) -> Capabilities:
            return Capabilities(dtypes=("float16",), head_dims=(64,), max_block_length=4)

    q, k, v = block(14)
    with pytest.raises(UnsupportedError, match=r"dtype float32.*head_dim 8.*block of 5 tokens exceeds 4"):
        PrefixAttention("dense", Narrow())(q, k, v, ragged_context(15))


def test_overridden_reuse_and_merge_are_called_instead_of_the_fused_pass() -> None:
    @dataclass(frozen=True)
    class BlockOnly(PrefixAttentionPolicy[None]):
        name: ClassVar[str] = "block-only"

        def select_pages(self, inputs: PassInputs[None], active: Array) -> Selection:
            return Selection.all_pages(inputs.context, inputs.tokens)

        def merge(self, inputs: PassInputs[None], context_state: AttentionState, block_state: AttentionState) -> Array:
            return block_state.out

    q, k, v = block(16)
    attention = PrefixAttention(BlockOnly(), "reference")
    out, _ = attention(q, k, v, ragged_context(17))
    assert np.array_equal(out, attention.backend.attend_block(q, k, v).out)


def test_bounds_that_a_context_brings_are_not_built_again() -> None:
    context, attention = ragged_context(2), PrefixAttention("quest:budget=8")
    attached = context.with_bounds(attention.backend.page_bounds(context))
    assert [attention(*block(3), view)[1].traffic.key_reads for view in (context, attached)] == [1, 0]


TOKENS = 13


class EvenRows(PrefixAttentionPolicy[None]):
    """Compute every second row after pass 0."""

    name = "even-rows"

    def computed_tokens(self, info: PassInfo, rows: Any) -> Any:
        return rows if info.index == 0 else rows & (np.arange(rows.shape[1]) % 2 == 0)

    def select_pages(self, inputs: PassInputs[None], active: Any) -> Selection:
        return Selection.all_pages(inputs.context, inputs.tokens)


@pytest.mark.parametrize("answer", [None, np.ones((2, 3), bool), np.ones((2, TOKENS))])
def test_an_answer_that_is_no_set_of_rows_is_refused(answer: Any) -> None:
    class Wrong(EvenRows):
        def computed_tokens(self, info: PassInfo, rows: Any) -> Any:
            return answer

    q, k, v = block(6, tokens=TOKENS)
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=r"computed_tokens\(\)"):
        PrefixAttention(Wrong())(q, k, v, ragged_context(7))


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
