"""The small model's forward pass, written once on the array API; a client of `PrefixAttention`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparse_dlm_attn import Backend, InvalidArgumentError, PassInfo, PrefixAttention, get_backend
from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn_small_model.cache import DEFAULT_PAGE_SIZE, KVCache
from sparse_dlm_attn_small_model.config import TinyConfig
from sparse_dlm_attn_small_model.layers import Layer, block_causal_attention, block_causal_mask, rms_norm, rope_tables
from sparse_dlm_attn_small_model.weights import Weights, load_weights

HostArray = np.ndarray[Any, Any]

BLOCK_LENGTHS = (8, 16, 32)
"""Block lengths that training has shown."""

BYTES = "must be bytes, or ints in 0..255"
SPARE_TOKENS = 256  # room behind a prompt, for an answer
ROWS_AT_ONCE = 512  # of the prompt: bounds the memory of activations and score matrix


class TinyModel:
    """A byte-level block-diffusion transformer.

    Parameters
    ----------
    config : TinyConfig
        The architecture.
    weights : dict of str to numpy.ndarray
        As `sparse_dlm_attn_small_model.weights.load_weights` returns them.
    backend : str or Backend
        Whose arrays the forward pass computes with and whose operators do the attention.
    """

    def __init__(self, config: TinyConfig, weights: Weights, backend: str | Backend = "reference") -> None:
        self.config = config
        self.backend = get_backend(backend)
        names = ("embedding", "final_norm", "head")
        self._embedding, self._final_norm, self._head = (
            self.backend.asarray(weights[name], dtype="float32") for name in names
        )
        self._layers = [Layer.of(config, weights, index, self.backend) for index in range(config.layers)]

    @classmethod
    def load(cls, backend: str | Backend = "reference", path: str | Path | None = None) -> TinyModel:
        """Read the weights that ship with the package, or those of a safetensors file.

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
    ) -> KVCache:
        """Return the cache of a prefix without tokens."""
        length = check_block_length(self.config.block_length if block_length is None else block_length)
        return KVCache(
            self.config, self.backend, page_size=page_size, block_length=length, capacity=capacity, owner=self
        )

    def prefill(
        self, prompt: bytes | Sequence[int], *, block_length: int | None = None, page_size: int = DEFAULT_PAGE_SIZE
    ) -> KVCache:
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
        KVCache
            The KV, with page metadata. Share it between decodings by passing it to each of them.

        Raises
        ------
        InvalidArgumentError
            If the prompt is empty or longer than the model's context, holds something else than
            bytes, or if a length is not supported.
        """
        tokens = self.tokens_of(prompt)
        cache = self.empty_cache(block_length=block_length, page_size=page_size, capacity=len(tokens) + SPARE_TOKENS)
        cached = tokens[: len(tokens) // cache.block_length * cache.block_length]
        cache.reserve(len(cached))
        if cached:
            self._fill(cache, cached)
        cache.advance([cached], prompt_tokens=len(tokens))
        return cache

    def tokens_of(self, prompt: object, argument: str = "prompt") -> tuple[int, ...]:
        """Return a prompt as tokens; `InvalidArgumentError` unless the model can read it."""
        if isinstance(prompt, str):
            raise InvalidArgumentError(argument, BYTES, "a str", "Encode it: text.encode().")
        if not isinstance(prompt, Iterable):
            raise InvalidArgumentError(argument, BYTES, type(prompt).__name__)
        tokens = tuple(prompt)
        for value in tokens:
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= 255:
                raise InvalidArgumentError(argument, BYTES, repr(value))
        if not tokens:
            raise InvalidArgumentError(argument, "must hold at least one byte", "an empty prompt")
        if len(tokens) > self.config.max_context:
            raise InvalidArgumentError(
                argument,
                f"must hold at most {self.config.max_context} bytes, the longest the model knows",
                f"{len(tokens)} bytes",
                "Shorten the text.",
            )
        return tuple(map(int, tokens))

    def forward(
        self,
        tokens: Sequence[Sequence[int]] | HostArray,
        cache: KVCache,
        attention: PrefixAttention,
        info: PassInfo,
        memories: Sequence[LayerMemory | None] | None = None,
        *,
        rows: HostArray | None = None,
        window_end: int | None = None,
    ) -> tuple[Array, tuple[LayerMemory, ...]]:
        """Run one pass over the block behind a prefix, or over a whole sequence.

        Parameters
        ----------
        tokens : array_like
            int ``(batch, tokens)``: bytes, or `sparse_dlm_attn_small_model.config.MASK_ID` where not decoded yet.
        cache : KVCache
            The prefix, or the whole sequence. The keys and values of the computed rows are written to it;
            those of a block count as soon as `KVCache.advance` is called.
        attention : PrefixAttention
            Policy and backend.
        info : PassInfo
            Place in the denoising; its layer numbers are filled in here.
        memories : sequence of LayerMemory, optional
            Those of the previous pass.
        rows : numpy.ndarray, optional
            int64 ``(computed,)``: rows to compute in every sequence, ascending; default all. The others
            keep the keys and values that the previous passes over them have written.
        window_end : int, optional
            For a whole sequence: position behind the window that is being filled in.

        Returns
        -------
        logits : array
            float32 ``(batch, tokens, 256)``, 0 for rows that are not computed.
        memories : tuple of LayerMemory
            One a layer, for the next pass.
        """
        given = np.asarray(tokens, dtype=np.int64)
        batch, count = given.shape
        first = 0 if cache.whole else cache.length
        if not cache.whole:
            cache.reserve(count)
        places: slice | HostArray = slice(first, first + count)
        cosine, sine = rope_tables(self.config, first, count, self.backend)
        if rows is not None and len(rows) == count:
            rows = None
        if rows is not None:
            places, given, cosine, sine = first + rows, given[:, rows], cosine[rows, :], sine[rows, :]
        x = self._embed(given.reshape(-1))
        contexts = cache.contexts(window_end)
        kept = []
        for index, layer in enumerate(self._layers):
            q, k, v = layer.project(x, cosine, sine)
            cache.write(index, places, k, v)
            of_layer = replace(info, layer=index, num_layers=self.config.layers)
            memory = None if memories is None else memories[index]
            if rows is not None:
                q = _scattered(q, rows, count, 2)
                k, v = cache.read(index, first, first + count)
            block_k, block_v = (None, None) if cache.whole else (k, v)
            attended, memory = attention(q, block_k, block_v, contexts[index], memory, of_layer)
            x = layer.finish(x, attended if rows is None else attended[:, :, rows, :])
            kept.append(memory)
        logits = namespace(x).reshape(self._logits(x), (batch, given.shape[1], -1))
        return logits if rows is None else _scattered(logits, rows, count, 1), tuple(kept)

    def _fill(self, cache: KVCache, tokens: Sequence[int]) -> None:
        """Write the KV of all tokens, layer by layer and some rows at a time."""
        block = cache.block_length
        rows = min(max(ROWS_AT_ONCE // block, 1) * block, len(tokens))
        mask = block_causal_mask(rows, len(tokens), block, self.backend)
        x = self._embed(tokens)
        cosine, sine = rope_tables(self.config, 0, len(tokens), self.backend)
        for index, layer in enumerate(self._layers):
            finished = []
            for start in range(0, len(tokens), rows):
                end = min(start + rows, len(tokens))
                q, k, v = layer.project(x[start:end, :], cosine[start:end, :], sine[start:end, :])
                cache.write(index, slice(start, end), k, v)
                if index + 1 == self.config.layers:
                    continue  # the last layer's output would only serve logits that nobody reads
                seen = mask[rows - (end - start) :, len(tokens) - end :]
                attended = block_causal_attention(q, *cache.read(index, 0, end), seen)
                finished.append(layer.finish(x[start:end, :], attended))
            x = namespace(x).concat(finished, axis=0) if finished else x

    def _embed(self, tokens: Sequence[int] | HostArray) -> Array:
        """Return the embeddings of some tokens, ``(tokens, width)``."""
        indices = self.backend.asarray(np.asarray(tokens, dtype=np.int64), dtype="int64")
        return namespace(self._embedding).take(self._embedding, indices, axis=0)

    def _logits(self, x: Array) -> Array:
        """Return the logits of some rows of the residual stream."""
        normed = rms_norm(x, self._final_norm, self.config.norm_eps)
        return normed @ namespace(x).matrix_transpose(self._head)


def _scattered(values: Array, rows: HostArray, count: int, axis: int) -> Array:
    """Return zeros with ``count`` entries along ``axis``, ``values`` in those that ``rows`` names."""
    shape = [int(size) for size in values.shape]
    shape[axis] = count
    result = namespace(values).zeros(tuple(shape), dtype=values.dtype, device=values.device)
    places: list[Any] = [slice(None)] * len(shape)
    places[axis] = rows
    result[tuple(places)] = values
    return result


def check_block_length(block_length: int) -> int:
    """Return ``block_length`` if the model was trained with it, else raise `InvalidArgumentError`."""
    check_count("block_length", block_length, 1)
    if block_length not in BLOCK_LENGTHS:
        raise InvalidArgumentError(
            "block_length",
            f"must be one of {', '.join(map(str, BLOCK_LENGTHS))}: the model was trained with these",
            block_length,
        )
    return block_length
