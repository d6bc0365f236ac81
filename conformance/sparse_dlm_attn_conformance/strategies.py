"""Hypothesis strategies for whole problems; sizes are drawn first and everything else derived.

All of them stay inside what the backend under test declares (`within`), so that few examples are
thrown away. Options are listed simplest first, because shrinking moves towards the first.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st

from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn.ranked import Keep
from sparse_dlm_attn_conformance.cases import REGIMES, Case
from sparse_dlm_attn_conformance.tables import ChangeTable, MergeTable, RankedRule, ScoreTable

MAX_ELEMENTS = int(os.environ.get("SDA_CONFORMANCE_MAX_ELEMENTS", "8192"))
"""Cap on the elements of one sequence in one array, so that a failing problem stays readable."""

HEAD_DIMS = (2, 4, 8, 16, 1, 3, 64, 80, 96, 128)
PAGE_SIZES = (1, 2, 3, 4, 5, 8, 16, 24, 64, 128)
GROUPS = (1, 2, 4, 7)
BLOCKS = (1, 2, 3, 5, 8, 13, 17)
WILD_ENTRIES = (0, -1, 2**31 - 1, -(2**31), 10_000)
LAYOUTS = ("plain", "token_major", "gapped")
SPECIAL = (float("-inf"), float("inf"), float("nan"))
BOOLEANS = st.booleans()
SCALES = (None, 1.0, 0.25, 0.7)

T = TypeVar("T")
_limits: ContextVar[Capabilities | None] = ContextVar("capabilities of the backend under test", default=None)


@contextmanager
def within(capabilities: Capabilities | None) -> Iterator[None]:
    """Draw only problems that ``capabilities`` admit, as long as the block runs."""
    token = _limits.set(capabilities)
    try:
        yield
    finally:
        _limits.reset(token)


def _allowed(defaults: tuple[int, ...], name: str, largest: int) -> tuple[int, ...]:
    """Return the defaults that the backend admits, else the smallest sizes that it does admit."""
    declared: tuple[int, ...] | None = getattr(_limits.get(), name, None)
    if declared is None:
        return defaults
    common = tuple(size for size in defaults if size in declared)
    return common or tuple(sorted(size for size in declared if size <= largest)) or tuple(sorted(declared)[:1])


@functools.lru_cache(maxsize=4096)
def integers(low: int, high: int) -> st.SearchStrategy[int]:
    """Return `hypothesis.strategies.integers`, once for each range.

    Hypothesis validates every strategy object that it meets, which takes longer than to draw from it.
    """
    return st.integers(low, high)


@functools.lru_cache(maxsize=4096)
def _options(options: tuple[T, ...], kinds: tuple[type, ...]) -> st.SearchStrategy[T]:
    return st.sampled_from(options)


def choice(options: tuple[T, ...]) -> st.SearchStrategy[T]:
    """Return `hypothesis.strategies.sampled_from`, once for each tuple of options."""
    return _options(options, tuple(map(type, options)))  # 1, 1.0 and True are equal keys


def _pick(draw: Any, options: tuple[T, ...], label: str) -> T:
    return draw(choice(options), label=label)  # type: ignore[no-any-return]


@st.composite
def cases(
    draw: Any,
    *,
    regimes: tuple[str, ...] = REGIMES,
    max_batch: int = 3,
    batches: tuple[int, ...] = (),
    min_pages: int = 0,
    max_pages: int = 6,
    heads: tuple[str, ...] = ("one", "kv", "query"),
    poisons: tuple[str, ...] = ("zero", "nan", "inf", "huge"),
    layouts: tuple[str, ...] = LAYOUTS,
    groups: tuple[int, ...] = GROUPS,
    scales: tuple[float | None, ...] = SCALES,
    spans: tuple[int, ...] | None = None,
    wild: bool = True,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    page_sizes: tuple[int, ...] = PAGE_SIZES,
    blocks: tuple[int, ...] = BLOCKS,
    kv_heads: tuple[int, ...] | None = None,
    max_elements: int = MAX_ELEMENTS,
    sparse_pages: bool = False,
    selects: bool = True,
) -> Case:
    """Draw a whole problem; every parameter narrows one part of it.

    Without ``selects``, everything is selected and active: a policy will decide.
    """
    batch = draw(choice(batches) if batches else integers(1, max_batch), label="batch")
    group = _pick(draw, _allowed(groups, "groups", 64), "group")
    heads_kv = _pick(draw, kv_heads or ((1, 2, 3) if group < 4 else (1, 2)), "kv_heads")
    head_dim = _pick(draw, _allowed(head_dims, "head_dims", 256), "head_dim")
    page_size = _pick(draw, _allowed(page_sizes, "page_sizes", 128), "page_size")
    most_rows = max(1, max_elements // (heads_kv * group * head_dim))
    longest = getattr(_limits.get(), "max_block_length", None) or max(blocks)
    tokens = _pick(draw, tuple(n for n in blocks if n <= min(most_rows, longest)) or (1,), "tokens")
    fitting = max(2, max_elements // (heads_kv * page_size * head_dim))
    most = max(min_pages, min(max_pages, fitting))
    pages = draw(_page_counts(min_pages, most), label="pages")
    lengths = tuple(_page_lengths(draw, pages, page_size, sparse_pages) for _ in range(batch))
    table, num_pages = _page_tables(draw, lengths, wild)
    all_spans = (tokens, 1, 2, 3, 32) if spans is None else spans
    return Case(
        kv_heads=heads_kv,
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        tokens=tokens,
        lengths=lengths,
        table=table,
        num_pages=num_pages,
        segments=_segments(draw, batch, pages),
        heads=_pick(draw, heads, "selection heads"),
        span=_pick(draw, all_spans, "span"),
        masks=tuple(draw(_masks(pages), label="masks")) if selects else ((1 << pages) - 1,),
        active=tuple(draw(_bits(tokens), label="active") if selects else (1 << tokens) - 1 for _ in range(batch)),
        scale=_pick(draw, scales, "scale"),
        regime=_pick(draw, regimes, "regime"),
        poison=_pick(draw, poisons, "poison"),
        layout=_pick(draw, layouts, "layout"),
        seed=draw(integers(0, 999), label="seed"),
    )


@functools.lru_cache(maxsize=512)
def _page_counts(least: int, most: int) -> st.SearchStrategy[int]:
    """Numbers of pages: at least one, many, or any."""
    some, many = (integers(min(max(least, low), most), most) for low in (1, (most + 1) // 2))
    return st.one_of(some, many, integers(least, most))


@functools.lru_cache(maxsize=512)
def _masks(pages: int) -> st.SearchStrategy[list[int]]:
    return st.lists(_bits(pages), min_size=1, max_size=5)


@functools.lru_cache(maxsize=512)
def _bits(width: int) -> st.SearchStrategy[int]:
    """Bitmasks: all or any; "all" first, because it is the plainest case."""
    everything = (1 << width) - 1
    anything = integers(0, everything)
    return st.one_of(st.just(everything), anything, anything, anything)


@functools.lru_cache(maxsize=512)
def _any_length(page_size: int) -> st.SearchStrategy[int]:
    return st.one_of(st.just(page_size), integers(0, page_size))


def _page_lengths(draw: Any, pages: int, page_size: int, sparse: bool = False) -> tuple[int, ...]:
    """Draw the lengths of one sequence: a prefix of full pages, or anything anywhere."""
    if draw(BOOLEANS, label="pages filled in any way"):
        if sparse and draw(BOOLEANS, label="few tokens a page"):
            length = integers(0, min(2, page_size))
        else:
            length = _any_length(page_size)
        return tuple(draw(length, label="page length") for _ in range(pages))
    unused = draw(integers(0, pages * page_size), label="unused context tokens")
    tokens = pages * page_size - unused
    return tuple(min(page_size, max(0, tokens - page * page_size)) for page in range(pages))


def _page_tables(
    draw: Any, lengths: tuple[tuple[int, ...], ...], wild: bool
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Draw a table: in order, shuffled, or with physical pages that sequences share."""
    batch, pages = len(lengths), len(lengths[0])
    spare = draw(integers(0, 2), label="spare physical pages")
    num_pages = max(1, batch * pages + spare)
    kind = _pick(draw, ("in order", "shuffled", "shared"), "page table")
    rng = np.random.default_rng(draw(integers(0, 99), label="page table seed"))
    numbers = np.arange(num_pages)
    if kind == "shuffled":
        numbers = rng.permutation(num_pages)
    elif kind == "shared":
        numbers = rng.integers(0, num_pages, num_pages)
    table = numbers[: batch * pages].reshape(batch, pages).tolist()
    absent = _pick(draw, WILD_ENTRIES, "table entry of absent pages") if wild else 0
    return tuple(
        tuple(entry if length else absent for entry, length in zip(entries, row, strict=True))
        for entries, row in zip(table, lengths, strict=True)
    ), num_pages


def _segments(draw: Any, batch: int, pages: int) -> tuple[tuple[int, ...], ...] | None:
    """Draw prompt, generated and suffix pages in this order, or no segments."""
    if not draw(BOOLEANS, label="has segments"):
        return None
    rows = []
    for _ in range(batch):
        prompt, suffix = sorted((draw(integers(0, pages)), draw(integers(0, pages))))
        rows.append(tuple(0 if page < prompt else 1 if page < suffix else 2 for page in range(pages)))
    return tuple(rows)


@st.composite
def score_tables(draw: Any, *, special: bool = True) -> ScoreTable:
    """Draw scores to rank, with ties; ``special`` adds infinities and NaN."""
    pages = draw(integers(0, 9), label="pages")
    lead = draw(st.lists(integers(1, 3), min_size=1, max_size=3), label="leading shape")
    values: tuple[float, ...] = (0.0, 1.0, -0.0, -1.0, 2.0, 0.125, -3.5)
    if special:
        values = (*values, *SPECIAL)
    kept = draw(integers(1, 4), label="different rows")
    drawn = draw(st.lists(choice(values), min_size=pages * kept, max_size=pages * kept))
    return ScoreTable(
        tuple(lead),
        pages,
        tuple(drawn),
        tuple(draw(st.lists(integers(-2, pages + 2), min_size=1, max_size=5), label="counts")),
        draw(integers(0, len(lead)), label="axes of the count"),
        tuple(draw(st.lists(_bits(pages), min_size=1, max_size=3), label="eligible")),
        draw(integers(0, len(lead)), label="axes of eligible"),
    )


@st.composite
def change_tables(draw: Any, *, special: bool = False, dyadic: bool = True) -> ChangeTable:
    """Draw changes to rank; ``special`` adds NaN."""
    tokens, batch = draw(integers(1, 12), label="tokens"), draw(integers(1, 3), label="batch")
    # Beside 2 ** 24 a sum in float32 does not see the other changes any more, beside 2 ** 34 no tolerance.
    numbers: tuple[float, ...] = (0.0, 1.0, 2.0, 0.5, 0.125, 3.75, 8.0, 2.0**24, 2.0**34)
    if special:
        numbers = (*numbers, SPECIAL[-1])
    value = choice(numbers) if dyadic else st.floats(0, 1024, width=32, allow_subnormal=False)
    rows = draw(st.lists(value, min_size=tokens * batch, max_size=tokens * batch), label="change")
    mass = draw(choice((0.5, 0.0, 1.0, 0.25, 0.9, 0.1, 1 / 3)), label="mass")
    return ChangeTable(batch, tuple(rows), draw(integers(0, tokens + 2), label="count"), mass)


@st.composite
def merge_tables(draw: Any, *, states: tuple[int, ...] = (2, 1, 3, 4), empty: bool = True) -> MergeTable:
    """Draw attention states to merge: shapes, a level and a kind for each state."""
    count = _pick(draw, states, "states")
    head_dims = _allowed(HEAD_DIMS, "head_dims", 256)
    longest = getattr(_limits.get(), "max_block_length", None) or 70
    kinds = ("plain", "some rows empty", "empty") if empty else ("plain",)
    return MergeTable(
        batch=_pick(draw, (1, 2, 5), "batch"),
        q_heads=_pick(draw, (1, 2, 3, 4, 9), "q_heads"),
        tokens=_pick(draw, tuple(n for n in (*BLOCKS[:5], 40, 70) if n <= longest) or (1,), "tokens"),
        head_dim=_pick(draw, head_dims, "head_dim"),
        levels=tuple(draw(choice((0.0, 1.0, -3.0, 40.0, -90.0, 3000.0))) for _ in range(count)),
        kinds=tuple(_pick(draw, kinds, "kind") for _ in range(count)),
        seed=draw(integers(0, 999), label="seed"),
    )


@st.composite
def ranked_rules(draw: Any) -> RankedRule:
    """Draw the rule of a ranked pass."""
    rows = _pick(draw, ("count", "mass", "all"), "rows")
    keeps: tuple[Keep, ...] = ("active_queries", "queries", "nothing")
    return RankedRule(
        rows=rows,
        count=draw(integers(0, 6), label="count"),
        mass=_pick(draw, (0.5, 0.0, 1.0, 0.25, 0.9, 1 / 3), "mass"),
        fits=_pick(draw, ("nothing", "exactly", "one less", "everything"), "budget"),
        pages=_pick(draw, (1, 2, 3, 0, 9), "pages"),
        union=_pick(draw, ("kv_head", "query_head", "row"), "union"),
        keep=_pick(draw, keeps[1:] if rows == "all" else keeps, "keep"),
    )
