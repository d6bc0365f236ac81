"""What a block of a model leaves behind: its state while it lasts, and a report of each pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparse_dlm_attn import Context, InvalidArgumentError, StaleMemoryError
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn.decoder import DecoderPass
from sparse_dlm_attn.runs import largest_page_size
from sparse_dlm_attn.traffic import Traffic
from sparse_dlm_attn_transformers.buffers import Tables, fitting_page_size
from sparse_dlm_attn_transformers.caches import CachedLayer, cached_layer
from sparse_dlm_attn_transformers.masks import visible_context, visible_tokens

__all__ = ["BlockState", "LayerState", "PassReport", "in_one_dtype", "pages_of", "whole_block"]

HostArray = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class PassReport:
    """What a pass read.

    Parameters
    ----------
    block, index : int
        Block since attaching and pass within it, from 0.
    is_save : bool
        Whether the pass wrote the block's keys and values.
    traffic : tuple of Traffic
        One a layer; for each sequence, where whole sequences of different lengths run one by one.
    """

    block: int
    index: int
    is_save: bool
    traffic: tuple[Traffic, ...]

    @property
    def density(self) -> float:
        """Share of context tokens loaded, the mean over layers and sequences. Waits for a device."""
        return float(np.mean([to_numpy(traffic.density).mean() for traffic in self.traffic]))

    @property
    def bytes_read(self) -> float:
        """Bytes of pages and metadata, over layers and sequences. Waits for a device."""
        return float(sum(to_numpy(traffic.bytes_read).sum() for traffic in self.traffic))

    @property
    def dense_bytes(self) -> float:
        """What the dense policy would have read. Waits for a device."""
        return float(sum(to_numpy(traffic.dense_bytes).sum() for traffic in self.traffic))


@dataclass(eq=False)
class LayerState:
    """What a layer reads while a block lasts.

    ``cached`` are the cache's own tensors, ``context`` the pages that view them, ``mask`` and ``valid`` what was
    hidden in the first pass, ``queries`` those of all rows, where a pass computes some of them.
    """

    cached: CachedLayer
    context: Context
    mask: Any
    valid: HostArray
    queries: torch.Tensor | None = None


@dataclass(eq=False)
class BlockState:
    """All that belongs to a block, beside the memories: dropped when it ends.

    ``announced`` is a pass that `SparseAttention.next_pass` has begun and whose forward pass is still to
    come, ``running`` the one whose layers run now, ``reportable`` one that is over and not reported yet. Each
    has one entry for all sequences, or one for each where they are whole and of different lengths.
    ``cache`` is set where the model's own loop began the block, which ends with its save pass.
    ``exists`` tells which tokens of whole sequences exist, ``held`` how many tokens caches hold that count them on
    a device. ``mask`` is what the running pass was called with, ``masks`` what has been read of it and of others in
    this pass, ``tables`` those of caches that stay.
    """

    total_passes: int | None = None
    cache: Any = None
    announced: tuple[DecoderPass, ...] = ()
    running: tuple[DecoderPass, ...] = ()
    reportable: tuple[DecoderPass, ...] = ()
    decoded: torch.Tensor | None = None
    exists: HostArray | None = None
    held: int | None = None
    mask: Any = None
    layers: dict[int, LayerState] = field(default_factory=dict)
    masks: dict[tuple[int, int], tuple[Any, HostArray]] = field(default_factory=dict)
    tables: Tables = field(default_factory=Tables)

    def begin_pass(self, mask: Any) -> None:
        """Let the announced pass run, with the mask that the model is called with."""
        self.running, self.announced, self.mask = self.announced, (), mask
        self.masks = {key: read for key, read in self.masks.items() if read[0] is mask}

    def end_pass(self) -> tuple[DecoderPass, ...]:
        """Return the pass that ran."""
        steps, self.running, self.mask = self.running, (), None
        return steps

    def layer(
        self, number: int, cached: CachedLayer, made: Any, batch: int, tokens: int, page_size: int, version: int
    ) -> LayerState:
        """Return what a layer reads: viewed in the block's first pass, the same after it.

        ``made`` is the mask that the model made for its modules, None for the one that it was called with.
        """
        mask, of_module = (self.mask, False) if made is None else (made, True)
        layer = self.layers.get(number)
        if layer is None:
            if cached.keys.shape[0] != batch:
                raise InvalidArgumentError(
                    "cache",
                    f"must hold as many sequences as the block, {batch}",
                    int(cached.keys.shape[0]),
                    "Prefill it with the same batch, or call its batch_repeat_interleave().",
                )
            valid = self._visible(mask, batch, self._held(cached), tokens, int(cached.keys.shape[2]), of_module)
            context = self._context(cached, valid, page_size, version)
            self.layers[number] = layer = LayerState(cached, context, mask, valid)
        elif layer.cached.moved_to(cached):
            raise StaleMemoryError(
                f"the cache of layer {number} changed in the middle of a block: {layer.cached!r} became {cached!r} or "
                "moved. Call finish_block() before anything is appended."
            )
        elif mask is not layer.mask:
            self.check_same_mask(layer, mask, batch, tokens, of_module)
        return layer

    def check_room(self, tokens: int) -> None:
        """Raise unless all layers have room for more tokens, which a graph would write without asking."""
        for layer in self.layers.values():
            needed, room = self._held(layer.cached) + tokens, int(layer.cached.keys.shape[2])
            if needed > room:
                raise InvalidArgumentError(
                    "cache", f"must have room for {needed} tokens", f"{room}", "Make it for more tokens."
                )

    def _held(self, cached: CachedLayer) -> int:
        """Return how many tokens a layer holds; a number on a device is read once for all layers of a block."""
        if isinstance(cached.held, int):
            return cached.held
        if self.held is None:
            self.held = int(cached.held)
        return min(self.held, int(cached.keys.shape[2]))

    def _context(self, cached: CachedLayer, valid: HostArray, page_size: int, version: int) -> Context:
        k, v = in_one_dtype(cached.keys, cached.values)
        if cached.stays and k is cached.keys:
            return self.tables.context(cached, valid, fitting_page_size(cached, valid, page_size), version)
        k, v = k[:, :, : valid.shape[1]], v[:, :, : valid.shape[1]]
        if k.stride() != v.stride():  # old versions of transformers store the first ones as they come
            k, v = k.contiguous(), v.contiguous()
        return Context.from_dense(k, v, largest_page_size(valid, page_size), valid=valid, version=version)

    def existing_tokens(self, q: torch.Tensor) -> HostArray:
        """Return which tokens of whole sequences exist, bool ``(batch, tokens)``."""
        batch, tokens = int(q.shape[0]), int(q.shape[2])
        key = (id(self.mask), tokens)
        if key not in self.masks:
            self.masks[key] = (self.mask, visible_tokens(self.mask, batch, tokens))
        exists = self.masks[key][1]
        if self.exists is not None and not np.array_equal(self.exists, exists):
            raise _changed_mask("sequence")
        if not exists.any(axis=1).all():
            raise InvalidArgumentError(
                "attention_mask",
                "must leave every sequence a token",
                f"nothing in sequence {int(np.argmin(exists.any(axis=1)))}",
                "Leave that sequence out.",
            )
        self.exists = exists
        return exists

    def check_same_mask(self, layer: LayerState, mask: Any, batch: int, tokens: int, of_module: bool = False) -> None:
        """Raise if another mask than the first pass's hides other tokens, where that can be seen at no wait.

        A mask on a device is read only where the first pass had none.
        """
        on_device = isinstance(mask, torch.Tensor) and mask.device.type != "cpu"
        if on_device and layer.mask is not None:
            return
        room = int(layer.cached.keys.shape[2])
        if not np.array_equal(self._visible(mask, batch, layer.valid.shape[1], tokens, room, of_module), layer.valid):
            raise _changed_mask("cache")

    def _visible(
        self, mask: Any, batch: int, context_tokens: int, tokens: int, room: int, of_module: bool
    ) -> HostArray:
        """Read a mask, once for all the layers that share it."""
        key = (id(mask), context_tokens)
        if key not in self.masks:
            valid = visible_context(mask, batch, context_tokens, tokens, room=room, of_module=of_module)
            self.masks[key] = (mask, valid)  # the mask too, lest another one get its id
        return self.masks[key][1]


def _changed_mask(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "attention_mask",
        f"must hide the same tokens of the {what} in every pass of a block",
        "other tokens than in its first pass",
        "Pass one mask to all of them, or call finish_block() first.",
    )


def autocasts(tensor: torch.Tensor) -> bool:
    """Return whether autocast is on for what is computed with a tensor."""
    return torch.is_autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64


def in_one_dtype(*heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast as autocast casts what PyTorch's own attention gets: norms and rotations leave dtypes mixed."""
    if not autocasts(heads[0]):
        return heads
    dtype = torch.get_autocast_dtype(heads[0].device.type)
    return tuple(x.to(dtype) for x in heads)


def pages_of(k: torch.Tensor, v: torch.Tensor, page_size: int, version: int) -> Context:
    """View the keys and values of whole sequences as pages."""
    valid = np.ones((k.shape[0], k.shape[2]), dtype=bool)
    size = largest_page_size(valid, page_size)
    return Context.from_dense(k.contiguous(), v.contiguous(), size, valid=valid, version=version)


def whole_block(
    layer: LayerState, block_cache: Any, layer_idx: int, rows: slice, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values of all rows of a block, of which a pass computed some.

    The others keep what they had in the pass that computed them.
    """
    held = cached_layer(block_cache, layer_idx)
    if held is None:
        block_cache.update(k, v, layer_idx)
        layer.queries = q
        return q, k, v
    if layer.queries is None or layer.queries.shape[2] != held.keys.shape[2]:
        raise StaleMemoryError(
            f"the block cache holds {held.keys.shape[2]} rows that were not computed in this block of "
            "SparseAttention. Start its first pass with an empty block cache."
        )
    for whole, part in ((held.keys, k), (held.values, v)):
        whole[:, :, rows] = part
    layer.queries = layer.queries.clone()
    layer.queries[:, :, rows] = q
    k, v = in_one_dtype(held.keys, held.values)
    return layer.queries, k, v
