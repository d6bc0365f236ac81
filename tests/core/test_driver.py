"""The driver: validation before work, memory that cannot be misused, traffic that is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from problems import block, ragged_context

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

Array = np.ndarray[Any, Any]


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


def test_a_problem_that_the_backend_does_not_declare_is_refused_with_every_reason() -> None:
    from sparse_dlm_attn import Capabilities
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


def test_info_accepts_ints_and_uniform_arrays_alike() -> None:
    assert PassInfo(np.array([2, 2])).index == 2
    assert isinstance(PassInfo([0, 1]).index, np.ndarray)
    assert PassInfo(0, is_save=np.array([True, True])).is_save is True
    with pytest.raises(InvalidArgumentError, match=r"layer must be in 0\.\.num_layers-1 = 0\.\.1"):
        PassInfo(0, layer=2, num_layers=2)
    with pytest.raises(InvalidArgumentError, match="index must be a pass number from 0"):
        PassInfo(-1)
