"""Laws of ranked passes: the rule decides what the operators decide, and policies say the right rule."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_dlm_attn import AttentionState, PageBounds, get_policy
from sparse_dlm_attn.ranked import RankedResult
from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import EXACT, Arrays, Case, Host
from sparse_dlm_attn_conformance.checks import expect, expect_array, expect_close, expect_same_bits, expect_state
from sparse_dlm_attn_conformance.doubles import Ranking, Watched
from sparse_dlm_attn_conformance.episodes import Episode, episodes, play
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.oracle import block_keys, context_keys
from sparse_dlm_attn_conformance.strategies import cases, ranked_rules
from sparse_dlm_attn_conformance.subjects import Subject, host
from sparse_dlm_attn_conformance.tables import HostState, RankedRule
from sparse_dlm_attn_conformance.test_decisions import ranked as by_change
from sparse_dlm_attn_conformance.test_decisions import scores_on_host
from sparse_dlm_attn_conformance.test_pass import cached_state, merged_expectation
from sparse_dlm_attn_conformance.test_policies import SHARE, output_budget

READ = ("bytes_read", "page_bytes", "tokens_read", "pairs", "density")
ASKED = ("losa:budget=4,active=2", "losa:budget=3,mass=0.5,drift=refresh,pages=own", "quest:budget=4")


def run(
    subject: Subject,
    arrays: Arrays,
    rule: RankedRule,
    cached: AttentionState | None = None,
    bounds: PageBounds | None = None,
) -> RankedResult:
    """Run a ranked pass and check the types and shapes of its result."""
    on, bounds = subject.load(arrays), bounds or arrays.bounds()
    result = subject.backend.attend_ranked(
        on.q,
        on.k,
        on.v,
        on.context,
        subject.bounds(bounds, arrays.layout),
        rule.over(arrays, on.q_other),
        cached,
        scale=arrays.scale,
    )
    text = f"attend_ranked must return a RankedResult; got {type(result).__qualname__}"
    expect(isinstance(result, RankedResult), "RANKED-1", text)
    expect_array(subject, result.out, "out of attend_ranked", arrays.q.shape, subject.dtype, "STATE-4")
    expect_state(subject, result.state, "the context state of attend_ranked", arrays.q.shape)
    expect_array(subject, result.active, "active of attend_ranked", arrays.active.shape, "bool", "RANKED-1")
    return result


def rows_by_change(arrays: Arrays, rule: RankedRule) -> Host:
    """Return the active rows by the definition, one sequence after the other."""
    active = np.ones_like(arrays.active)
    if rule.rows == "all":
        return active
    change = ((arrays.q - arrays.q_other) ** 2).mean(axis=(1, 3)).astype(np.float32)
    for b, row in enumerate(change.astype(np.float64)):
        order, wanted = by_change(row), rule.count
        if rule.rows == "mass":
            target, reached, wanted = rule.mass * float(row.sum()), 0.0, 0
            while wanted < len(order) and not reached >= target:
                reached, wanted = reached + float(row[order[wanted]]), wanted + 1
            if np.isnan(row).any():
                wanted = len(order)
        active[b] = np.isin(np.arange(len(row)), order[:wanted])
    return active


def pages_by_bounds(arrays: Arrays, rule: RankedRule, active: Host) -> tuple[Host, int]:
    """Return the selection of a ranked pass by the definition, as mask and span."""
    scores = scores_on_host(arrays)
    scores = np.where(np.isnan(scores), np.inf, scores)
    own: Host = np.zeros(scores.shape, dtype=bool)
    whole = arrays.page_lengths.sum(axis=1) <= rule.budget(arrays)
    for b, head, row in np.ndindex(*scores.shape[:3]):
        if active[b, row]:
            pages = np.flatnonzero(arrays.page_lengths[b] > 0)
            best = pages[np.lexsort((pages, -scores[b, head, row, pages]))]
            own[b, head, row, best if whole[b] else best[: rule.pages]] = True
    if rule.union == "row":
        return own, 1
    mask: Host = np.asarray(own.any(axis=2, keepdims=True))
    if rule.union == "kv_head":
        batch, heads, _, count = mask.shape
        shared: Host = mask.reshape(batch, heads // arrays.group, arrays.group, 1, count)
        mask = np.asarray(shared.any(axis=2))
    return mask, int(own.shape[2])


def expect_decided(result: RankedResult, arrays: Arrays, rule: RankedRule) -> None:
    """Compare active rows, pages and kept queries with the definition, bit for bit."""
    active = rows_by_change(arrays, rule)
    expect_same_bits(host(result.active), active, "active rows of attend_ranked", "RANKED-1")
    mask, span = pages_by_bounds(arrays, rule, active)
    expect(result.selection.span == span, "RANKED-1", f"span must be {span}; got {result.selection.span}")
    expect_same_bits(host(result.selection.mask), mask, "pages of attend_ranked", "RANKED-1")
    if rule.keep == "nothing":
        expect(result.kept is None, "RANKED-1", "attend_ranked must keep nothing where the rule says so")
        return
    rows = active[:, None, :, None] | (rule.keep == "queries")
    kept = host(result.kept).astype(np.float64)
    expect_same_bits(kept, np.where(rows, arrays.q, arrays.q_other), "kept of attend_ranked", "RANKED-1")


@pytest.mark.clause("RANKED-1", "ACCURACY-3")
@law(case=cases(regimes=EXACT), rule=ranked_rules())
def test_a_rule_decides_what_the_operators_decide(subject: Subject, rule: RankedRule, arrays: Arrays) -> None:
    expect_decided(run(subject, arrays, rule), arrays, rule)


@pytest.mark.clause("RANKED-1")
@law(case=cases(regimes=("dyadic",), groups=(2, 4), min_pages=3, blocks=(1, 2)), share=0.5)
def test_heads_of_a_group_share_pages_where_the_rule_says_so(subject: Subject, arrays: Arrays) -> None:
    for union in ("kv_head", "query_head", "row"):
        rule = RankedRule("all", pages=1, union=union)
        expect_decided(run(subject, arrays, rule), arrays, rule)


@pytest.mark.clause("RANKED-1", "TOP-4", "CHANGE-2", "CHANGE-3")
@law(case=cases(regimes=EXACT, min_pages=1, poisons=("zero",)), rule=ranked_rules(), share=0.5)
def test_nan_in_a_query_or_a_key_ranks_first(subject: Subject, case: Case, rule: RankedRule, arrays: Arrays) -> None:
    q, k_pages = arrays.q.copy(), arrays.k_pages.copy()
    if case.seed % 2:
        q[-1, -1, case.seed % case.tokens, -1] = np.nan
    else:
        k_pages[arrays.stored().nonzero()[0][-1:], :, 0, -1] = np.nan
    rotten = arrays.but(q=q, k_pages=k_pages)
    expect_decided(run(subject, rotten, rule), rotten, rule)


@pytest.mark.clause("RANKED-1", "CHANGE-3")
@law(case=cases(regimes=("dyadic",), max_pages=2, blocks=(2, 3, 5)), share=0.5)
def test_the_share_of_a_mass_rule_is_no_float32(subject: Subject, case: Case, arrays: Arrays) -> None:
    """Changes of 3 and 2 in 5: the first alone reaches 0.6 of them, and 0.6 in float32 is a little more."""
    channels = case.q_heads * case.head_dim
    if channels < 3 or case.tokens < 2:
        return
    moved = np.zeros((case.tokens, channels))
    moved[0, :3] = moved[1, :2] = 1.0
    by_head = moved.reshape(case.tokens, case.q_heads, case.head_dim).swapaxes(0, 1)
    arrays = arrays.but(q_other=arrays.q + by_head)
    rule = RankedRule("mass", mass=0.6, keep="active_queries")
    expect_decided(run(subject, arrays, rule), arrays, rule)


@pytest.mark.clause("RANKED-1", "ATTEND-4", "REUSE-1")
@law(case=cases(), rule=ranked_rules())
def test_a_rule_computes_what_the_operators_compute(
    subject: Subject, case: Case, rule: RankedRule, arrays: Arrays
) -> None:
    """On any values: attention over the pages that were reported, and the cached bits of other rows."""
    given, cached = cached_state(subject, arrays, case.seed)
    nothing = case.seed % 4 == 0
    if nothing:
        given = HostState(np.zeros(arrays.q.shape), np.full(arrays.q.shape[:3], -np.inf))
    result = run(subject, arrays, rule, None if nothing else cached)
    chosen = decided(arrays, result)
    rows = np.broadcast_to(chosen.active[:, None, :], arrays.q.shape[:3])
    for name in ("out", "lse"):
        got = host(getattr(result.state, name)).astype(np.float64)
        what = f"{name} of inactive rows, which keep what was cached"
        expect_same_bits(got[~rows], getattr(given, name)[~rows], what, "RANKED-1")
    fresh = accuracy.attention(chosen, context_keys(chosen))
    block = accuracy.attention(chosen, block_keys(chosen))
    expect_close(
        host(result.state.lse)[rows], fresh.state.lse[rows], fresh.lse_budget[rows], "lse of active rows", "RANKED-1"
    )
    expect_close(
        host(result.state.out)[rows], fresh.state.out[rows], fresh.out_budget[rows], "out of active rows", "RANKED-1"
    )
    merged, budget = merged_expectation(chosen, rows, given, fresh, block)
    expect_close(host(result.out), merged, budget, "out of attend_ranked", "RANKED-1")


def decided(arrays: Arrays, result: RankedResult) -> Arrays:
    """Return the problem with what a ranked pass decided in it."""
    return arrays.but(mask=host(result.selection.mask), span=result.selection.span, active=host(result.active))


@pytest.mark.clause("RANKED-1", "ATTEND-3", "CONTEXT-2")
@law(case=cases(poisons=("zero",), regimes=EXACT), rule=ranked_rules(), share=0.7)
def test_a_rule_reads_no_page_that_it_did_not_choose(
    subject: Subject, case: Case, rule: RankedRule, arrays: Arrays
) -> None:
    """Neither those pages, nor what does not exist, nor what is cached for active rows."""
    given, cached = cached_state(subject, arrays, case.seed)
    clean = run(subject, arrays, rule, cached)
    chosen = decided(arrays, clean)
    entry = (-(2**31), 2**31 - 1)[case.seed % 2]
    rotten = arrays.poisoned(~arrays.stored(chosen.loaded()), np.nan).but(
        page_table=np.where(arrays.page_lengths > 0, arrays.page_table, entry).astype(np.int32)
    )
    rows = np.broadcast_to(chosen.active[:, None, :], arrays.q.shape[:3])
    stale = HostState(np.where(rows[..., None], np.nan, given.out), np.where(rows, np.nan, given.lse))
    again = run(subject, rotten, rule, subject.state(stale), arrays.bounds())
    for name, want, got in (
        ("out", clean.out, again.out),
        ("out of the context part", clean.state.out, again.state.out),
        ("lse of the context part", clean.state.lse, again.state.lse),
        ("active rows", clean.active, again.active),
        ("pages", clean.selection.mask, again.selection.mask),
    ):
        expect_same_bits(host(got), host(want), f"{name} with NaN in what was not chosen", "RANKED-1")


@pytest.mark.clause("RANKED-1", "DENSITY-2")
@pytest.mark.parametrize("policy_name", ASKED)
@law(episode=episodes(), share=SHARE)
def test_the_driver_asks_for_ranked_passes_and_counts_the_same(
    subject: Subject, episode: Episode, policy_name: str, arrays: Arrays
) -> None:
    policy, fused = get_policy(policy_name), Ranking(subject.backend)
    apart = play(subject.using(Watched(subject.backend)), policy, episode, arrays=arrays)
    together = play(subject.using(fused), policy, episode, arrays=arrays)
    asked, expected = fused.calls.count("attend_ranked"), episode.passes - (policy.name == "losa")
    expect(asked == expected, "RANKED-1", f"{expected} passes are ranked; attend_ranked was asked {asked}")
    for number, (one, two) in enumerate(zip(together, apart, strict=True)):
        where = f"in pass {number}, ranked"
        expect_same_bits(one.active, two.active, f"active rows {where}", "RANKED-1")
        expect_same_bits(one.pages, two.pages, f"pages {where}", "RANKED-1")
        expect_close(one.out, two.out, output_budget(arrays), f"out {where}", "RANKED-1")
        read, wanted = one.memory.traffic, two.memory.traffic
        for name in READ:
            expect_same_bits(
                host(getattr(read, name)), host(getattr(wanted, name)), f"traffic.{name} {where}", "DENSITY-2"
            )
