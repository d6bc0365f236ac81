"""Drawn inputs of the operators that need no whole problem: scores, changes, states to merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_dlm_attn.arrays import Array
from sparse_dlm_attn.capabilities import Problem
from sparse_dlm_attn.ranked import Keep, RankedPass, Union
from sparse_dlm_attn_conformance.cases import Arrays, Host, round_to


@dataclass(frozen=True, eq=False)
class HostState:
    """An attention state in float64 NumPy (``out`` representable in the dtype, ``lse`` in float32)."""

    out: Host
    lse: Host


@dataclass(frozen=True)
class ScoreTable:
    """Scores to rank: ``values`` fill ``(*lead, pages)`` cyclically.

    ``counts`` and ``eligible`` differ along the first ``count_axes`` and ``eligible_axes`` axes and
    broadcast along the others; a count of no axes is an int.
    """

    lead: tuple[int, ...]
    pages: int
    values: tuple[float, ...]
    counts: tuple[int, ...]
    count_axes: int
    eligible: tuple[int, ...]
    eligible_axes: int

    def scores(self) -> Host:
        """Return float32 scores ``(*lead, pages)``."""
        shape = (*self.lead, self.pages)
        return np.resize(np.asarray(self.values, dtype=np.float32), shape)

    def count(self) -> Any:
        """Return an int, or an int32 array that broadcasts to ``lead``."""
        if self.count_axes == 0:
            return self.counts[0]
        shape = self._shape(self.count_axes)
        return np.resize(np.asarray(self.counts, dtype=np.int32), shape)

    def mask(self) -> Host:
        """Return the eligible pages, bool, broadcasting to the shape of the scores."""
        shape = self._shape(self.eligible_axes)
        chosen = np.resize(np.asarray(self.eligible, dtype=np.int64), (*shape, 1))
        return np.asarray((chosen >> np.arange(self.pages)) & 1, dtype=bool)

    def _shape(self, axes: int) -> tuple[int, ...]:
        """Return ``lead`` with all but its first ``axes`` axes 1."""
        return self.lead[:axes] + (1,) * (len(self.lead) - axes)


@dataclass(frozen=True)
class ChangeTable:
    """Changes to rank: ``values`` fill ``(batch, tokens)``."""

    batch: int
    values: tuple[float, ...]
    count: int
    mass: float

    def change(self) -> Host:
        """Return float32 changes ``(batch, tokens)``."""
        return np.asarray(self.values, dtype=np.float32).reshape(self.batch, -1)


@dataclass(frozen=True)
class MergeTable:
    """Attention states to merge; state ``i`` has lse around ``levels[i]``."""

    batch: int
    q_heads: int
    tokens: int
    head_dim: int
    levels: tuple[float, ...]
    kinds: tuple[str, ...]
    seed: int

    def problem(self, dtype: str, device: str = "cpu") -> Problem:
        """Return the facts that decide whether a backend computes this."""
        return Problem(dtype, self.head_dim, 16, self.q_heads, self.q_heads, self.tokens, device)

    def states(self, dtype: str) -> list[HostState]:
        """Return the states, with values representable in ``dtype``."""
        rng = np.random.default_rng(self.seed)
        shape = (self.batch, self.q_heads, self.tokens)
        made = []
        for level, kind in zip(self.levels, self.kinds, strict=True):
            out = round_to(rng.standard_normal((*shape, self.head_dim)), dtype)
            lse = round_to(level + rng.standard_normal(shape), "float32")
            empty = {"plain": 0.0, "some rows empty": 0.5, "empty": 1.0}[kind] > rng.random(shape)
            made.append(HostState(np.where(empty[..., None], 0.0, out), np.where(empty, -np.inf, lse)))
        return made


@dataclass(frozen=True)
class RankedRule:
    """The rule of a ranked pass over any problem, whose ``q_other`` change is measured against.

    Parameters
    ----------
    rows : {"all", "count", "mass"}
        Who is active.
    count, mass : int, float
        How many, where ``rows`` says so.
    fits : {"nothing", "one less", "exactly", "everything"}
        Budget in tokens, measured by the context of the first sequence.
    pages, union, keep
        As in `sparse_dlm_attn.ranked.RankedPass`.
    """

    rows: str = "all"
    count: int = 1
    mass: float = 0.5
    fits: str = "nothing"
    pages: int = 1
    union: Union = "kv_head"
    keep: Keep = "nothing"

    def features(self) -> list[str]:
        """Name what this rule covers."""
        return [f"rows by {self.rows}", f"union of a {self.union}", f"keeps {self.keep}", f"budget fits {self.fits}"]

    def budget(self, arrays: Arrays) -> int:
        """Return the budget in tokens."""
        tokens = int(arrays.page_lengths[0].sum())
        return {"nothing": 0, "one less": max(tokens - 1, 0), "exactly": tokens, "everything": 2**70}[self.fits]

    def over(self, arrays: Arrays, reference: Array) -> RankedPass:
        """Return the rule for a problem; ``reference`` holds its ``q_other``."""
        return RankedPass(
            self.budget(arrays),
            self.pages,
            self.union,
            reference=None if self.rows == "all" else reference,
            count=self.count if self.rows == "count" else None,
            mass=self.mass if self.rows == "mass" else None,
            keep=self.keep,
        )
