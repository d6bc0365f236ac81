r"""The error budget: how far a result may lie from the float64 oracle.

No tolerance is picked by hand. For every row the suite measures how far a plain computation *in the
precision that the specification demands* lies from the oracle, and allows twice that plus a rounding
band (clause ACCURACY-2)::

    |actual - oracle| <= 2 * (|simulation - oracle| + band)

The **simulation** (`oracle.simulate`) gets the inputs as given; float64 computes in float64,
everything else in float32; in half precision the softmax weights are rounded to that precision before
they multiply V, and the result is rounded to it.

The **band** keeps a lucky simulation from making the budget unfair. With ``u`` the spacing of 1 in
the computing precision, ``n`` keys, ``d`` channels and ``c = scale * max_j sum_c |q_c k_jc|`` (the
condition of the scores: rounding errors of a dot product grow with it, however small the product itself
is, and with the root of its terms where one channel outweighs the others):

======  ==========================================================================
out     ``(eps(out dtype) + u * (sqrt(d) c + sqrt(n))) * max|V|``: an output is a convex
        combination of values, so ``max|V|`` is its natural scale
lse     ``eps(float32) * (1 + max|score|) + u * (sqrt(d) c + sqrt(n))``
merge   the same with ``c = max|lse|`` and ``d = 1``
scores  ``(sqrt(d) u + eps(float32)) * max over the row of sum_c max(|q_c lower_c|, |q_c upper_c|)``
mass    ``eps(float32) + u * (sqrt(d) c + sqrt(n))``
change  ``(eps(float32) + u * sqrt(n)) * change``
======  ==========================================================================

Finally no budget may exceed the ceiling of its dtype times ``(1 + c) * scale``, so that a mistake in
the simulation cannot hide one in a backend. Decisions have no budget: on the dyadic grid they are
exact (clause ACCURACY-3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparse_dlm_attn_conformance.cases import Arrays, Host
from sparse_dlm_attn_conformance.oracle import KeySet, context_keys, scale_of, simulate, softmax
from sparse_dlm_attn_conformance.tables import HostState

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Spacing of 1 in each dtype."""

CEILING = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3.2e-2}
"""Largest error of an output relative to its natural scale, whatever the simulation says."""

FACTOR = 2.0


@dataclass(frozen=True, eq=False)
class Expected:
    """The oracle's state and the budget around it; ``out_budget`` has a last axis of 1."""

    state: HostState
    out_budget: Host
    lse_budget: Host

    def of(self, rows: Host) -> Expected:
        """Return the part about some rows."""
        state = HostState(self.state.out[rows], self.state.lse[rows])
        return Expected(state, self.out_budget[rows], self.lse_budget[rows])


def computing(dtype: str) -> float:
    """Return the spacing of 1 in the precision in which ``dtype`` computes (clause ACCURACY-1)."""
    return EPS["float64" if dtype == "float64" else "float32"]


def attention(arrays: Arrays, keys: KeySet, *, rounded_parts: int = 0) -> Expected:
    """Return oracle and budget of attention over ``keys``.

    Each of the partial states that were merged into the result (``rounded_parts``) adds the rounding of its ``out``
    to the dtype and of its ``lse`` to float32.
    """
    scale, dtype = scale_of(arrays), arrays.dtype
    oracle = softmax(arrays.q, keys, scale)
    simulated = simulate(arrays.q, keys, scale, dtype)
    condition, magnitude = _condition(arrays.q, keys, scale), _magnitude(keys)
    scores = _largest_score(arrays.q, keys, scale)
    count = keys.allowed.sum(axis=3)
    with np.errstate(invalid="ignore"):
        out_error = np.abs(simulated.out - oracle.out).max(axis=3, initial=0.0)
        lse_error = np.abs(simulated.lse - oracle.lse)
    out, lse = state_budget(
        dtype, condition, scores, magnitude, count, out_error, np.nan_to_num(lse_error), arrays.q.shape[3]
    )
    through_lse = EPS["float32"] * (1.0 + scores + np.log1p(count))  # parts are weighted by a float32 lse
    out = out + FACTOR * rounded_parts * (EPS[dtype] + through_lse) * magnitude
    lse = lse + FACTOR * rounded_parts * through_lse
    return Expected(oracle, out[..., None], lse)


def state_budget(
    dtype: str,
    condition: Host,
    scores: Host,
    magnitude: Host,
    count: Host,
    out_error: Host,
    lse_error: Host,
    terms: int = 1,
) -> tuple[Host, Host]:
    """Return the budgets of ``out`` and ``lse`` (see the module's docstring); ``terms`` is ``d``."""
    spread = computing(dtype) * (np.sqrt(terms) * condition + np.sqrt(count))
    out = FACTOR * (out_error + (EPS[dtype] + spread) * magnitude)
    lse = FACTOR * (lse_error + EPS["float32"] * (1.0 + scores) + spread)
    ceiling = CEILING["float32"] * (1.0 + condition)
    return np.minimum(out, CEILING[dtype] * (1.0 + condition) * magnitude), np.minimum(lse, ceiling)


def _condition(q: Host, keys: KeySet, scale: float) -> Host:
    products = np.einsum("bhtd,bhnd->bhtn", np.abs(q), np.abs(keys.keys))
    return np.asarray(scale * np.where(keys.allowed, products, 0.0).max(axis=3, initial=0.0))


def _largest_score(q: Host, keys: KeySet, scale: float) -> Host:
    products = np.einsum("bhtd,bhnd->bhtn", q, keys.keys)
    return np.asarray(scale * np.where(keys.allowed, np.abs(products), 0.0).max(axis=3, initial=0.0))


def _magnitude(keys: KeySet) -> Host:
    largest = np.abs(keys.values).max(axis=3)[:, :, None, :]
    return np.asarray(np.where(keys.allowed, largest, 0.0).max(axis=3, initial=0.0))


def merge_budget(dtype: str, states: list[HostState]) -> tuple[Host, Host]:
    """Return the budgets of a merge of ``states``, given as they are."""
    lse = np.stack([state.lse for state in states])
    condition = np.where(np.isfinite(lse), np.abs(lse), 0.0).max(axis=0)
    weighty = [np.where(np.isfinite(state.lse), np.abs(state.out).max(axis=3), 0.0) for state in states]
    nothing = np.zeros(condition.shape)
    out, logs = state_budget(
        dtype, condition, condition, np.stack(weighty).max(axis=0), nothing + len(states), nothing, nothing
    )
    return out[..., None], logs


def scores_budget(dtype: str, q: Host, lower: Host, upper: Host) -> Host:
    """Return the budget of page scores, ``(batch, q_heads, tokens, 1)``."""
    group = q.shape[1] // lower.shape[1]
    largest = np.repeat(np.maximum(np.abs(lower), np.abs(upper)), group, axis=1)
    magnitude = np.einsum("bhtd,bhpd->bhtp", np.abs(q), largest).max(axis=3, keepdims=True, initial=0.0)
    return np.asarray(FACTOR * (np.sqrt(q.shape[3]) * computing(dtype) + EPS["float32"]) * magnitude)


def pooled_budget(arrays: Arrays) -> float:
    """Return the budget of pooled scores: one number, since a mean mixes all rows of a span."""
    keys = context_keys(arrays, arrays.everyone())
    condition = np.sqrt(arrays.q.shape[3]) * _condition(arrays.q, keys, scale_of(arrays)).max(initial=0.0)
    count = keys.allowed.shape[3]
    return float(FACTOR * (EPS["float32"] + computing(arrays.dtype) * (condition + np.sqrt(count))))


def change_budget(dtype: str, change: Host, terms: int) -> Host:
    """Return the budget of `query_change` over ``terms`` squared differences a row."""
    return np.asarray(FACTOR * (EPS["float32"] + computing(dtype) * np.sqrt(terms)) * change)
