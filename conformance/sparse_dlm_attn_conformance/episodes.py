"""Denoising episodes: a block's passes as data, and what a policy decided in each of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from sparse_dlm_attn import PassInfo, PrefixAttention, PrefixAttentionPolicy
from sparse_dlm_attn.capabilities import Problem
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn_conformance.cases import EXACT, Arrays, Case, Host
from sparse_dlm_attn_conformance.operations import leaves
from sparse_dlm_attn_conformance.strategies import cases, choice, integers
from sparse_dlm_attn_conformance.subjects import Subject, host


@functools.lru_cache(maxsize=1024)
def spread(bits: int, tokens: int, batch: int) -> Host:
    """Spread a bitmask of rows over the batch, so that sequences differ in which and in how many."""
    row = np.asarray((bits >> np.arange(tokens)) & 1, dtype=bool)
    others = row & (np.arange(tokens) % 2 == 0)
    rows = np.stack([np.roll(others if b % 2 else row, b) for b in range(batch)])
    rows.flags.writeable = False
    return rows


@dataclass(frozen=True)
class Episode:
    """The passes of one block.

    Parameters
    ----------
    case : Case
        Context, block and sizes; its selection and active rows are not used.
    moves : tuple of int
        For each pass after the first, the bitmask of rows whose query moved.
    decoded : tuple of int
        For each pass after the first, the bitmask of rows decoded after the previous pass.
    saves : bool
        Whether the last pass is the save pass.
    layer, num_layers : int
        Layer of the calls.
    total_passes : int or None
        Planned passes, as the caller says.
    """

    case: Case
    moves: tuple[int, ...] = ()
    decoded: tuple[int, ...] = ()
    saves: bool = False
    layer: int = 0
    num_layers: int = 1
    total_passes: int | None = None

    def problem(self, dtype: str, device: str = "cpu") -> Problem:
        """Return the facts that decide whether a backend computes this."""
        return self.case.problem(dtype, device)

    def features(self) -> list[str]:
        """Name what this episode covers."""
        return [*self.case.features(), f"{self.passes} passes", *(["save pass"] if self.saves else [])]

    @property
    def passes(self) -> int:
        """Number of passes."""
        return 1 + len(self.moves)

    def begun(self) -> Episode:
        """Return its first two passes."""
        return replace(self, moves=self.moves[:1], decoded=self.decoded[:1], saves=False)

    def moved(self, number: int) -> Host:
        """Return the rows whose query moves before pass ``number``, bool ``(batch, tokens)``."""
        return self._of_sequences(self.moves[number - 1] if number else 0)

    def newly(self, number: int) -> Host:
        """Return the rows decoded before pass ``number``, bool ``(batch, tokens)``."""
        return self._of_sequences(self.decoded[number - 1] if number else 0)

    def _of_sequences(self, bits: int) -> Host:
        return spread(bits, self.case.tokens, self.case.batch)

    def queries(self, dtype: str) -> list[Host]:
        """Return the queries of every pass, float64 on the value grid of the case."""
        current = self.case.arrays(dtype).q
        queries = [current]
        for number in range(1, self.passes):
            fresh = self.case.fresh(dtype, self.case.seed + 1000 * number, self.case.q_heads)
            current = np.where(self.moved(number)[:, None, :, None], fresh, current)
            queries.append(current)
        return queries

    def info(self, subject: Subject, number: int, index: Any = None, rows: slice | Host = slice(None)) -> PassInfo:
        """Return the place of pass ``number`` (with another index, or for some sequences only)."""
        known = np.zeros((self.case.batch, self.case.tokens), dtype=bool)
        for earlier in range(number + 1):
            known |= self.newly(earlier)
        return PassInfo(
            number if index is None else index,
            is_save=self.saves and number == self.passes - 1,
            decoded=subject.ints(known[rows]),
            newly_decoded=subject.ints(self.newly(number)[rows]),
            layer=self.layer,
            num_layers=self.num_layers,
            total_passes=self.total_passes,
        )


@dataclass(frozen=True, eq=False)
class Pass:
    """What happened in one pass, on the host."""

    out: Host
    active: Host  # bool (batch, tokens)
    pages: Host  # bool (batch, q_heads, tokens, pages): existing pages that active rows read
    memory: LayerMemory
    kept: tuple[Host, Host]  # a copy of memory.state, taken before any later pass
    left: dict[str, Host]  # a copy of what the policy remembers, likewise

    @classmethod
    def of(cls, arrays: Arrays, out: Any, memory: LayerMemory) -> Pass:
        """Copy what the driver returned to the host."""
        return cls(
            host(out),
            host(memory.active),
            rows_of(arrays, memory),
            memory,
            (host(memory.state.out), host(memory.state.lse)),
            leaves(memory.policy_memory),
        )


def rows_of(arrays: Arrays, memory: LayerMemory) -> Host:
    """Return the existing pages that each query head and active row reads."""
    mask, active = host(memory.selection.mask), host(memory.active)
    return arrays.but(mask=mask, span=memory.selection.span, active=active).rows()


def play(
    subject: Subject,
    policy: PrefixAttentionPolicy[Any],
    episode: Episode,
    *,
    arrays: Arrays | None = None,
    rows: slice | Host = slice(None),
    memory: LayerMemory | None = None,
    version: int = 0,
    heads: slice = slice(None),
    first: int = 0,
) -> list[Pass]:
    """Run an episode through the driver: some sequences and query heads of it, on other values if given.

    ``memory`` is that of an earlier block, handed in at the pass ``first``; ``version`` is the context's.
    """
    base = arrays if arrays is not None else episode.case.arrays(subject.dtype)
    attention = PrefixAttention(policy, subject.backend)
    done: list[Pass] = []
    on = subject.load(base)  # one context object for the block, as an engine has it
    context = replace(on.context, version=version) if version else on.context
    queries = episode.queries(subject.dtype)
    for number in range(first, episode.passes):
        out, memory = attention(
            subject.laid_out(queries[number][rows, heads], base.layout),
            on.k,
            on.v,
            context,
            memory,
            episode.info(subject, number, rows=rows),
            scale=episode.case.scale,
        )
        done.append(Pass.of(base, out, memory))
    return done


@functools.lru_cache(maxsize=64)
def _cases(**narrow: Any) -> st.SearchStrategy[Case]:
    return cases(max_pages=8, heads=("one",), spans=(1,), selects=False, **narrow)


@functools.lru_cache(maxsize=64)
def _rows(tokens: int) -> tuple[st.SearchStrategy[int], st.SearchStrategy[int]]:
    """Return two strategies for bitmasks of rows: one that likes a single row, and one that likes none."""
    one_row = st.integers(0, tokens - 1).map(lambda row: 1 << row)
    rows = st.one_of(st.just(0), one_row, st.integers(0, (1 << tokens) - 1))
    return st.one_of(one_row, rows), rows


@st.composite
def episodes(
    draw: Any, /, *, max_passes: int = 4, regimes: tuple[str, ...] = EXACT, max_batch: int = 2, **narrow: Any
) -> Episode:
    """Draw an episode; values lie on a grid, so that every decision is exact.

    Pages are small: policies have budgets of a few tokens here, and one page leaves nothing to choose.
    """
    narrow.setdefault("page_sizes", (1, 2, 3, 4, 5, 8, 16))
    case = draw(_cases(regimes=regimes, max_batch=max_batch, **narrow))
    later = draw(integers(1, max_passes - 1), label="later passes")
    some, rows = _rows(case.tokens)
    layers = draw(choice((1, 2, 3, 33)), label="layers")
    return Episode(
        case=case,
        moves=tuple(draw(rows, label="moved rows") for _ in range(later)),
        decoded=tuple(draw(some, label="decoded rows") for _ in range(later)),
        saves=draw(choice((False, True)), label="last pass saves"),
        num_layers=layers,
        layer=draw(integers(0, layers - 1), label="layer"),
        total_passes=draw(choice((None, 1, 4, 16)), label="total passes"),
    )
