"""Which pages each query row may read, and what a kernel has to load for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_dlm_attn.arrays import Array, namespace, shape_of, to_numpy
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn.forms import once_a_form
from sparse_dlm_attn.values import check_array, check_int, check_same_place, short_repr

__all__ = ["Selection"]


@once_a_form
def _check_mask(mask: Array) -> None:
    check_array("mask", mask, ("batch", "heads", "spans", "pages"), ("bool", "bool_"))


@dataclass(frozen=True, eq=False)
class Selection:
    """Pages selected for every span of query rows (clause SELECTION-1).

    Parameters
    ----------
    mask : array
        bool ``(batch, heads, spans, pages)`` with ``heads`` 1, kv_heads or q_heads: one selection for
        all heads, for each group, or for each query head.
    span : int
        Consecutive query rows that share one selection: row ``r`` uses span ``r // span``.
    """

    mask: Array
    span: int

    __repr__ = short_repr

    def __post_init__(self) -> None:
        _check_mask(self.mask)
        object.__setattr__(self, "span", check_int("span", self.span, 1))

    @property
    def heads(self) -> int:
        """Number of separate selections along the heads."""
        return int(self.mask.shape[1])

    @property
    def pages(self) -> int:
        """Logical pages that the mask covers."""
        return int(self.mask.shape[3])

    @classmethod
    def all_pages(cls, context: Context, tokens: int) -> Selection:
        """Select every existing page for all ``tokens`` rows."""
        _check_context(context)
        return cls(context.exists[:, None, None, :], max(check_int("tokens", tokens, 0), 1))

    @classmethod
    def no_pages(cls, context: Context, tokens: int) -> Selection:
        """Select nothing."""
        _check_context(context)
        xp = namespace(context.page_lengths)
        nothing = xp.zeros_like(context.exists)[:, None, None, :]
        return cls(nothing, max(check_int("tokens", tokens, 0), 1))

    def check_fits(self, q_shape: tuple[int, ...], context: Context) -> None:
        """Raise unless this selection fits queries of ``q_shape`` and ``context``."""
        _check_context(context)
        if not isinstance(q_shape, tuple) or len(q_shape) != 4:
            raise InvalidTypeError(
                "q_shape", "must be the shape (batch, q_heads, tokens, head_dim) of q", repr(q_shape)
            )
        batch, q_heads, tokens, _ = q_shape
        check_same_place("selection.mask", self.mask, "context", context.page_lengths)
        spans = -(-tokens // self.span)
        # Not ``in``, which a compiler that keeps sizes symbolic takes for a comparison of symbols.
        if not any(self.heads == heads for heads in (1, context.kv_heads, q_heads)):
            raise InvalidArgumentError(
                "selection.mask",
                f"must have 1, kv_heads={context.kv_heads} or q_heads={q_heads} heads",
                f"{self.heads} heads",
            )
        wanted = (batch, self.heads, spans, context.pages)
        if shape_of(self.mask) != wanted:
            raise InvalidArgumentError(
                "selection.mask",
                f"must have shape (batch, heads, ceil(tokens/span), pages) = {wanted}",
                f"shape {shape_of(self.mask)} with span {self.span}",
            )

    def for_query_heads(self, q_heads: int) -> Array:
        """Return the mask per query head, bool ``(batch, q_heads, spans, pages)``.

        Query head ``h`` uses entry ``h // (q_heads / heads)`` (clause GQA-1), which covers all three
        forms: one entry, one a KV head, one a query head.
        """
        if check_int("q_heads", q_heads, 1) % max(self.heads, 1) or self.heads == 0:
            raise InvalidArgumentError("q_heads", f"must be a multiple of the selection's {self.heads} heads", q_heads)
        xp = namespace(self.mask)
        return xp.repeat(self.mask, q_heads // self.heads, axis=1)

    def for_rows(self, q_heads: int, tokens: int) -> Array:
        """Return the mask per query head and row, bool ``(batch, q_heads, tokens, pages)``."""
        span = self._rows_a_span(tokens)
        xp = namespace(self.mask)
        rows = xp.repeat(self.for_query_heads(q_heads), span, axis=2)
        return rows[:, :, :tokens, :]

    def _rows_a_span(self, tokens: int) -> int:
        """Return ``span``, cut to the block: a span may be longer, and memory must not follow it."""
        spans = int(self.mask.shape[2])
        if spans != -(-check_int("tokens", tokens, 0) // self.span):
            raise InvalidArgumentError("tokens", f"must fill the selection's {spans} spans of {self.span} rows", tokens)
        return min(self.span, max(tokens, 1))

    def rows_of_spans(self, active: Array) -> Array:
        """Return how many active rows each span has, float32 ``(batch, spans)``.

        Parameters
        ----------
        active : array
            bool ``(batch, tokens)``.
        """
        xp = namespace(self.mask)
        batch, tokens = shape_of(active)
        span, spans = self._rows_a_span(tokens), int(self.mask.shape[2])
        missing = xp.zeros((batch, spans * span - tokens), dtype=xp.bool, device=active.device)
        padded = xp.reshape(xp.concat([active, missing], axis=1), (batch, spans, span))
        return xp.sum(xp.astype(padded, xp.float32), axis=-1)

    def loaded(self, active: Array, q_heads: int, kv_heads: int) -> Array:
        """Return the pages that a kernel loads, bool ``(batch, kv_heads, pages)``.

        The union over the active rows and over the query heads of a group: a page that several of
        them selected is loaded once (clause DENSITY-1).

        Parameters
        ----------
        active : array
            bool ``(batch, tokens)``.
        q_heads, kv_heads : int
            Head counts of the problem.
        """
        check_array("active", active, (int(self.mask.shape[0]), "tokens"), ("bool", "bool_"))
        check_same_place("active", active, "selection.mask", self.mask)
        if check_int("q_heads", q_heads, 1) % check_int("kv_heads", kv_heads, 1):
            raise InvalidArgumentError("q_heads", f"must be a multiple of kv_heads={kv_heads}", q_heads)
        xp = namespace(self.mask)
        batch = int(active.shape[0])
        used = self.rows_of_spans(active) > 0
        of_heads = xp.any(self.for_query_heads(q_heads) & used[:, None, :, None], axis=2)
        return xp.any(xp.reshape(of_heads, (batch, kv_heads, q_heads // kv_heads, self.pages)), axis=2)

    def page_lists(self, capacity: int | None = None) -> tuple[Array, Array]:
        """Return the same selection as padded lists.

        Parameters
        ----------
        capacity : int, optional
            Most entries of a list; default: ``pages``, which needs no look at the values. A list
            longer than ``capacity`` is cut, so pass a bound that holds.

        Returns
        -------
        indices : array
            int32 ``(batch, heads, spans, min(capacity, pages))``: logical pages, ascending, unique,
            padded with -1.
        counts : array
            int32 ``(batch, heads, spans)``.
        """
        pages = self.pages
        if capacity is not None:
            capacity = check_int("capacity", capacity, 0)
        xp = namespace(self.mask)
        index = xp.arange(pages, dtype=xp.int32, device=self.mask.device)
        # Unselected pages sort behind all selected ones, so no data-dependent shape arises.
        keys = xp.sort(xp.where(self.mask, index, pages), axis=-1)
        indices = xp.astype(xp.where(keys < pages, keys, -1), xp.int32)
        counts = xp.sum(xp.astype(self.mask, xp.int32), axis=-1, dtype=xp.int32)
        return indices[..., : pages if capacity is None else min(capacity, pages)], counts

    def to_csr(self, context: Context) -> tuple[Any, Any, Any]:
        """Return FlashInfer-style CSR page lists with physical page ids, on the host.

        One list for each (sequence, selection head, span), in that order.

        Returns
        -------
        indptr : numpy.ndarray
            int32 ``(lists + 1,)``.
        indices : numpy.ndarray
            int32 physical pages in reading order; absent pages are left out.
        last_page_len : numpy.ndarray
            int32 ``(lists,)``: tokens in the last page of each list, 0 for an empty list.

        Raises
        ------
        InvalidArgumentError
            If a listed page other than the last of its list is partly filled: CSR cannot say so; or if
            ``context`` has other sequences or pages than this selection.
        """
        import numpy as np

        _check_context(context)
        if (int(self.mask.shape[0]), self.pages) != (context.batch, context.pages):
            raise InvalidArgumentError(
                "context",
                f"must have the selection's {int(self.mask.shape[0])} sequences of {self.pages} pages",
                f"{context.batch} sequences of {context.pages} pages",
            )
        check_same_place("context", context.page_lengths, "selection.mask", self.mask)
        mask = to_numpy(self.mask & context.exists[:, None, None, :])
        table, lengths = to_numpy(context.page_table), to_numpy(context.page_lengths)
        indptr, indices, last = [0], [], []
        for position in np.ndindex(mask.shape[:3]):
            listed = np.flatnonzero(mask[position])
            sizes = lengths[position[0]][listed]
            if (sizes[:-1] != context.page_size).any():
                raise InvalidArgumentError(
                    "context.page_lengths",
                    "must be full except for the last listed page, to be CSR",
                    f"lengths {sizes.tolist()} in list {position}",
                )
            indices.extend(table[position[0]][listed].tolist())
            indptr.append(len(indices))
            last.append(int(sizes[-1]) if listed.size else 0)
        return tuple(np.asarray(part, dtype=np.int32) for part in (indptr, indices, last))  # type: ignore[return-value]

    def __str__(self) -> str:
        """Draw the selection of sequence 0: a line for each head and span, a column a page range."""
        mask = to_numpy(self.mask)
        batch, heads, spans, pages = mask.shape
        head = f"Selection(batch={batch}, heads={heads}, spans={spans} of {self.span}, pages={pages})"
        if batch == 0 or pages == 0:
            return head
        columns = min(pages, 64)
        lines = [head]
        for h in range(min(heads, 8)):
            for s in range(min(spans, 8)):
                cells = [
                    mask[0, h, s, c * pages // columns : (c + 1) * pages // columns].mean() for c in range(columns)
                ]
                lines.append(f"  head {h} span {s} |{''.join(' .:#'[int(cell * 3)] for cell in cells)}|")
        return "\n".join(lines)


def _check_context(context: object) -> None:
    if not isinstance(context, Context):
        raise InvalidTypeError(
            "context",
            "must be a Context",
            type(context).__name__,
            "Build one with Context.from_dense(k, v, page_size).",
        )
