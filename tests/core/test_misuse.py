"""Wrong arguments end in our typed errors, whatever they are and whoever is asked (clause ERROR-1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from problems import block, ragged_context

from sparse_dlm_attn import (
    AttentionState,
    Backend,
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PageBounds,
    PassInfo,
    PrefixAttention,
    PrefixAttentionPolicy,
    Selection,
    SparseAttentionError,
    StaleMemoryError,
    get_backend,
    get_policy,
)
from sparse_dlm_attn.capabilities import Problem
from sparse_dlm_attn.values import softmax_scale

Array = np.ndarray[Any, Any]
WRONG: list[Any] = [None, "abc", [1, 2], 2.5, object(), {}, np.zeros((0,)), np.array([None, 1])]
BACKENDS = ["reference", "torch"]
OPTIONAL = (("attend", "cached"), ("page_scores", "active"))


def backend_named(name: str) -> Backend:
    if name == "torch":
        pytest.importorskip("torch")
    return get_backend(name)


def other_library(values: Array) -> Any:
    return pytest.importorskip("torch").from_numpy(np.array(values))


def of_backend(backend: Backend, context: Context) -> Context:
    convert = backend.asarray
    return Context(
        convert(context.k_pages), convert(context.v_pages), convert(context.page_table),
        convert(context.page_lengths),
    )


def arguments_of(backend: Backend) -> dict[str, dict[str, Any]]:
    """Good arguments of every operator, by name."""
    context = of_backend(backend, ragged_context(0))
    q, k, v = (backend.asarray(values) for values in block(1))
    active = backend.asarray(np.ones((2, 5), bool))
    selection = Selection.all_pages(context, 5)
    bounds = backend.page_bounds(context)
    scores, state = backend.page_scores(q, bounds), backend.attend_block(q, k, v)
    return {
        "page_bounds": {"context": context},
        "page_scores": {"q": q, "bounds": bounds, "active": active},
        "pooled_scores": {"q": q, "context": context, "span": 2},
        "top_pages": {"scores": scores, "count": 2, "eligible": context.exists[:, None, None, :]},
        "query_change": {"q": q, "q_reference": q},
        "largest_changes": {"change": backend.query_change(q, q)},
        "attend_pages": {"q": q, "context": context, "selection": selection, "active": active},
        "attend_block": {"q": q, "k": k, "v": v},
        "reuse": {"active": active, "fresh": state, "cached": state},
        "attend": {"q": q, "k": k, "v": v, "context": context, "selection": selection, "active": active,
                   "cached": state},
    }


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("name", BACKENDS)
def test_operators_refuse_every_wrong_type_in_every_argument(name: str) -> None:
    backend = backend_named(name)
    for operator, good in arguments_of(backend).items():
        extra = {"count": 1} if operator == "largest_changes" else {}
        for argument in good:
            for wrong in WRONG:
                if wrong is None and (operator, argument) in OPTIONAL:
                    continue  # the empty set; every row
                with pytest.raises(SparseAttentionError, match=r"must|broadcast"):
                    getattr(backend, operator)(**{**good, argument: wrong}, **extra)


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("name", BACKENDS)
def test_operators_refuse_arrays_of_other_shapes_dtypes_and_libraries(name: str) -> None:
    backend = backend_named(name)
    for operator, good in arguments_of(backend).items():
        for argument, value in good.items():
            if not hasattr(value, "shape") or operator in ("top_pages", "largest_changes"):
                continue
            host = np.asarray(value)
            wrong = [backend.asarray(host[..., :-1]), backend.asarray(host[0]),
                     backend.asarray(host.astype(np.int64))]
            wrong.append(other_library(host) if name == "reference" else host)
            for bad in wrong:
                with pytest.raises(InvalidArgumentError):
                    getattr(backend, operator)(**{**good, argument: bad})


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("policy", ["dense", "losa", "mage:dense_layers=0", "sparsed"])
def test_arrays_of_a_library_that_the_backend_does_not_compute_with_are_refused(
    name: str, policy: str
) -> None:
    attention = PrefixAttention(policy, backend_named(name))
    source = backend_named("torch" if name == "reference" else "reference")
    q, k, v = (source.asarray(values) for values in block(1))
    with pytest.raises(InvalidTypeError, match=r"as backend .* computes with"):
        attention(q, k, v, of_backend(source, ragged_context(0)))


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("name", BACKENDS)
def test_asarray_refuses_what_is_not_numbers(name: str) -> None:
    backend = backend_named(name)
    for wrong in (object(), "abc", [[1], [2, 3]]):
        with pytest.raises(InvalidTypeError, match="values"):
            backend.asarray(wrong)
    for dtype in ("flaot32", 3, np.zeros(0)):
        with pytest.raises(InvalidTypeError, match="dtype"):
            backend.asarray([1.0], dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("field", ["v_pages", "page_table", "page_lengths", "page_segments"])
def test_a_context_of_two_array_libraries_is_refused(field: str) -> None:
    context = ragged_context(0)
    segments = np.zeros_like(context.page_lengths, dtype=np.int8)
    context = replace(context, page_segments=segments)
    with pytest.raises(InvalidArgumentError, match=f"{field} must be a ndarray .*k_pages is; got a Tensor"):
        replace(context, **{field: other_library(getattr(context, field))})


@pytest.mark.clause("CONTEXT-1", "ERROR-1")
@pytest.mark.parametrize("reorder", [lambda a: a[..., ::2], lambda a: a[..., ::-1], np.asfortranarray])
def test_pages_whose_channels_are_not_contiguous_are_refused(reorder: Callable[[Array], Array]) -> None:
    context = ragged_context(0)
    pages = reorder(context.k_pages)
    with pytest.raises(InvalidArgumentError, match="contiguous in its last axis"):
        Context(pages, np.ascontiguousarray(pages), context.page_table, context.page_lengths)


@pytest.mark.clause("ERROR-1")
def test_context_refuses_metadata_versions_and_segments_that_mean_nothing() -> None:
    context = ragged_context(0)
    for wrong in ((1, 2), "bounds", 3):
        with pytest.raises(InvalidTypeError, match="bounds"):
            context.with_bounds(wrong)  # type: ignore[arg-type]
    lower = np.zeros((2, 2, 6, 8), np.float32)
    with pytest.raises(InvalidTypeError, match="upper must have dtype float32"):
        PageBounds(lower, lower.astype(np.float64))
    with pytest.raises(InvalidTypeError, match="version"):
        replace(context, version="2")
    segments = np.full(context.page_lengths.shape, 7, np.int8)
    with pytest.raises(InvalidArgumentError, match=r"page_segments must be 0 prompt.* got 7"):
        replace(context, page_segments=segments).check_contents()
    with pytest.raises(InvalidArgumentError, match="segment must be 0"):
        context.in_segment(3)


@pytest.mark.clause("CONTEXT-4")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_cache_without_tokens_is_an_empty_context(batch: int) -> None:
    cache = np.zeros((batch, 2, 0, 8), np.float32)
    context = Context.from_dense(cache, cache, np.int64(4))  # type: ignore[arg-type]
    assert (context.batch, context.pages, context.page_size) == (batch, 0, 4)
    q, k, v = block(0, batch=batch)
    backend = get_backend("reference")
    out, _ = PrefixAttention("losa", backend)(q, k, v, context)
    np.testing.assert_allclose(out, backend.attend_block(q, k, v).out, atol=1e-6)


@pytest.mark.clause("CONTEXT-2")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("policy", ["quest", "mage:dense_layers=0", "sparsed:warmup=1"])
def test_absent_pages_may_point_into_a_cache_without_any_page(name: str, policy: str) -> None:
    backend = backend_named(name)
    good = ragged_context(0)
    context = of_backend(backend, Context(
        good.k_pages[:0], good.v_pages[:0], good.page_table, np.zeros_like(good.page_lengths)
    ))
    q, k, v = (backend.asarray(values) for values in block(1))
    out, _ = PrefixAttention(policy, backend)(q, k, v, context)
    np.testing.assert_allclose(out, backend.attend_block(q, k, v).out, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_batch_of_no_sequences_gives_no_rows(name: str) -> None:
    backend = backend_named(name)
    context = of_backend(backend, ragged_context(0))
    none = replace(context, page_table=context.page_table[:0], page_lengths=context.page_lengths[:0])
    q, k, v = (backend.asarray(values)[:0] for values in block(1))
    for policy in ("dense", "losa", "quest"):
        out, _ = PrefixAttention(policy, backend)(q, k, v, none)
        assert tuple(out.shape) == (0, 4, 5, 8)


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("field", ["index", "is_save", "layer", "num_layers", "total_passes"])
def test_pass_info_refuses_what_is_no_number(field: str) -> None:
    for wrong in ("1", 2.5, [1.5], {}, np.zeros((0,)), [[1], [2, 3]]):
        with pytest.raises(InvalidArgumentError, match=field):
            PassInfo(**{"index": 0, field: wrong})  # type: ignore[arg-type]
    if field != "is_save":
        for wrong in (True, -1):
            with pytest.raises(InvalidArgumentError, match=field):
                PassInfo(**{"index": 0, field: wrong})  # type: ignore[arg-type]


@pytest.mark.clause("ERROR-1")
def test_pass_info_takes_numpy_numbers_and_refuses_negative_passes_in_arrays() -> None:
    info = PassInfo(np.int64(3), np.bool_(True), layer=np.int32(1), num_layers=2)  # type: ignore[arg-type]
    assert (info.index, info.is_save, info.layer) == (3, True, 1)
    with pytest.raises(InvalidArgumentError, match=r"index .*\[-1, 2\]"):
        PassInfo([-1, 2])


@pytest.mark.clause("ERROR-1")
def test_selection_refuses_wrong_spans_capacities_contexts_and_rows() -> None:
    context = ragged_context(0)
    selection = Selection.all_pages(context, 5)
    for call in (
        lambda: Selection(selection.mask, 0),
        lambda: selection.page_lists(-1),
        lambda: selection.to_csr(None),  # type: ignore[arg-type]
        lambda: selection.to_csr(Context.from_dense(*np.zeros((2, 2, 2, 8, 8), np.float32), 4)),
        lambda: Selection.all_pages(None, 5),  # type: ignore[arg-type]
        lambda: Selection.all_pages(context, -1),
        lambda: selection.loaded(np.ones((2, 5)), 4, 2),
        lambda: selection.loaded(np.ones((2, 6), bool), 4, 2),
        lambda: selection.for_rows(4, 0),
        lambda: selection.check_fits((2, 4), context),
    ):
        with pytest.raises(InvalidArgumentError):
            call()


@pytest.mark.clause("SELECTION-1")
def test_a_span_far_longer_than_the_block_costs_no_memory() -> None:
    context = ragged_context(0)
    selection = Selection(Selection.all_pages(context, 5).mask, 10**15)
    assert selection.for_rows(4, 5).shape == (2, 4, 5, 6)
    assert np.array_equal(
        selection.loaded(np.ones((2, 5), bool), 4, 2), np.repeat(context.exists[:, None], 2, axis=1)
    )


@pytest.mark.clause("ERROR-1")
@pytest.mark.parametrize("scale", [True, "1", math.nan, math.inf, 0, -1.0, 10**400, [1.0]])
def test_scales_that_are_no_finite_positive_number_are_refused(scale: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="scale"):
        softmax_scale(8, scale)


def test_numpy_scalars_are_scales() -> None:
    assert softmax_scale(8, np.float32(0.5)) == 0.5  # type: ignore[arg-type]


@pytest.mark.clause("MEMORY-2")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("field", ["page_lengths", "page_table"])
def test_a_table_or_lengths_written_in_place_make_memory_stale(name: str, field: str) -> None:
    backend = backend_named(name)
    context = of_backend(backend, ragged_context(0))
    q, k, v = (backend.asarray(values) for values in block(1))
    attention = PrefixAttention("losa", backend)
    _, memory = attention(q, k, v, context)
    _, memory = attention(q, k, v, context, memory, PassInfo(1))
    array = getattr(context, field)
    array[1, 5] = 0 if int(array[1, 5]) else 1
    with pytest.raises(StaleMemoryError, match=field):
        attention(q, k, v, context, memory, PassInfo(2))


@pytest.mark.clause("MEMORY-2")
@pytest.mark.parametrize("policy", ["losa", "quest", "flashblock"])
def test_memory_of_another_dtype_or_library_is_stale(policy: str) -> None:
    context = ragged_context(0)
    q, k, v = block(1)
    attention = PrefixAttention(policy, "reference")
    _, memory = attention(q, k, v, context)
    half = replace(context, k_pages=context.k_pages.astype("float16"),
                   v_pages=context.v_pages.astype("float16"))
    info = PassInfo(1, newly_decoded=np.zeros((2, 5), bool))
    with pytest.raises(StaleMemoryError, match=r"float32.*float16"):
        attention(*(a.astype("float16") for a in (q, k, v)), half, memory, info)
    torch = backend_named("torch")
    tensors = [torch.asarray(a) for a in (q, k, v)]
    with pytest.raises(StaleMemoryError, match="Tensor"):
        PrefixAttention(policy, torch)(*tensors, of_backend(torch, context), memory, info)


@dataclass(frozen=True)
class Forgetful(PrefixAttentionPolicy[None]):
    """Returns its mask instead of a selection, as a newcomer's first policy might."""

    name: ClassVar[str] = "forgetful"

    def select_pages(self, inputs: Any, active: Any) -> Any:
        return inputs.context.exists


@pytest.mark.clause("ERROR-1")
def test_a_policy_that_returns_no_selection_is_named() -> None:
    with pytest.raises(InvalidTypeError, match=r"forgetful.select_pages\(\) must be a Selection"):
        PrefixAttention(Forgetful(), "reference")(*block(1), ragged_context(0))


@pytest.mark.clause("ERROR-1")
def test_choices_driver_options_states_and_problems_are_checked() -> None:
    for call in (
        lambda: get_policy("losa", drift=np.zeros(2)),
        lambda: get_policy("losa", drift=["previous"]),
        lambda: PrefixAttention("dense", "reference", check_contents="yes"),  # type: ignore[arg-type]
        lambda: AttentionState.empty_like(None),
        lambda: AttentionState(np.zeros((1, 1, 1, 2), np.float32), other_library(np.zeros((1, 1, 1), "f4"))),
        lambda: get_backend("reference").why_not(None),  # type: ignore[arg-type]
        lambda: get_backend("reference").why_not(Problem("float32", 8, 4, 4, 0, 5)),
        lambda: get_policy("sys:exit"),
    ):
        with pytest.raises(SparseAttentionError):
            call()


@pytest.mark.clause("STATE-2", "MERGE-1")
@pytest.mark.parametrize("name", BACKENDS)
def test_keys_whose_scores_are_all_minus_infinity_weigh_nothing(name: str) -> None:
    backend = backend_named(name)
    q, k, v = block(1)
    q = np.abs(q) + np.float32(0.1)
    good = ragged_context(0)
    context = of_backend(backend, replace(good, k_pages=np.full_like(good.k_pages, -np.inf)))
    q, k, v = (backend.asarray(values) for values in (q, k, v))
    state = backend.attend_pages(
        q, context, Selection.all_pages(context, 5), backend.asarray(np.ones((2, 5), bool))
    )
    assert np.isneginf(np.asarray(state.lse)).all() and not np.asarray(state.out).any()
    out, _ = PrefixAttention("dense", backend)(q, k, v, context)
    np.testing.assert_allclose(out, backend.attend_block(q, k, v).out, atol=1e-6)
    assert not np.asarray(backend.pooled_scores(q, context, span=5)).any()


@pytest.mark.clause("MERGE-1")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lse", [1e10, 1e17, 3e38, -3e38])
def test_merged_states_stay_normalised_where_the_lse_has_no_room_for_a_sum(name: str, lse: float) -> None:
    backend = backend_named(name)
    states = [
        AttentionState(
            backend.asarray(np.full((1, 1, 1, 2), value, np.float32)),
            backend.asarray(np.full((1, 1, 1), lse, np.float32)),
        )
        for value in (1, 2)
    ]
    np.testing.assert_allclose(backend.merge(*states).out, 1.5, rtol=1e-6)


@pytest.mark.clause("CHANGE-3")
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("change", "mass", "expected"),
    [
        ([math.inf, math.inf, 1.0], 0.5, [True, False, False]),
        ([1.0, math.inf, math.inf], 1.0, [False, True, False]),
        ([math.inf, 1.0, 2.0], 0.0, [False, False, False]),
        ([math.nan, 1.0, 2.0], 0.5, [True, True, True]),
    ],
)
def test_infinite_changes_reach_any_mass_by_the_first_of_them(
    name: str, change: list[float], mass: float, expected: list[bool]
) -> None:
    backend = backend_named(name)
    chosen = backend.largest_changes(backend.asarray(np.array([change], np.float32)), mass=mass)
    assert np.asarray(chosen).tolist() == [expected]


@pytest.mark.clause("TOP-1", "CHANGE-2")
@pytest.mark.parametrize("name", BACKENDS)
def test_counts_beyond_every_integer_dtype_are_clamped(name: str) -> None:
    backend = backend_named(name)
    scores = backend.asarray(np.arange(4, dtype=np.float32))
    eligible = backend.asarray(np.array([True, True, False, True]))
    assert np.array_equal(backend.top_pages(scores, 10**30, eligible=eligible), eligible)
    assert not np.asarray(backend.top_pages(scores, -(10**30), eligible=eligible)).any()
    change = backend.asarray(np.ones((1, 3), np.float32))
    assert np.asarray(backend.largest_changes(change, count=10**30)).all()
