"""Wrong arguments end in our typed errors, whatever they are and whoever is asked (clause ERROR-1)."""

from __future__ import annotations

import math
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
    PassInfo,
    PrefixAttention,
    PrefixAttentionPolicy,
    Selection,
    SparseAttentionError,
    StaleMemoryError,
    get_backend,
)

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
        convert(context.k_pages), convert(context.v_pages), convert(context.page_table), convert(context.page_lengths)
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
        "attend": {
            "q": q,
            "k": k,
            "v": v,
            "context": context,
            "selection": selection,
            "active": active,
            "cached": state,
        },
    }


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


@pytest.mark.parametrize("name", BACKENDS)
def test_operators_refuse_arrays_of_other_shapes_dtypes_and_libraries(name: str) -> None:
    backend = backend_named(name)
    for operator, good in arguments_of(backend).items():
        for argument, value in good.items():
            if not hasattr(value, "shape") or operator in ("top_pages", "largest_changes"):
                continue
            host = np.asarray(value)
            wrong = [backend.asarray(host[..., :-1]), backend.asarray(host[0]), backend.asarray(host.astype(np.int64))]
            wrong.append(other_library(host) if name == "reference" else host)
            for bad in wrong:
                with pytest.raises(InvalidArgumentError):
                    getattr(backend, operator)(**{**good, argument: bad})


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("policy", ["dense", "losa", "mage:dense_layers=0", "sparsed"])
def test_arrays_of_a_library_that_the_backend_does_not_compute_with_are_refused(name: str, policy: str) -> None:
    attention = PrefixAttention(policy, backend_named(name))
    source = backend_named("torch" if name == "reference" else "reference")
    q, k, v = (source.asarray(values) for values in block(1))
    with pytest.raises(InvalidTypeError, match=r"as backend .* computes with"):
        attention(q, k, v, of_backend(source, ragged_context(0)))


@pytest.mark.parametrize("name", BACKENDS)
def test_asarray_refuses_what_is_not_numbers(name: str) -> None:
    backend = backend_named(name)
    for wrong in (object(), "abc", [[1], [2, 3]]):
        with pytest.raises(InvalidTypeError, match="values"):
            backend.asarray(wrong)
    for dtype in ("flaot32", 3, np.zeros(0)):
        with pytest.raises(InvalidTypeError, match="dtype"):
            backend.asarray([1.0], dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_cache_without_tokens_is_an_empty_context(batch: int) -> None:
    cache = np.zeros((batch, 2, 0, 8), np.float32)
    context = Context.from_dense(cache, cache, np.int64(4))  # type: ignore[arg-type]
    assert (context.batch, context.pages, context.page_size) == (batch, 0, 4)
    q, k, v = block(0, batch=batch)
    backend = get_backend("reference")
    out, _ = PrefixAttention("losa", backend)(q, k, v, context)
    np.testing.assert_allclose(out, backend.attend_block(q, k, v).out, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("policy", ["quest", "mage:dense_layers=0", "sparsed:warmup=1"])
def test_absent_pages_may_point_into_a_cache_without_any_page(name: str, policy: str) -> None:
    backend = backend_named(name)
    good = ragged_context(0)
    context = of_backend(
        backend, Context(good.k_pages[:0], good.v_pages[:0], good.page_table, np.zeros_like(good.page_lengths))
    )
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


def test_a_span_far_longer_than_the_block_costs_no_memory() -> None:
    context = ragged_context(0)
    selection = Selection(Selection.all_pages(context, 5).mask, 10**15)
    assert selection.for_rows(4, 5).shape == (2, 4, 5, 6)
    assert np.array_equal(selection.loaded(np.ones((2, 5), bool), 4, 2), np.repeat(context.exists[:, None], 2, axis=1))


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


def test_memory_of_another_library_is_stale() -> None:
    context, torch = ragged_context(0), backend_named("torch")
    _, memory = PrefixAttention("losa", "reference")(*block(1), context)
    with pytest.raises(StaleMemoryError, match="Tensor"):
        PrefixAttention("losa", torch)(*map(torch.asarray, block(1)), of_backend(torch, context), memory, PassInfo(1))


@dataclass(frozen=True)
class Forgetful(PrefixAttentionPolicy[None]):
    """Returns its mask instead of a selection, as a newcomer's first policy might."""

    name: ClassVar[str] = "forgetful"

    def select_pages(self, inputs: Any, active: Any) -> Any:
        return inputs.context.exists


def test_a_policy_that_returns_no_selection_is_named() -> None:
    with pytest.raises(InvalidTypeError, match=r"forgetful.select_pages\(\) must be a Selection"):
        PrefixAttention(Forgetful(), "reference")(*block(1), ragged_context(0))


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


@pytest.mark.parametrize("name", BACKENDS)
def test_counts_beyond_every_integer_dtype_are_clamped(name: str) -> None:
    backend = backend_named(name)
    scores = backend.asarray(np.arange(4, dtype=np.float32))
    eligible = backend.asarray(np.array([True, True, False, True]))
    assert np.array_equal(backend.top_pages(scores, 10**30, eligible=eligible), eligible)
    assert not np.asarray(backend.top_pages(scores, -(10**30), eligible=eligible)).any()
    change = backend.asarray(np.ones((1, 3), np.float32))
    assert np.asarray(backend.largest_changes(change, count=10**30)).all()
