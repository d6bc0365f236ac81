"""The driver: validation before work, memory that cannot be misused, traffic that is counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from problems import block, masked_softmax, ragged_context

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
    StaleMemoryError,
    UnsupportedError,
)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FirstRowOnly(PrefixAttentionPolicy[int]):
    """Recomputes row 0 after the first pass and counts the passes it has seen."""

    name: ClassVar[str] = "first-row-only"

    def active_set(self, inputs: PassInputs[int]) -> Array:
        first = np.arange(inputs.tokens)[None, :] == 0
        return inputs.rows_where(inputs.restarts, inputs.all_rows, lambda: inputs.no_rows() | first)

    def select_pages(self, inputs: PassInputs[int], active: Array) -> Selection:
        inputs.ops.page_scores(inputs.q, inputs.ops.page_bounds(inputs.context))
        return Selection.all_pages(inputs.context, inputs.tokens)

    def remember(self, inputs: PassInputs[int], active: Array, selection: Selection) -> int:
        return (inputs.memory or 0) + 1


def with_lengths(context: Context, lengths: Array, version: int = 0) -> Context:
    return Context(context.k_pages, context.v_pages, context.page_table, lengths, version=version)


@pytest.mark.clause("ATTEND-4", "BLOCK-1")
@pytest.mark.parametrize("empty", [False, True])
def test_dense_pass_is_one_softmax_over_context_and_block(empty: bool) -> None:
    context = ragged_context(0)
    if empty:
        context = with_lengths(context, np.zeros_like(context.page_lengths))
    q, k, v = block(1)
    out, memory = PrefixAttention("dense", "reference")(q, k, v, context)
    pages = Context(  # the block as one more page behind the context
        np.concatenate([_pad(context.k_pages), k]), np.concatenate([_pad(context.v_pages), v]),
        np.concatenate([context.page_table, 15 + np.arange(2)[:, None]], axis=1).astype(np.int32),
        np.concatenate([context.page_lengths, np.full((2, 1), 5, np.int32)], axis=1),
    )
    whole, _ = masked_softmax(
        q, pages, Selection.all_pages(pages, 5), np.ones((2, 5), bool), 1 / math.sqrt(8)
    )
    np.testing.assert_allclose(out, whole, atol=1e-6)
    assert memory.traffic.density.tolist() == ([0, 0] if empty else [1, 1])


def _pad(pages: Array) -> Array:
    return np.pad(pages, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=np.nan)


@pytest.mark.clause("REUSE-1", "DENSITY-1", "DENSITY-2")
def test_rows_that_are_not_active_keep_their_context_part_and_traffic_is_counted() -> None:
    context = ragged_context(2)
    q, k, v = block(3)
    attention = PrefixAttention(FirstRowOnly(), "reference")
    _, first = attention(q, k, v, context)
    moved = (q + 1).astype(np.float32)
    _, second = attention(moved, k, v, context, first, PassInfo(1))
    assert np.array_equal(second.state.out[:, :, 1:], first.state.out[:, :, 1:])
    assert not np.array_equal(second.state.out[:, :, 0], first.state.out[:, :, 0])
    assert second.policy_memory == 2
    tokens = context.page_lengths.sum(axis=1)
    pages = (context.page_lengths > 0).sum(axis=1)
    token_bytes = 2 * 8 * 4
    # Bounds are built in pass 0 from all keys (half of K and V) and only read afterwards.
    assert first.traffic.metadata_bytes.tolist() == (2 * pages * token_bytes + tokens * token_bytes).tolist()
    assert second.traffic.metadata_bytes.tolist() == (2 * pages * token_bytes).tolist()
    assert second.traffic.page_bytes.tolist() == (2 * tokens * token_bytes).tolist()
    assert np.array_equal(second.traffic.dense_bytes, second.traffic.page_bytes)
    attached = context.with_bounds(attention.backend.page_bounds(context))
    assert attention(q, k, v, attached)[1].traffic.key_reads == 0


@pytest.mark.clause("MEMORY-1")
def test_memory_of_a_block_is_dropped_at_pass_0() -> None:
    context = ragged_context(4)
    q, k, v = block(5)
    attention = PrefixAttention(FirstRowOnly(), "reference")
    _, memory = attention(q, k, v, context)
    _, memory = attention(q, k, v, context, memory, PassInfo(1))
    grown = with_lengths(context, np.full_like(context.page_lengths, 4), version=1)
    again, fresh = attention(q, k, v, grown, memory, PassInfo(0))
    expected, _ = attention(q, k, v, grown)
    assert np.array_equal(again, expected) and fresh.policy_memory == 1


@pytest.mark.clause("MEMORY-1", "POLICY-2")
def test_a_sequence_that_restarts_sees_nothing_of_its_earlier_block() -> None:
    context = ragged_context(6)
    q, k, v = block(7)
    attention = PrefixAttention(FirstRowOnly(), "reference")
    _, memory = attention(q, k, v, context)
    moved = (q + 1).astype(np.float32)
    mixed, after = attention(moved, k, v, context, memory, PassInfo(np.array([0, 1], np.int32)))
    assert np.array_equal(mixed[:1], attention(moved, k, v, context)[0][:1])
    assert np.array_equal(mixed[1:], attention(moved, k, v, context, memory, PassInfo(1))[0][1:])
    assert after.active.tolist() == [[True] * 5, [True, False, False, False, False]]


@pytest.mark.clause("MEMORY-2")
@pytest.mark.parametrize("change", ["policy", "layer", "version", "lengths", "table", "rows"])
def test_stale_memory_is_refused(change: str) -> None:
    context = ragged_context(8)
    q, k, v = block(9)
    attention = PrefixAttention(FirstRowOnly(), "reference")
    _, memory = attention(q, k, v, context, None, PassInfo(0, num_layers=2))
    info = PassInfo(1, layer=1 if change == "layer" else 0, num_layers=2)
    if change == "policy":
        attention = PrefixAttention("dense", "reference")
    elif change == "version":
        context = with_lengths(context, context.page_lengths, version=1)
    elif change == "lengths":
        context = with_lengths(context, np.full_like(context.page_lengths, 4))
    elif change == "table":
        context = Context(context.k_pages, context.v_pages, context.page_table[:, ::-1], context.page_lengths)
    elif change == "rows":
        q, k, v = block(9, tokens=6)
    with pytest.raises(StaleMemoryError):
        attention(q, k, v, context, memory, info)


@pytest.mark.clause("MEMORY-3")
def test_dropped_memory_restarts_in_the_middle_of_a_block() -> None:
    context = ragged_context(10)
    q, k, v = block(11)
    attention = PrefixAttention(FirstRowOnly(), "reference")
    assert np.array_equal(
        attention(q, k, v, context, None, PassInfo(3))[0], attention(q, k, v, context)[0]
    )


@pytest.mark.clause("DRIVER-1", "ERROR-1")
def test_bad_calls_name_argument_rule_and_value() -> None:
    context = ragged_context(12)
    q, k, v = block(13)
    attention = PrefixAttention("dense", "reference")
    cases: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (InvalidTypeError, "context must be a Context", (q, k, v, "cache")),
        (InvalidArgumentError, r"q must have shape .*; got shape \(2, 4, 5\)", (q[..., 0], k, v, context)),
        (InvalidTypeError, "q must be an array", (q.tolist(), k, v, context)),
        (InvalidTypeError, "k must have dtype float32; got dtype float64", (q, k.astype(float), v, context)),
        (InvalidArgumentError, r"k must have shape \(2, 2, 5, 8\)", (q, k[:, :1], v, context)),
        (InvalidArgumentError, "multiple of kv_heads=2", (q[:, :3], k, v, context)),
        (InvalidTypeError, "q must have dtype", (q.astype(int), k, v, context)),
        (InvalidArgumentError, "must hold 1 sequences", (q[:1], k[:1], v[:1], context)),
        (InvalidArgumentError, "at least one row", (q[:, :, :0], k[:, :, :0], v[:, :, :0], context)),
        (InvalidTypeError, "memory must be", (q, k, v, context, "x", PassInfo(1))),
        (InvalidTypeError, "info must be a PassInfo", (q, k, v, context, None, 1)),
        (InvalidArgumentError, "info.index must have shape", (q, k, v, context, None,
                                                              PassInfo(np.arange(3, dtype=np.int32)))),
    ]
    for error, words, arguments in cases:
        with pytest.raises(error, match=words):
            attention(*arguments)
    with pytest.raises(InvalidArgumentError, match="scale must be a finite positive"):
        attention(q, k, v, context, scale=0.0)
    with pytest.raises(InvalidArgumentError, match="head_dim 4"):
        attention(q[..., :4], k[..., :4], v[..., :4], context)


@pytest.mark.clause("CAPS-1")
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


@pytest.mark.clause("MERGE-1", "POLICY-5")
def test_overridden_reuse_and_merge_are_called_instead_of_the_fused_pass() -> None:
    @dataclass(frozen=True)
    class BlockOnly(PrefixAttentionPolicy[None]):
        name: ClassVar[str] = "block-only"

        def select_pages(self, inputs: PassInputs[None], active: Array) -> Selection:
            return Selection.all_pages(inputs.context, inputs.tokens)

        def merge(self, inputs: PassInputs[None], context_state: AttentionState,
                  block_state: AttentionState) -> Array:
            return block_state.out

    q, k, v = block(16)
    attention = PrefixAttention(BlockOnly(), "reference")
    out, _ = attention(q, k, v, ragged_context(17))
    assert np.array_equal(out, attention.backend.attend_block(q, k, v).out)


def test_info_accepts_ints_and_uniform_arrays_alike() -> None:
    assert PassInfo(np.array([2, 2])).index == 2
    assert isinstance(PassInfo([0, 1]).index, np.ndarray)
    assert PassInfo(0, is_save=np.array([True, True])).is_save is True
    with pytest.raises(InvalidArgumentError, match=r"layer must be in 0\.\.num_layers-1 = 0\.\.1"):
        PassInfo(0, layer=2, num_layers=2)
    with pytest.raises(InvalidArgumentError, match="index must be a pass number from 0"):
        PassInfo(-1)
