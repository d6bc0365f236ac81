"""A cache of transformers that stays where it is in memory: pages, lengths, blocks saved in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils

from sparse_dlm_attn import InvalidArgumentError, UnavailableError
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn_cuda_graphs import is_capturing

__all__ = ["PagedCache", "PagedLayer"]

Layer: Any = getattr(cache_utils, "CacheLayerMixin", object)  # which came with transformers 4.54


class PagedCache(cache_utils.Cache):
    """Keys and values of one batch, allocated once for as many tokens as it may hold; a cache of transformers.

    Nothing is ever concatenated: prefill and the save pass of a block write behind what is there, so the copy of the
    whole prefix that a `DynamicCache` makes for each block is spared, and graphs can read it
    (``SparseAttention(..., cuda_graph=True)``).

    Parameters
    ----------
    config : PretrainedConfig
        Of the model.
    batch : int
        Sequences.
    tokens : int
        Most tokens of a sequence: prompt and all blocks.
    page_size : int
        Tokens a page, as `SparseAttention` is told.

    Raises
    ------
    InvalidArgumentError
        If a number is out of range, or, when tokens are added, there is no room for them.
    UnavailableError
        If transformers is older than 4.54.

    Examples
    --------
    >>> import torch
    >>> from transformers import Qwen3Config
    >>> from sparse_dlm_attn_transformers import PagedCache
    >>> config = Qwen3Config(num_hidden_layers=1, num_key_value_heads=2, head_dim=8)
    >>> cache = PagedCache(config, batch=1, tokens=100, page_size=16)
    >>> keys, _ = cache.update(torch.ones(1, 2, 40, 8), torch.ones(1, 2, 40, 8), 0)
    >>> cache.get_seq_length(), tuple(keys.shape), tuple(cache.layers[0].keys.shape)
    (40, (1, 2, 40, 8), (1, 2, 128, 8))
    """

    def __init__(self, config: Any, batch: int, tokens: int, page_size: int = 64) -> None:
        if Layer is object:
            raise UnavailableError(
                "PagedCache",
                ["caches of layers came with transformers 4.54"],
                "Upgrade it: pip install -U transformers; or use a DynamicCache.",
            )
        for name, value in (("batch", batch), ("tokens", tokens), ("page_size", page_size)):
            check_count(name, value, 1)
        config = config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise InvalidArgumentError(
                "config",
                "must be of a model whose layers all read everything",
                f"layers of {', '.join(sorted(kinds))}",
                "Use a StaticCache or a DynamicCache.",
            )
        room = (-(-tokens // page_size) + 1) * page_size  # one more: padding in front shifts pages
        super().__init__(layers=[PagedLayer(batch, room) for _ in range(config.num_hidden_layers)])

    def advance(self, tokens: int) -> None:
        """Count tokens that a replayed graph has written."""
        layers: Any = self.layers
        for layer in layers:
            layer.tokens += tokens


class PagedLayer(Layer):  # type: ignore[misc]
    """One layer: buffers ``(batch, kv_heads, room, head_dim)``, and how many tokens they hold.

    The number is kept on the host, and on the device for graphs, which must not hold it as a constant.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, batch: int, room: int) -> None:
        super().__init__()
        self.batch, self.room, self.tokens = batch, room, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocate the buffers, of the kind of the first tokens."""
        values = key_states if value_states is None else value_states
        if key_states.shape[0] != self.batch:
            raise InvalidArgumentError(
                "PagedCache",
                f"must get its {self.batch} sequences",
                f"{key_states.shape[0]} sequences",
                "Make one for your batch.",
            )
        self.keys, self.values = (
            part.new_empty(self.batch, part.shape[1], self.room, part.shape[3]) for part in (key_states, values)
        )
        self.on_device = torch.zeros((), dtype=torch.int64, device=key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write tokens behind those that are there; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        if self.tokens + new > self.room:
            raise InvalidArgumentError(
                "PagedCache",
                f"must have room for {self.tokens + new} tokens",
                f"{self.room}",
                "Make it with more tokens.",
            )
        places = torch.arange(new, device=self.on_device.device) + self.on_device
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        self.on_device += new
        self.tokens += 0 if is_capturing() else new
        return self.keys[:, :, : self.tokens], self.values[:, :, : self.tokens]

    def get_seq_length(self, *_: Any) -> Any:
        """Return the tokens held: on the device while a graph is recorded, which has to follow them."""
        return self.on_device if self.is_initialized and is_capturing() else self.tokens

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return keys and offset that masks of the model's own attention have."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.tokens + new, 0

    def get_max_length(self) -> int:
        """Return the most tokens that it holds."""
        return self.room

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget all tokens."""
        self.tokens = 0
        if self.is_initialized:
            self.on_device.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: ``-n`` of them, or all but the first ``n``."""
        kept = self.tokens + tokens_to_remove if tokens_to_remove < 0 else min(tokens_to_remove, self.tokens)
        self.tokens = max(kept, 0)
        if self.is_initialized:
            self.on_device.fill_(self.tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequences continue others, in place."""
        if self.is_initialized:
            for part in (self.keys, self.values):
                part.copy_(part.index_select(0, beam_idx.to(part.device)))
