"""The prefix cache: keys, values and page metadata of everything decoded so far.

Keys and values lie densely, layer by layer, in buffers with room to grow; a `Context` is a view of
them. Sequences of the same length can share a cache, so that they decode side by side. A cache can be
forked in constant time, so that the KV of one prompt serves any number of decodings: forks share the
buffers until one of them appends after another has (copy on append).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.backend import Backend
from sparse_dlm_attn.context import GENERATED, PROMPT, Context
from sparse_dlm_attn.errors import InvalidArgumentError
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn.values import PageBounds, check_array
from sparse_dlm_attn_tiny.config import TinyConfig

__all__ = ["DEFAULT_PAGE_SIZE", "PrefixCache"]

DEFAULT_PAGE_SIZE = 16
GROWTH_TOKENS = 256  # spare room of a new buffer: a typical answer fits without growing again


class _Buffers:
    """Room for the KV of every layer, heads first: pages of all sequences lie at one step from another.

    `filled` tells up to which token somebody, `claimant`, claimed it.
    """

    def __init__(self, config: TinyConfig, backend: Backend, batch: int, capacity: int) -> None:
        shape = (config.kv_heads, batch, capacity, config.head_dim)
        self.keys = [self._zeros(backend, shape) for _ in range(config.layers)]
        self.values = [self._zeros(backend, shape) for _ in range(config.layers)]
        self.capacity = capacity
        self.filled = 0
        self.claimant: object = None

    @staticmethod
    def _zeros(backend: Backend, shape: tuple[int, ...]) -> Array:
        like = backend.asarray(np.zeros(1, dtype=np.float32), dtype="float32")
        return namespace(like).zeros(shape, dtype=like.dtype, device=like.device)


class PrefixCache:
    """Post-RoPE keys and values of the finished tokens of one or several sequences, for all layers.

    Parameters
    ----------
    config : TinyConfig
        Architecture that the cache is for.
    backend : Backend
        Whose arrays the cache holds and whose `page_bounds` keeps the metadata.
    page_size : int
        Tokens a page.
    block_length : int
        Tokens denoised together; the prompt's KV depends on it (block-causal attention).
    capacity : int
        Tokens to reserve; the cache grows by copying when it needs more.
    owner : object
        The model whose KV it holds; decoding refuses a prefix of another model.

    Attributes
    ----------
    length : int
        Finished tokens of each sequence.
    version : int
        Increased by every append, the same for no two different contents of a cache and its forks; the
        version of the contexts.
    prompt_tokens : int
        Tokens that count as prompt: a page is of segment ``PROMPT`` if its first token is one.
    tokens : tuple of tuple of int
        The finished tokens themselves, of each sequence.
    bounds_key_bytes : tuple of int
        Per layer, the key bytes of a sequence read so far to build page metadata: each key once, and the
        keys of a partly filled page again whenever it grows. Forks inherit what was read before the fork.

    Notes
    -----
    Page metadata belongs to a cache, not to the shared buffers, because two forks may fill the same
    page with different tokens.
    """

    def __init__(
        self,
        config: TinyConfig,
        backend: Backend,
        *,
        page_size: int = DEFAULT_PAGE_SIZE,
        block_length: int | None = None,
        capacity: int = 0,
        owner: object = None,
    ) -> None:
        check_count("page_size", page_size, 1)
        check_count("capacity", capacity, 0)
        self.config = config
        self.backend = backend
        self.owner = owner
        self.page_size = page_size
        self.block_length = config.block_length if block_length is None else block_length
        self.length = 0
        self.version = 0
        self._versions = itertools.count(1)  # one counter for a cache and all its forks
        self.prompt_tokens = 0
        self.tokens: tuple[tuple[int, ...], ...] = ((),)
        self.bounds_key_bytes = (0,) * config.layers
        self._buffers = _Buffers(config, backend, 1, self._rounded(max(capacity, 1)))
        self._claim = object()  # stands for this cache where it claims room
        self._bounds: list[PageBounds | None] = [None] * config.layers
        self._contexts: tuple[Context, ...] | None = None
        self._rebuild_bounds(0)

    def __repr__(self) -> str:
        several = f"{self.batch} sequences of " if self.batch > 1 else ""
        return (
            f"PrefixCache({several}{self.length} tokens, {self.prompt_tokens} of them prompt, "
            f"page_size={self.page_size}, block_length={self.block_length}, version={self.version})"
        )

    @classmethod
    def together(cls, caches: Sequence[PrefixCache]) -> PrefixCache:
        """Return one cache with the sequences of several, which are copied.

        Parameters
        ----------
        caches : sequence of PrefixCache
            At least one; alike in everything but their tokens.

        Raises
        ------
        InvalidArgumentError
            If there is none, or if two differ in length or layout.
        """
        if not caches:
            raise InvalidArgumentError("caches", "must hold at least one PrefixCache", "none")
        names = ("owner", "length", "prompt_tokens", "page_size", "block_length")
        for name in names:
            values = {getattr(cache, name) for cache in caches}
            if len(values) > 1:
                raise InvalidArgumentError(
                    "caches", f"must have the same {name}", ", ".join(map(repr, values)),
                    "Use prompts of equal length, and one model.",
                )
        joint = caches[0].fork()
        joint.tokens = tuple(tokens for cache in caches for tokens in cache.tokens)
        joint._versions = itertools.count(1)
        joint.version = next(joint._versions)
        joint._copy(joint.capacity, [cache._buffers for cache in caches])
        for layer in range(joint.config.layers):
            bounds = [cache._bounds[layer] for cache in caches]
            xp = namespace(joint._buffers.keys[layer])
            joint._bounds[layer] = PageBounds(
                xp.concat([each.lower for each in bounds if each is not None], axis=0),
                xp.concat([each.upper for each in bounds if each is not None], axis=0),
            )
        return joint

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.tokens)

    @property
    def pages(self) -> int:
        """Pages of a sequence that hold a token."""
        return -(-self.length // self.page_size)

    @property
    def capacity(self) -> int:
        """Tokens of a sequence that the buffers hold."""
        return self._buffers.capacity

    def fork(self, *, page_size: int | None = None) -> PrefixCache:
        """Return a cache of the same tokens that can be appended to independently.

        Nothing is copied now. The first fork to append writes into the shared room; others copy first.

        Parameters
        ----------
        page_size : int, optional
            Tokens a page of the fork; default: the same. Another one rebuilds the metadata.
        """
        fork = PrefixCache.__new__(PrefixCache)
        fork.__dict__.update(self.__dict__)
        fork._bounds = list(self._bounds)
        fork._claim = object()
        if page_size is not None and page_size != self.page_size:
            check_count("page_size", page_size, 1)
            fork.page_size = page_size
            fork.version = next(self._versions)
            fork._contexts = None
            fork._bounds = [None] * self.config.layers
            fork.bounds_key_bytes = (0,) * self.config.layers
            fork._make_room(0)
            fork._rebuild_bounds(0)
        return fork

    @contextlib.contextmanager
    def forked(self, *, page_size: int | None = None) -> Iterator[PrefixCache]:
        """Lend a `fork` for the time of a decoding; the next one need not copy then.

        What the fork appends may be overwritten as soon as the context ends.

        Parameters
        ----------
        page_size : int, optional
            As for `fork`.
        """
        fork, buffers, length = self.fork(page_size=page_size), self._buffers, self.length
        try:
            yield fork
        finally:
            if buffers.claimant is fork._claim:
                buffers.filled = length

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more tokens of each sequence and claim it for this cache."""
        check_count("tokens", tokens, 0)
        if self._buffers.filled != self.length:
            self._copy(self.length + tokens + GROWTH_TOKENS)  # another fork wrote behind our tokens
        self._make_room(tokens)
        self._buffers.filled, self._buffers.claimant = self.length + tokens, self._claim

    def write(self, layer: int, start: int, keys: Array, values: Array) -> None:
        """Store KV of unfinished tokens in room that `reserve` claimed; `advance` makes them count.

        Parameters
        ----------
        layer : int
            Layer, counted from 0.
        start : int
            Position of the first token, at least `length`.
        keys, values : array
            float32 ``(batch, kv_heads, tokens, head_dim)``.
        """
        shape = (self.batch, self.config.kv_heads, "tokens", self.config.head_dim)
        check_array("keys", keys, shape, ("float32",))
        check_array("values", values, tuple(int(size) for size in keys.shape), ("float32",))
        end = start + int(keys.shape[2])
        if not self.length <= start <= end <= self._buffers.filled:
            raise InvalidArgumentError(
                "start", f"must lie with its tokens in {self.length}..{self._buffers.filled}",
                f"{start}..{end}", "Call reserve() first.",
            )
        xp = namespace(keys)
        self._buffers.keys[layer][:, :, start:end, :] = xp.permute_dims(keys, (1, 0, 2, 3))
        self._buffers.values[layer][:, :, start:end, :] = xp.permute_dims(values, (1, 0, 2, 3))

    def read(self, layer: int, end: int) -> tuple[Array, Array]:
        """Return views of the keys and values of tokens 0..end of a layer, written ones included.

        They have the shape ``(batch, kv_heads, end, head_dim)``.
        """
        keys, values = self._buffers.keys[layer], self._buffers.values[layer]
        xp = namespace(keys)
        return (
            xp.permute_dims(keys[:, :, :end, :], (1, 0, 2, 3)),
            xp.permute_dims(values[:, :, :end, :], (1, 0, 2, 3)),
        )

    def advance(self, tokens: Sequence[Sequence[int]], *, prompt_tokens: int | None = None) -> None:
        """Count tokens as finished whose KV has been written for every layer.

        Parameters
        ----------
        tokens : sequence of sequence of int
            Those of each sequence, equally many.
        prompt_tokens : int, optional
            New value of `prompt_tokens`; default: unchanged.
        """
        first_page = self.length // self.page_size  # a partly filled last page has to be rebuilt
        self.tokens = tuple(
            (*before, *map(int, after)) for before, after in zip(self.tokens, tokens, strict=True)
        )
        self.length = len(self.tokens[0])
        if prompt_tokens is not None:
            self.prompt_tokens = prompt_tokens
        self.version = next(self._versions)
        self._contexts = None
        self._make_room(0)
        self._rebuild_bounds(first_page)

    def append(
        self, keys: Sequence[Array], values: Sequence[Array], tokens: Sequence[Sequence[int]]
    ) -> None:
        """Append finished tokens: `reserve`, `write` for every layer, `advance`.

        Parameters
        ----------
        keys, values : sequence of array
            One array ``(batch, kv_heads, tokens, head_dim)`` a layer.
        tokens : sequence of sequence of int
            Those of each sequence, equally many.

        Raises
        ------
        InvalidArgumentError
            If layers are missing or a shape does not fit; the cache is unchanged then.
        """
        lengths = {len(row) for row in tokens}
        if len(tokens) != self.batch or len(lengths) != 1:
            raise InvalidArgumentError(
                "tokens", f"must hold equally many tokens for each of {self.batch} sequences",
                f"{[len(row) for row in tokens]} tokens",
            )
        count = lengths.pop()
        for name, arrays in (("keys", keys), ("values", values)):
            if len(arrays) != self.config.layers:
                raise InvalidArgumentError(
                    name, f"must hold one array for each of {self.config.layers} layers", len(arrays)
                )
            for array in arrays:
                shape = (self.batch, self.config.kv_heads, count, self.config.head_dim)
                check_array(name, array, shape, ("float32",))
        self.reserve(count)
        for layer in range(self.config.layers):
            self.write(layer, self.length, keys[layer], values[layer])
        self.advance(tokens)

    def context(self, layer: int) -> Context:
        """Return the finished tokens of one layer as a `Context` that shares the cache's memory.

        Page metadata is attached. An empty cache gives one absent page.
        """
        return self.contexts()[layer]

    def contexts(self) -> tuple[Context, ...]:
        """Return `context` of every layer; they share page table, lengths and segments."""
        if self._contexts is None:
            table, lengths, segments = self._page_arrays()
            self._contexts = tuple(
                Context(
                    *self._pool(layer), table, lengths, segments, self._bounds[layer], self.version
                )
                for layer in range(self.config.layers)
            )
        return self._contexts

    def _page_arrays(self) -> tuple[Array, Array, Array]:
        """Return page table, page lengths and page segments of all sequences."""
        pages = np.arange(max(self.pages, 1))
        lengths = np.clip(self.length - pages * self.page_size, 0, self.page_size)
        segments = np.where(pages * self.page_size < self.prompt_tokens, PROMPT, GENERATED)
        first = np.arange(self.batch)[:, None] * (self.capacity // self.page_size)
        arrays = ((first + pages, "int32"), (lengths, "int32"), (segments, "int8"))
        shape = (self.batch, len(pages))
        table, lengths, segments = (
            self.backend.asarray(np.broadcast_to(values, shape).astype(dtype), dtype=dtype)
            for values, dtype in arrays
        )
        return table, lengths, segments

    def _pool(self, layer: int) -> tuple[Array, Array]:
        """View the room for all sequences as ``(pages, kv_heads, page_size, head_dim)``."""
        views = []
        for buffers in (self._buffers.keys, self._buffers.values):
            xp = namespace(buffers[layer])
            shape = (self.config.kv_heads, -1, self.page_size, self.config.head_dim)
            views.append(xp.permute_dims(xp.reshape(buffers[layer], shape), (1, 0, 2, 3)))
        return views[0], views[1]

    def _rebuild_bounds(self, first_page: int) -> None:
        """Build metadata from page ``first_page`` on and keep the pages before it."""
        last_page = max(self.pages, 1)
        first_page = min(first_page, last_page - 1)
        table, lengths, _ = self._page_arrays()
        for layer in range(self.config.layers):
            context, kept = Context(*self._pool(layer), table, lengths), self._bounds[layer]
            self._bounds[layer] = (
                self.backend.page_bounds(context) if kept is None
                else self.backend.extend_bounds(context, kept, first_page)
            )
        key_bytes = 4 * self.config.kv_heads * self.config.head_dim
        read = (self.length - min(first_page * self.page_size, self.length)) * key_bytes
        self.bounds_key_bytes = tuple(bytes_ + read for bytes_ in self.bounds_key_bytes)

    def _rounded(self, tokens: int) -> int:
        return -(-tokens // self.page_size) * self.page_size

    def _make_room(self, tokens: int) -> None:
        """Grow so that whole pages hold the finished tokens and ``tokens`` more."""
        needed = self._rounded(max(self.length + tokens, 1))
        if needed > self.capacity or self.capacity % self.page_size:
            self._copy(needed + GROWTH_TOKENS)

    def _copy(self, capacity: int, sources: Sequence[_Buffers] | None = None) -> None:
        """Move to buffers of our own, which take the sequences of ``sources`` one after the other."""
        sources = sources or [self._buffers]
        self._buffers = _Buffers(self.config, self.backend, self.batch, self._rounded(capacity))
        self._buffers.filled = self.length
        for layer in range(self.config.layers):
            for name in ("keys", "values"):
                new, first = getattr(self._buffers, name)[layer], 0
                for source in sources:
                    old = getattr(source, name)[layer][:, :, : self.length, :]
                    new[:, first : first + int(old.shape[1]), : self.length, :] = old
                    first += int(old.shape[1])
        self._contexts = None
