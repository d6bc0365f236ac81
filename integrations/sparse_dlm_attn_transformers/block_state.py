"""What a block of a model leaves behind: its state while it lasts, and a report of each pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparse_dlm_attn import Context, DecoderPass, Traffic
from sparse_dlm_attn.arrays import to_numpy

__all__ = ["BlockState", "LayerState", "PassReport"]


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
        One a layer.
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
    """What a layer reads while a block lasts: the cache's own tensors, the pages that view them, the mask."""

    keys: torch.Tensor
    context: Context
    mask: Any
    valid: np.ndarray[Any, Any]


@dataclass(eq=False)
class BlockState:
    """All that belongs to a block, beside the memories: dropped when it ends.

    ``announced`` is a pass that `SparseAttention.next_pass` has begun and whose forward pass is still to
    come, ``running`` the one whose layers run now, ``reportable`` one that is over and has not been reported.
    ``mask`` is what the running pass was called with, ``masks`` what has been read of it and of others in
    this pass.
    """

    announced: DecoderPass | None = None
    running: DecoderPass | None = None
    reportable: DecoderPass | None = None
    mask: Any = None
    layers: dict[int, LayerState] = field(default_factory=dict)
    masks: dict[tuple[int, int], tuple[Any, np.ndarray[Any, Any]]] = field(default_factory=dict)
