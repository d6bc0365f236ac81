"""What one layer carries from pass to pass, and whether it still fits (clauses MEMORY-1 to MEMORY-4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparse_dlm_attn.arrays import Array, device_of, dtype_name, namespace, shape_of, to_numpy
from sparse_dlm_attn.context import SUFFIX, Context
from sparse_dlm_attn.errors import InvalidTypeError, StaleMemoryError
from sparse_dlm_attn.pass_info import PassInfo
from sparse_dlm_attn.policy import PrefixAttentionPolicy, certain
from sparse_dlm_attn.selection import Selection
from sparse_dlm_attn.traffic import Traffic
from sparse_dlm_attn.values import AttentionState, PageBounds, check_sequences, short_repr, take_sequences

__all__ = ["LayerMemory", "check_memory"]

HostArray = np.ndarray[Any, Any]
SIZES = ("sequences", "query heads", "rows", "channels", "KV heads", "tokens a page")


@dataclass(frozen=True, eq=False)
class LayerMemory:
    """What one layer carries from pass to pass; hand it back unchanged.

    It may be copied and pickled.

    Parameters
    ----------
    policy : PrefixAttentionPolicy
        The policy that made it.
    layer : int
        Layer it belongs to.
    version : int or None
        Version of its context; None after `reorder`, which leads to another one.
    page_size : int
        Tokens of a page of its context.
    page_table : array or None
        That of its context, to notice a changed one; None after `reorder`.
    page_lengths, page_segments : array, array or None
        Those of its context.
    state : AttentionState
        Context part of every row.
    policy_memory : object
        The policy's own value.
    bounds : PageBounds or None
        Metadata built in this block.
    selection, active : Selection, array
        What this pass selected, for reports.
    traffic : Traffic
        What this pass read.
    """

    policy: PrefixAttentionPolicy[Any]
    layer: int
    version: int | None
    page_size: int
    page_table: Array | None
    page_lengths: Array
    page_segments: Array | None
    state: AttentionState
    policy_memory: Any
    bounds: PageBounds | None
    selection: Selection
    active: Array
    traffic: Traffic

    __repr__ = short_repr

    def between_blocks(self) -> LayerMemory:
        """Return it without states and metadata, which no later block may see (clause MEMORY-1)."""
        xp = namespace(self.state.out)
        batch, heads, _, head_dim = shape_of(self.state.out)
        shape, device = (batch, heads, 0), device_of(self.state.out)
        state = AttentionState(
            xp.zeros((*shape, head_dim), dtype=self.state.out.dtype, device=device),
            xp.zeros(shape, dtype=self.state.lse.dtype, device=device),
        )
        return replace(self, state=state, bounds=None)

    def reorder(self, indices: Any) -> LayerMemory:
        """Return the memory of other sequences: some of these, each any number of times (clause MEMORY-4).

        It follows a batch whose sequences change places, end, or split into several, as beams do. The next
        pass has to bring their queries and their context; its pages may lie elsewhere.

        Parameters
        ----------
        indices : array or sequence of int
            ``(sequences,)``: for each sequence of the new batch, its number in this one.

        Returns
        -------
        LayerMemory
            A new one; this one stays as it is.

        Raises
        ------
        InvalidArgumentError, InvalidTypeError
            If they are no numbers of sequences, or the policy's memory cannot be reordered.
        """
        rows = check_sequences(indices, shape_of(self.page_lengths)[0], self.page_lengths)
        own = None if self.policy_memory is None else self.policy.reorder(self.policy_memory, rows)
        names = ("page_lengths", "page_segments", "state", "bounds", "selection", "active", "traffic")
        taken: dict[str, Any] = {name: take_sequences(getattr(self, name), rows) for name in names}
        return replace(self, **taken, policy_memory=own, page_table=None, version=None)


def check_memory(
    policy: PrefixAttentionPolicy[Any], q: Array, context: Context, memory: LayerMemory, info: PassInfo, read: bool
) -> None:
    """Refuse memory of another policy, layer, batch, block or context (clause MEMORY-2).

    Parameters
    ----------
    policy : PrefixAttentionPolicy
        The policy of this pass.
    q : array
        ``(batch, q_heads, tokens, head_dim)``.
    context : Context
        What it reads.
    memory : LayerMemory
        What was handed in.
    info : PassInfo
        Its place in the denoising.
    read : bool
        Whether tables and lengths may be read.

    Raises
    ------
    InvalidTypeError
        If it is no `LayerMemory`.
    StaleMemoryError
        If it belongs to something else.
    """
    if not read and _plainly_continues(policy, q, context, memory, info):
        return
    if not isinstance(memory, LayerMemory):
        raise InvalidTypeError(
            "memory", "must be what this layer's previous pass returned, or None", type(memory).__name__
        )
    starts = isinstance(info.index, int) and certain(info.index == 0)
    if starts and policy.memory_scope == "block":
        return  # it is dropped, so it cannot be stale
    advice = "Pass memory=None to start the block again, or call finish_block() of a Decoder first."
    if starts:
        advice = "Pass memory=None where another sequence begins, or call reset() of a Decoder first."
    if memory.policy is not policy and memory.policy != policy:
        raise StaleMemoryError(f"memory was made by {memory.policy!r}, not by {policy!r}. {advice}")
    if memory.layer != info.layer:
        raise StaleMemoryError(
            f"memory belongs to layer {memory.layer}, info.layer is {info.layer}. Keep one memory a layer."
        )
    state = memory.state.out
    if namespace(state) is not namespace(q) or device_of(state) != device_of(q) or state.dtype != q.dtype:
        raise StaleMemoryError(
            f"memory holds a {_type_name(state)} of {dtype_name(state)} on {device_of(state)}, q is a "
            f"{_type_name(q)} of {dtype_name(q)} on {device_of(q)}. {advice}"
        )
    before = (*shape_of(state), memory.traffic.kv_heads, memory.page_size)
    now = (*shape_of(q), context.kv_heads, context.page_size)
    for name, was, size in zip(SIZES, before, now, strict=True):
        # Blocks of a sequence may differ in length; that of a running one may not.
        if was != size and not (starts and name == "rows"):
            raise StaleMemoryError(f"memory is of {was} {name}, this pass has {size}. {advice}")
    changed = _changed_context(policy, context, memory, info, starts, read)
    if changed:
        raise StaleMemoryError(f"the context changed since the memory was made: {changed}. {advice}")


def _plainly_continues(
    policy: PrefixAttentionPolicy[Any], q: Array, context: Context, memory: Any, info: PassInfo
) -> bool:
    """Return whether nothing can be wrong, for a later pass whose tables lie on a device: most passes, soon told."""
    if type(memory) is not LayerMemory or not isinstance(info.index, int) or certain(info.index == 0):
        return False
    held = memory.state.out
    return (
        memory.policy is policy
        and memory.layer == info.layer
        and memory.version == context.version
        and type(held) is type(q)
        and held.shape == q.shape
        and held.dtype == q.dtype
        and held.device == q.device
        and memory.traffic.kv_heads == context.kv_heads
        and memory.page_size == context.page_size
        and memory.page_lengths.shape == context.page_lengths.shape
    )


def _type_name(array: Array) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def _changed_context(
    policy: PrefixAttentionPolicy[Any], context: Context, memory: LayerMemory, info: PassInfo, starts: bool, read: bool
) -> str:
    """Say how a context is not that of a running block, or does not continue that of the block before.

    "" if it fits, or if that cannot be seen.
    """
    old_pages, pages = shape_of(memory.page_lengths)[1], context.pages
    if isinstance(info.index, int) and not starts:
        if memory.version is not None and memory.version != context.version:
            return f"version {memory.version} became {context.version}"
        if old_pages != pages:
            return f"{old_pages} pages a sequence became {pages}"
    if not read:
        # Pages that the sequence does not fill may be cut off, but that is not to be seen here.
        return f"{old_pages} pages a sequence became {pages}" if starts and pages < old_pages else ""
    running = to_numpy(info.of_sequences("index", context.page_lengths)) > 0
    before, after = _of_one_width(to_numpy(memory.page_lengths), to_numpy(context.page_lengths))
    if (before != after)[running].any():
        return "page_lengths differs for a sequence in the middle of its block"
    if memory.page_table is not None:
        width = min(old_pages, pages)
        moved = to_numpy(memory.page_table)[:, :width] != to_numpy(context.page_table)[:, :width]
        if moved[running].any():
            return "page_table differs for a sequence in the middle of its block"
    if policy.memory_scope == "block":
        return ""
    return _not_continued(before, after, memory.page_segments, ~running)


def _of_one_width(before: HostArray, after: HostArray) -> tuple[HostArray, HostArray]:
    """Append absent pages to the narrower of two tables of page lengths."""
    added = after.shape[1] - before.shape[1]
    if added > 0:
        return np.pad(before, ((0, 0), (0, added))), after
    return before, np.pad(after, ((0, 0), (0, -added))) if added else after


def _not_continued(before: HostArray, after: HostArray, segments: Array | None, starts: HostArray) -> str:
    """Say which page is not what it was where a sequence goes on with another block, "" if all are.

    The last page may have grown; those before it are complete. A suffix is left out: blocks take its place.
    """
    kept = before > 0
    if segments is not None:
        kept[:, : segments.shape[1]] &= to_numpy(segments) != SUFFIX
    counted = kept.cumsum(axis=1)
    last = kept & (counted == counted[:, -1:])
    wrong = kept & np.where(last, after < before, after != before) & starts[:, None]
    if not wrong.any():
        return ""
    sequence, page = (int(number) for number in np.argwhere(wrong)[0])
    was, now = int(before[sequence, page]), int(after[sequence, page])
    return f"page {page} of sequence {sequence} held {was} tokens, now {now}"
