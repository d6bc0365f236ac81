"""Ranked passes gone wrong: each is the definition with one mistake in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from mutation import Method, R, broken

from sparse_dlm_attn import Selection, ranked
from sparse_dlm_attn.ranked import RankedPass, RankedResult
from sparse_dlm_attn_reference import ReferenceBackend

Mistake = Callable[..., RankedResult]


def ranked_mutant(*clauses: str) -> Callable[[Mistake], Mistake]:
    """Register a mistake: a function of the right operator, the arguments before the rule, and the rule."""

    def register(mistake: Mistake) -> Mistake:
        def attend_ranked(
            self: Any, q: Any, k: Any, v: Any, context: Any, bounds: Any, rule: RankedPass, cached: Any, *,
            scale: Any = None,
        ) -> RankedResult:
            given = (q, k, v, context, bounds)

            def right(rule: RankedPass, ops: Any = R, cached: Any = cached) -> RankedResult:
                return ranked.attend_ranked(ops, *given, rule, cached, scale)

            return mistake(right, given, rule)

        attend_ranked.__name__ = mistake.__name__
        broken(*(clauses or ("RANKED-1",)), operator="attend_ranked")(attend_ranked)
        return mistake

    return register


def with_operator(name: str, method: Method) -> ReferenceBackend:
    """Return a reference whose one operator is ``method``."""
    return type("Patched", (ReferenceBackend,), {name: method})()  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_ties_to_the_highest_page(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    def top_pages(self: Any, scores: Any, count: Any, *, eligible: Any) -> Any:
        mask = np.ascontiguousarray(np.broadcast_to(eligible, scores.shape)[..., ::-1])
        return R.top_pages(np.ascontiguousarray(scores[..., ::-1]), count, eligible=mask)[..., ::-1].copy()

    return right(rule, with_operator("top_pages", top_pages))  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_budget_must_exceed_the_context(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    return right(replace(rule, budget=max(rule.budget - 1, 0)))  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_budget_of_one_token_more(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    return right(replace(rule, budget=rule.budget + 1))  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_takes_one_page_more(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    return right(replace(rule, pages=rule.pages + 1))  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_chooses_in_a_context_that_fits(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    return right(replace(rule, budget=0))  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_budget_of_the_longest_sequence(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    """Reads whole only where all sequences fit, as a check on the host would."""
    fits = (given[3].tokens <= rule.budget).all()
    return right(replace(rule, budget=2**31 - 1 if fits else 0))  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_by_the_largest_change_of_a_head(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    def query_change(self: Any, q: Any, other: Any) -> Any:
        return ((q.astype(np.float64) - other) ** 2).max(axis=(1, 3)).astype(np.float32)

    return right(rule, with_operator("query_change", query_change))  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_count_takes_one_row_more(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    """What ``rank <= count`` does where ``rank < count`` is meant."""
    count = None if rule.count is None else rule.count + 1
    return right(replace(rule, count=count))  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_mass_of_every_row(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    """Takes rows while the total is not reached, whatever share of it was asked for."""
    return right(replace(rule, mass=None if rule.mass is None else 1.0))  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_mass_in_single_precision(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    """What a kernel makes of a Python float that it is passed."""
    mass = None if rule.mass is None else min(float(np.float32(rule.mass)), 1.0)
    return right(replace(rule, mass=mass))  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_union_over_inactive_rows_too(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    everyone = right(replace(rule, reference=None, count=None, mass=None, keep="nothing"))
    return replace(right(rule), selection=everyone.selection)


@ranked_mutant()
def ranked_union_over_the_group_where_heads_choose(
    right: Any, given: Any, rule: RankedPass
) -> RankedResult:
    result = right(rule)
    if rule.union != "query_head":
        return result  # type: ignore[no-any-return]
    shared = right(replace(rule, union="kv_head")).selection.mask
    group = result.selection.mask.shape[1] // shared.shape[1]
    return replace(result, selection=Selection(np.repeat(shared, group, axis=1), result.selection.span))


@ranked_mutant()
def ranked_keeps_the_old_reference(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    result = right(rule)
    if result.kept is None or rule.reference is None:
        return result  # type: ignore[no-any-return]
    return replace(result, kept=rule.reference.copy())


@ranked_mutant()
def ranked_keeps_the_queries_of_inactive_rows(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    result = right(rule)
    return result if result.kept is None else replace(result, kept=given[0].copy())


@ranked_mutant("PURE-2")
def ranked_keeps_the_queries_without_a_copy(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    result = right(rule)
    return replace(result, kept=given[0]) if rule.keep == "queries" else result


@ranked_mutant()
def ranked_forgets_what_was_cached(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    return right(rule, cached=None)  # type: ignore[no-any-return]


@ranked_mutant()
def ranked_reads_the_last_page_in_any_case(right: Any, given: Any, rule: RankedPass) -> RankedResult:
    """Decides as it should, and attends to the last page of the table all the same."""
    context = given[3]
    result = right(rule)
    if not context.pages:
        return result  # type: ignore[no-any-return]
    mask = result.selection.mask.copy()
    mask[..., -1] = True
    state = R.attend_pages(given[0], context, Selection(mask, result.selection.span), result.active)
    rows = result.active[:, None, :]
    out = np.where(rows[..., None], state.out, result.state.out)
    return replace(
        result, state=type(state)(out, np.where(rows, state.lse, result.state.lse))
    )
