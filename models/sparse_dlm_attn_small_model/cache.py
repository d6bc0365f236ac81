"""The KV cache: keys, values and page metadata, of a prefix that grows or of a whole sequence.

Keys and values lie densely in one buffer with room to grow; a `Context` is a view of it. Sequences of the same length
can share a cache, so that they decode side by side. Forks of a prefix let the KV of one prompt serve any number of
decodings.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.backend import Backend
from sparse_dlm_attn.context import GENERATED, PROMPT, SUFFIX, Context
from sparse_dlm_attn.errors import InvalidArgumentError
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn.values import PageBounds, check_array
from sparse_dlm_attn_small_model.config import TinyConfig

DEFAULT_PAGE_SIZE = 16
GROWTH_TOKENS = 256  # spare room of a new buffer: a typical answer fits without growing again
HostArray = np.ndarray[Any, Any]


class KVCache:
    """Post-RoPE keys and values of one or several sequences, for all layers.

    The cache of a prefix grows: a pass writes the block behind it, and `advance` makes the block count.
    The tokens of a whole sequence keep their places, and a row that a pass does not compute keeps what
    the last pass that computed it has written.

    Parameters
    ----------
    config, backend : TinyConfig, Backend
        Architecture that the cache is for; whose arrays it holds and whose `page_bounds` keeps the metadata.
    page_size : int
        Tokens a page.
    block_length : int, optional
        Tokens denoised together, on which the prompt's KV depends; default: the model's.
    capacity : int
        Tokens to reserve; the cache grows by copying when it needs more.
    whole : bool
        Whether this is a whole sequence, of ``capacity`` tokens. It has no page bounds, which would be
        stale after every pass.
    prompt_tokens : int
        Tokens that count as prompt: a page is of segment ``PROMPT`` if its first token is one. The last
        page of a whole sequence never is (the boundary that SparseD's code draws).
    owner : object
        The model whose KV it holds; decoding refuses a prefix of another model.

    Attributes
    ----------
    length : int
        Tokens of each sequence that count: the finished ones of a prefix.
    version : int
        Version of the contexts: the same for no two different contents of a cache and its forks.
    tokens : tuple of tuple of int
        The finished tokens of each sequence of a prefix.
    bounds_key_bytes : int
        Key bytes of a sequence and layer read so far to build page metadata: each key once, and the keys of
        a partly filled page again whenever it grows. Forks inherit what was read before the fork.
    """

    def __init__(
        self,
        config: TinyConfig,
        backend: Backend,
        *,
        page_size: int = DEFAULT_PAGE_SIZE,
        block_length: int | None = None,
        capacity: int = 0,
        whole: bool = False,
        prompt_tokens: int = 0,
        owner: object = None,
    ) -> None:
        check_count("page_size", page_size, 1)
        check_count("capacity", capacity, int(whole))
        self.config, self.backend, self.owner, self.whole = config, backend, owner, whole
        self.page_size, self.prompt_tokens = page_size, prompt_tokens
        self.block_length = config.block_length if block_length is None else block_length
        self.length = capacity if whole else 0
        self.version = 0
        self.tokens: tuple[tuple[int, ...], ...] = ((),)
        self.bounds_key_bytes = 0
        self._versions = itertools.count(1)  # one counter for a cache and all its forks
        self._bounds: list[PageBounds | None] = [None] * config.layers
        self._contexts: tuple[int, tuple[Context, ...]] | None = None
        self._kv = self._room(capacity)
        self._rebuild_bounds(0)

    def __repr__(self) -> str:
        names = ("batch", "length", "prompt_tokens", "page_size", "block_length", "version")
        return f"KVCache({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    @classmethod
    def together(cls, caches: Sequence[KVCache]) -> KVCache:
        """Return one prefix with the sequences of several of one length and layout, which are copied."""
        if not caches:
            raise InvalidArgumentError("caches", "must hold at least one KVCache", "none")
        for name in ("owner", "length", "prompt_tokens", "page_size", "block_length"):
            values = {getattr(cache, name) for cache in caches}
            if len(values) > 1:
                raise InvalidArgumentError(
                    "caches",
                    f"must have the same {name}",
                    ", ".join(map(repr, values)),
                    "Use prompts of equal length, and one model.",
                )
        joint = copy.copy(caches[0])
        joint.tokens = tuple(tokens for cache in caches for tokens in cache.tokens)
        joint._versions = itertools.count(1)
        joint.version = next(joint._versions)
        xp = namespace(joint._kv)
        joint._grow(0, xp.concat([cache._kv[:, :, :, :, : cache.length, :] for cache in caches], axis=3))
        joint._bounds = [
            PageBounds(*(xp.concat([getattr(each, side) for each in bounds], axis=0) for side in ("lower", "upper")))
            for bounds in zip(*(cache._bounds for cache in caches), strict=True)
        ]
        return joint

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.tokens)

    def fork(self, *, page_size: int | None = None) -> KVCache:
        """Return a copy of a prefix that grows independently; another ``page_size`` rebuilds the metadata."""
        fork = copy.copy(self)
        if page_size is None or page_size == self.page_size:
            fork._grow(0)
            return fork
        check_count("page_size", page_size, 1)
        fork.page_size, fork.version = page_size, next(self._versions)
        fork.bounds_key_bytes, fork._bounds = 0, [None] * self.config.layers
        fork._grow(0)
        fork._rebuild_bounds(0)
        return fork

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more tokens of each sequence."""
        check_count("tokens", tokens, 0)
        if self.length + tokens > self._capacity:
            self._grow(tokens)

    def write(self, layer: int, rows: slice | HostArray, keys: Array, values: Array) -> None:
        """Store KV of the tokens at ``rows``, ascending; those of a prefix in room that `reserve` made.

        ``keys`` and ``values`` are float32 ``(batch, kv_heads, tokens, head_dim)``.
        """
        first, end = (rows.start, rows.stop) if isinstance(rows, slice) else (rows[0], rows[-1] + 1)
        shape = (self.batch, self.config.kv_heads, "tokens", self.config.head_dim)
        check_array("keys", keys, shape, ("float32",))
        check_array("values", values, tuple(int(size) for size in keys.shape), ("float32",))
        if not self.whole:
            self._check_reserved("rows", first, end)
        for part, array in enumerate((keys, values)):
            room = self._kv[layer, part, ...]
            room[:, :, rows, :] = namespace(array).permute_dims(array, (1, 0, 2, 3))

    def read(self, layer: int, start: int, end: int) -> tuple[Array, Array]:
        """Return views of keys and values of tokens ``start..end``, unfinished ones included.

        They have the shape ``(batch, kv_heads, end - start, head_dim)``.
        """
        kv = self._kv[layer, :, :, :, start:end, :]
        kv = namespace(kv).permute_dims(kv, (0, 2, 1, 3, 4))
        return kv[0, ...], kv[1, ...]

    def advance(self, tokens: Sequence[Sequence[int]], *, prompt_tokens: int | None = None) -> None:
        """Count tokens as finished whose KV has been written for every layer, equally many of each sequence.

        ``prompt_tokens`` replaces the attribute.
        """
        counts = {len(row) for row in tokens}
        if len(tokens) != self.batch or len(counts) != 1:
            raise InvalidArgumentError(
                "tokens",
                f"must hold equally many tokens for each of {self.batch} sequences",
                f"{[len(row) for row in tokens]} tokens",
            )
        end = self.length + counts.pop()
        self._check_reserved("tokens", self.length, end)
        first_page = self.length // self.page_size  # a partly filled last page has to be rebuilt
        self.tokens = tuple((*old, *map(int, new)) for old, new in zip(self.tokens, tokens, strict=True))
        self.length, self.version, self._contexts = end, next(self._versions), None
        if prompt_tokens is not None:
            self.prompt_tokens = prompt_tokens
        self._rebuild_bounds(first_page)

    def contexts(self, window_end: int | None = None) -> tuple[Context, ...]:
        """Return the tokens that count, layer by layer, as contexts that share memory with the cache.

        Page metadata is attached to a prefix. An empty one gives one absent page. Pages of a whole sequence
        that begin at ``window_end``, behind the window that is being filled in, are of segment ``SUFFIX``.
        """
        end = self.length if window_end is None else window_end
        if self._contexts is None or self._contexts[0] != end:
            self._contexts = end, self._make_contexts(end)
        return self._contexts[1]

    def _make_contexts(self, window_end: int) -> tuple[Context, ...]:
        """Return views of all layers, with the bounds that there are."""
        first = np.arange(self._rounded(self.length) // self.page_size) * self.page_size
        segments = np.where(first < window_end, GENERATED, SUFFIX)
        segments[first < self.prompt_tokens] = PROMPT
        if self.whole and segments[-1] == PROMPT:
            segments[-1] = GENERATED
        lengths = np.clip(self.length - first, 0, self.page_size)
        room = np.arange(self.batch)[:, None] * self._capacity
        pages = (first + room) // self.page_size
        pages, lengths, segments = (
            self.backend.asarray(np.broadcast_to(rows, (self.batch, len(first))).astype(dtype), dtype=dtype)
            for rows, dtype in ((pages, "int32"), (lengths, "int32"), (segments, "int8"))
        )
        kv, config = self._kv, self.config
        xp = namespace(kv)
        kv = xp.reshape(kv, (config.layers, 2, config.kv_heads, -1, self.page_size, config.head_dim))
        kv = xp.permute_dims(kv, (0, 1, 3, 2, 4, 5))
        return tuple(
            Context(kv[layer, 0, ...], kv[layer, 1, ...], pages, lengths, segments, bounds, self.version)
            for layer, bounds in enumerate(self._bounds)
        )

    def _rebuild_bounds(self, first_page: int) -> None:
        """Build the metadata of a prefix from page ``first_page`` on and keep that of the pages before it."""
        if self.whole:
            return
        kept, self._bounds = self._bounds, [None] * self.config.layers
        contexts = self._make_contexts(self.length)
        first_page = min(first_page, contexts[0].pages - 1)
        self._bounds = [
            self.backend.page_bounds(context)
            if bounds is None
            else self.backend.extend_bounds(context, bounds, first_page)
            for context, bounds in zip(contexts, kept, strict=True)
        ]
        read = self.length - min(first_page * self.page_size, self.length)
        self.bounds_key_bytes += read * 4 * self.config.kv_heads * self.config.head_dim

    def _check_reserved(self, argument: str, first: int, end: int) -> None:
        """Raise unless the tokens ``first..end`` lie in the room behind those that count."""
        if not self.length <= first <= end <= self._capacity:
            raise InvalidArgumentError(
                argument,
                f"must lie in the reserved room {self.length}..{self._capacity}",
                f"{first}..{end}",
                "Call reserve() first.",
            )

    @property
    def _capacity(self) -> int:
        """Tokens of each sequence that there is room for, in whole pages."""
        return int(self._kv.shape[4])

    def _rounded(self, tokens: int) -> int:
        """Return ``tokens`` rounded up to whole pages, at least one."""
        return max(-(-tokens // self.page_size), 1) * self.page_size

    def _room(self, tokens: int) -> Array:
        """Return zeros for keys and values of whole pages, which hold ``tokens`` of each sequence."""
        config, like = self.config, self.backend.asarray(np.zeros(1, dtype=np.float32), dtype="float32")
        shape = (config.layers, 2, config.kv_heads, self.batch, self._rounded(tokens), config.head_dim)
        return namespace(like).zeros(shape, dtype=like.dtype, device=like.device)

    def _grow(self, tokens: int, kv: Array | None = None) -> None:
        """Move to room for ``tokens`` more and some spare ones, taking along what counts of ``kv`` or our own."""
        old = (self._kv if kv is None else kv)[:, :, :, :, : self.length, :]
        self._kv, self._contexts = self._room(self.length + tokens + GROWTH_TOKENS), None
        self._kv[:, :, :, :, : self.length, :] = old
