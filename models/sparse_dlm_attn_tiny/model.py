"""The small model's forward pass, written once on the array API; a client of `PrefixAttention`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparse_dlm_attn import (
    Backend,
    Context,
    InvalidArgumentError,
    LayerMemory,
    PassInfo,
    PrefixAttention,
    get_backend,
)
from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn.values import short_repr
from sparse_dlm_attn_tiny.cache import DEFAULT_PAGE_SIZE, PrefixCache
from sparse_dlm_attn_tiny.config import TinyConfig
from sparse_dlm_attn_tiny.layers import (
    Layer,
    block_causal_attention,
    block_causal_mask,
    rms_norm,
    rope_tables,
)
from sparse_dlm_attn_tiny.sequence import SequenceCache, scattered
from sparse_dlm_attn_tiny.weights import Weights, load_weights

__all__ = ["BLOCK_LENGTHS", "BlockPass", "TinyModel", "as_tokens", "check_block_length"]

HostArray = np.ndarray[Any, Any]

BLOCK_LENGTHS = (8, 16, 32)
"""Block lengths that training has shown."""

SPARE_TOKENS = 256  # room behind a prompt, for an answer
ROWS_AT_ONCE = 512  # of the prompt: bounds the memory of activations and score matrix


@dataclass(frozen=True, eq=False)
class BlockPass:
    """Result of one forward pass over a block.

    Parameters
    ----------
    logits : array
        float32 ``(batch, tokens, 256)``.
    keys, values : tuple of array
        The block's own KV, ``(batch, kv_heads, tokens, head_dim)`` a layer; to be appended by a save pass.
    memories : tuple of LayerMemory
        One a layer, for the next pass.
    """

    logits: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    memories: tuple[LayerMemory, ...]

    __repr__ = short_repr


class TinyModel:
    """A byte-level block-diffusion transformer.

    Parameters
    ----------
    config : TinyConfig
        The architecture.
    weights : dict of str to numpy.ndarray
        As `sparse_dlm_attn_tiny.weights.load_weights` returns them.
    backend : str or Backend
        Whose arrays the forward pass computes with and whose operators do the attention.
    """

    def __init__(
        self, config: TinyConfig, weights: Weights, backend: str | Backend = "reference"
    ) -> None:
        self.config = config
        self.backend = get_backend(backend)
        self._embedding = self.backend.asarray(weights["embedding"], dtype="float32")
        self._final_norm = self.backend.asarray(weights["final_norm"], dtype="float32")
        self._head = self.backend.asarray(weights["head"], dtype="float32")
        self._layers = [
            Layer.of(config, weights, index, self.backend) for index in range(config.layers)
        ]

    @classmethod
    def load(cls, backend: str | Backend = "reference", path: str | Path | None = None) -> TinyModel:
        """Read the weights that ship with the package, or those of a file.

        Parameters
        ----------
        backend : str or Backend
            A registered name, ``"module:attr"`` or an instance.
        path : str or Path, optional
            A safetensors file; default: the shipped weights.

        Raises
        ------
        DataFileError
            If the weights cannot be read.
        UnknownNameError, UnavailableError
            If the backend cannot be had.
        """
        chosen = get_backend(backend)
        return cls(*load_weights(path), chosen)

    def __repr__(self) -> str:
        return f"TinyModel({self.config.layers} layers, backend={self.backend.name!r})"

    def empty_cache(
        self, *, block_length: int | None = None, page_size: int = DEFAULT_PAGE_SIZE, capacity: int = 0
    ) -> PrefixCache:
        """Return a `PrefixCache` without tokens for this model."""
        length = check_block_length(self.config.block_length if block_length is None else block_length)
        return PrefixCache(
            self.config, self.backend, page_size=page_size, block_length=length, capacity=capacity,
            owner=self,
        )

    def prefill(
        self,
        prompt: bytes | Sequence[int],
        *,
        block_length: int | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
    ) -> PrefixCache:
        """Compute the KV of the prompt's whole blocks, densely and block-causally.

        Parameters
        ----------
        prompt : bytes
            Only its first ``floor(len(prompt) / block_length) * block_length`` bytes are cached; the
            others belong to the first block that is decoded.
        block_length : int, optional
            Tokens a block: 8, 16 or 32; default: the model's.
        page_size : int
            Tokens a page of the cache.

        Returns
        -------
        PrefixCache
            The KV, with page metadata. Share it between decodings by passing it to each of them.

        Raises
        ------
        InvalidArgumentError
            If the prompt is empty or longer than the model's context, holds something else than
            bytes, or if a length is not supported.
        """
        tokens = as_tokens("prompt", prompt)
        self.check_prompt(tokens)
        cache = self.empty_cache(
            block_length=block_length, page_size=page_size, capacity=len(tokens) + SPARE_TOKENS
        )
        cached = tokens[: len(tokens) // cache.block_length * cache.block_length]
        cache.reserve(len(cached))
        if cached:
            self._fill(cache, cached)
        cache.advance([cached], prompt_tokens=len(tokens))
        return cache

    def check_prompt(self, tokens: Sequence[int]) -> None:
        """Raise `InvalidArgumentError` unless a prompt has a length that the model can read."""
        if not tokens:
            raise InvalidArgumentError("prompt", "must hold at least one byte", "an empty prompt")
        if len(tokens) > self.config.max_context:
            raise InvalidArgumentError(
                "prompt", f"must hold at most {self.config.max_context} bytes, the longest the model knows",
                f"{len(tokens)} bytes", "Shorten the text.",
            )

    def forward_block(
        self,
        tokens: Sequence[Sequence[int]] | HostArray,
        position: int,
        contexts: Sequence[Context],
        attention: PrefixAttention,
        info: PassInfo,
        memories: Sequence[LayerMemory | None] | None = None,
        *,
        computed: HostArray | None = None,
        previous: BlockPass | None = None,
    ) -> BlockPass:
        """Run one pass over a block of each sequence.

        Parameters
        ----------
        tokens : array_like
            int ``(batch, tokens)``, each sequence's block: bytes, or
            `sparse_dlm_attn_tiny.config.MASK_ID` where not decoded yet.
        position : int
            Position of the first token, the same in all sequences.
        contexts : sequence of Context
            One a layer, from `PrefixCache.contexts`.
        attention : PrefixAttention
            Policy and backend.
        info : PassInfo
            Place in the denoising; its layer numbers are filled in here.
        memories : sequence of LayerMemory, optional
            Those of the previous pass.
        computed : numpy.ndarray, optional
            int64: rows to compute, in every sequence; default all. The others keep the keys and
            values of ``previous``, and their logits are 0.
        previous : BlockPass, optional
            The previous pass over this block; needed if not all rows are computed.
        """
        block = np.asarray(tokens, dtype=np.int64)
        batch, count = block.shape
        rows = np.arange(count) if computed is None else computed
        cosine, sine = self._angles(position, count, rows)
        x = self._embed(block[:, rows].reshape(-1))
        keys, values, kept = [], [], []
        for index, layer in enumerate(self._layers):
            q, k, v = layer.project(x, cosine, sine)
            if len(rows) < count:
                assert previous is not None
                q = scattered(q, rows, count, 2)
                k = _with_rows(previous.keys[index], rows, k)
                v = _with_rows(previous.values[index], rows, v)
            of_layer = replace(info, layer=index, num_layers=self.config.layers)
            memory = None if memories is None else memories[index]
            attended, memory = attention(q, k, v, contexts[index], memory, of_layer)
            x = layer.finish(x, attended if len(rows) == count else attended[:, :, rows, :])
            keys.append(k)
            values.append(v)
            kept.append(memory)
        logits = namespace(x).reshape(self._logits(x), (batch, len(rows), -1))
        return BlockPass(scattered(logits, rows, count, 1), tuple(keys), tuple(values), tuple(kept))

    def forward_sequence(
        self,
        tokens: Sequence[int],
        rows: HostArray,
        cache: SequenceCache,
        window_end: int,
        attention: PrefixAttention,
        info: PassInfo,
        memories: Sequence[LayerMemory | None] | None = None,
    ) -> tuple[Array, tuple[LayerMemory, ...]]:
        """Run one pass over a whole sequence that sees itself in both directions.

        Parameters
        ----------
        tokens : sequence of int
            The sequence: bytes, or the mask where not decoded yet.
        rows : numpy.ndarray
            int64 ``(computed,)``: rows to compute, ascending. Only their keys and values are written.
        cache : SequenceCache
            Keys and values of all rows.
        window_end : int
            Position behind the window that is being filled in.
        attention : PrefixAttention
            Policy and backend.
        info : PassInfo
            Place in the denoising; its layer numbers are filled in here.
        memories : sequence of LayerMemory, optional
            Those of the previous pass.

        Returns
        -------
        logits : array
            float32 ``(len(tokens), 256)``, 0 for rows that are not computed.
        memories : tuple of LayerMemory
            One a layer, for the next pass.
        """
        count = len(tokens)
        cosine, sine = self._angles(0, count, rows)
        contexts = cache.contexts(window_end)
        x = self._embed([tokens[row] for row in rows.tolist()])
        kept = []
        for index, layer in enumerate(self._layers):
            q, k, v = layer.project(x, cosine, sine)
            cache.write(index, rows, k, v)
            of_layer = replace(info, layer=index, num_layers=self.config.layers)
            memory = None if memories is None else memories[index]
            q = scattered(q, rows, count, 2)
            attended, memory = attention(q, None, None, contexts[index], memory, of_layer)
            x = layer.finish(x, attended if len(rows) == count else attended[:, :, rows, :])
            kept.append(memory)
        return scattered(self._logits(x), rows, count, 0), tuple(kept)

    def _angles(self, position: int, count: int, rows: HostArray) -> tuple[Array, Array]:
        """Return the rotary tables of some rows of a block that begins at ``position``."""
        cosine, sine = rope_tables(self.config, position, count, self.backend)
        return (cosine, sine) if len(rows) == count else (cosine[rows, :], sine[rows, :])

    def _fill(self, cache: PrefixCache, tokens: Sequence[int]) -> None:
        """Write the KV of all tokens, layer by layer and some rows at a time."""
        block = cache.block_length
        rows = min(max(ROWS_AT_ONCE // block, 1) * block, len(tokens))
        mask = block_causal_mask(rows, len(tokens), block, self.backend)
        xp = namespace(self._embedding)
        x = self._embed(tokens)
        cosine, sine = rope_tables(self.config, 0, len(tokens), self.backend)
        for index, layer in enumerate(self._layers):
            finished = []
            for start in range(0, len(tokens), rows):
                end = min(start + rows, len(tokens))
                q, k, v = layer.project(x[start:end, :], cosine[start:end, :], sine[start:end, :])
                cache.write(index, start, k, v)
                if index + 1 == self.config.layers:
                    continue  # the last layer's output would only serve logits that nobody reads
                seen = mask[rows - (end - start) :, len(tokens) - end :]
                attended = block_causal_attention(q, *cache.read(index, end), seen)
                finished.append(layer.finish(x[start:end, :], attended))
            x = xp.concat(finished, axis=0) if finished else x

    def _embed(self, tokens: Sequence[int] | HostArray) -> Array:
        xp = namespace(self._embedding)
        indices = self.backend.asarray(np.asarray(tokens, dtype=np.int64), dtype="int64")
        return xp.take(self._embedding, indices, axis=0)

    def _logits(self, x: Array) -> Array:
        normed = rms_norm(x, self._final_norm, self.config.norm_eps)
        return normed @ namespace(x).matrix_transpose(self._head)


def _with_rows(values: Array, rows: HostArray, fresh: Array) -> Array:
    """Return a copy of ``(batch, heads, tokens, head_dim)`` with some rows replaced."""
    result = namespace(values).asarray(values, copy=True)
    result[:, :, rows, :] = fresh
    return result


def as_tokens(name: str, text: object) -> tuple[int, ...]:
    """Return bytes as tokens.

    Raises
    ------
    InvalidArgumentError
        If ``text`` is not bytes nor a sequence of ints in 0..255.
    """
    if isinstance(text, bytes | bytearray | memoryview):
        return tuple(bytes(text))
    rule = "must be bytes, or ints in 0..255"
    if isinstance(text, str):
        raise InvalidArgumentError(name, rule, "a str", "Encode it: text.encode().")
    try:
        values = list(text)  # type: ignore[call-overload]
    except TypeError:
        raise InvalidArgumentError(name, rule, type(text).__name__) from None
    for value in values:
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not 0 <= value <= 255:
            raise InvalidArgumentError(name, rule, repr(value))
    return tuple(int(value) for value in values)


def check_block_length(block_length: int) -> int:
    """Return ``block_length`` if the model was trained with it, else raise `InvalidArgumentError`."""
    check_count("block_length", block_length, 1)
    if block_length not in BLOCK_LENGTHS:
        raise InvalidArgumentError(
            "block_length", f"must be one of {', '.join(map(str, BLOCK_LENGTHS))}: "
            "the model was trained with these", block_length,
        )
    return block_length
