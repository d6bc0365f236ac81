"""Whole problems as data: a `Case` is a small, printable description; `Arrays` are its values.

A case holds everything that should shrink (sizes, lengths, tables, masks, active rows) as plain
integers, and a seed and a regime for the values, which would shrink badly and print worse.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np

from sparse_dlm_attn import Context, PageBounds, Selection
from sparse_dlm_attn.capabilities import Problem

HostArray: TypeAlias = "np.ndarray[Any, Any]"
Host = HostArray

REGIMES = ("dyadic", "generic", "ties", "zeros", "one_hot", "large", "mixed_scale")
"""Value regimes, the simplest first, because shrinking moves towards the first."""

EXACT = ("dyadic", "ties", "zeros", "one_hot")
"""Regimes in which every sum is exact, so that decisions are."""

POISON = {"zero": 0.0, "nan": np.nan, "inf": np.inf, "huge": 3e4}
TRANSPORT = {"float16": np.float16, "bfloat16": np.float32, "float32": np.float32, "float64": np.float64}


def round_to(values: HostArray, dtype: str) -> HostArray:
    """Round float64 ``values`` to the nearest values of ``dtype`` (ties to even), as float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return values.astype(TRANSPORT[dtype]).astype(np.float64)
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        result = np.where(np.isfinite(values), rounded.view(np.float32), values.astype(np.float32))
        return result.astype(np.float64).reshape(values.shape)


def transport(values: HostArray, dtype: str) -> HostArray:
    """Return representable float64 ``values`` in the NumPy dtype that carries ``dtype``."""
    return values.astype(TRANSPORT[dtype])


def fill(rng: np.random.Generator, regime: str, shape: tuple[int, ...], *, scores: bool = True) -> HostArray:
    """Draw values of one regime.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness.
    regime : str
        One of `REGIMES`. "dyadic" is k/8 with ``|k| <= 32``: sums of a few thousand products stay
        exact in float32 in any order. "ties" has three values, so that many scores are equal.
    shape : tuple of int
        Shape of the result.
    scores : bool
        Whether the values enter scores; "large" and "mixed_scale" spare the V vectors.
    """
    if regime == "dyadic":
        return rng.integers(-32, 33, shape) / 8.0
    if regime == "ties":
        return rng.integers(-1, 2, shape).astype(np.float64)
    if regime == "zeros":
        return np.zeros(shape)
    if regime == "one_hot":
        chosen = rng.integers(0, shape[-1], shape[:-1])
        signs = rng.choice([-2.0, 1.0, 3.0], shape[:-1])
        return np.asarray((np.arange(shape[-1]) == chosen[..., None]) * signs[..., None])
    values = rng.standard_normal(shape)
    if regime == "large" and scores:
        return 30.0 * values
    if regime == "mixed_scale":
        return values * 10.0 ** rng.uniform(-2, 1.5 if scores else 1.0, (*shape[:-1], 1))
    return values


def unpacked(masks: tuple[int, ...], width: int) -> HostArray:
    """Return bitmasks of any width as bool rows ``(len(masks), width)``."""
    rows = [[(mask >> bit) & 1 for bit in range(width)] for mask in masks]
    return np.asarray(rows, dtype=bool).reshape(len(masks), width)


@dataclass(frozen=True, repr=False)
class Case:
    """One problem of the specification, as drawn.

    Parameters
    ----------
    kv_heads, group, head_dim, page_size, tokens : int
        Sizes; ``q_heads = kv_heads * group`` and ``tokens`` is the block length.
    lengths : tuple of tuple of int
        Valid tokens of each sequence's logical pages, ``(batch, pages)``.
    table : tuple of tuple of int
        Physical pages; anything at all where the length is 0.
    num_pages : int
        Physical pages.
    segments : tuple of tuple of int or None
        Segment of each page.
    heads : str
        "one", "kv" or "query": what has its own selection.
    span : int
        Rows that share a selection.
    masks : tuple of int
        Page bitmasks; selection number ``i`` in (sequence, head, span) order uses ``masks[i % len]``.
    active : tuple of int
        Row bitmask of each sequence.
    scale : float or None
        Softmax scale.
    regime, poison, layout : str
        Value regime; what is stored where nothing may be read; memory layout of the arrays.
    seed : int
        Seed of the values.
    """

    kv_heads: int = 1
    group: int = 1
    head_dim: int = 2
    page_size: int = 1
    tokens: int = 1
    lengths: tuple[tuple[int, ...], ...] = ((1,),)
    table: tuple[tuple[int, ...], ...] = ((0,),)
    num_pages: int = 1
    segments: tuple[tuple[int, ...], ...] | None = None
    heads: str = "one"
    span: int = 1
    masks: tuple[int, ...] = (1,)
    active: tuple[int, ...] = (1,)
    scale: float | None = None
    regime: str = "dyadic"
    poison: str = "zero"
    layout: str = "plain"
    seed: int = 0

    def __repr__(self) -> str:
        different = [
            f"{item.name}={getattr(self, item.name)!r}"
            for item in fields(self)
            if getattr(self, item.name) != item.default
        ]
        return f"Case({', '.join(different)})"

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def pages(self) -> int:
        """Logical pages of a sequence."""
        return len(self.lengths[0])

    @property
    def q_heads(self) -> int:
        """Number of query heads."""
        return self.kv_heads * self.group

    def problem(self, dtype: str, device: str = "cpu") -> Problem:
        """Return the facts that decide whether a backend computes this case."""
        return Problem(dtype, self.head_dim, self.page_size, self.q_heads, self.kv_heads, self.tokens, device)

    def features(self) -> list[str]:
        """Name what this case covers, for `hypothesis.event` and the report."""
        flat = [length for row in self.lengths for length in row]
        active = self.active_rows()
        named = {
            f"regime {self.regime}": True,
            f"group {self.group}": True,
            f"selection per {self.heads}": True,
            f"layout {self.layout}": self.layout != "plain",
            f"poison {self.poison}": self.poison != "zero",
            "page size 1": self.page_size == 1,
            "page size not a power of two": self.page_size & (self.page_size - 1) != 0,
            "head size not a power of two": self.head_dim & (self.head_dim - 1) != 0,
            "page size of 64 or more": self.page_size >= 64,
            f"head size {self.head_dim}": self.head_dim >= 64,
            "span 1": self.span == 1 < self.tokens,
            "one span for the block": self.span >= self.tokens > 1,
            "more than 32 rows": self.tokens > 32,
            "more than 64 pages": self.pages > 64,
            "ragged batch": len({sum(row) for row in self.lengths}) > 1,
            "empty context": not any(flat),
            "absent page": 0 in flat,
            "partial page": any(0 < length < self.page_size for length in flat),
            "no active row": not active.any(),
            "all rows active": bool(active.all()),
            "nothing selected": not self.mask().any(),
            "segments": self.segments is not None,
            "explicit scale": self.scale is not None,
        }
        return [name for name, holds in named.items() if holds]

    def mask(self) -> HostArray:
        """Return the selection mask, bool ``(batch, heads, spans, pages)``."""
        heads = {"one": 1, "kv": self.kv_heads, "query": self.q_heads}[self.heads]
        spans = -(-self.tokens // self.span)
        numbers = np.arange(self.batch * heads * spans) % len(self.masks)
        return unpacked(self.masks, self.pages)[numbers].reshape(self.batch, heads, spans, self.pages)

    def active_rows(self) -> HostArray:
        """Return the active rows, bool ``(batch, tokens)``."""
        return unpacked(self.active, self.tokens)

    def fresh(self, dtype: str, seed: int, heads: int) -> HostArray:
        """Return other queries or keys of the block, float64 ``(batch, heads, tokens, head_dim)``."""
        shape = (self.batch, heads, self.tokens, self.head_dim)
        return round_to(fill(np.random.default_rng(seed), self.regime, shape), dtype)

    def arrays(self, dtype: str) -> Arrays:
        """Return the values of this case, all of them representable in ``dtype`` and read-only."""
        return _arrays(self, dtype)

    def _drawn(self, dtype: str) -> Arrays:
        rng = np.random.default_rng(self.seed)

        def draw(*shape: int, scores: bool = True) -> HostArray:
            return round_to(fill(rng, self.regime, shape, scores=scores), dtype)

        rows = (self.batch, self.q_heads, self.tokens, self.head_dim)
        block = (self.batch, self.kv_heads, self.tokens, self.head_dim)
        pages = (self.num_pages, self.kv_heads, self.page_size, self.head_dim)
        q, other = draw(*rows), draw(*rows)
        moved = rng.integers(0, 3, (self.batch, 1, self.tokens, 1)) > 0
        segments = None if self.segments is None else np.asarray(self.segments, dtype=np.int8)
        arrays = Arrays(
            dtype=dtype,
            q=q,
            q_other=np.where(moved, other, q),
            k=draw(*block),
            v=draw(*block, scores=False),
            k_pages=draw(*pages),
            v_pages=draw(*pages, scores=False),
            page_table=np.asarray(self.table, dtype=np.int32).reshape(self.batch, self.pages),
            page_lengths=np.asarray(self.lengths, dtype=np.int32).reshape(self.batch, self.pages),
            page_segments=segments,
            mask=self.mask(),
            span=self.span,
            active=self.active_rows(),
            scale=self.scale,
            layout=self.layout,
        )
        return arrays.poisoned(~arrays.stored(), POISON[self.poison])


@functools.lru_cache(maxsize=8)
def _arrays(case: Case, dtype: str) -> Arrays:
    """Draw the values of a case once for all that one law asks."""
    arrays = case._drawn(dtype)
    for value in vars(arrays).values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return arrays


@dataclass(frozen=True, eq=False)
class Arrays:
    """Host values of a case: float64, each representable in ``dtype``. Never changed in place."""

    dtype: str
    q: HostArray
    q_other: HostArray
    k: HostArray
    v: HostArray
    k_pages: HostArray
    v_pages: HostArray
    page_table: HostArray
    page_lengths: HostArray
    page_segments: HostArray | None
    mask: HostArray
    span: int
    active: HostArray
    scale: float | None = None
    layout: str = "plain"

    def but(self, **changes: Any) -> Arrays:
        """Return these values with some of them replaced."""
        return replace(self, **changes)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return int(self.q.shape[1] // self.k_pages.shape[1])

    @property
    def page_size(self) -> int:
        """Tokens that a page can hold."""
        return int(self.k_pages.shape[2])

    def context(self) -> Context:
        """Return the context in float64 NumPy, for the reference."""
        return Context(self.k_pages, self.v_pages, self.page_table, self.page_lengths, self.page_segments)

    def selection(self) -> Selection:
        """Return the selection in NumPy, for the reference."""
        return Selection(self.mask, self.span)

    def bounds(self) -> PageBounds:
        """Return the page bounds by a plain minimum and maximum over each page's valid keys."""
        shape = (*self.page_lengths.shape, *self.k_pages.shape[1::2])
        lower, upper = np.zeros(shape), np.zeros(shape)
        for b, page in np.argwhere(self.page_lengths > 0):
            keys = self.k_pages[self.page_table[b, page], :, : self.page_lengths[b, page]]
            lower[b, page], upper[b, page] = np.min(keys, axis=1), np.max(keys, axis=1)
        return PageBounds(lower.swapaxes(1, 2), upper.swapaxes(1, 2))

    def stored(self, pages: HostArray | None = None) -> HostArray:
        """Return which physical token slots, bool ``(num_pages, kv_heads, page_size)``, hold a token.

        With ``pages``, bool ``(batch, kv_heads, pages)``, those of these logical pages alone.
        """
        stored = np.zeros(self.k_pages.shape[:3], dtype=bool)
        for b, page in np.argwhere(self.page_lengths > 0):
            slots = stored[self.page_table[b, page], :, : self.page_lengths[b, page]]
            slots |= True if pages is None else pages[b, :, page, None]
        return stored

    def poisoned(self, where: HostArray, value: float) -> Arrays:
        """Return these values with ``value`` in the K and V slots ``where`` (see `stored`)."""
        k_pages, v_pages = self.k_pages.copy(), self.v_pages.copy()
        k_pages[where], v_pages[where] = value, value
        return self.but(k_pages=k_pages, v_pages=v_pages)

    def rows(self) -> HostArray:
        """Return the pages each query head and row reads, bool ``(batch, q_heads, tokens, pages)``.

        Inactive rows read nothing, absent pages are not read.
        """
        heads = np.arange(self.q.shape[1]) // (self.q.shape[1] // self.mask.shape[1])
        spans = np.arange(self.q.shape[2]) // self.span
        chosen = self.mask[:, heads][:, :, spans]
        return np.asarray(chosen & self.active[:, None, :, None] & self.exists, dtype=bool)

    @property
    def exists(self) -> HostArray:
        """The pages that hold a token, bool ``(batch, 1, 1, pages)``."""
        return (self.page_lengths > 0)[:, None, None, :]

    def everyone(self) -> HostArray:
        """Return the pages of rows that read all there are, bool ``(batch, q_heads, tokens, pages)``."""
        return np.broadcast_to(self.exists, (*self.q.shape[:3], self.exists.shape[3]))

    def loaded(self) -> HostArray:
        """Return the pages that some row of a KV head reads, bool ``(batch, kv_heads, pages)``."""
        rows = self.rows()
        shape = (rows.shape[0], self.k_pages.shape[1], self.group, rows.shape[3])
        per_head: HostArray = np.asarray(rows.any(axis=2)).reshape(shape)
        return np.asarray(per_head.any(axis=2))
