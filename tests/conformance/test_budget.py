"""The error budget admits honest rounding and nothing more; assertions can fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import Case
from sparse_dlm_attn_conformance.checks import ConformanceFailure, expect_close, expect_same_bits, expect_state_close
from sparse_dlm_attn_conformance.oracle import context_keys, page_mass, scale_of, simulate, softmax
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_reference import ReferenceBackend

CALM = settings(
    deadline=None, max_examples=80, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
DTYPES = ["float64", "float32", "float16", "bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_simulation_itself_stays_within_the_budget(dtype: str) -> None:
    @CALM
    @given(case=cases())
    def check(case: Case) -> None:
        arrays = case.arrays(dtype)
        keys = context_keys(arrays)
        simulated = simulate(arrays.q, keys, scale_of(arrays), dtype)
        expected = accuracy.attention(arrays, keys)
        expect_state_close(simulated.out, simulated.lse, expected, "simulation", "ACCURACY-2")

    check()


@CALM
@given(case=cases())
def test_the_oracle_and_the_reference_agree_in_double_precision(case: Case) -> None:
    arrays = case.arrays("float64")
    reference = ReferenceBackend()
    state = reference.attend_pages(arrays.q, arrays.context(), arrays.selection(), arrays.active, scale=arrays.scale)
    oracle = softmax(arrays.q, context_keys(arrays), scale_of(arrays))
    np.testing.assert_allclose(state.out, oracle.out, rtol=1e-9, atol=1e-9)
    mass = reference.pooled_scores(arrays.q, arrays.context(), span=case.span, scale=arrays.scale)
    np.testing.assert_allclose(mass, page_mass(arrays, case.span), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_error_of_a_few_roundings_is_refused(dtype: str) -> None:
    case = Case(
        head_dim=8,
        page_size=4,
        tokens=3,
        lengths=((4, 3),),
        table=((0, 1),),
        num_pages=2,
        masks=(3,),
        active=(7,),
        span=3,
    )
    arrays = case.arrays(dtype)
    expected = accuracy.attention(arrays, context_keys(arrays))
    largest = np.abs(arrays.v_pages).max()
    worse = expected.state.out + 40 * accuracy.EPS[dtype] * (1 + 8) * largest
    with pytest.raises(ConformanceFailure, match="budget"):
        expect_state_close(worse, expected.state.lse, expected, "out", "ACCURACY-2")
    with pytest.raises(ConformanceFailure, match="lse"):
        expect_state_close(expected.state.out, expected.state.lse + 1e-3, expected, "state", "ACCURACY-2")


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_budget_exceeds_the_ceiling(dtype: str) -> None:
    case = Case(
        head_dim=8,
        page_size=4,
        tokens=3,
        lengths=((4, 3),),
        table=((0, 1),),
        num_pages=2,
        masks=(3,),
        active=(7,),
        span=3,
    )
    arrays = case.arrays(dtype)
    keys = context_keys(arrays)
    condition = np.einsum("bhtd,bhnd->bhtn", np.abs(arrays.q), np.abs(keys.keys)).max() * scale_of(arrays)
    budget = accuracy.attention(arrays, keys).out_budget
    assert (budget <= accuracy.CEILING[dtype] * (1 + condition) * np.abs(keys.values).max()).all()
    nothing = replace(
        accuracy.attention(
            arrays.but(mask=np.zeros_like(arrays.mask)), context_keys(arrays.but(mask=np.zeros_like(arrays.mask)))
        )
    )
    assert (nothing.out_budget == 0).all()


def test_closeness_fails_on_values_nan_and_infinities() -> None:
    good = np.asarray([1.0, np.nan, -np.inf, 2.0])
    expect_close(good, good, 0.0, "x", "STATE-1")
    for bad in (
        [1.1, np.nan, -np.inf, 2.0],
        [1.0, 0.0, -np.inf, 2.0],
        [1.0, np.nan, -1e30, 2.0],
        [np.nan, np.nan, -np.inf, 2.0],
        [1.0, np.nan, np.inf, 2.0],
    ):
        with pytest.raises(ConformanceFailure, match="STATE-1"):
            expect_close(np.asarray(bad), good, 0.01, "x", "STATE-1")


def test_equal_bits_fail_on_one_element_and_on_shape() -> None:
    values = np.asarray([[1.0, np.nan], [0.0, 2.0]], dtype=np.float32)
    expect_same_bits(values, values.copy(), "x", "PURE-3")
    other = values.copy()
    other[1, 1] = np.nextafter(np.float32(2), np.float32(3))
    with pytest.raises(ConformanceFailure, match=r"\(1, 1\)"):
        expect_same_bits(values, other, "x", "PURE-3")
    with pytest.raises(ConformanceFailure, match="shape"):
        expect_same_bits(values, values[:1], "x", "PURE-3")
