"""The interface of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import FunctionType
from typing import Any, ClassVar

from sparse_dlm_attn import operators, ranked
from sparse_dlm_attn.arrays import Array, without_autocast
from sparse_dlm_attn.capabilities import Capabilities, Problem
from sparse_dlm_attn.checks import check_attend_block, check_attend_pages, check_cached
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.ranked import RankedPass, RankedResult
from sparse_dlm_attn.selection import Selection
from sparse_dlm_attn.values import AttentionState, PageBounds

__all__ = ["Backend"]

OPERATORS = (
    "page_bounds",
    "extend_bounds",
    "page_scores",
    "pooled_scores",
    "top_pages",
    "query_change",
    "largest_changes",
    "attend_pages",
    "attend_block",
    "merge",
    "reuse",
    "attend",
    "attend_ranked",
)


class Backend(ABC):
    """Computes the operators of the specification on one kind of array.

    A new backend implements `page_bounds`, `page_scores`, `attend_pages`, `attend_block` and
    `asarray`, and overrides what it computes faster. Every operator is a pure function of its
    arguments: it changes none of them, keeps nothing, and returns arrays that share no memory with
    them. `sparse-dlm-attn conformance` proves it.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        """Let operators compute in the precision that they choose, whoever writes them (clause PURE-6)."""
        super().__init_subclass__(**options)
        for operator in OPERATORS:
            own = vars(cls).get(operator)
            if isinstance(own, FunctionType):
                setattr(cls, operator, without_autocast(own))

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend supports, known without running a kernel."""

    def why_not(self, problem: Problem) -> list[str]:
        """Return every reason against a problem; empty if it is supported."""
        return self.capabilities.why_not(problem)

    @abstractmethod
    def asarray(self, values: Any, *, dtype: str | None = None) -> Array:
        """Convert host values (NumPy array, list, scalar) to this backend's arrays.

        Parameters
        ----------
        values : array_like
            Host values.
        dtype : str, optional
            Target dtype by name, e.g. ``"bfloat16"``; default: the dtype of ``values``.
        """

    @abstractmethod
    def page_bounds(self, context: Context) -> PageBounds:
        """Return per-channel minimum and maximum of each page's valid keys (clause BOUNDS-1).

        Exact, in the dtype of the keys; 0 for absent pages. NaN keys give NaN bounds.
        """

    def extend_bounds(self, context: Context, bounds: PageBounds, from_page: int) -> PageBounds:
        """Return the bounds of a context that has grown; only what is new is read (clause BOUNDS-2).

        Parameters
        ----------
        context : Context
            The context as it is now.
        bounds : PageBounds
            Bounds of at least its first ``from_page`` pages, as they were before.
        from_page : int
            First page that tokens have been written to since, or that was not there:
            ``tokens before // page_size``, the least over sequences. It may equal the number of pages.

        Returns
        -------
        PageBounds
            What ``page_bounds(context)`` returns, bit for bit.

        Raises
        ------
        InvalidArgumentError, InvalidTypeError
            If ``from_page`` lies outside the context or beyond ``bounds``, or these are of another form.
        """
        return operators.extend_bounds(self, context, bounds, from_page)

    @abstractmethod
    def page_scores(self, q: Array, bounds: PageBounds, *, active: Array | None = None) -> Array:
        """Return the largest q.k that a page's box allows, unscaled (clause SCORES-1).

        The sum over channels of ``max(q * lower, q * upper)``.

        Parameters
        ----------
        q : array
            ``(batch, q_heads, tokens, head_dim)``.
        bounds : PageBounds
            Metadata of the context's pages.
        active : array, optional
            bool ``(batch, tokens)``: rows whose scores will be looked at; default all. Scores of the
            other rows may hold anything, so a backend need not compute them.

        Returns
        -------
        array
            float32 ``(batch, q_heads, tokens, pages)``; at least q.k for every valid key of the page.

        Notes
        -----
        Source: QUEST (Tang et al. 2024). For lower <= upper it equals
        ``relu(q) . upper + min(q, 0) . lower``: two matrix products.
        """

    @abstractmethod
    def attend_pages(
        self, q: Array, context: Context, selection: Selection, active: Array, *, scale: float | None = None
    ) -> AttentionState:
        """Return softmax attention of active rows over their selected pages (clause ATTEND-1).

        Parameters
        ----------
        q : array
            ``(batch, q_heads, tokens, head_dim)``. Inactive rows are not read.
        context : Context
            Pages of K and V. Pages that no active row selected are not read.
        selection : Selection
            Pages each row may read.
        active : array
            bool ``(batch, tokens)``.
        scale : float, optional
            Factor on q.k; default ``1 / sqrt(head_dim)``.

        Returns
        -------
        AttentionState
            Inactive rows and rows without a valid key: out 0, lse -inf.
        """

    @abstractmethod
    def attend_block(self, q: Array, k: Array, v: Array, *, scale: float | None = None) -> AttentionState:
        """Return dense, unmasked softmax attention within the block (clause BLOCK-1).

        Parameters
        ----------
        q : array
            ``(batch, q_heads, tokens, head_dim)``.
        k, v : array
            ``(batch, kv_heads, keys, head_dim)``; ``keys`` is usually ``tokens``.
        scale : float, optional
            Factor on q.k; default ``1 / sqrt(head_dim)``.
        """

    @without_autocast
    def pooled_scores(
        self, q: Array, context: Context, *, span: int, scale: float | None = None, lse: Array | None = None
    ) -> Array:
        """Return the mean softmax mass of each page over each span's rows (clauses POOLED-1, POOLED-3).

        Parameters
        ----------
        q : array
            ``(batch, q_heads, tokens, head_dim)``.
        context : Context
            All its valid keys share one softmax a row.
        span : int
            Rows to average over; a last, shorter span averages over the rows it has.
        scale : float, optional
            Factor on q.k; default ``1 / sqrt(head_dim)``.
        lse : array, optional
            float32 ``(batch, q_heads, tokens)``: LSE of each row, as attention over these keys (or over
            more keys, of which these are a part) has returned it. The keys are then read once; without
            it a sweep of its own finds it first.

        Returns
        -------
        array
            float32 ``(batch, q_heads, spans, pages)``; each span sums to 1 (0 for an empty context), or to
            the mean share of these keys in ``lse``.

        Notes
        -----
        Source: SparseD's block-averaged attention, as mass instead of a mean over the tile. Beside its
        result the default holds a chunk of scores, whatever the lengths of block and context.
        """
        return operators.pooled_scores(q, context, span=span, scale=scale, lse=lse)

    def top_pages(self, scores: Array, count: int | Array, *, eligible: Array) -> Array:
        """Return the mask of the ``count`` best pages (clause TOP-1).

        Parameters
        ----------
        scores : array
            ``(..., pages)``. NaN ranks as +inf, so that it shows in the output.
        count : int or array
            Pages to take, clamped to 0..eligible pages; an integer array broadcasts to ``(...)``.
        eligible : array
            bool, broadcasts to the shape of ``scores``.

        Returns
        -------
        array
            bool, like ``scores``. Ties go to the lowest page index.
        """
        return operators.top_pages(scores, count, eligible=eligible)

    def query_change(self, q: Array, q_reference: Array) -> Array:
        """Return how far each row's query moved, float32 ``(batch, tokens)`` (clause CHANGE-1).

        The mean over heads and channels of the squared difference; source: LoSA, figure 2.
        """
        return operators.query_change(q, q_reference)

    def largest_changes(self, change: Array, *, count: int | None = None, mass: float | None = None) -> Array:
        """Return the rows that changed most, bool ``(batch, tokens)`` (clauses CHANGE-2, CHANGE-3).

        Parameters
        ----------
        change : array
            float32 ``(batch, tokens)``, not negative. NaN ranks as +inf.
        count : int, optional
            Take this many rows, clamped to the rows there are. Ties go to the lowest row.
        mass : float, optional
            Take the smallest set of largest changes whose sum reaches ``mass`` of the total, summed
            in float64; a total of 0 gives the empty set.
        """
        return operators.largest_changes(change, count=count, mass=mass)

    def merge(self, *states: AttentionState) -> AttentionState:
        """Return the state of the union of disjoint key sets (clause MERGE-1).

        With ``lse = log(sum of exp(lse_r))``, ``out`` is the sum of ``exp(lse_r - lse) * out_r``.

        A state of weight 0 is dropped by selection, not multiplied, so its ``out`` may hold anything.
        """
        return operators.merge(*states)

    def reuse(self, active: Array, fresh: AttentionState, cached: AttentionState) -> AttentionState:
        """Return ``fresh`` for active rows and ``cached`` for the others (clause REUSE-1)."""
        return operators.reuse(active, fresh, cached)

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        context: Context,
        selection: Selection,
        active: Array,
        cached: AttentionState | None,
        *,
        scale: float | None = None,
    ) -> tuple[Array, AttentionState]:
        """Run a whole pass: attend_pages, reuse, attend_block and merge (clause ATTEND-4).

        Parameters
        ----------
        q, k, v : array
            The block's queries, keys and values.
        context, selection, active
            As for `attend_pages`.
        cached : AttentionState or None
            Context part of earlier passes, for inactive rows; None counts as the empty set.
        scale : float, optional
            Factor on q.k; default ``1 / sqrt(head_dim)``.

        Returns
        -------
        out : array
            ``(batch, q_heads, tokens, head_dim)``.
        context_state : AttentionState
            The context part, to be cached for the next pass.
        """
        check_attend_pages(q, context, selection, active, scale)
        check_attend_block(q, k, v, scale)
        if cached is not None:  # all of it before the first kernel
            check_cached(cached, q)
        state = self.attend_pages(q, context, selection, active, scale=scale)
        if cached is not None:
            state = self.reuse(active, state, cached)
        block = self.attend_block(q, k, v, scale=scale)
        return self.merge(state, block).out, state

    def attend_ranked(
        self,
        q: Array,
        k: Array,
        v: Array,
        context: Context,
        bounds: PageBounds,
        ranked_pass: RankedPass,
        cached: AttentionState | None,
        *,
        scale: float | None = None,
    ) -> RankedResult:
        """Decide and run a whole pass by a rule (clause RANKED-1).

        Its definition is the operators above, one after the other, and so is the default. A backend
        that overrides it is asked for it by the driver; no other is.

        Parameters
        ----------
        q, k, v : array
            The block's queries, keys and values.
        context : Context
            Pages to choose from.
        bounds : PageBounds
            Their metadata.
        ranked_pass : RankedPass
            The rule.
        cached : AttentionState or None
            Context part of earlier passes, for inactive rows; None counts as the empty set.
        scale : float, optional
            Factor on q.k; default ``1 / sqrt(head_dim)``.

        Returns
        -------
        RankedResult
            Output, context state, and what was decided.
        """
        return ranked.attend_ranked(self, q, k, v, context, bounds, ranked_pass, cached, scale)
