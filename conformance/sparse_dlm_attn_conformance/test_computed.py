"""Laws of the rows that a model computes at all, and of a block that is the whole sequence."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_dlm_attn import PassInfo, PrefixAttention, PrefixAttentionPolicy
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn_conformance import accuracy
from sparse_dlm_attn_conformance.cases import Arrays, Host
from sparse_dlm_attn_conformance.checks import expect, expect_close, expect_same_bits, expect_state_close
from sparse_dlm_attn_conformance.contenders import Contender
from sparse_dlm_attn_conformance.episodes import Episode, episodes, rows_of
from sparse_dlm_attn_conformance.laws import law
from sparse_dlm_attn_conformance.oracle import context_keys
from sparse_dlm_attn_conformance.rules import RULES
from sparse_dlm_attn_conformance.strategies import BOOLEANS, choice, integers
from sparse_dlm_attn_conformance.subjects import Subject, host
from sparse_dlm_attn_conformance.test_policies import SHARE, loaded, on_grid
from sparse_dlm_attn_reference import ReferenceBackend


@dataclass(frozen=True)
class Filling:
    """A pass of a batch of sequences that are filled in window by window."""

    tokens: int
    rows: tuple[tuple[int, int, int, int], ...]  # bitmasks: decoded, decoded just now, window, decoded next
    index: tuple[int, ...]
    window_index: tuple[int, ...]
    said: tuple[bool, bool, bool, bool]  # whether the pass tells decoded rows, window, those decoded next, their order
    seed: int  # of the order

    def masks(self) -> tuple[Host, Host, Host, Host]:
        """Return decoded, newly decoded, window and planned rows, bool ``(batch, tokens)``."""
        bits = (np.asarray(self.rows)[:, :, None] >> np.arange(self.tokens)) & 1
        decoded, newly, window, planned = np.moveaxis(bits.astype(bool), 1, 0)
        begun = (np.asarray(self.window_index) == 0)[:, None]
        newly = decoded & newly & (window | begun)  # what an earlier window decoded, a new one begins with
        return decoded, newly, window, planned & window & ~decoded

    def orders(self) -> list[list[int]]:
        """Return the planned rows of each sequence as they are decoded: from left to right if untold."""
        rows = [np.flatnonzero(part) for part in self.masks()[3]]
        if self.said[3]:
            rows = [np.random.default_rng((self.seed, b)).permutation(part) for b, part in enumerate(rows)]
        return [part.tolist() for part in rows]

    def info(self, subject: Subject, chosen: slice = slice(None), *, uniform: bool = False) -> PassInfo:
        """Return what the policy is told about the ``chosen`` sequences."""
        decoded, newly, window, planned = (subject.ints(part[chosen]) for part in self.masks())
        index, within = np.asarray(self.index[chosen]), np.asarray(self.window_index[chosen])
        numbers: list[Any] = [subject.ints(part.astype(np.int32)) for part in (index, within)]
        if uniform:
            numbers = [int(index[0]), int(within[0])]
        order = None
        if self.said[2] and self.said[3]:
            longest = max(map(len, self.orders()))
            filled = [[*rows, *[-1] * (longest - len(rows))] for rows in self.orders()[chosen]]
            order = subject.ints(np.asarray(filled, np.int32))
        return PassInfo(
            numbers[0],
            decoded=decoded if self.said[0] else None,
            newly_decoded=newly if self.said[0] else None,
            window=window if self.said[1] else None,
            window_index=numbers[1],
            planned=planned if self.said[2] else None,
            planned_order=order,
        )


@st.composite
def fillings(draw: Any, /) -> Filling:
    """Draw a pass of up to three sequences."""
    tokens, batch = draw(integers(1, 20)), draw(integers(1, 3))
    bits, mostly = integers(0, (1 << tokens) - 1), choice((True, True, True, False))
    within = [draw(integers(0, 9)) for _ in range(batch)]
    some, most = (st.builds(mix, bits, bits) for mix in (operator.and_, operator.or_))
    return Filling(
        tokens,
        tuple((draw(some), draw(bits), draw(most), draw(bits)) for _ in range(batch)),
        tuple(number + draw(choice((0, 0, 4))) for number in within),
        tuple(within),
        (draw(mostly), draw(BOOLEANS), draw(mostly), draw(mostly)),
        draw(integers(0, 99)),
    )


def computed(subject: Subject, policy: PrefixAttentionPolicy[Any], info: PassInfo, shape: Any) -> Host:
    answer = policy.computed_tokens(info, subject.ints(np.ones(shape, dtype=bool)))
    found = host(answer)
    text = f"computed_tokens must be bool {shape}; got {found.dtype} {found.shape}"
    expect(found.shape == shape and found.dtype == bool, "POLICY-7", text)
    return found


@pytest.mark.clause("POLICY-7", "POLICY-2")
@law(filling=fillings(), share=2.0)
def test_computed_rows_hold_all_that_must_be_computed(subject: Subject, policy: Contender, filling: Filling) -> None:
    chosen = loaded(policy)
    decoded, newly, window, planned = filling.masks()
    rows = computed(subject, chosen, filling.info(subject), decoded.shape)
    told, in_windows, plans, _ = filling.said
    needed = window if in_windows else np.ones_like(window)
    if plans:
        needed = planned
    elif told:
        needed = needed & ~decoded
    # A sequence at the beginning of its block has nothing stored.
    needed = needed | (newly & told) | (np.asarray(filling.index) == 0)[:, None]
    missing = np.argwhere(needed & ~rows).tolist()
    expect(not missing, "POLICY-7", f"rows {missing} must be computed")
    for b in range(decoded.shape[0]):
        for uniform in (True, False):
            one = slice(b, b + 1)
            alone = computed(subject, chosen, filling.info(subject, one, uniform=uniform), decoded[one].shape)
            expect_same_bits(alone[0], rows[b], f"computed rows of sequence {b} alone", "POLICY-2")


def stated(policy: Any, filling: Filling) -> Host:
    """Return the rows that a published policy's page promises to compute, once more and plainly."""
    decoded, newly, window, _ = filling.masks()
    told, in_windows, plans, _ = filling.said
    rows = np.ones_like(decoded)
    for b, number in enumerate(filling.window_index):
        if filling.index[b] == 0 or number == 0:
            continue
        if policy.name == "fast-dllm" and in_windows:
            rows[b] = np.logical_or.accumulate(window[b]) if policy.mode == "prefix" else window[b]
        if policy.name == "sparse-dllm" and in_windows and number > policy.delay:
            rows[b] = window[b]
        if policy.name == "dkv-cache" and told:
            greedy = policy.mode == "greedy"
            if number % (policy.reload or (2 if greedy else 8)) == 0 or (not greedy and number == 1):
                continue
            rows[b] = ~decoded[b]
            if greedy and plans:
                rows[b] = False
                rows[b, taken(~decoded[b], filling.orders()[b], policy.neighbours)] = True
            elif greedy and in_windows:
                rows[b] &= window[b]
            rows[b] |= newly[b]
    return rows


def taken(masked: Host, centres: list[int], wanted: int) -> list[int]:
    """Return the centres, and for one after another the nearest masked rows that are not among these yet."""
    chosen = list(centres)
    for centre in centres:
        free = [row for row in np.flatnonzero(masked).tolist() if row not in chosen]
        chosen += sorted(free, key=lambda row: (abs(row - centre), row))[:wanted]
    return chosen


@pytest.mark.clause("POLICY-6", "POLICY-7")
@law(filling=fillings(), share=6.0)
def test_computed_rows_are_those_that_the_page_states(subject: Subject, policy: Contender, filling: Filling) -> None:
    chosen = loaded(policy)
    if chosen.name not in RULES:
        pytest.skip("the policy is none of the published ones")
    wanted = stated(chosen, filling)
    found = computed(subject, chosen, filling.info(subject), wanted.shape)
    expect_same_bits(found, wanted, "computed rows", "POLICY-6")


def whole(arrays: Arrays) -> Arrays:
    """Return the block of a case as a whole sequence: its own keys as pages, in any physical order."""
    batch, kv_heads, tokens, head_dim = arrays.k.shape
    size = arrays.page_size
    pages = -(-tokens // size)

    def paged(values: Host) -> Host:
        wide = np.full((batch, kv_heads, pages * size, head_dim), 0.0)
        wide[:, :, :tokens] = values
        parts = wide.reshape(batch, kv_heads, pages, size, head_dim).swapaxes(1, 2)
        return np.ascontiguousarray(parts.reshape(batch * pages, kv_heads, size, head_dim)[::-1])

    table = np.arange(batch * pages)[::-1].reshape(batch, pages).astype(np.int32)
    lengths = np.clip(tokens - np.arange(pages) * size, 0, size).astype(np.int32)
    segments = None
    if arrays.page_segments is not None:
        segments = np.broadcast_to(np.arange(pages) * 2 // max(pages, 1), (batch, pages)).astype(np.int8)
    return arrays.but(
        k_pages=paged(arrays.k),
        v_pages=paged(arrays.v),
        page_table=table,
        page_segments=segments,
        page_lengths=np.ascontiguousarray(np.broadcast_to(lengths, (batch, pages))),
    )


def fill_in(
    subject: Subject, policy: PrefixAttentionPolicy[Any], episode: Episode, spoil: float | None = None
) -> list[tuple[Arrays, Host, Host, LayerMemory]]:
    """Run an episode's passes over its block as a whole sequence; keys of computed rows are new in each.

    Returns the values of each pass, the rows computed, the output, and what the driver returned.
    ``spoil`` stands in the queries of rows that are not computed.
    """
    attention, memory, done = PrefixAttention(policy, subject.backend), None, []
    base = episode.case.arrays(subject.dtype)
    keys, shape = base.k, (base.q.shape[0], base.q.shape[2])
    window = np.broadcast_to(np.arange(shape[1]) >= shape[1] // 2, shape)
    for number, q in enumerate(episode.queries(subject.dtype)):
        info = replace(episode.info(subject, number), window=subject.ints(window), window_index=number)
        rows = computed(subject, policy, info, shape)[:, None, :, None]
        fresh = episode.case.fresh(subject.dtype, episode.case.seed + 50 + number, episode.case.kv_heads)
        keys = np.where(rows, fresh, keys)
        arrays = whole(base.but(q=q, k=keys))
        shown = q if spoil is None else np.where(rows, q, spoil)
        on = subject.load(arrays.but(q=shown))
        out, memory = attention(on.q, None, None, on.context, memory, info, scale=episode.case.scale)
        done.append((arrays, rows[:, 0, :, 0], host(out), memory))
    return done


@pytest.mark.clause("DRIVER-4", "DRIVER-3", "REUSE-1")
@law(episode=episodes(), share=SHARE)
def test_a_whole_sequence_is_attention_of_active_rows_over_their_pages(
    subject: Subject, policy: Contender, episode: Episode
) -> None:
    for number, (arrays, rows, out, memory) in enumerate(fill_in(subject, loaded(policy), episode)):
        active = host(memory.active)
        expect(not (active & ~rows).any(), "DRIVER-3", "rows that are not computed must not be active")
        keys = context_keys(arrays, rows_of(arrays, memory))
        expected = accuracy.attention(arrays, keys)
        chosen = np.broadcast_to(active[:, None, :], out.shape[:3])
        kept = expected.of(chosen)
        state = memory.state
        expect_state_close(
            host(state.out)[chosen], host(state.lse)[chosen], kept, f"active rows in pass {number}", "DRIVER-4"
        )
        expect_close(out[chosen], kept.state.out, 2 * kept.out_budget, f"out of pass {number}", "DRIVER-4")


@pytest.mark.clause("DRIVER-3")
@law(episode=episodes(), share=SHARE)
def test_queries_of_rows_that_are_not_computed_reach_nothing(
    subject: Subject, policy: Contender, episode: Episode
) -> None:
    chosen = loaded(policy)
    plain = fill_in(subject, chosen, episode)
    spoiled = fill_in(subject, chosen, episode, spoil=np.nan)
    for number, (want, got) in enumerate(zip(plain, spoiled, strict=True)):
        rows = np.broadcast_to(want[1][:, None, :], want[2].shape[:3])
        what = f"of computed rows in pass {number} with NaN in the other queries"
        expect_same_bits(rows_of(got[0], got[3]), rows_of(want[0], want[3]), f"pages {what}", "DRIVER-3")
        expect_same_bits(got[2][rows], want[2][rows], f"out {what}", "DRIVER-3")


@pytest.mark.clause("DRIVER-4", "POLICY-1")
@law(episode=episodes(), share=SHARE)
def test_decisions_over_a_whole_sequence_are_those_on_the_reference(
    subject: Subject, policy: Contender, episode: Episode
) -> None:
    """Keys change from pass to pass, so metadata kept from the pass before would show here."""
    reference = on_grid(Subject("reference", "float64", ReferenceBackend()))
    chosen = loaded(policy)
    exact = replace(episode, case=replace(episode.case, regime="dyadic"))
    for number, (mine, theirs) in enumerate(
        zip(fill_in(on_grid(subject), chosen, exact), fill_in(reference, chosen, exact), strict=True)
    ):
        what = f"in pass {number} of a whole sequence, against the reference"
        expect_same_bits(host(mine[3].active), host(theirs[3].active), f"active rows {what}", "POLICY-1")
        pages, wanted = (rows_of(one[0], one[3]) for one in (mine, theirs))
        expect_same_bits(pages, wanted, f"pages {what}", "POLICY-1")
