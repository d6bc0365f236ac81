"""The interface of a policy: four questions a pass has to answer, as laws in docstrings.

A policy is written once, with the operators of a backend and the Python array API, and runs on
every backend. It keeps nothing: what it carries to the next pass of its layer is one frozen value,
returned by :meth:`PrefixAttentionPolicy.remember`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from sparse_dlm_attn.arrays import Array, namespace
from sparse_dlm_attn.backend import Backend
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.errors import InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn.pass_info import PassInfo
from sparse_dlm_attn.selection import Selection
from sparse_dlm_attn.values import AttentionState, short_repr, take_sequences

__all__ = [
    "PassInputs",
    "PrefixAttentionPolicy",
    "certain",
    "check_choice",
    "check_count",
    "check_flag",
    "check_fraction",
    "either",
]

MemoryT = TypeVar("MemoryT")


@dataclass(frozen=True, eq=False)
class PassInputs(Generic[MemoryT]):
    """What a policy sees of one pass of one layer.

    Parameters
    ----------
    ops : Backend
        The operators to compute with.
    q : array
        ``(batch, q_heads, tokens, head_dim)``: the block's queries.
    context : Context
        Pages outside the block.
    memory : object or None
        What `remember` returned for this layer's previous pass.
    cached : AttentionState or None
        Context part of the previous pass; the empty state for sequences that restart.
    info : PassInfo
        Place in the denoising.
    restarts : bool or array
        Sequences for which nothing may be reused (first pass of a block, or memory dropped): one
        bool for all of them, or bool ``(batch,)`` when they stand at different passes.
    scale : float or None
        Softmax scale, None for the default.
    whole : bool
        Whether the block is the whole sequence, its own keys being the context (clause DRIVER-4).
    state : AttentionState or None
        Context part of this pass, after `reuse`; known to `remember` alone.
    kept : array or None
        Queries that a ranked pass has kept (`RankedPass`); known to `remember` alone.
    """

    ops: Backend
    q: Array
    context: Context
    memory: MemoryT | None
    cached: AttentionState | None
    info: PassInfo
    restarts: bool | Array
    scale: float | None = None
    whole: bool = False
    state: AttentionState | None = None
    kept: Array | None = None

    __repr__ = short_repr

    @property
    def xp(self) -> Any:
        """Array namespace of the queries."""
        return namespace(self.q)

    @property
    def tokens(self) -> int:
        """Rows of the block."""
        return int(self.q.shape[2])

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return int(self.q.shape[1]) // self.context.kv_heads

    def all_rows(self) -> Array:
        """Return bool ``(batch, tokens)``, all True."""
        return self.xp.ones((self.q.shape[0], self.tokens), dtype=self.xp.bool, device=self.q.device)

    def no_rows(self) -> Array:
        """Return bool ``(batch, tokens)``, all False."""
        return self.xp.zeros((self.q.shape[0], self.tokens), dtype=self.xp.bool, device=self.q.device)

    def passes(self, predicate: Callable[[Any], Any]) -> bool | Array:
        """Evaluate ``predicate`` on the pass index: a bool, or bool ``(batch,)`` if sequences differ."""
        index = self.info.index
        if isinstance(index, int):
            return certain(predicate(index))
        return predicate(self.info.of_sequences("index", self.q))

    def saves(self) -> bool | Array:
        """Return whether this is the save pass, as `passes` does."""
        value = self.info.is_save
        return value if isinstance(value, bool) else self.info.of_sequences("is_save", self.q)

    def rows_where(self, condition: bool | Array, rows: Callable[[], Array], otherwise: Callable[[], Array]) -> Array:
        """Return ``rows()`` for sequences where ``condition`` holds, else ``otherwise()``.

        Both give arrays ``(batch, ...)`` of one shape. Either side is computed only if some sequence
        may need it.
        """
        if isinstance(condition, bool):
            return rows() if condition else otherwise()
        chosen = rows()
        axes = (condition.shape[0],) + (1,) * (chosen.ndim - 1)
        return self.xp.where(self.xp.reshape(condition, axes), chosen, otherwise())

    def dense_where(self, condition: bool | Array, select: Callable[[], Selection]) -> Selection:
        """Return all pages for sequences where ``condition`` holds, else ``select()``."""
        if isinstance(condition, bool):
            condition = certain(condition)
        if condition is True:
            return Selection.all_pages(self.context, self.tokens)
        chosen = select()
        if condition is False:
            return chosen
        everything = self.context.exists[:, None, None, :]
        mask = self.xp.where(condition[:, None, None, None], everything, chosen.mask)
        return Selection(mask, chosen.span)


def certain(condition: bool) -> bool:
    """Return a bool that ``is True`` or ``is False``.

    A compiler that traces integers as symbols leaves their comparisons symbolic, even through `bool`; a
    branch makes it decide.
    """
    if condition:  # noqa: SIM103, as it has to be a branch
        return True
    return False


def either(left: bool | Array, right: bool | Array) -> bool | Array:
    """Return ``left or right`` for bools and bool arrays alike."""
    if isinstance(left, bool):  # a branch, not ``is True``: see `certain`
        if left:
            return True
        return certain(right) if isinstance(right, bool) else right
    if isinstance(right, bool):
        return True if right else left
    return left | right


class PrefixAttentionPolicy(ABC, Generic[MemoryT]):
    """Decides, for one layer and pass, what is read, recomputed, kept and merged.

    Subclasses are frozen dataclasses whose fields are the policy's parameters. Methods are pure:
    the same inputs give the same answers, on every backend (clause POLICY-1). A sequence's answers
    do not depend on the others in its batch (clause POLICY-2).
    """

    name: ClassVar[str]
    """Name under which the policy is registered."""

    memory_scope: ClassVar[Literal["block", "sequence"]] = "block"
    """Whether memory ends with the block or is carried to the next one."""

    counts_passes: ClassVar[bool] = True
    """Whether its answers depend on the number of a pass beyond its being the first of a block.

    Passes of a policy that sets it to False look alike to a graph that records one of them: what it decides by is
    its memory, the save pass, and the contents of arrays. Numbers in its memory have to settle at a value.
    """

    @property
    def mixes_heads(self) -> bool:
        """Whether the pages of one KV head depend on queries or keys of another one's group.

        Devices that hold some KV heads each (tensor parallelism) can run a policy only if this is False:
        they see their own heads alone, and :meth:`sparse_dlm_attn.Backend.query_change` is the one
        operator over all of them.
        """
        return False

    def computed_tokens(self, info: PassInfo, rows: Array) -> Array:
        """Return the rows that the model computes at all in this pass, bool ``(batch, tokens)``.

        The others are neither embedded nor projected nor attended from, in any layer: their keys and
        values stay those of the last pass that computed them. Asked once a pass, before the first
        layer; the driver asks again and lets no other row be active. The default is all rows.

        Law: all rows in pass 0; in every pass the rows that may be decoded after it (``info.planned``,
        else the masked rows of ``info.window``) and those that were decoded after the previous one;
        nothing but ``info`` decides (clause POLICY-7).

        Parameters
        ----------
        info : PassInfo
            Place in the denoising; the same for every layer.
        rows : array
            bool ``(batch, tokens)``, True: all rows of the block.
        """
        return rows

    def active_set(self, inputs: PassInputs[MemoryT]) -> Array:
        """Return the rows whose context part is computed afresh, bool ``(batch, tokens)``.

        Law: rows of a sequence that restarts are all active, or their context part is empty,
        because there is nothing to reuse (clause POLICY-3). The default is all rows.
        """
        return inputs.all_rows()

    @abstractmethod
    def select_pages(self, inputs: PassInputs[MemoryT], active: Array) -> Selection:
        """Return the pages that active rows read.

        Law: does not depend on queries of inactive rows, nor on anything stored in absent pages or
        past a page's length (clause POLICY-4).
        """

    def reuse(self, inputs: PassInputs[MemoryT], active: Array, fresh: AttentionState) -> AttentionState:
        """Return the context part of every row: fresh where active, else from earlier passes.

        Law: with all rows active it returns ``fresh`` (clause POLICY-5).
        """
        if inputs.cached is None:
            return fresh
        return inputs.ops.reuse(active, fresh, inputs.cached)

    def merge(self, inputs: PassInputs[MemoryT], context_state: AttentionState, block_state: AttentionState) -> Array:
        """Return the attention output ``(batch, q_heads, tokens, head_dim)``.

        Law: if every row read all pages in this pass, it equals one softmax over context and block.
        """
        return inputs.ops.merge(context_state, block_state).out

    def remember(self, inputs: PassInputs[MemoryT], active: Array, selection: Selection) -> MemoryT | None:
        """Return what this layer's next pass needs, a frozen value; the default is nothing.

        ``inputs.state`` is the pass's context part. After a dense pass its LSE spares
        :meth:`sparse_dlm_attn.Backend.pooled_scores` a sweep over the keys.
        """
        return None

    def reorder(self, memory: MemoryT, indices: Array) -> MemoryT:
        """Return what `remember` would have returned for other sequences.

        Law: the passes that follow decide for each sequence as they would without it (clause MEMORY-4). The
        default takes every array of the value, ``(batch, ...)``, along its first axis, through dataclasses
        and tuples; numbers and arrays without axes hold for all sequences and stay.

        Parameters
        ----------
        memory : object
            What `remember` returned, not None.
        indices : array
            int64 ``(sequences,)``: for each sequence of the new batch, its number in the old one.
        """
        taken: MemoryT = take_sequences(memory, indices)
        return taken


def check_count(name: str, value: object, minimum: int = 0) -> None:
    """Raise unless ``value`` is an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(name, "must be an int", repr(value))
    if value < minimum:
        raise InvalidArgumentError(name, f"must be at least {minimum}", value)


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise InvalidTypeError(name, "must be true or false", repr(value))


def check_fraction(name: str, value: object) -> None:
    """Raise unless ``value`` is a number in 0..1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidTypeError(name, "must be a number in 0..1", repr(value))
    if not 0.0 <= value <= 1.0:
        raise InvalidArgumentError(name, "must lie in 0..1", value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidArgumentError(name, f"must be one of {', '.join(choices)}", repr(value))
