"""What is refused, and in which words: each error names the argument, the rule and what was given."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    PageBounds,
    PassInfo,
    PrefixAttention,
    Selection,
    SparseAttentionError,
    get_backend,
    get_policy,
)
from sparse_dlm_attn.capabilities import Problem
from sparse_dlm_attn.operators import largest_changes, pooled_scores
from sparse_dlm_attn.values import softmax_scale

CACHE = np.zeros((1, 1, 12, 4), np.float32)
LONG = np.zeros((2, 1, 16, 4), np.float32)
PADDED = np.zeros((2, 1, 8, 4), np.float32)
VALID = np.ones((2, 8), bool)
SIDEWAYS = np.zeros((8, 2, 1, 4), np.float32).transpose(1, 2, 0, 3)  # tokens outside sequences
CONTEXT = ragged_context(0)  # 15 physical pages of 4 tokens; 2 sequences of 6
ONE_PAGE = Context.from_dense(*np.zeros((2, 1, 1, 64, 8), np.float32), 16)
Q, K, V = block(1)  # 4 query heads and 2 KV heads, 5 rows, 8 channels
EVERY = Selection.all_pages(CONTEXT, 5)
REFERENCE = get_backend("reference")
PLANNED = np.array([[True, False, True], [False, True, False]])


def changed(array: Array, at: Any, value: int) -> Array:
    array = array.copy()
    array[at] = value
    return array


def attend(q: Any = Q, k: Any = K, v: Any = V, context: Any = CONTEXT, *rest: Any, **options: Any) -> Any:
    return PrefixAttention("dense", "reference")(q, k, v, context, *rest, **options)


def whole(q: Any = Q, k: Any = None, v: Any = None, *, keys: int = 5, channels: int = 8) -> Any:
    cache = np.zeros((2, 2, 8, channels), np.float32)
    return attend(q, k, v, Context.from_dense(cache, cache, 4, [keys] * 2))


def tensor(values: Array) -> Any:
    return pytest.importorskip("torch").from_numpy(np.array(values))


def grow(first: Any, pages: int = 4, heads: int = 1) -> Any:
    known = np.zeros((1, heads, pages, 8), np.float32)
    return REFERENCE.extend_bounds(ONE_PAGE, PageBounds(known, known), first)


def order(*rows: Any, dtype: str = "int64") -> PassInfo:
    return PassInfo(0, planned=PLANNED, planned_order=np.array(rows, dtype))


Call = Callable[[], Any]
VALUES: list[tuple[str, Call]] = [
    # A context of a dense cache
    ("multiple of page_size=5", lambda: Context.from_dense(CACHE, CACHE, 5)),
    ("at least 1 token", lambda: Context.from_dense(CACHE, CACHE, 0)),
    ("at least 1 token", lambda: Context.from_dense(CACHE, CACHE, True)),
    ("0..12", lambda: Context.from_dense(CACHE, CACHE, 4, [13])),
    ("0..12", lambda: Context.from_dense(CACHE, CACHE, 4, [-1])),
    (r"lengths must have shape \(1\)", lambda: Context.from_dense(CACHE, CACHE, 4, [1, 2])),
    ("contiguous", lambda: Context.from_dense(LONG[:, :, :12], LONG[:, :, :12], 4)),  # a slice would be misread
    ("lengths must be None together with valid", lambda: Context.from_dense(PADDED, PADDED, 4, [8, 8], valid=VALID)),
    (r"valid must have shape \(2, 8\)", lambda: Context.from_dense(PADDED, PADDED, 4, valid=VALID[:1])),
    ("batch stride", lambda: Context.from_dense(SIDEWAYS, SIDEWAYS, 4, valid=VALID)),
    ("v must be laid out as k is", lambda: Context.from_dense(PADDED, LONG[:, :, :8], 4, valid=VALID)),
    # A context
    (
        r"page_table must point into .* got 15 at \(1, 5\)",
        lambda: replace(CONTEXT, page_table=changed(CONTEXT.page_table, (1, -1), 15)).check_contents(),
    ),
    (
        r"0..page_size = 0..4; got 5 at \(1, 2\)",
        lambda: replace(CONTEXT, page_lengths=changed(CONTEXT.page_lengths, (1, 2), 5)).check_contents(),
    ),
    (
        r"page_segments must be 0 prompt.* got 7",
        lambda: replace(CONTEXT, page_segments=np.full((2, 6), 7, np.int8)).check_contents(),
    ),
    ("segment must be 0", lambda: CONTEXT.in_segment(3)),
    *(
        ("contiguous in its last axis", lambda pages=pages: replace(CONTEXT, k_pages=pages, v_pages=pages.copy("C")))
        for pages in (CONTEXT.k_pages[..., ::2], CONTEXT.k_pages[..., ::-1], np.asfortranarray(CONTEXT.k_pages))
    ),
    *(
        (
            f"{field} must be a ndarray .*k_pages is; got a Tensor",
            lambda field=field: replace(CONTEXT, **{field: tensor(getattr(CONTEXT, field))}),
        )
        for field in ("v_pages", "page_table", "page_lengths")
    ),
    # A selection
    ("span", lambda: Selection(EVERY.mask, 0)),
    ("capacity must be at least 0; got -1", lambda: EVERY.page_lists(-1)),
    ("context", lambda: EVERY.to_csr(None)),  # type: ignore[arg-type]
    (
        "2 sequences of 6 pages; got 2 sequences of 2 pages",
        lambda: EVERY.to_csr(Context.from_dense(*np.zeros((2, 2, 2, 8, 8), np.float32), 4)),
    ),
    ("CSR", lambda: EVERY.to_csr(CONTEXT)),  # a partial page in the middle
    ("context", lambda: Selection.all_pages(None, 5)),  # type: ignore[arg-type]
    ("tokens must be at least 0; got -1", lambda: Selection.all_pages(CONTEXT, -1)),
    ("1 spans of 5 rows; got 6", lambda: EVERY.loaded(np.ones((2, 6), bool), 4, 2)),
    ("1 spans of 5 rows; got 0", lambda: EVERY.for_rows(4, 0)),
    # A pass
    (r"q must have shape .*; got shape \(2, 4, 5\)", lambda: attend(Q[..., 0])),
    (r"k must have shape \(2, 2, 5, 8\)", lambda: attend(k=K[:, :1])),
    ("multiple of kv_heads=2", lambda: attend(Q[:, :3])),
    ("must hold 1 sequences", lambda: attend(Q[:1], K[:1], V[:1])),
    ("at least one row", lambda: attend(Q[:, :, :0], K[:, :, :0], V[:, :, :0])),
    ("head_dim 4", lambda: attend(Q[..., :4], K[..., :4], V[..., :4])),
    ("scale must be a finite positive", lambda: attend(scale=0.0)),
    ("info.index must have shape", lambda: attend(Q, K, V, CONTEXT, None, PassInfo(np.arange(3, dtype=np.int32)))),
    (r"info\.window", lambda: attend(Q, K, V, CONTEXT, None, PassInfo(0, window=np.ones((2, 3), bool)))),
    (r"info\.planned", lambda: attend(Q, K, V, CONTEXT, None, PassInfo(0, planned=np.ones((1, 5), bool)))),
    (r"info\.window_index", lambda: attend(Q, K, V, CONTEXT, None, PassInfo(0, window_index=np.arange(3)))),
    ("exactly the block's 5 tokens", lambda: whole(keys=4)),
    ("head_dim 8", lambda: whole(channels=4)),
    # Its place in the block
    (r"layer must be in 0\.\.num_layers-1 = 0\.\.1", lambda: PassInfo(0, layer=2, num_layers=2)),
    ("index must be a pass number from 0", lambda: PassInfo(-1)),
    (r"index .*\[-1, 2\]", lambda: PassInfo([-1, 2])),
    ("window_index", lambda: PassInfo(0, window_index=-1)),
    ("window_index", lambda: PassInfo(0, window_index=2**31)),
    *(
        (field, lambda field=field, wrong=wrong: PassInfo(**{"index": 0, field: wrong}))
        for field in ("index", "is_save", "layer", "num_layers", "total_passes")
        for wrong in ("1", 2.5, [1.5], {}, np.zeros((0,)), [[1], [2, 3]], *(() if field == "is_save" else (True, -1)))
    ),
    (r"planned_order.*Pass planned too", lambda: PassInfo(0, planned_order=np.array([[0]]))),
    *(
        ("planned_order.*planned once", lambda rows=rows: order(*rows))
        for rows in (
            ([0, 1], [1, -1]),
            ([0, 0], [1, -1]),
            ([0, 2, 2], [1, -1, -1]),
            ([0, 2], [-1, 1]),
            ([0, 2], [1, -2]),
            ([0, 2, 3], [1, -1, -1]),
            ([0], [1]),
        )
    ),
    (r"planned_order.*shape \(2, rows\)", lambda: order([0, 2])),
    (r"planned_order.*shape \(2, rows\)", lambda: order(0, 2)),
    ("planned_order.*dtype int8", lambda: order([0, 2], [1, -1], dtype="float64")),
    *(
        ("drift must be one of previous, refresh", lambda drift=drift: get_policy("losa", drift=drift))
        for drift in (np.zeros(2), ["previous"])
    ),
    # Operators
    *(
        ("count|mass", lambda rule=rule: largest_changes(np.zeros((1, 2), np.float32), **rule))
        for rule in ({}, {"count": 1, "mass": 0.5}, {"count": -1}, {"count": 1.5}, {"mass": 1.1}, {"mass": -0.1})
    ),
    *(("from_page", lambda first=first: grow(first)) for first in (-1, 5, True, 1.0)),
    ("bounds must hold the first from_page=3 pages", lambda: grow(3, pages=2)),
    (r"bounds\.lower", lambda: grow(1, heads=2)),
    *(
        ("lse", lambda pooled=pooled: pooled(Q, CONTEXT, span=2, lse=np.zeros((2, 4, 4), np.float32)))
        for pooled in (pooled_scores, REFERENCE.pooled_scores)
    ),
    *(
        ("scale", lambda scale=scale: softmax_scale(8, scale))
        for scale in (True, "1", math.nan, math.inf, 0, -1.0, 10**400, [1.0])
    ),
    ("lse must be a ndarray", lambda: AttentionState(np.zeros((1, 1, 1, 2), "f4"), tensor(np.zeros((1, 1, 1), "f4")))),
    ("multiple of kv_heads, itself at least 1", lambda: REFERENCE.why_not(Problem("float32", 8, 4, 4, 0, 5))),
]
TYPES: list[tuple[str, Call]] = [
    ("page_table must have dtype int32", lambda: replace(CONTEXT, page_table=CONTEXT.page_table.astype(np.int64))),
    ("v_pages must have dtype float32", lambda: replace(CONTEXT, v_pages=CONTEXT.v_pages.astype(np.float64))),
    ("version", lambda: replace(CONTEXT, version="2")),
    *(("bounds", lambda wrong=wrong: CONTEXT.with_bounds(wrong)) for wrong in ((1, 2), "bounds", 3)),
    ("upper must have dtype float32", lambda: PageBounds(*(np.zeros((2, 2, 6, 8), x) for x in ("f4", "f8")))),
    ("valid must have dtype bool", lambda: Context.from_dense(PADDED, PADDED, 4, valid=VALID.astype(int))),
    ("context must be a Context", lambda: attend(context="cache")),
    ("must be a Context", lambda: attend(Q, None, None, None)),
    ("q must be an array", lambda: attend(Q.tolist())),
    ("q must have dtype", lambda: attend(Q.astype(int))),
    ("k must have dtype float32; got dtype float64", lambda: attend(k=K.astype(float))),
    ("k must be", lambda: whole(v=V)),
    ("v must be", lambda: whole(k=K)),
    ("memory must be", lambda: attend(Q, K, V, CONTEXT, "x", PassInfo(1))),
    ("info must be a PassInfo", lambda: attend(Q, K, V, CONTEXT, None, 1)),
    ("bounds must be PageBounds", lambda: REFERENCE.extend_bounds(ONE_PAGE, None, 1)),  # type: ignore[arg-type]
    *(
        ("lse", lambda pooled=pooled: pooled(Q, CONTEXT, span=2, lse=np.zeros((2, 4, 5))))
        for pooled in (pooled_scores, REFERENCE.pooled_scores)
    ),
    ("check_contents", lambda: PrefixAttention("dense", "reference", check_contents="yes")),  # type: ignore[arg-type]
    ("q must be an array", lambda: AttentionState.empty_like(None)),
    ("problem must be a Problem", lambda: REFERENCE.why_not(None)),  # type: ignore[arg-type]
    ("must be constructible with these options", lambda: get_policy("sys:exit")),
    ("active must have dtype bool", lambda: EVERY.loaded(np.ones((2, 5)), 4, 2)),
    ("q_shape must be the shape", lambda: EVERY.check_fits((2, 4), CONTEXT)),
]


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [*((InvalidArgumentError, *case) for case in VALUES), *((InvalidTypeError, *case) for case in TYPES)],
)
def test_what_does_not_fit_is_refused_in_these_words(error: type[SparseAttentionError], words: str, call: Call) -> None:
    with pytest.raises(error, match=words):
        call()


def test_what_is_nearly_refused_is_taken() -> None:
    assert PassInfo(np.array([2, 2])).index == 2
    assert isinstance(PassInfo([0, 1]).index, np.ndarray)
    assert PassInfo(0, is_save=np.array([True, True])).is_save is True
    info = PassInfo(np.int64(3), np.bool_(True), layer=np.int32(1), num_layers=2)  # type: ignore[arg-type]
    assert (info.index, info.is_save, info.layer) == (3, True, 1)
    assert PassInfo(3).pass_in_window == 3
    assert PassInfo(3, window_index=np.array([1, 1], np.int32)).pass_in_window == 1
    assert order([2, 0, -1], [1, -1, -1]).planned is PLANNED
    assert softmax_scale(8, np.float32(0.5)) == 0.5  # type: ignore[arg-type]
