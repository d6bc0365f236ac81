"""What a decoding did: its output, and what every pass read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from sparse_dlm_attn import Selection
from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn.traffic import Traffic
from sparse_dlm_attn.values import short_repr
from sparse_dlm_attn_small_model.config import STOP_BYTE

HostArray = np.ndarray[Any, Any]


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

    @classmethod
    def sum(cls, totals: Iterable[TrafficTotal]) -> TrafficTotal:
        """Return the total of totals; its shares are those of all passes, not means of shares."""
        parts = list(totals)
        return cls(*(sum(getattr(part, field.name) for part in parts) for field in fields(cls)))

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
class PassRecord:
    """One forward pass over one block.

    Parameters
    ----------
    block, index : int
        Block of this decoding and pass in the block, both from 0.
    is_save : bool
        Whether this pass wrote the block's final KV.
    tokens : tuple of int
        The block after the pass, or all that follows the prompt in a whole sequence; 256 where masked.
    newly_decoded : tuple of int
        Positions in ``tokens`` that were decoded after this pass.
    reads : TrafficTotal
        What it read, without the building of metadata.
    metadata_reads, active_rows : numpy.ndarray
        int64 ``(layers,)``: how often the policy read the page bounds, and rows whose context part was computed.
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
    reads: TrafficTotal
    metadata_reads: HostArray
    active_rows: HostArray
    loaded: HostArray
    seconds: float

    __repr__ = short_repr

    @classmethod
    def of(
        cls,
        memories: Sequence[LayerMemory],
        tokens: HostArray,
        newly_decoded: HostArray,
        computed_rows: int,
        **place: Any,
    ) -> list[PassRecord]:
        """Read the traffic of a pass from its layers' memories, to the host: one record a sequence.

        ``tokens`` and ``newly_decoded`` are ``(batch, tokens)``, ``place`` is what memories do not tell.
        """
        layers = [_on_host(memory.traffic) for memory in memories]
        batch, rows = layers[0].active.shape

        totals = {
            name: np.stack([getattr(each, name) for each in layers]).sum(axis=0, dtype=np.float64).tolist()
            for name in (
                "tokens_read",
                "context_tokens",
                "page_bytes",
                "metadata_bytes",
                "dense_bytes",
                "pairs",
                "dense_pairs",
            )
        }
        return [
            cls(
                tokens=tuple(tokens[sequence].tolist()),
                newly_decoded=tuple(np.flatnonzero(newly_decoded[sequence]).tolist()),
                reads=TrafficTotal(
                    passes=1,
                    build_bytes=0.0,
                    computed_rows=float(computed_rows),
                    rows=float(rows),
                    **{name: values[sequence] for name, values in totals.items()},
                ),
                metadata_reads=np.asarray([each.metadata_reads for each in layers]),
                active_rows=np.asarray([each.active[sequence].sum() for each in layers]),
                loaded=np.stack([each.loaded[sequence] for each in layers]),
                **place,
            )
            for sequence in range(batch)
        ]


def _on_host(traffic: Traffic) -> Traffic:
    """Return the same traffic in NumPy, where many small sums are quickest."""
    selection = Selection(to_numpy(traffic.selection.mask), traffic.selection.span)
    active, lengths = to_numpy(traffic.active), to_numpy(traffic.page_lengths)
    return replace(traffic, selection=selection, active=active, page_lengths=lengths)


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
    prefilled_tokens : int
        Bytes of the prompt that were prefilled.
    build_bytes : float
        See `TrafficTotal`.
    seconds : float
        Wall time of the passes; of several sequences decoded together, an equal part.
    """

    output: bytes
    generated: bytes
    stopped: bool
    passes: tuple[PassRecord, ...]
    prefilled_tokens: int
    build_bytes: float
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
            Whether pass 0 of every block counts, and with it the building of page metadata. Save passes always count.

        Notes
        -----
        The bounds of the prompt's pages are built when the prompt is cached, not in a pass. A
        policy that never reads them does not need that work, so it is charged, once, to layers in which the
        policy read bounds in some pass of this decoding; likewise the bounds of blocks appended before
        the last block. Shared prefixes make no difference: every decoding is charged as if alone.
        """
        total = TrafficTotal.sum(each.reads for each in self.passes if first_pass or each.index > 0)
        return replace(total, build_bytes=self.build_bytes) if first_pass else total


def text_before_stop(generated: bytes) -> tuple[bytes, bool]:
    """Return what precedes the first stop byte, and whether there is one."""
    before, stop, _ = generated.partition(bytes([STOP_BYTE]))
    return before, bool(stop)
