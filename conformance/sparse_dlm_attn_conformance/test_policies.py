"""Laws of policies, for anyone's policy on any backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import AttentionState, PassInputs, PrefixAttention, PrefixAttentionPolicy, Selection, get_policy
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import Arrays, Host
from sparse_dlm_attn_conformance.checks import (
    expect,
    expect_close,
    expect_same_bits,
    expect_same_state,
    expect_state_close,
)
from sparse_dlm_attn_conformance.contenders import Contender, policy_texts
from sparse_dlm_attn_conformance.doubles import Grid, Probe
from sparse_dlm_attn_conformance.episodes import Episode, Pass, episodes, play, rows_of
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.oracle import block_keys, context_keys
from sparse_dlm_attn_conformance.rules import Moment, Rule, rule_of
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_conformance.subjects import Subject, host
from sparse_dlm_attn_conformance.test_purity import single
from sparse_dlm_attn_reference import ReferenceBackend

SHARE = 0.35  # of the profile's problems: an episode is many passes, and each law meets every policy


def loaded(policy: Contender) -> PrefixAttentionPolicy[Any]:
    """Return the policy, or skip: that it did not load is one failure, not a dozen."""
    if policy.instance is None:
        pytest.skip(f"policy {policy.spec!r} did not load")
    return policy.instance


def on_grid(subject: Subject) -> Subject:
    """Return the subject with pooled scores that every backend ranks alike."""
    return subject.using(Grid(subject.backend))


def expect_same_decisions(got: Pass, want: Pass, what: str, clause: str) -> None:
    expect_same_bits(got.active, want.active, f"active rows {what}", clause)
    expect_same_bits(got.pages, want.pages, f"pages read {what}", clause)


@pytest.mark.clause("REGISTRY-1", "POLICY-1")
@law()
def test_the_policy_loads(subject: Subject, policy: Contender) -> None:
    expect(policy.instance is not None, "REGISTRY-1", f"policy {policy.spec!r} must load; {policy.error}")


@pytest.mark.clause("POLICY-1")
@law(episode=episodes(), share=SHARE)
def test_decisions_are_those_on_the_reference(
    subject: Subject, policy: Contender, episode: Episode, arrays: Arrays
) -> None:
    reference = Subject("reference", "float64", ReferenceBackend())
    want = play(on_grid(reference), loaded(policy), episode, arrays=arrays)
    got = play(on_grid(subject), loaded(policy), episode, arrays=arrays)
    for number, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        expect_same_decisions(mine, theirs, f"in pass {number}, against the reference", "POLICY-1")
        expect_close(mine.out, theirs.out, output_budget(arrays), f"out of pass {number}", "POLICY-1")


def output_budget(arrays: Arrays) -> Host:
    """Return a budget for a pass that may hold states of earlier passes: the worst row counts for all."""
    everything = arrays.but(
        mask=np.ones((arrays.q.shape[0], 1, arrays.q.shape[2], arrays.page_lengths.shape[1]), dtype=bool),
        span=1,
        active=np.ones_like(arrays.active),
    )
    keys = context_keys(everything).joined(block_keys(everything))
    largest = np.abs(keys.values).max(initial=0.0)
    condition = np.abs(keys.keys).sum(axis=3).max(initial=0.0) * np.abs(arrays.q).max(initial=0.0)
    terms, count = keys.keys.shape[3], keys.keys.shape[2]
    spread = accuracy.computing(arrays.dtype) * (np.sqrt(terms) * condition + np.sqrt(count))
    return np.asarray(
        2 * (3 * accuracy.EPS[arrays.dtype] + 3 * spread + accuracy.EPS["float32"] * (1 + condition)) * largest
    )


@pytest.mark.clause("POLICY-1", "PURE-3")
@law(episode=episodes(), share=SHARE)
def test_the_same_inputs_give_the_same_answers(subject: Subject, policy: Contender, episode: Episode) -> None:
    """Passes of another problem in between must not matter: a policy keeps nothing but its memory."""
    chosen = loaded(policy)
    first = play(subject, chosen, episode)
    other = replace(episode, case=replace(episode.case, seed=episode.case.seed + 7)).begun()
    play(subject, chosen, other)
    for number, (one, two) in enumerate(zip(first, play(subject, chosen, episode), strict=True)):
        expect_same_decisions(two, one, f"in pass {number}, asked again", "POLICY-1")
        if subject.backend.capabilities.deterministic:
            expect_same_bits(two.out, one.out, f"out of pass {number}, asked again", "POLICY-1")


@pytest.mark.clause("POLICY-2")
@law(episode=episodes(max_batch=3), share=SHARE)
def test_a_ragged_batch_decides_as_each_sequence_alone(
    subject: Subject, policy: Contender, episode: Episode, arrays: Arrays
) -> None:
    subject, chosen = on_grid(subject), loaded(policy)
    together = play(subject, chosen, episode)
    for b in range(episode.case.batch):
        alone = play(subject, chosen, episode, arrays=single(arrays, b), rows=slice(b, b + 1))
        for number, (one, all_) in enumerate(zip(alone, together, strict=True)):
            expect_same_bits(one.active[0], all_.active[b], f"active rows of sequence {b} in pass {number}", "POLICY-2")
            expect_same_bits(one.pages[0], all_.pages[b], f"pages of sequence {b} in pass {number}", "POLICY-2")


@pytest.mark.clause("POLICY-2", "MEMORY-1")
@law(episode=episodes(max_batch=3, max_passes=5), share=SHARE)
def test_sequences_may_stand_at_different_passes(subject: Subject, policy: Contender, episode: Episode) -> None:
    """Sequence b begins a new block at its own time; it decides as it would alone."""
    subject, chosen, case = on_grid(subject), loaded(policy), episode.case
    if chosen.memory_scope != "block":
        return
    starts = [0] + [1 + (case.seed + b) % (episode.passes + 1) for b in range(1, case.batch)]
    arrays, queries = case.arrays(subject.dtype), episode.queries(subject.dtype)
    on, attention, memory = subject.load(arrays), PrefixAttention(chosen, subject.backend), None
    alone: list[LayerMemory | None] = [None] * case.batch
    lone = [single(arrays, b) for b in range(case.batch)]
    lone_on = [subject.load(one) for one in lone]
    for step, q in enumerate(queries):
        index = [step if step < start or start == 0 else step - start for start in starts]
        rows = subject.laid_out(q, arrays.layout)
        info = episode.info(subject, step, subject.ints(np.asarray(index, dtype=np.int32)))
        _, memory = attention(rows, on.k, on.v, on.context, memory, info, scale=case.scale)
        pages, active = rows_of(arrays, memory), host(memory.active)
        for b in range(case.batch):
            one = slice(b, b + 1)
            mine = lone_on[b]
            _, alone[b] = attention(
                subject.laid_out(q[one], arrays.layout),
                mine.k,
                mine.v,
                mine.context,
                alone[b],
                episode.info(subject, step, index[b], one),
                scale=case.scale,
            )
            kept = alone[b]
            assert kept is not None
            expect_same_bits(active[b], host(kept.active)[0], f"active rows of sequence {b}, call {step}", "POLICY-2")
            expect_same_bits(pages[b], rows_of(lone[b], kept)[0], f"pages of sequence {b}, call {step}", "POLICY-2")


@pytest.mark.clause("POLICY-3")
@law(episode=episodes(), share=SHARE)
def test_rows_that_restart_are_active_or_have_no_context_part(
    subject: Subject, policy: Contender, episode: Episode
) -> None:
    chosen = loaded(policy)
    first = play(subject, chosen, episode)[0]
    lse = host(first.memory.state.lse)
    idle = np.broadcast_to(~first.active[:, None, :], lse.shape)
    expect(
        np.isneginf(lse[idle]).all(), "POLICY-3", "a row that is not active in pass 0 must have an empty context part"
    )


@pytest.mark.clause("POLICY-4")
@law(episode=episodes(min_pages=3), share=SHARE)
def test_pages_do_not_depend_on_queries_of_inactive_rows(subject: Subject, policy: Contender, episode: Episode) -> None:
    def check(inner: PrefixAttentionPolicy[Any], question: str, inputs: PassInputs[Any], *answer: Any) -> None:
        if question != "select_pages":
            return
        active, selection = answer
        q, rows = host(inputs.q).astype(np.float64), host(active)[:, None, :, None]
        for changed in (np.where(rows, q, 4.0 - q[:, :, ::-1]), np.where(rows, q, np.nan)):
            other = inner.select_pages(replace(inputs, q=subject.floats(changed)), active)
            what = "pages after the queries of inactive rows changed"
            expect_same_bits(read_by(other, host(active), q), read_by(selection, host(active), q), what, "POLICY-4")

    play(subject, Probe(loaded(policy), check), episode)


def read_by(selection: Selection, active: Host, q: Host) -> Host:
    """Return the pages of each query head and active row, absent ones included."""
    mask = host(selection.mask)
    heads = np.arange(q.shape[1]) // (q.shape[1] // mask.shape[1])
    spans = np.arange(q.shape[2]) // selection.span
    return np.asarray(mask[:, heads][:, :, spans] & active[:, None, :, None])


@pytest.mark.clause("POLICY-4", "CONTEXT-2")
@law(episode=episodes(poisons=("zero",), wild=False, min_pages=3), share=SHARE)
def test_decisions_do_not_depend_on_what_does_not_exist(
    subject: Subject, policy: Contender, episode: Episode, arrays: Arrays
) -> None:
    chosen = loaded(policy)
    plain = play(subject, chosen, episode, arrays=arrays)
    for poison, entry in ((np.nan, -(2**31)), (np.inf, 2**31 - 1)):
        table = np.where(arrays.page_lengths > 0, arrays.page_table, entry).astype(np.int32)
        wild = arrays.poisoned(~arrays.stored(), poison).but(page_table=table)
        for number, (got, want) in enumerate(zip(play(subject, chosen, episode, arrays=wild), plain, strict=True)):
            what = f"in pass {number} with {poison} and table entry {entry} in what does not exist"
            expect_same_decisions(got, want, what, "POLICY-4")
            expect_same_bits(got.out, want.out, f"out {what}", "POLICY-4")


@pytest.mark.clause("POLICY-5")
@law(episode=episodes(), share=SHARE)
def test_reuse_with_all_rows_active_returns_fresh(subject: Subject, policy: Contender, episode: Episode) -> None:
    def check(inner: PrefixAttentionPolicy[Any], question: str, inputs: PassInputs[Any], *answer: Any) -> None:
        if question == "reuse":
            fresh: AttentionState = answer[1]
            expect_same_state(
                inner.reuse(inputs, inputs.all_rows(), fresh), fresh, "reuse with all rows active", "POLICY-5"
            )

    play(subject, Probe(loaded(policy), check), episode)


@pytest.mark.clause("POLICY-6")
@law(episode=episodes(max_passes=5, sparse_pages=True), share=2.0)
def test_the_policy_does_what_its_page_states(subject: Subject, policy: Contender, episode: Episode) -> None:
    chosen = loaded(policy)
    rule = rule_of(chosen, episode)
    if rule is None:
        pytest.skip("the policy states no rule (see stated_rule in the how-to)")
    arrays = episode.case.arrays(subject.dtype)
    done = play(on_grid(subject), chosen, episode)
    expect_stated(done, rule, episode, arrays, episode.queries(subject.dtype))


@pytest.mark.clause("POLICY-6")
@law(episode=episodes(max_passes=5, sparse_pages=True), policy_name=policy_texts(), share=3.0, one_dtype=True)
def test_every_parameter_does_what_its_page_states(subject: Subject, episode: Episode, policy_name: str) -> None:
    chosen = get_policy(policy_name)
    rule = rule_of(chosen, episode)
    assert rule is not None
    arrays = episode.case.arrays(subject.dtype)
    done = play(on_grid(subject), chosen, episode)
    expect_stated(done, rule, episode, arrays, episode.queries(subject.dtype))


def expect_stated(
    played: list[Pass],
    rule: Rule,
    episode: Episode,
    arrays: Arrays,
    queries: list[Host],
    block: str = "the block",
    first: int = 0,
) -> None:
    """Compare active rows and pages of every pass, from ``first`` on, with the rule."""
    for number, done in enumerate(played, first):
        saves = episode.saves and number == episode.passes - 1
        moment = Moment(arrays.but(q=queries[number]), number - first, saves, episode.newly(number))
        stated = rule.step(moment)
        what = f"in pass {number} of {block}"
        expect_same_bits(done.active, stated.active, f"active rows {what}", "POLICY-6")
        pages = np.broadcast_to(stated.pages, done.pages.shape) & stated.active[:, None, :, None]
        pages = pages & arrays.exists
        expect_same_bits(done.pages, pages, f"pages read {what}", "POLICY-6")


@pytest.mark.clause("POLICY-5", "ATTEND-4")
@law(episode=episodes(), share=SHARE)
def test_a_pass_that_reads_everything_is_dense_attention(subject: Subject, policy: Contender, episode: Episode) -> None:
    arrays, queries = episode.case.arrays(subject.dtype), episode.queries(subject.dtype)
    for number, done in enumerate(play(subject, loaded(policy), episode)):
        everything = arrays.but(
            q=queries[number],
            mask=np.ones((episode.case.batch, 1, 1, episode.case.pages), dtype=bool),
            span=episode.case.tokens,
            active=np.ones_like(done.active),
        )
        if not (done.active.all() and (done.pages == everything.rows()).all()):
            continue
        expected = accuracy.attention(
            everything, context_keys(everything).joined(block_keys(everything)), rounded_parts=2
        )
        expect_close(done.out, expected.state.out, expected.out_budget, f"out of pass {number}", "POLICY-5")


@pytest.mark.clause("REUSE-1", "ATTEND-2")
@law(episode=episodes(), share=SHARE)
def test_the_context_part_of_active_rows_is_attention_over_their_pages(
    subject: Subject, policy: Contender, episode: Episode
) -> None:
    arrays, queries = episode.case.arrays(subject.dtype), episode.queries(subject.dtype)
    for number, done in enumerate(play(subject, loaded(policy), episode)):
        keys = context_keys(arrays, done.pages)
        expected = accuracy.attention(arrays.but(q=queries[number]), keys)
        rows = np.broadcast_to(done.active[:, None, :], done.out.shape[:3])
        state = done.memory.state
        kept = expected.of(rows)
        what = f"context part of active rows in pass {number}"
        expect_state_close(host(state.out)[rows], host(state.lse)[rows], kept, what, "REUSE-1")


@pytest.mark.clause("POLICY-4", "CONTEXT-3")
@law(episode=episodes(), share=SHARE)
def test_decisions_follow_the_logical_pages(
    subject: Subject, policy: Contender, episode: Episode, arrays: Arrays
) -> None:
    chosen, case = loaded(policy), episode.case
    order = np.random.default_rng(case.seed).permutation(case.num_pages)
    where, real = np.argsort(order).astype(np.int32), arrays.page_lengths > 0
    moved = arrays.but(
        k_pages=arrays.k_pages[order],
        v_pages=arrays.v_pages[order],
        page_table=np.where(real, where[np.where(real, arrays.page_table, 0)], arrays.page_table),
    )
    for number, (got, want) in enumerate(
        zip(play(subject, chosen, episode, arrays=moved), play(subject, chosen, episode, arrays=arrays), strict=True)
    ):
        expect_same_decisions(got, want, f"in pass {number} with the physical pages permuted", "POLICY-4")
        expect_same_bits(got.out, want.out, f"out of pass {number} with the pages permuted", "CONTEXT-3")


@pytest.mark.clause("POLICY-1", "SELECTION-1")
@law(case=cases(regimes=("dyadic",), max_batch=2), share=0.3)
def test_answers_have_the_declared_shapes(subject: Subject, policy: Contender, case: Any) -> None:
    def check(inner: PrefixAttentionPolicy[Any], question: str, inputs: PassInputs[Any], *answer: Any) -> None:
        batch, q_heads, tokens, _ = inputs.q.shape
        if question == "active_set":
            shape = tuple(answer[0].shape)
            text = f"active_set must return an array (batch, tokens) = {(batch, tokens)}; got {shape}"
            expect(subject.owns(answer[0]) and shape == (batch, tokens), "POLICY-1", text)
        if question == "select_pages":
            selection = answer[1]
            text = f"select_pages must return a Selection; got {type(selection).__qualname__}"
            expect(isinstance(selection, Selection), "POLICY-1", text)
            text = f"a selection must have 1, {case.kv_heads} or {q_heads} heads; got {selection.heads}"
            expect(selection.heads in (1, case.kv_heads, q_heads), "SELECTION-1", text)

    play(subject, Probe(loaded(policy), check), Episode(case, moves=(0,), decoded=(0,)))
