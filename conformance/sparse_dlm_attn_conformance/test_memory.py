"""Laws of what passes from pass to pass, and of what a pass reads, for anyone's policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparse_dlm_attn import PassInfo, PrefixAttention, StaleMemoryError
from sparse_dlm_attn_conformance.cases import Arrays, Case, Host
from sparse_dlm_attn_conformance.checks import expect, expect_close, expect_same_bits
from sparse_dlm_attn_conformance.contenders import Contender
from sparse_dlm_attn_conformance.episodes import Episode, Pass, episodes, play
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.operations import leaves
from sparse_dlm_attn_conformance.strategies import cases
from sparse_dlm_attn_conformance.subjects import Loaded, Subject, host
from sparse_dlm_attn_conformance.test_policies import SHARE, expect_same_decisions, loaded, on_grid, output_budget
from sparse_dlm_attn_conformance.test_purity import of_sequences


@pytest.mark.clause("POLICY-1", "PURE-1")
@law(episode=episodes(), share=SHARE)
def test_memory_is_a_value(subject: Subject, policy: Contender, episode: Episode, arrays: Arrays) -> None:
    """Going on twice from one memory gives the same pass twice, and leaves the memory as it was."""
    chosen, case = loaded(policy), episode.case
    done = play(subject, chosen, episode)
    memory = done[0].memory
    attention, context = PrefixAttention(chosen, subject.backend), subject.load(arrays).context
    context = replace(context, page_table=memory.page_table, page_lengths=memory.page_lengths)
    on = subject.load(arrays.but(q=episode.queries(subject.dtype)[1]))
    _, again = attention(on.q, on.k, on.v, context, memory, episode.info(subject, 1), scale=case.scale)
    expect_same_decisions(
        Pass.of(arrays, done[1].out, again), done[1], "when a pass is repeated from its memory", "POLICY-1"
    )
    for number, earlier in enumerate(done):
        state = earlier.memory.state
        for name, value, before in zip(("out", "lse"), (state.out, state.lse), earlier.kept, strict=True):
            expect_same_bits(host(value), before, f"{name} in the memory of pass {number}, later", "PURE-1")
        now = leaves(earlier.memory.policy_memory)
        expect(now.keys() == earlier.left.keys(), "POLICY-1", f"memory of pass {number} holds something else")
        for name, value in earlier.left.items():
            what = f"memory{name} that the policy made in pass {number}, after later passes"
            expect_same_bits(now[name], value, what, "POLICY-1")


@pytest.mark.clause("DRIVER-2")
@law(episode=episodes(), share=SHARE)
def test_values_that_were_not_selected_are_not_read(subject: Subject, policy: Contender, episode: Episode) -> None:
    chosen, case = loaded(policy), episode.case
    arrays, queries = case.arrays(subject.dtype), episode.queries(subject.dtype)
    attention, memory = PrefixAttention(chosen, subject.backend), None
    on = subject.load(arrays)
    context = on.context.with_bounds(subject.bounds(arrays.bounds()))
    for number, q in enumerate(queries):
        rows, info = subject.laid_out(q, arrays.layout), episode.info(subject, number)
        given = memory
        out, memory = attention(rows, on.k, on.v, context, given, info, scale=case.scale)
        rotten = arrays.poisoned(~arrays.stored(host(memory.traffic.loaded)), np.nan)
        pages = subject.load(rotten if memory.traffic.key_reads == 0 else rotten.but(k_pages=arrays.k_pages))
        poisoned = replace(context, k_pages=pages.context.k_pages, v_pages=pages.context.v_pages)
        again, _ = attention(rows, on.k, on.v, poisoned, given, info, scale=case.scale)
        expect_same_bits(host(again), host(out), f"out of pass {number} with NaN in pages not selected", "DRIVER-2")


@pytest.mark.clause("MEMORY-1")
@law(episode=episodes(), share=SHARE)
def test_memory_of_a_block_does_not_reach_the_next(subject: Subject, policy: Contender, episode: Episode) -> None:
    chosen = loaded(policy)
    if chosen.memory_scope != "block":
        pytest.skip("the policy's memory spans the sequence")
    earlier = replace(episode, case=replace(episode.case, seed=episode.case.seed + 5)).begun()
    left_over = play(subject, chosen, earlier)[-1].memory
    clean, tainted = play(subject, chosen, episode), play(subject, chosen, episode, memory=left_over)
    for number, (want, got) in enumerate(zip(clean, tainted, strict=True)):
        expect_same_decisions(got, want, f"in pass {number} after another block", "MEMORY-1")
        expect_same_bits(got.out, want.out, f"out of pass {number} after another block", "MEMORY-1")


@pytest.mark.clause("MEMORY-3")
@law(episode=episodes(), share=SHARE)
def test_dropped_memory_restarts_the_block(
    subject: Subject, policy: Contender, episode: Episode, arrays: Arrays
) -> None:
    chosen, case = loaded(policy), episode.case
    on, attention = subject.load(arrays), PrefixAttention(chosen, subject.backend)

    def run(now: Loaded, info: PassInfo) -> Pass:
        out, memory = attention(now.q, now.k, now.v, on.context, None, info, scale=case.scale)
        return Pass.of(arrays, out, memory)

    place = episode.info(subject, 1)
    restarted, begun = run(on, place), run(on, replace(place, index=0))
    expect_same_decisions(restarted, begun, "in the middle of a block without memory", "MEMORY-3")
    expect_same_bits(restarted.out, begun.out, "out in the middle of a block without memory", "MEMORY-3")


@pytest.mark.clause("MEMORY-4")
@law(episode=episodes(max_batch=3, max_passes=5), share=SHARE)
def test_reordered_memory_goes_on_as_each_sequence_would(
    subject: Subject, policy: Contender, episode: Episode, arrays: Arrays
) -> None:
    """Between two passes sequences change places, end, or go on several times."""
    subject, chosen, case = on_grid(subject), loaded(policy), episode.case
    alone = play(subject, chosen, episode)
    rng = np.random.default_rng(case.seed)
    first = int(rng.integers(1, episode.passes))
    order = rng.integers(0, case.batch, rng.integers(1, case.batch + 2))
    memory, taken = alone[first - 1].memory.reorder(order.tolist()), of_sequences(arrays, order)
    together = play(subject, chosen, episode, arrays=taken, rows=order, memory=memory, first=first)
    for number, (got, want) in enumerate(zip(together, alone[first:], strict=True), first):
        what = f"in pass {number} after sequences were reordered as {order.tolist()}"
        expect_same_bits(got.active, want.active[order], f"active rows {what}", "MEMORY-4")
        expect_same_bits(got.pages, want.pages[order], f"pages read {what}", "MEMORY-4")
        expect_close(got.out, want.out[order], output_budget(taken), f"out {what}", "MEMORY-4")


@pytest.mark.clause("MEMORY-2")
@law(case=cases(max_batch=2, min_pages=2, regimes=("dyadic",)), share=0.3, one_dtype=True)
def test_memory_of_another_sequence_is_refused(subject: Subject, case: Case, arrays: Arrays) -> None:
    """Of a policy whose memory spans blocks: the next one's context has to continue the one before."""
    attention = PrefixAttention("snapkv:capacity=5,window=2,kernel=3", subject.backend, check_contents=True)
    on = subject.load(arrays)
    _, memory = attention(on.q, on.k, on.v, on.context, None, PassInfo(0))
    lengths = arrays.page_lengths
    cut = np.where(np.arange(lengths.shape[1]) < lengths.shape[1] // 2, lengths, 0)
    others = {
        "fewer tokens": arrays.but(page_lengths=cut),
        "two sequences for each": of_sequences(arrays, np.repeat(np.arange(case.batch), 2)),
    }
    if (cut == lengths).all() or arrays.page_segments is not None:
        del others["fewer tokens"]  # it has no more, or those that follow the block
    for name, other in others.items():
        now = subject.load(other)
        try:
            attention(now.q, now.k, now.v, now.context, memory, PassInfo(0))
        except StaleMemoryError:
            continue
        expect(False, "MEMORY-2", f"memory of a sequence handed to one with {name} must be refused")
    attention(on.q, on.k, on.v, replace(on.context, version=1), memory, PassInfo(0))


@pytest.mark.clause("DENSITY-1", "DENSITY-2")
@law(episode=episodes(), share=SHARE)
def test_density_and_bytes_are_those_of_the_pages_read(
    subject: Subject, policy: Contender, episode: Episode, arrays: Arrays
) -> None:
    case = episode.case
    size = {"float64": 8, "float32": 4}.get(subject.dtype, 2)
    for number, done in enumerate(play(subject, loaded(policy), episode)):
        traffic = done.memory.traffic
        batch, heads, _, pages = done.pages.shape
        of_heads: Host = np.asarray(done.pages.any(axis=2))
        union = np.asarray(of_heads.reshape(batch, heads // case.group, case.group, pages).any(axis=2))
        expect_same_bits(host(traffic.loaded), union, f"pages loaded in pass {number}", "DENSITY-1")
        read = (union * arrays.page_lengths[:, None, :]).sum(axis=(1, 2))
        total = arrays.page_lengths.sum(axis=1) * case.kv_heads
        density = np.where(total > 0, read / np.maximum(total, 1), 0.0)
        expect_close(host(traffic.density), density, 1e-6, f"density of pass {number}", "DENSITY-1")
        metadata = (arrays.page_lengths > 0).sum(axis=1) * case.kv_heads * 2 * case.head_dim * size
        expected = (
            read * 2 * case.head_dim * size
            + metadata * traffic.metadata_reads
            + total * case.head_dim * size * traffic.key_reads
        )
        expect_close(host(traffic.bytes_read), expected, 1e-6 * expected, f"bytes read in pass {number}", "DENSITY-2")
