"""A pass whose decisions are a rule, as data: what lets a backend compute it in a few launches.

A policy that states its decisions as a rule (`sparse_dlm_attn.rules.RulePolicy`) lets a backend run a pass as one
operator, :meth:`sparse_dlm_attn.Backend.attend_ranked`. The operators remain the definition (clause RANKED-1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from sparse_dlm_attn.arrays import Array, copy_of, namespace, shape_of
from sparse_dlm_attn.checks import check_block, check_cached, check_page_scores, check_query_change
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn.forms import once_a_form
from sparse_dlm_attn.operators import check_change_rule
from sparse_dlm_attn.selection import Selection
from sparse_dlm_attn.values import AttentionState, PageBounds, check_array, check_int, short_repr, softmax_scale

if TYPE_CHECKING:
    from sparse_dlm_attn.backend import Backend

__all__ = ["RankedPass", "RankedResult", "affordable_pages", "check_ranked_pass", "kept_queries", "united"]

Union = Literal["kv_head", "query_head", "row"]
Keep = Literal["nothing", "queries", "active_queries"]


@dataclass(frozen=True, eq=False)
class RankedPass:
    """Active rows by change of their queries, pages by QUEST bounds, united over rows (clause RANKED-1).

    Parameters
    ----------
    budget : int
        A context of at most this many tokens is read whole.
    pages : int
        Best pages of each active row and query head in a longer one.
    union : {"kv_head", "query_head", "row"}
        Who shares pages: the active rows of a KV head or of a query head read the union of what they
        ranked best; ``"row"`` reads its own.
    reference : array, optional
        ``(batch, q_heads, tokens, head_dim)``: queries that change is measured against. None: every row
        is active.
    count, mass : int or float, optional
        Rule of the active rows, one of the two where there is a reference; see
        :meth:`sparse_dlm_attn.Backend.largest_changes`.
    keep : {"nothing", "queries", "active_queries"}
        What the result holds for the next pass to measure against: nothing, a copy of the queries, or
        those of active rows and the reference of the others.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If a number or name is out of range, or the rule does not fit the reference.
    """

    budget: int
    pages: int
    union: Union = "kv_head"
    reference: Array | None = None
    count: int | None = None
    mass: float | None = None
    keep: Keep = "nothing"

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_int("budget", self.budget, 0)
        check_int("pages", self.pages, 0)
        for name, choices in (("union", get_args(Union)), ("keep", get_args(Keep))):
            if getattr(self, name) not in choices:
                raise InvalidArgumentError(name, f"must be one of {', '.join(choices)}", repr(getattr(self, name)))
        if self.reference is not None:
            check_change_rule(self.count, self.mass)
        elif (self.count, self.mass) != (None, None) or self.keep == "active_queries":
            raise InvalidArgumentError("reference", "must be given with count, mass or keep='active_queries'", "None")


@dataclass(frozen=True, eq=False)
class RankedResult:
    """What `attend_ranked` returns.

    Parameters
    ----------
    out : array
        ``(batch, q_heads, tokens, head_dim)``.
    state : AttentionState
        Context part, to be cached for the next pass.
    active : array
        bool ``(batch, tokens)``.
    selection : Selection
        Pages that active rows read.
    kept : array or None
        Queries for the next pass to measure change against.
    """

    out: Array
    state: AttentionState
    active: Array
    selection: Selection
    kept: Array | None

    __repr__ = short_repr


def check_ranked_pass(
    q: Array,
    k: Array,
    v: Array,
    context: Context,
    bounds: PageBounds,
    ranked: RankedPass,
    cached: AttentionState | None,
    scale: float | None,
) -> None:
    """Check the arguments of `attend_ranked`."""
    if not isinstance(ranked, RankedPass):
        raise InvalidTypeError("ranked_pass", "must be a RankedPass", type(ranked).__name__)
    _check_operands(q, k, v, context, bounds, ranked.reference, cached, scale)


@once_a_form
def _check_operands(
    q: Array,
    k: Array,
    v: Array,
    context: Context,
    bounds: PageBounds,
    reference: Array | None,
    cached: AttentionState | None,
    scale: float | None,
) -> None:
    check_block(q, k, v, context)
    check_page_scores(q, bounds)
    shape = (context.batch, context.kv_heads, context.pages, context.head_dim)
    check_array("bounds.lower", bounds.lower, shape)
    if reference is not None:
        check_query_change(q, reference)
    if cached is not None:
        check_cached(cached, q)
    softmax_scale(shape_of(q)[3], scale)


def affordable_pages(context: Context, budget: int, pages: int) -> Array:
    """Return the pages that a row may choose in each sequence, int32 ``(batch,)``.

    Parameters
    ----------
    context : Context
        Pages to choose from.
    budget : int
        Tokens: a context that fits is read whole.
    pages : int
        Pages of a longer one.
    """
    xp = namespace(context.page_lengths)
    tokens, budget = context.tokens, min(budget, context.pages * context.page_size)  # any int is legal
    return xp.where(
        tokens <= budget, xp.full_like(tokens, context.pages), xp.full_like(tokens, min(pages, context.pages))
    )


def united(own: Array, kv_heads: int, union: Union) -> Selection:
    """Unite the pages of active rows.

    Parameters
    ----------
    own : array
        bool ``(batch, q_heads or kv_heads, tokens, pages)``, nothing for inactive rows.
    kv_heads : int
        KV heads.
    union : {"kv_head", "query_head", "row"}
        See `RankedPass`.
    """
    if union == "row":
        return Selection(own, 1)
    xp = namespace(own)
    batch, heads, tokens, pages = shape_of(own)
    mask = xp.any(own, axis=2, keepdims=True)
    if union == "kv_head":
        mask = xp.any(xp.reshape(mask, (batch, kv_heads, heads // kv_heads, 1, pages)), axis=2)
    return Selection(mask, max(tokens, 1))


def kept_queries(q: Array, active: Array, keep: Keep, reference: Array | None) -> Array | None:
    """Return the queries kept for the next pass: a copy, since the caller may write into ``q``.

    Parameters
    ----------
    q : array
        ``(batch, q_heads, tokens, head_dim)``.
    active : array
        bool ``(batch, tokens)``.
    keep : {"nothing", "queries", "active_queries"}
        See `RankedPass`.
    reference : array or None
        Like ``q``: what inactive rows keep.
    """
    if keep == "nothing":
        return None
    if keep == "queries" or reference is None:
        return copy_of(q)
    return namespace(q).where(active[:, None, :, None], q, reference)


def attend_ranked(
    ops: Backend,
    q: Array,
    k: Array,
    v: Array,
    context: Context,
    bounds: PageBounds,
    ranked: RankedPass,
    cached: AttentionState | None,
    scale: float | None,
) -> RankedResult:
    """Run a ranked pass operator by operator: the definition of it."""
    check_ranked_pass(q, k, v, context, bounds, ranked, cached, scale)
    xp = namespace(q)
    batch, _, tokens, _ = shape_of(q)
    if ranked.reference is None:
        active = xp.ones((batch, tokens), dtype=xp.bool, device=q.device)
    else:
        change = ops.query_change(q, ranked.reference)
        active = ops.largest_changes(change, count=ranked.count, mass=ranked.mass)
    rows = active[:, None, :, None]
    scores = ops.page_scores(q, bounds, active=active)
    own = ops.top_pages(
        scores,
        affordable_pages(context, ranked.budget, ranked.pages)[:, None, None],
        eligible=context.exists[:, None, None, :] & rows,
    )
    selection = united(own & rows, context.kv_heads, ranked.union)
    out, state = ops.attend(q, k, v, context, selection, active, cached, scale=scale)
    return RankedResult(out, state, active, selection, kept_queries(q, active, ranked.keep, ranked.reference))
