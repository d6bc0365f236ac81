"""Passes of a block as CUDA graphs: captured once, replayed for every pass of their kind in every block."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import Any, Protocol

import torch

from sparse_dlm_attn import CallOrderError, Context, Decoder, UnsupportedError
from sparse_dlm_attn.decoder import DecoderPass
from sparse_dlm_attn.memory import LayerMemory
from sparse_dlm_attn.traffic import Traffic
from sparse_dlm_attn_cuda_graphs.contexts import FixedContexts
from sparse_dlm_attn_cuda_graphs.trees import copy_tensors, filled, map_tensors, skeleton, tensors_of

__all__ = ["CapturedPasses", "CudaGraph", "is_capturing", "why_not"]

KEPT_APART = ("selection", "active", "traffic", "page_table", "page_lengths", "page_segments")
"""Fields of a memory that are not copied: reports, which no pass reads, and what contexts hold already."""

_capturing: ContextVar[bool] = ContextVar("capturing", default=False)


def is_capturing() -> bool:
    """Return whether a pass is being recorded: numbers of the host become constants of its graph then."""
    return _capturing.get()


@contextmanager
def _recording() -> Iterator[None]:
    token = _capturing.set(True)
    try:
        yield
    finally:
        _capturing.reset(token)


class Graph(Protocol):
    """Work on tensors that stay where they are, recorded once."""

    def replay(self) -> None:
        """Do it again."""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let Python collect no garbage: a graph among it that is freed while another is recorded spoils the latter."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class CudaGraph:
    """A CUDA graph. Those that run one after another share a memory pool.

    Parameters
    ----------
    work : callable
        What is recorded. It is called once, and computes nothing then.
    pool : object
        What ``torch.cuda.graph_pool_handle()`` returned.
    """

    def __init__(self, work: Callable[[], None], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with _no_collection(), torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        """Launch it on the current stream."""
        self._graph.replay()


def why_not(decoder: Decoder) -> list[str]:
    """Return every reason against capturing the passes of a decoder; empty if they can be captured."""
    policy, backend = decoder.attention.policy, decoder.attention.backend
    can, reasons = backend.capabilities, []
    if "cuda" not in can.devices:
        reasons.append(f"backend {backend.name!r} computes on {', '.join(can.devices)}")
    if can.plans_on_host:
        reasons.append(f"backend {backend.name!r} reads selections on the host in every pass")
    if decoder.attention.check_contents:
        reasons.append("check_contents=True reads page tables on the host in every pass")
    if policy.counts_passes:
        reasons.append(
            f"policy {policy.name!r} may decide by the number of a pass, which a graph would keep; if it does not, "
            "set counts_passes = False in its class"
        )
    return reasons


class CapturedPasses:
    """Runs the passes of a `Decoder` as CUDA graphs.

    The first pass of a kind runs as it is, which compiles what has to be compiled; the second one is captured, and it
    and all others are replayed. A kind is what the forward pass is called with but for the contents of tensors,
    whether it is a block's first pass or its save pass, what numbers a policy remembers, and how large contexts may
    be. Nothing else may decide what a pass computes.

    All that a graph reads lies in buffers that stay. Inputs, page tables and lengths are written into them; memories
    are there already, where the pass before left them. Results are copies.

    Parameters
    ----------
    decoder : Decoder
        Whose passes they are. Call `start_block` here, `next_pass` and `finish_block` there.
    forward : callable
        ``forward(step, *args, **kwargs)`` runs all layers, each by ``step(layer, q, k, v)``, and returns tensors,
        nested as it likes. It must not read tensors on the host.
    graph : callable, optional
        ``graph(work, pool)`` records; default: `CudaGraph`.

    Attributes
    ----------
    captures : int
        Graphs captured so far.

    Raises
    ------
    UnsupportedError
        If passes of this decoder cannot be captured; `why_not` lists the reasons.
    """

    def __init__(
        self, decoder: Decoder, forward: Callable[..., Any], *, graph: Callable[..., Graph] = CudaGraph
    ) -> None:
        if graph is CudaGraph and (reasons := why_not(decoder)):
            raise UnsupportedError(f"{decoder.attention.backend.name} in CUDA graphs", reasons)
        self.decoder, self.forward, self.captures = decoder, forward, 0
        self._graph = graph
        self._contexts: FixedContexts | None = None
        self._place: int | None = None
        self._every: dict[Hashable, FixedContexts] = {}
        self._seen: set[Hashable] = set()
        self._passes: dict[Hashable, _Captured] = {}
        self._buffers: dict[Hashable, list[torch.Tensor]] = {}
        self._left: tuple[tuple[LayerMemory | None, ...], Hashable] = (), None
        self._pool: Any = torch.cuda.graph_pool_handle() if graph is CudaGraph else None

    def __repr__(self) -> str:
        return f"CapturedPasses({self.decoder!r}, captures={self.captures})"

    def start_block(self, contexts: Sequence[Context], *, total_passes: int | None = None) -> None:
        """Begin a block.

        Parameters
        ----------
        contexts : sequence of Context
            One a layer. Graphs serve contexts whose pages lie in the same memory and whose tables have the same
            shape. Tables of another shape need graphs of their own; pages in other memory make all graphs anew.
            Tables, lengths and segments are copied.
        total_passes : int, optional
            As for `Decoder.start_block`.

        Raises
        ------
        CallOrderError, InvalidArgumentError, InvalidTypeError
            As `Decoder.start_block` does.
        """
        fixed = self.use_contexts(self.decoder.check_start(contexts))
        self.decoder.start_block(fixed, total_passes=total_passes)

    def use_contexts(self, contexts: Sequence[Context]) -> tuple[Context, ...]:
        """Return contexts as graphs read them: for a block of a decoder whose calls bring contexts of their own.

        Parameters
        ----------
        contexts : sequence of Context
            One a layer, as for `start_block`.
        """
        key, place = FixedContexts.key(contexts), contexts[0].k_pages.data_ptr()
        if place != self._place:  # another cache, and this one's would be kept alive for nothing
            self._place, self._left = place, ((), None)
            for kept in (self._every, self._seen, self._passes):
                kept.clear()
        if key not in self._every:
            self._every[key] = FixedContexts(contexts)
        self._contexts = self._every[key]
        self._contexts.take(contexts)
        return self._contexts.contexts

    def replace_contexts(self, contexts: Sequence[Context]) -> None:
        """Let sequences of a running batch go on with other tokens, between two passes.

        Sequences whose block ends and whose next one begins (``next_pass(index=...)`` is 0 for them) have grown, or
        another request has taken their place.

        Parameters
        ----------
        contexts : sequence of Context
            One a layer, whose pages lie where those of `start_block` lie.

        Raises
        ------
        CallOrderError
            If no block is under way, or pages lie elsewhere.
        """
        if self._contexts is None or not self.decoder.running:
            raise CallOrderError(
                "replace_contexts()", "must be called within a block", "no block", "Call start_block() first."
            )
        if self._every.get(FixedContexts.key(contexts)) is not self._contexts:
            raise CallOrderError(
                "replace_contexts()",
                "must bring pages that lie where those of the block lie",
                "others",
                "Call start_block() with them.",
            )
        self._contexts.take(contexts)

    def __call__(self, step: DecoderPass, *args: Any, **kwargs: Any) -> Any:
        """Run one pass.

        Parameters
        ----------
        step : DecoderPass
            The pass, from `Decoder.next_pass`.
        *args, **kwargs
            For ``forward``.

        Returns
        -------
        object
            What ``forward`` returns, its tensors copied.
        """
        if self._contexts is None:
            raise CallOrderError("a pass", "must be run within a block", "no block", "Call start_block() first.")
        inputs = args, kwargs, step.info
        key = id(self._contexts), self._form(), skeleton((args, kwargs)), _kind(step)
        captured = self._passes.get(key)
        if captured is None and key not in self._seen:
            self._seen.add(key)
            return self.forward(step, *args, **kwargs)
        if captured is None:
            captured = self._passes[key] = _Captured(self, step, inputs)
            self.captures += 1
        return captured.run(self, step, inputs)

    @property
    def lies_in_buffers(self) -> bool:
        """Whether the decoder's memories are those that the last replay has left, where it left them."""
        return self._left[0] == self.decoder.memories

    def _form(self) -> Hashable:
        """Return the skeleton of the decoder's memories."""
        return self._left[1] if self.lies_in_buffers else skeleton(self.decoder.memories, KEPT_APART)

    def left_by_replay(self, memories: tuple[LayerMemory | None, ...], form: Hashable) -> None:
        """Remember what lies in the buffers, for the next pass."""
        self._left = memories, form

    def buffers(self, memories: Any) -> list[torch.Tensor]:
        """Return where memories of this form lie, whichever pass left them."""
        form = skeleton(memories, KEPT_APART)
        if form not in self._buffers:
            self._buffers[form] = [torch.empty_like(part) for part in tensors_of(memories, KEPT_APART)]
        return self._buffers[form]


class _Captured:
    """One kind of pass."""

    def __init__(self, owner: CapturedPasses, step: DecoderPass, inputs: Any) -> None:
        decoder = owner.decoder
        self._inputs = [tensor.clone() for tensor in tensors_of(inputs)]
        args, kwargs, info = filled(inputs, self._inputs)
        self._before = owner.buffers(decoder.memories)
        recorded = decoder.recorded_pass(filled(decoder.memories, self._before, KEPT_APART), info)

        def work() -> None:
            self._out = owner.forward(recorded, *args, **kwargs)
            made = recorded.decoder.memories
            after = owner.buffers(made)
            copy_tensors(after, list(tensors_of(made, KEPT_APART)))
            self._memories: tuple[LayerMemory | None, ...] = filled(made, after, KEPT_APART)

        with _recording():
            self._graph = owner._graph(work, owner._pool)
        self._form = skeleton(self._memories, KEPT_APART)

    def run(self, owner: CapturedPasses, step: DecoderPass, inputs: Any) -> Any:
        copy_tensors(self._inputs, list(tensors_of(inputs)))
        if not owner.lies_in_buffers:
            copy_tensors(self._before, list(tensors_of(owner.decoder.memories, KEPT_APART)))
        self._graph.replay()
        step.replayed(self._memories, self._traffic)
        owner.left_by_replay(self._memories, self._form)
        return map_tensors(torch.clone, self._out)

    def _traffic(self) -> tuple[Traffic, ...]:
        """Return what the layers read: copies, since the next replay writes over it."""
        memories = [memory for memory in self._memories if memory is not None]
        return tuple(map_tensors(torch.clone, memory.traffic) for memory in memories)


def _kind(step: DecoderPass) -> Hashable:
    """Return what of a pass the host decides by."""
    info = step.info
    if not isinstance(info.index, int) or info.window is not None:  # windows may be counted by it
        return skeleton(info)
    others = (skeleton(getattr(info, field.name)) for field in fields(info) if field.name != "index")
    return tuple(others), info.index == 0
