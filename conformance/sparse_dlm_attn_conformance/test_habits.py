"""Laws of what a policy depends on beside the pass at hand: other heads, the block before, the process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import PassInputs, PrefixAttentionPolicy
from sparse_dlm_attn.arrays import is_array
from sparse_dlm_attn_conformance.cases import Arrays
from sparse_dlm_attn_conformance.checks import expect, expect_same_bits
from sparse_dlm_attn_conformance.contenders import Contender
from sparse_dlm_attn_conformance.doubles import Changes, Grid, Probe
from sparse_dlm_attn_conformance.episodes import Episode, episodes, play
from sparse_dlm_attn_conformance.guards import changed_settings, restored, stirred_settings
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.operations import array_leaves
from sparse_dlm_attn_conformance.rules import RULES, rule_of
from sparse_dlm_attn_conformance.subjects import Subject, host
from sparse_dlm_attn_conformance.test_context import shares_memory
from sparse_dlm_attn_conformance.test_denoising import appended, with_room
from sparse_dlm_attn_conformance.test_policies import SHARE, expect_stated, loaded, on_grid


@pytest.mark.clause("POLICY-8")
@law(episode=episodes(kv_heads=(2, 3)), share=SHARE)
def test_pages_of_a_kv_head_are_those_it_gets_alone(subject: Subject, policy: Contender, episode: Episode) -> None:
    """As on a device that holds one KV head of several: only the change of queries is over all of them."""
    chosen, case = loaded(policy), episode.case
    if chosen.mixes_heads:
        pytest.skip("the policy declares mixes_heads")
    if subject.backend.why_not(replace(case, kv_heads=1).problem(subject.dtype, subject.device_kind)):
        return
    whole = Changes(Grid(subject.backend))
    arrays = case.arrays(subject.dtype)
    together = play(subject.using(whole), chosen, episode)
    for head in range(case.kv_heads):
        device = Changes(Grid(subject.backend), whole.seen)
        mine = slice(head * case.group, (head + 1) * case.group)
        alone = play(subject.using(device), chosen, episode, arrays=of_head(arrays, head), heads=mine)
        for number, (one, all_) in enumerate(zip(alone, together, strict=True)):
            what = f"of KV head {head} in pass {number}, which it gets alone"
            expect_same_bits(one.active, all_.active, f"active rows {what}", "POLICY-8")
            expect_same_bits(one.pages, all_.pages[:, mine], f"pages {what}", "POLICY-8")


def of_head(arrays: Arrays, head: int) -> Arrays:
    """Return the problem of one KV head and its query heads; a selection is that of all heads."""
    one, group = slice(head, head + 1), arrays.group
    mine = slice(head * group, (head + 1) * group)
    query = {name: getattr(arrays, name)[:, mine] for name in ("q", "q_other")}
    return arrays.but(**query, **{name: getattr(arrays, name)[:, one] for name in ("k", "v", "k_pages", "v_pages")})


@pytest.mark.clause("POLICY-6", "MEMORY-1")
@law(episode=episodes(), share=SHARE)
def test_the_next_block_does_what_the_page_states(subject: Subject, policy: Contender, episode: Episode) -> None:
    """The block's keys have joined the context, and the memory of its last pass is handed in."""
    chosen, case = loaded(policy), episode.case
    rule, first = rule_of(chosen, episode), episode.begun()
    if rule is None:
        pytest.skip("the policy states no rule (see stated_rule in the how-to)")
    before = with_room(case.arrays(subject.dtype), 1, case.num_pages)
    done = play(on_grid(subject), chosen, first, arrays=before)
    expect_stated(done, rule, first, before, first.queries(subject.dtype), "the first block")
    if chosen.memory_scope == "block":
        rule = rule_of(chosen, episode)
        assert rule is not None
    after, later = appended(before), replace(episode, case=replace(case, seed=case.seed + 11))
    fresh = later.case.arrays(subject.dtype)
    after = after.but(q=fresh.q, k=fresh.k, v=fresh.v)
    done = play(on_grid(subject), chosen, later, arrays=after, memory=done[-1].memory, version=1)
    expect_stated(done, rule, later, after, later.queries(subject.dtype), "the next block")


@pytest.mark.clause("POLICY-6", "MEMORY-3")
@law(episode=episodes(max_passes=5), share=SHARE)
def test_a_block_that_lost_its_memory_goes_on_as_the_page_states(
    subject: Subject, policy: Contender, episode: Episode
) -> None:
    """The pass after a restart is no pass 0 by its number, and must find what a pass 0 leaves behind."""
    chosen, arrays = loaded(policy), episode.case.arrays(subject.dtype)
    if type(chosen).computed_tokens is not PrefixAttentionPolicy.computed_tokens:
        pytest.skip("a policy with its own computed_tokens may go by the pass number")
    rule = RULES.get(chosen.name)
    if rule is None:
        pytest.skip("what the policy states may go by the pass number")
    done = play(on_grid(subject), chosen, episode, first=1)
    queries = episode.queries(subject.dtype)
    expect_stated(done, rule(chosen, episode), episode, arrays, queries, "a block that restarted", first=1)


@pytest.mark.clause("POLICY-1", "PURE-2")
@law(episode=episodes(layouts=("plain",)), share=SHARE)
def test_what_is_remembered_is_no_view_of_what_was_given(subject: Subject, policy: Contender, episode: Episode) -> None:
    """The caller writes the next queries where these were, and the next tokens into the table."""

    def check(inner: PrefixAttentionPolicy[Any], question: str, inputs: PassInputs[Any], *answer: Any) -> None:
        if question != "remember":
            return
        context, info = inputs.context, inputs.info
        given = {
            "q": inputs.q,
            "page_table": context.page_table,
            "page_lengths": context.page_lengths,
            "k_pages": context.k_pages,
            "decoded": info.decoded,
            "newly_decoded": info.newly_decoded,
        }
        for name, part in array_leaves(answer[2]).items():
            for argument, array in given.items():
                if is_array(part) and is_array(array):
                    text = f"memory{name} must not share memory with {argument}"
                    expect(not shares_memory(part, array), "PURE-2", text)

    play(subject, Probe(loaded(policy), check), episode)


@pytest.mark.clause("POLICY-1")
@law(episode=episodes(), share=SHARE)
def test_questions_asked_in_between_do_not_matter(subject: Subject, policy: Contender, episode: Episode) -> None:
    """Answers pass from question to question as arguments: other layers may be asked in between."""
    chosen = loaded(policy)

    def disturb(inner: PrefixAttentionPolicy[Any], question: str, inputs: PassInputs[Any], *answer: Any) -> None:
        if question in ("active_set", "select_pages"):
            moved = np.asarray(host(inputs.q).astype(np.float64)[:, :, ::-1])
            other = replace(inputs, q=subject.floats(-moved))
            inner.select_pages(other, inner.active_set(other))

    apart = play(subject, chosen, episode)
    with restored():
        before = stirred_settings()
        disturbed = play(subject, Probe(chosen, disturb), episode)
        changed = changed_settings(before)
        if changed:  # once may be a compiler that set itself up
            before = stirred_settings()
            play(subject, Probe(chosen, disturb), episode)
            changed = changed_settings(before)
    for number, (got, want) in enumerate(zip(disturbed, apart, strict=True)):
        what = f"in pass {number} with other questions in between"
        expect_same_bits(got.active, want.active, f"active rows {what}", "POLICY-1")
        expect_same_bits(got.pages, want.pages, f"pages {what}", "POLICY-1")
    expect(not changed, "POLICY-1", f"a pass must leave the process as it was, but: {'; '.join(changed)}")
