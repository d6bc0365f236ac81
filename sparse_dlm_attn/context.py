"""The paged KV of everything outside the block that the block may read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from sparse_dlm_attn.arrays import (
    Array,
    dtype_name,
    is_readable,
    namespace,
    shape_of,
    strided_view,
    strides_of,
    to_numpy,
)
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn.forms import with_one_form
from sparse_dlm_attn.runs import check_valid, shifted_pages
from sparse_dlm_attn.values import (
    PageBounds,
    check_array,
    check_int,
    check_same_place,
    check_sequences,
    short_repr,
    take_sequences,
)

__all__ = ["GENERATED", "PROMPT", "SUFFIX", "Context"]

SEGMENTS = PROMPT, GENERATED, SUFFIX = 0, 1, 2


@with_one_form
@dataclass(frozen=True, eq=False)
class Context:
    """Pages of keys and values, in reading order, behind a page table (clause CONTEXT-1).

    Parameters
    ----------
    k_pages, v_pages : array
        ``(num_pages, kv_heads, page_size, head_dim)``: physical pages; any strides except that the
        last axis is contiguous. Engines whose caches are ``(num_pages, page_size, kv_heads, head_dim)``
        pass a transposed view.
    page_table : array
        int32 ``(batch, pages)``: physical page of each logical page. Ignored where the length is 0.
    page_lengths : array
        int32 ``(batch, pages)``: valid tokens in each logical page, 0..page_size; 0 = absent.
    page_segments : array, optional
        int8 ``(batch, pages)``: 0 prompt, 1 generated, 2 suffix. None means all prompt.
    bounds : PageBounds, optional
        Metadata kept by the owner of the cache, so that no pass has to rebuild it. It must describe
        exactly these pages: a backend's `extend_bounds` makes it anew from the first page written to.
    version : int
        Change it whenever the valid tokens change: memory made under another version is refused.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If a shape or dtype does not fit. Contents are checked by :meth:`check_contents`.
    """

    k_pages: Array
    v_pages: Array
    page_table: Array
    page_lengths: Array
    page_segments: Array | None = None
    bounds: PageBounds | None = None
    version: int = 0
    _of_pages: ClassVar[tuple[str, ...]] = ("page_table", "page_lengths", "page_segments")

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_array("k_pages", self.k_pages, ("num_pages", "kv_heads", "page_size", "head_dim"))
        check_array("v_pages", self.v_pages, shape_of(self.k_pages), (dtype_name(self.k_pages),))
        check_array("page_table", self.page_table, ("batch", "pages"), ("int32",))
        check_array("page_lengths", self.page_lengths, shape_of(self.page_table), ("int32",))
        if self.page_segments is not None:
            check_array("page_segments", self.page_segments, shape_of(self.page_table), ("int8",))
        if self.bounds is not None:
            if not isinstance(self.bounds, PageBounds):
                raise InvalidTypeError(
                    "bounds",
                    "must be PageBounds or None",
                    type(self.bounds).__name__,
                    "Make them with a backend's page_bounds(context).",
                )
            shape = (self.batch, self.kv_heads, self.pages, self.head_dim)
            check_array("bounds.lower", self.bounds.lower, shape, (dtype_name(self.k_pages),))
        if 0 in (self.kv_heads, self.page_size, self.head_dim):
            raise InvalidArgumentError(
                "k_pages", "must have at least one KV head, token and channel a page", f"shape {shape_of(self.k_pages)}"
            )
        object.__setattr__(self, "version", check_int("version", self.version))
        self._check_placement()

    def _check_placement(self) -> None:
        """Raise unless all arrays share library and device, and channels lie side by side."""
        arrays = {"v_pages": self.v_pages, "page_table": self.page_table, "page_lengths": self.page_lengths}
        if self.page_segments is not None:
            arrays["page_segments"] = self.page_segments
        if self.bounds is not None:
            arrays["bounds.lower"] = self.bounds.lower
        for name, array in arrays.items():
            check_same_place(name, array, "k_pages", self.k_pages)
        for name, array in (("k_pages", self.k_pages), ("v_pages", self.v_pages)):
            strides = strides_of(array)
            if strides is not None and strides[-1] != 1 and self.head_dim > 1 and 0 not in shape_of(array):
                raise InvalidArgumentError(
                    name,
                    "must be contiguous in its last axis (channels)",
                    f"a stride of {strides[-1]} elements",
                    "Copy it into contiguous memory.",
                )

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return int(self.page_table.shape[0])

    @property
    def pages(self) -> int:
        """Logical pages a sequence, absent ones included."""
        return int(self.page_table.shape[1])

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return int(self.k_pages.shape[1])

    @property
    def page_size(self) -> int:
        """Tokens that a page can hold."""
        return int(self.k_pages.shape[2])

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return int(self.k_pages.shape[3])

    @property
    def exists(self) -> Array:
        """Bool ``(batch, pages)``: pages that hold at least one token."""
        return self.page_lengths > 0

    @property
    def resident(self) -> Array:
        """Bool ``(batch, pages)``: existing pages whose keys and values lie in ``k_pages`` and ``v_pages``.

        All that exist, unless a context is spread over several devices.
        """
        return self.exists

    @property
    def tokens(self) -> Array:
        """int32 ``(batch,)``: valid tokens of each sequence."""
        xp = namespace(self.page_lengths)
        return xp.sum(self.page_lengths, axis=-1, dtype=xp.int32)

    @property
    def page_ends(self) -> Array:
        """int32 ``(batch, pages)``: valid tokens up to and including each page, in reading order."""
        xp = namespace(self.page_lengths)
        return xp.cumulative_sum(self.page_lengths, axis=-1, dtype=xp.int32)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one KV head of this layer."""
        size = {"float64": 8, "float32": 4}.get(dtype_name(self.k_pages), 2)
        return 2 * self.head_dim * size

    def in_segment(self, segment: int) -> Array:
        """Bool ``(batch, pages)``: existing pages of one segment, 0 prompt, 1 generated, 2 suffix."""
        if check_int("segment", segment) not in SEGMENTS:
            raise InvalidArgumentError("segment", "must be 0 prompt, 1 generated or 2 suffix", segment)
        if self.page_segments is None:
            xp = namespace(self.page_lengths)
            return self.exists if segment == PROMPT else xp.zeros_like(self.exists)
        return self.exists & (self.page_segments == segment)

    def pages_from(self, first: int) -> Context:
        """Return the context of the logical pages from ``first`` on, without metadata."""
        values = {name: getattr(self, name) for name in self._of_pages}
        cut = {name: value[:, first:] for name, value in values.items() if value is not None}
        return replace(self, **cut, bounds=None)

    def reorder(self, indices: Any) -> Context:
        """Return the same pages as the context of other sequences.

        Parameters
        ----------
        indices : array or sequence of int
            ``(sequences,)``: for each sequence of the new batch, its number in this one; any number of times.

        Raises
        ------
        InvalidArgumentError, InvalidTypeError
            If they are no numbers of sequences.
        """
        rows = check_sequences(indices, self.batch, self.page_table)
        names = (*self._of_pages, "bounds")
        return replace(self, **{name: take_sequences(getattr(self, name), rows) for name in names})

    def with_bounds(self, bounds: PageBounds) -> Context:
        """Return this context with metadata attached."""
        return replace(self, bounds=bounds)

    @classmethod
    def from_dense(
        cls,
        k: Array,
        v: Array,
        page_size: int,
        lengths: Array | None = None,
        *,
        valid: Array | None = None,
        version: int = 0,
    ) -> Context:
        """View a dense cache as pages, without copying.

        Parameters
        ----------
        k, v : array
            ``(batch, kv_heads, tokens, head_dim)``. ``tokens`` is the capacity and must be a multiple
            of ``page_size``; the part in use is given by ``lengths``.
        page_size : int
            Tokens a page.
        lengths : array or sequence of int, optional
            Valid tokens of each sequence, ``(batch,)``; default: the whole capacity.
        valid : array, optional
            bool ``(batch, tokens)`` in host memory, instead of ``lengths``: which tokens exist. It allows
            padding on either side or between tokens, any capacity, and slices of a larger buffer.
        version : int
            See :class:`Context`.

        Returns
        -------
        Context
            Its pages share memory with ``k`` and ``v``.

        Raises
        ------
        InvalidArgumentError
            If ``tokens`` is not a multiple of ``page_size`` (no view exists then), if a length lies
            outside the capacity, or if the batch axis has strides that rule a view out. With ``valid``:
            if a page would reach behind the end of the memory (see Notes).

        Notes
        -----
        With several sequences the physical page axis overlaps itself: page ``x`` of head ``h`` is the
        memory block ``x + h * pages``, and logical page ``j`` of sequence ``b`` has
        ``x = b * kv_heads * pages + j``. This is what lets one axis cover batch and pages.

        A page holds its tokens from its first slot on, so padding in front shifts the pages: with ``valid``
        pages begin wherever tokens do, and overlap others in memory where they are short. Each run of
        consecutive tokens is cut into full pages from its end, and what is left over becomes a short page at
        its front. A sequence is cut alike whatever it is padded to, and only a run of fewer than
        ``page_size`` tokens at the end of the memory has no view; a smaller page size has one.
        """
        check_array("k", k, ("batch", "kv_heads", "tokens", "head_dim"))
        check_array("v", v, shape_of(k), (dtype_name(k),))
        batch, kv_heads, tokens, _ = shape_of(k)
        check_same_place("v", v, "k", k)
        if isinstance(page_size, bool | np.bool_) or not isinstance(page_size, int | np.integer):
            raise InvalidTypeError("page_size", "must be an int of at least 1 token", repr(page_size))
        page_size = int(page_size)
        if not 1 <= page_size < 2**31:
            raise InvalidArgumentError("page_size", "must be at least 1 token and less than 2**31", page_size)
        if valid is not None:
            if lengths is not None:
                raise InvalidArgumentError("lengths", "must be None together with valid, which says the same", "both")
            shifted = shifted_pages(k, v, page_size, check_valid(valid, (batch, tokens)))
            return cls(*shifted, version=version)
        if tokens % page_size:
            raise InvalidArgumentError(
                "k",
                f"must have a multiple of page_size={page_size} tokens, since a view cannot pad",
                f"{tokens} tokens",
                f"Allocate {-(-tokens // page_size) * page_size} tokens and pass lengths=, "
                "or choose a page_size that divides the capacity, or pass valid=.",
            )
        pages = tokens // page_size
        xp = namespace(k)
        first = xp.arange(batch, dtype=xp.int32, device=k.device) * (kv_heads * pages if batch > 1 else 0)
        offsets = xp.arange(pages, dtype=xp.int32, device=k.device)
        table = xp.astype(first[:, None] + offsets[None, :], xp.int32)
        page_lengths = _page_lengths(xp, lengths, batch, pages, page_size, k.device)
        return cls(_paged_view("k", k, page_size), _paged_view("v", v, page_size), table, page_lengths, version=version)

    def check_contents(self) -> None:
        """Check the values of table and lengths; reads them, so it synchronises with a device.

        Raises
        ------
        InvalidArgumentError
            If a length lies outside 0..page_size, an existing page points outside ``k_pages``, or a
            page belongs to no segment that there is.
        """
        lengths, table = to_numpy(self.page_lengths), to_numpy(self.page_table)
        bad = (lengths < 0) | (lengths > self.page_size)
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise InvalidArgumentError(
                "page_lengths", f"must lie in 0..page_size = 0..{self.page_size}", f"{lengths[where]} at {where}"
            )
        bad = to_numpy(self.resident) & ((table < 0) | (table >= self.k_pages.shape[0]))
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise InvalidArgumentError(
                "page_table",
                f"must point into 0..num_pages-1 = 0..{self.k_pages.shape[0] - 1} where page_lengths > 0",
                f"{table[where]} at {where}",
            )
        if self.page_segments is not None:
            segments = to_numpy(self.page_segments)
            bad = (lengths > 0) & ~np.isin(segments, SEGMENTS)
            if bad.any():
                where = tuple(int(i) for i in np.argwhere(bad)[0])
                raise InvalidArgumentError(
                    "page_segments",
                    "must be 0 prompt, 1 generated or 2 suffix where page_lengths > 0",
                    f"{segments[where]} at {where}",
                )


def _page_lengths(xp: Any, lengths: Any, batch: int, pages: int, page_size: int, device: Any) -> Array:
    """Split sequence lengths into page lengths, all pages full but the last one."""
    if lengths is None:
        return xp.full((batch, pages), page_size, dtype=xp.int32, device=device)
    try:
        lengths = xp.asarray(lengths, device=device)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # what libraries raise
        raise InvalidTypeError(
            "lengths", "must be an array or a list of ints, one a sequence", repr(lengths)
        ) from error
    check_array("lengths", lengths, (batch,), ("int32", "int64"))
    if is_readable(lengths):
        host = to_numpy(lengths)
        if ((host < 0) | (host > pages * page_size)).any():
            raise InvalidArgumentError("lengths", f"must lie in 0..tokens = 0..{pages * page_size}", host.tolist())
    starts = xp.arange(pages, dtype=xp.int32, device=device) * page_size
    return xp.astype(xp.clip(lengths[:, None] - starts[None, :], 0, page_size), xp.int32)


def _paged_view(name: str, dense: Array, page_size: int) -> Array:
    """View ``(batch, kv_heads, tokens, head_dim)`` as ``(num_pages, kv_heads, page_size, head_dim)``."""
    batch, kv_heads, tokens, head_dim = shape_of(dense)
    pages = tokens // page_size
    strides = strides_of(dense)
    if 0 in (batch, kv_heads, tokens):  # nothing to view, so no layout to ask for
        return namespace(dense).zeros((0, kv_heads, page_size, head_dim), dtype=dense.dtype, device=dense.device)
    if batch == 1 or strides is None:
        if batch != 1:
            raise InvalidTypeError(
                name,
                "must be a NumPy array or PyTorch tensor to view several sequences as pages",
                type(dense).__name__,
                "Pass one sequence at a time or build Context from pages.",
            )
        xp = namespace(dense)
        return xp.permute_dims(xp.reshape(dense[0, ...], (kv_heads, pages, page_size, head_dim)), (1, 0, 2, 3))
    sequence, head, token, channel = strides
    page = page_size * token
    if sequence != kv_heads * pages * page or head != pages * page:
        raise InvalidArgumentError(
            name,
            "must be contiguous in its batch, head and token axes to be viewed as pages",
            f"strides {strides}",
            "Call it on the contiguous cache, not on a slice of it.",
        )
    shape = ((batch - 1) * kv_heads * pages + pages, kv_heads, page_size, head_dim)
    return strided_view(dense, shape, (page, head, token, channel))
