"""What a decoding did: its output, and what every pass of every layer read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparse_dlm_attn import LayerMemory, Selection, Traffic
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn.values import short_repr
from sparse_dlm_attn_tiny.config import STOP_BYTE

__all__ = ["Decoded", "PassRecord", "TrafficTotal", "text_before_stop"]

HostArray = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class PassRecord:
    """One forward pass over one block; token counts and bytes are summed over KV heads.

    Parameters
    ----------
    block, index : int
        Block of this decoding and pass in the block, both from 0.
    is_save : bool
        Whether this pass wrote the block's final KV.
    tokens : tuple of int
        The block after the pass; 256 where it is still masked.
    newly_decoded : tuple of int
        Positions in the block that were decoded after this pass.
    tokens_read, context_tokens, page_bytes, metadata_bytes, dense_bytes : numpy.ndarray
        float64 ``(layers,)``: tokens loaded and tokens there are; bytes of the pages loaded, bytes
        read to choose them, bytes that the dense policy reads.
    metadata_reads : numpy.ndarray
        int64 ``(layers,)``: how often the policy read the page bounds.
    pairs, dense_pairs : numpy.ndarray
        float64 ``(layers,)``: pairs of a row and a context token it attended to, over query heads, and what
        they are if every row attends to every token.
    active_rows : numpy.ndarray
        int64 ``(layers,)``: rows whose context part was computed.
    computed_rows, rows : int
        Rows that the model computed at all, and rows of the block.
    loaded : numpy.ndarray
        bool ``(layers, kv_heads, pages)``: pages loaded.
    seconds : float
        Wall time of the pass, divided by the number of sequences that it computed.
    """

    block: int
    index: int
    is_save: bool
    tokens: tuple[int, ...]
    newly_decoded: tuple[int, ...]
    tokens_read: HostArray
    context_tokens: HostArray
    page_bytes: HostArray
    metadata_bytes: HostArray
    dense_bytes: HostArray
    metadata_reads: HostArray
    pairs: HostArray
    dense_pairs: HostArray
    active_rows: HostArray
    computed_rows: int
    rows: int
    loaded: HostArray
    seconds: float

    __repr__ = short_repr

    @property
    def density(self) -> float:
        """Tokens loaded / context tokens, over all layers; 0 for an empty context."""
        total = float(self.context_tokens.sum())
        return float(self.tokens_read.sum()) / total if total else 0.0

    @classmethod
    def of(
        cls,
        memories: Sequence[LayerMemory],
        *,
        block: int,
        index: int,
        is_save: bool,
        tokens: HostArray,
        newly_decoded: HostArray,
        seconds: float,
        computed_rows: int | None = None,
    ) -> list[PassRecord]:
        """Read the traffic of a pass from its memories, to the host: one record a sequence.

        Parameters
        ----------
        memories : sequence of LayerMemory
            What the pass returned, layer by layer.
        block, index, is_save
            As for the class.
        tokens, newly_decoded : numpy.ndarray
            ``(batch, tokens)``: the blocks after the pass, and bool: what was decoded after it.
        seconds : float
            As for the class.
        computed_rows : int, optional
            Rows that the model computed in each sequence; default: all.
        """
        traffic = [_on_host(memory.traffic) for memory in memories]
        names = ("pairs", "dense_pairs", "tokens_read", "context_tokens", "page_bytes", "metadata_bytes",
                 "dense_bytes")
        figures = {
            name: np.stack([getattr(item, name) for item in traffic]).astype(np.float64) for name in names
        }
        active_rows = np.stack([item.active.sum(axis=-1) for item in traffic])
        loaded = np.stack([item.loaded for item in traffic])
        metadata_reads = np.asarray([item.metadata_reads for item in traffic])
        batch, rows = traffic[0].active.shape
        return [
            cls(
                block=block, index=index, is_save=is_save, seconds=seconds, rows=rows,
                computed_rows=rows if computed_rows is None else computed_rows,
                tokens=tuple(tokens[sequence].tolist()),
                newly_decoded=tuple(np.flatnonzero(newly_decoded[sequence]).tolist()),
                metadata_reads=metadata_reads, active_rows=active_rows[:, sequence],
                loaded=loaded[:, sequence], **{name: each[:, sequence] for name, each in figures.items()},
            )
            for sequence in range(batch)
        ]


def _on_host(traffic: Traffic) -> Traffic:
    """Return the same traffic in NumPy, where many small sums are quickest."""
    selection = Selection(to_numpy(traffic.selection.mask), traffic.selection.span)
    return replace(
        traffic, selection=selection, active=to_numpy(traffic.active),
        page_lengths=to_numpy(traffic.page_lengths),
    )


@dataclass(frozen=True)
class TrafficTotal:
    """Context reads summed over passes, layers and KV heads.

    Parameters
    ----------
    passes : int
        Passes summed.
    tokens_read, context_tokens : float
        Tokens loaded, and tokens that the dense policy loads.
    page_bytes, metadata_bytes : float
        Bytes of pages loaded, and bytes read in the passes to choose them.
    build_bytes : float
        Key bytes read to build the page bounds that the policy used; 0 in totals without pass 0.
    dense_bytes : float
        Bytes that the dense policy reads in these passes.
    pairs, dense_pairs : float
        Pairs of a row and a context token it attended to, over query heads, and those of the dense policy.
    computed_rows, rows : float
        Rows that the model computed, and rows that there were.
    """

    passes: int
    tokens_read: float
    context_tokens: float
    page_bytes: float
    metadata_bytes: float
    build_bytes: float
    dense_bytes: float
    pairs: float
    dense_pairs: float
    computed_rows: float
    rows: float

    @property
    def pair_share(self) -> float:
        """Pairs attended to / those of the dense policy; 0 for an empty context."""
        return self.pairs / self.dense_pairs if self.dense_pairs else 0.0

    @property
    def row_share(self) -> float:
        """Rows computed / rows there were; 0 without a pass."""
        return self.computed_rows / self.rows if self.rows else 0.0

    @property
    def density(self) -> float:
        """Tokens loaded / context tokens; 0 for an empty context."""
        return self.tokens_read / self.context_tokens if self.context_tokens else 0.0

    @property
    def bytes_read(self) -> float:
        """All bytes: pages, metadata, and the building of metadata."""
        return self.page_bytes + self.metadata_bytes + self.build_bytes

    @property
    def byte_share(self) -> float:
        """Bytes read / what the dense policy reads; 0 for an empty context. May exceed 1."""
        return self.bytes_read / self.dense_bytes if self.dense_bytes else 0.0


@dataclass(frozen=True, eq=False)
class Decoded:
    """A finished decoding.

    Parameters
    ----------
    output : bytes
        The new bytes up to the first stop byte, which is left out.
    generated : bytes
        All new bytes of the blocks that were decoded, stop byte and filling included.
    stopped : bool
        Whether a stop byte was decoded; False if the number of blocks ended it.
    passes : tuple of PassRecord
        Every pass in order.
    block_length, page_size : int
        Tokens a block and a page.
    prompt_tokens, prefilled_tokens : int
        Bytes of the prompt, and those of them that were prefilled.
    build_bytes : float
        See `TrafficTotal`.
    prefill_seconds, seconds : float
        Wall time of the prefill (0 if a prefix was given) and of the passes; of several sequences
        decoded together, an equal part.
    """

    output: bytes
    generated: bytes
    stopped: bool
    passes: tuple[PassRecord, ...]
    block_length: int
    page_size: int
    prompt_tokens: int
    prefilled_tokens: int
    build_bytes: float
    prefill_seconds: float
    seconds: float

    __repr__ = short_repr

    @property
    def blocks(self) -> int:
        """Blocks decoded."""
        return self.passes[-1].block + 1 if self.passes else 0

    def traffic(self, first_pass: bool = True) -> TrafficTotal:
        """Return the context reads of the decoding.

        Parameters
        ----------
        first_pass : bool
            Whether pass 0 of every block counts, and with it the building of page metadata. Save
            passes always count.

        Notes
        -----
        The bounds of the prompt's pages are built when the prompt is cached, not in a pass. A
        policy that never reads them does not need that work, so it is charged, once, to layers in which the
        policy read bounds in some pass of this decoding; likewise the bounds of blocks appended before
        the last block. Shared prefixes make no difference: every decoding is charged as if alone.
        """
        counted = [record for record in self.passes if first_pass or record.index > 0]

        def total(name: str) -> float:
            return math.fsum(float(getattr(record, name).sum()) for record in counted)

        return TrafficTotal(
            passes=len(counted), tokens_read=total("tokens_read"),
            context_tokens=total("context_tokens"), page_bytes=total("page_bytes"),
            metadata_bytes=total("metadata_bytes"),
            build_bytes=self.build_bytes if first_pass else 0.0, dense_bytes=total("dense_bytes"),
            pairs=total("pairs"), dense_pairs=total("dense_pairs"),
            computed_rows=float(sum(record.computed_rows for record in counted)),
            rows=float(sum(record.rows for record in counted)),
        )


def text_before_stop(generated: bytes) -> tuple[bytes, bool]:
    """Return what precedes the first stop byte, and whether there is one."""
    before, stop, _ = generated.partition(bytes([STOP_BYTE]))
    return before, bool(stop)
