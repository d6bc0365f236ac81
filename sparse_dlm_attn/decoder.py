"""For users who own their decoding loop: start a block, run its passes, finish it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from sparse_dlm_attn.arrays import Array, copy_of, shape_of
from sparse_dlm_attn.backend import Backend
from sparse_dlm_attn.context import Context
from sparse_dlm_attn.decoder_pass import DecoderPass
from sparse_dlm_attn.driver import PrefixAttention
from sparse_dlm_attn.errors import CallOrderError, InvalidArgumentError, InvalidTypeError
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn.pass_info import PassInfo
from sparse_dlm_attn.policy import PrefixAttentionPolicy, check_count
from sparse_dlm_attn.values import check_same_place, check_sequences, take_sequences

__all__ = ["Decoder", "DecoderPass"]


class Decoder:
    """Keeps one memory a layer over the passes of a block, and forgets it when the block ends.

    Parameters
    ----------
    policy : str or PrefixAttentionPolicy
        As for :class:`PrefixAttention`.
    backend : str or Backend
        As for :class:`PrefixAttention`.
    layers : int
        Layers of the model that attend through it.
    check_contents : bool, optional
        As for :class:`PrefixAttention`.

    Attributes
    ----------
    attention : PrefixAttention
        The driver.
    blocks : int
        Blocks started so far.
    current : DecoderPass or None
        The pass under way.

    Notes
    -----
    Three life-times. A *pass*: queries, outputs and decisions. A *block*, from `start_block` to
    `finish_block`: contexts, attention states, page bounds and the memory of policies, all of which
    `finish_block` lets go. A *sequence*, until `reset`: the memory of the few policies that say so
    (``memory_scope = "sequence"``). `reorder` follows a batch whose sequences change.

    Examples
    --------
    >>> import numpy as np
    >>> from sparse_dlm_attn import Context, Decoder
    >>> rng = np.random.default_rng(0)
    >>> cache = rng.standard_normal((2, 1, 2, 256, 32), dtype=np.float32)
    >>> decoder = Decoder("losa:budget=32,active=2", layers=1)
    >>> decoder.start_block([Context.from_dense(cache[0], cache[1], page_size=16)])
    >>> for _ in range(2):
    ...     step = decoder.next_pass()
    ...     q, k, v = (rng.standard_normal((1, heads, 8, 32), dtype=np.float32) for heads in (4, 2, 2))
    ...     out = step(0, q, k, v)
    >>> out.shape, [float(traffic.density[0]) < 1 for traffic in step.traffic]
    ((1, 4, 8, 32), [True])
    >>> decoder.finish_block()
    """

    def __init__(
        self,
        policy: str | PrefixAttentionPolicy[Any] = "dense",
        backend: str | Backend = "reference",
        *,
        layers: int,
        check_contents: bool | None = None,
    ) -> None:
        check_count("layers", layers, 1)
        self.attention = PrefixAttention(policy, backend, check_contents=check_contents)
        self.layers = layers
        self.blocks = 0
        self.current: DecoderPass | None = None
        self._running = False
        self._contexts: tuple[Context, ...] | None = None
        self._memories: list[LayerMemory | None] = [None] * layers
        self._passes = 0
        self._total: int | None = None
        self._decoded: Array | None = None

    def __repr__(self) -> str:
        place = f"pass {self._passes - 1} of block {self.blocks - 1}" if self._running else "between blocks"
        return f"Decoder({self.attention.policy!r}, layers={self.layers}, {place})"

    @property
    def running(self) -> bool:
        """Whether a block has been started and not finished."""
        return self._running

    @property
    def memories(self) -> tuple[LayerMemory | None, ...]:
        """What each layer carries to its next pass; None where there is nothing."""
        return tuple(self._memories)

    @memories.setter
    def memories(self, memories: Sequence[LayerMemory | None]) -> None:
        if len(memories) != self.layers:
            raise InvalidArgumentError("memories", f"must hold one for each of {self.layers} layers", len(memories))
        self._memories = list(memories)

    def recorded_pass(self, memories: Sequence[LayerMemory | None], info: PassInfo) -> DecoderPass:
        """Return a pass of a copy of this decoder, so that a graph can record it and change nothing here.

        Parameters
        ----------
        memories : sequence of LayerMemory or None
            What the layers begin with.
        info : PassInfo
            Place in the denoising, but for the layer.

        Returns
        -------
        DecoderPass
            The pass; its `decoder` holds the memories that it leaves.
        """
        other = copy(self)
        other.memories, other.current = memories, DecoderPass(other, info)
        return other.current

    def start_block(self, contexts: Sequence[Context] | None = None, *, total_passes: int | None = None) -> None:
        """Begin a block.

        Parameters
        ----------
        contexts : sequence of Context, optional
            One a layer; None if every call of a pass brings its own.
        total_passes : int, optional
            Denoising passes planned, the save pass not counted.

        Raises
        ------
        CallOrderError
            If the block before has not been finished.
        InvalidArgumentError, InvalidTypeError
            If there is not one context for each layer.
        """
        checked = self.check_start(contexts) or None
        PassInfo(0, total_passes=total_passes)  # refuses what is no number of passes
        self._contexts, self._total = checked, total_passes
        self._running, self._passes = True, 0
        self.blocks += 1

    def check_start(self, contexts: Sequence[Context] | None) -> tuple[Context, ...]:
        """Return the contexts of a block that may begin now, none for None; raise as `start_block` does."""
        if self._running:
            raise CallOrderError(
                "start_block()",
                "must not be called while a block is under way",
                repr(self),
                "Call finish_block() first.",
            )
        if contexts is None:
            return ()
        try:
            iterator = iter(contexts)
        except TypeError:
            raise InvalidTypeError(
                "contexts",
                "must be a list of Contexts, one for each layer",
                type(contexts).__name__,
                "Pass [context] * num_layers where layers share one.",
            ) from None
        given = tuple(iterator)  # apart: an error of the caller's own generator is not ours
        for context in given:
            if not isinstance(context, Context):
                raise InvalidTypeError("contexts", "must hold Contexts", type(context).__name__)
        if len(given) != self.layers:
            raise InvalidArgumentError("contexts", f"must hold one for each of {self.layers} layers", len(given))
        return given

    def next_pass(
        self,
        decoded: Array | None = None,
        *,
        is_save: bool | Array = False,
        index: Array | None = None,
        window: Array | None = None,
        window_index: int | None = None,
        planned: Array | None = None,
        planned_order: Array | None = None,
    ) -> DecoderPass:
        """Begin the block's next pass; call what it returns once for each layer.

        Parameters
        ----------
        decoded : array, optional
            bool ``(batch, tokens)``: tokens that are no longer masked. What was decoded since the pass
            before follows from it. Some policies ask for it.
        is_save : bool or array
            Whether this is the pass over the finished block that writes its keys and values; bool ``(batch,)``
            where sequences differ.
        index : array, optional
            Integers ``(batch,)``: the pass of each sequence within its block, where sequences stand at
            different ones; 0 where one begins. Default: passes are counted here, for all of them alike.
        window, window_index, planned, planned_order : array, int, array, array, optional
            As in :class:`PassInfo`.

        Returns
        -------
        DecoderPass
            The pass.

        Raises
        ------
        CallOrderError
            If no block has been started, or layers of the pass before are missing.
        InvalidArgumentError, InvalidTypeError
            If an argument breaks a rule of :class:`PassInfo`, or ``decoded`` has another shape or library
            than in the pass before.
        """
        if not self._running:
            raise CallOrderError(
                "next_pass()", "must be called within a block", "no block", "Call start_block() first."
            )
        if self.current is not None and self.current.missing:
            raise CallOrderError(
                "next_pass()",
                "must be called after every layer of the pass before has run",
                f"layers {list(self.current.missing)} missing",
                "Run them, or call finish_block() to give the block up.",
            )
        info = PassInfo(
            self._passes if index is None else index,
            is_save,
            decoded,
            total_passes=self._total,
            window=window,
            window_index=window_index,
            planned=planned,
            planned_order=planned_order,
            num_layers=self.layers,
        )
        newly = None
        if decoded is not None:
            before = decoded if self._decoded is None else self._decoded
            if shape_of(decoded) != shape_of(before):
                raise InvalidArgumentError(
                    "decoded",
                    f"must have shape {shape_of(before)}, as in the pass before",
                    f"shape {shape_of(decoded)}",
                    "Call finish_block() before a block of other rows.",
                )
            check_same_place("decoded", decoded, "decoded in the pass before", before)
            newly = decoded & ~before
            if index is not None:  # a sequence that begins had other rows before
                newly = newly & (info.of_sequences("index", decoded) > 0)[:, None]
        step = DecoderPass(self, replace(info, newly_decoded=newly))
        # A copy: the caller's loop may write into its own array.
        self._decoded = None if decoded is None else copy_of(decoded)
        self.current = step
        self._passes += 1
        return step

    def finish_block(self) -> None:
        """End the block and let go of all that belongs to it; nothing happens between blocks."""
        self._running = False
        self.current = self._contexts = self._decoded = None
        if self.attention.policy.memory_scope == "block":
            self._memories = [None] * self.layers
        else:
            self._memories = [memory and memory.between_blocks() for memory in self._memories]

    def reorder(self, indices: Any) -> None:
        """Go on with other sequences: some of these, each any number of times.

        It follows a batch whose sequences change places, end, or split into several, as beams do, between
        two passes or two blocks. Contexts that were given to `start_block` are reordered with their pages.

        Parameters
        ----------
        indices : array or sequence of int
            ``(sequences,)``: for each sequence of the new batch, its number in this one.

        Raises
        ------
        CallOrderError
            If layers of the pass under way have not run.
        InvalidArgumentError, InvalidTypeError
            If they are no numbers of sequences, or the policy's memory cannot be reordered; nothing has
            changed then.
        """
        if self.current is not None and self.current.missing:
            raise CallOrderError(
                "reorder()",
                "must be called between passes",
                f"layers {list(self.current.missing)} missing",
                "Run them, or call finish_block() to give the block up.",
            )
        memories = [memory and memory.reorder(indices) for memory in self._memories]
        contexts = self._contexts and tuple(context.reorder(indices) for context in self._contexts)
        decoded = self._decoded
        if decoded is not None:
            decoded = take_sequences(decoded, check_sequences(indices, shape_of(decoded)[0], decoded))
        self._memories, self._contexts, self._decoded, self.current = memories, contexts, decoded, None

    def reset(self) -> None:
        """End the sequence: let go of everything, the memory of policies that spans blocks included.

        Call it before the first block of another sequence or batch; it may be called at any time, and twice.
        """
        self.finish_block()
        self._memories = [None] * self.layers

    def _attend(
        self,
        step: DecoderPass,
        layer: int,
        q: Array,
        k: Array | None,
        v: Array | None,
        context: Context | None,
        scale: float | None,
    ) -> Array:
        if step is not self.current:
            raise CallOrderError("a pass", "must be the current one", repr(step), "Call next_pass().")
        info = step.info.at_layer(layer)
        if layer in step._ran:
            raise CallOrderError(
                "a pass", "must be called once for each layer", f"layer {layer} again", "Call next_pass()."
            )
        if context is None:
            if self._contexts is None:
                raise InvalidArgumentError("context", "must be given here or to start_block()", "None")
            context = self._contexts[layer]
        out, self._memories[layer] = self.attention(q, k, v, context, self._memories[layer], info, scale=scale)
        return out
