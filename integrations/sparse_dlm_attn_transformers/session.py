"""Attaching sparse attention to a model: what runs when, and what is kept for how long."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, get_args

import torch

from sparse_dlm_attn import (
    Backend,
    CallOrderError,
    Decoder,
    InvalidArgumentError,
    InvalidTypeError,
    PrefixAttentionPolicy,
)
from sparse_dlm_attn.policy import check_choice, check_count, check_flag
from sparse_dlm_attn_transformers.attachment import Scope, attachment_for
from sparse_dlm_attn_transformers.block_state import BlockState, PassReport
from sparse_dlm_attn_transformers.contracts import ModuleContract
from sparse_dlm_attn_transformers.interface import sessions
from sparse_dlm_attn_transformers.passes import ModelPasses

__all__ = ["SparseAttention"]


class SparseAttention(ModelPasses):
    """Sparse attention in a model of transformers, for as long as it is attached.

    Use it as ``with SparseAttention(model, policy) as sparse:``; leaving detaches. Outside of blocks
    (prefill) attention is dense, as before.

    Parameters
    ----------
    model : torch.nn.Module
        DiffusionGemma, or a model whose attention modules have a contract in `CONTRACTS`; in eval mode.
    policy : str or PrefixAttentionPolicy
        As for :class:`sparse_dlm_attn.PrefixAttention`.
    backend : str or Backend
        As for :class:`sparse_dlm_attn.PrefixAttention`; on an NVIDIA GPU "triton".
    page_size : int
        Tokens a page. A prefix of fewer tokens gets smaller pages.
    scope : {"prefix", "sequence"}, optional
        What a block reads: a cache of what stands before it, or itself alone, as whole-sequence diffusers do.
        Default: what the contract of the model says.
    contract : ModuleContract, optional
        How attention modules of a class that `CONTRACTS` does not list are built.
    on_pass : callable, optional
        Called with a `PassReport` when a pass is over.
    cuda_graph : bool
        Whether whole forward passes within blocks run as CUDA graphs: captured once, and replayed in every block whose
        cache lies in the same memory, a `PagedCache` or a `StaticCache`. The first pass of a kind runs as it is, the
        second is captured: a block's first pass, its other ones, the save pass; anew for every eighth that the context
        grows. Results are the same bits.

    Attributes
    ----------
    decoder : Decoder
        The memories, and who says when they end.
    graphs : CapturedPasses or None
        With ``cuda_graph``: ``graphs.captures`` counts them.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If the model cannot be attached to; it is unchanged then.
    UnsupportedError
        If ``cuda_graph`` is set and policy, backend or model rule it out, with every reason.
    UnknownNameError, UnavailableError
        If policy or backend cannot be had.

    Warns
    -----
    UserWarning
        When the `with` ends, if no block was ever started, or no block had a context to read.

    Notes
    -----
    Blocks are found by themselves where the model's own loop shows them. DiffusionGemma's decoder starts
    them, and its encoder, or the end of ``generate``, finishes them. Models with a flag for the pass that
    writes the cache (SDAR, Fast-dLLM v2) start one with a pass over a cache without the flag, and finish it
    with one that has it. For other models the loop says so, by `block` or by `start_block` and
    `finish_block`: each forward pass between them is a pass over the block, and one with ``is_save`` (or the
    flag) appends it to the cache.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        policy: str | PrefixAttentionPolicy[Any] = "dense",
        backend: str | Backend = "torch",
        *,
        page_size: int = 16,
        scope: Scope | None = None,
        contract: ModuleContract | None = None,
        on_pass: Callable[[PassReport], None] | None = None,
        cuda_graph: bool = False,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise InvalidTypeError("model", "must be a torch.nn.Module", type(model).__name__, "Pass the loaded model.")
        check_count("page_size", page_size, 1)
        if on_pass is not None and not callable(on_pass):
            raise InvalidTypeError("on_pass", "must be callable or None", type(on_pass).__name__)
        check_flag("cuda_graph", cuda_graph)
        if scope is not None:
            check_choice("scope", scope, get_args(Scope))
        if not isinstance(contract, ModuleContract | None):
            raise InvalidTypeError("contract", "must be a ModuleContract or None", type(contract).__name__)
        attachment = attachment_for(model, contract, scope)
        super().__init__(attachment, Decoder(policy, backend, layers=len(attachment.layers)), page_size, on_pass)
        computes = self.decoder.attention.backend
        if not isinstance(computes.asarray([0.0], dtype="float32"), torch.Tensor):
            raise InvalidTypeError(
                "backend",
                "must compute on tensors of PyTorch, as models of transformers do",
                repr(computes.name),
                "Pass 'torch', or 'triton' on a GPU.",
            )
        if cuda_graph:
            self.graphs = self._graphs()
        attachment.attach(self)

    def __repr__(self) -> str:
        return f"SparseAttention({self._attachment.description}, {self.decoder!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.detach()
        if kind is None:
            self._warn_of_no_effect()

    @staticmethod
    def of(model: torch.nn.Module) -> SparseAttention | None:
        """Return what is attached to a model, None if nothing is.

        Parameters
        ----------
        model : torch.nn.Module
            The model, or a part of it.

        Returns
        -------
        SparseAttention or None
            For instance to call its `detach` where the variable that held it is gone.

        Raises
        ------
        InvalidTypeError
            If ``model`` is not a module.
        """
        if not isinstance(model, torch.nn.Module):
            raise InvalidTypeError("model", "must be a torch.nn.Module", type(model).__name__)
        found = (sessions[module]() for module in model.modules() if module in sessions)
        return next(found, None)

    @property
    def memory_bytes(self) -> int:
        """Bytes that are kept for the next pass: attention states and page bounds of all layers."""
        memories = [memory for decoder in self._decoders for memory in decoder.memories if memory is not None]
        kept = [part for memory in memories for part in (memory.state.out, memory.state.lse)]
        bounds = [memory.bounds for memory in memories if memory.bounds is not None]
        kept += [part for one in bounds for part in (one.lower, one.upper)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def detach(self) -> None:
        """Give the model back as it was, and let go of everything; doing it again changes nothing."""
        try:
            self.finish_block()  # whose `on_pass` is the user's, and may raise
        finally:
            self.reset()
            for undo in self._unfollow.values():
                undo()
            self._unfollow.clear()
            self._attachment.detach()

    def reset(self) -> None:
        """End the sequence: let go of what policies keep of it from block to block.

        It happens by itself when a new prompt is encoded: in a forward pass outside of a block that has no
        cache, or an empty one.

        Raises
        ------
        CallOrderError
            If a block is under way.
        """
        self._refuse_within_a_block("reset()")
        self.decoder.reset()
        self._others.clear()

    def reorder(self, indices: torch.Tensor) -> None:
        """Follow a change of which sequences the cache holds, in which order: beams, continuous batches.

        ``reorder_cache``, ``batch_select_indices`` and ``batch_repeat_interleave`` of a cache that the model
        was called with while attached do this by themselves.

        Parameters
        ----------
        indices : torch.Tensor
            Integers ``(new batch,)``: which of the old sequences each new one was.

        Raises
        ------
        CallOrderError
            If a block is under way.
        InvalidArgumentError, InvalidTypeError
            If an index is none of a sequence.
        """
        self._refuse_within_a_block("reorder()")
        self.decoder.reorder(indices)

    def _refuse_within_a_block(self, call: str) -> None:
        if self.running:
            raise CallOrderError(
                call, "must be called between blocks", repr(self.decoder), "Call finish_block() first."
            )

    def start_block(self, *, total_passes: int | None = None) -> None:
        """Begin a block: the next forward pass is its first.

        Parameters
        ----------
        total_passes : int, optional
            Denoising passes planned, the save pass not counted.

        Raises
        ------
        CallOrderError
            If a block is under way, or nothing is attached any more.
        """
        if not self._attachment.attached:
            raise CallOrderError(
                "start_block()",
                "must be called while attached",
                "a model that was detached from",
                "Make another SparseAttention(model, ...).",
            )
        if self._state.cache is not None:
            self.finish_block()  # which the model's own loop began
        if self._attachment.scope == "sequence" and not self.running:
            self.reset()  # each block is a sequence of its own
        self.decoder.start_block(total_passes=total_passes)
        self._state = BlockState(total_passes)

    def next_pass(self, decoded: torch.Tensor | None = None, *, is_save: bool = False) -> None:
        """Say something about the next forward pass; without this call it is one more denoising pass.

        Parameters
        ----------
        decoded : torch.Tensor, optional
            bool ``(batch, tokens)``: tokens that are no longer masked, for policies that ask for it.
        is_save : bool
            Whether it runs over the finished block and appends it to the cache.

        Raises
        ------
        CallOrderError
            If no block is under way.
        InvalidArgumentError
            If the policy would leave rows out by it: models of transformers compute all of them.
        """
        policy = self.decoder.attention.policy
        if decoded is not None and type(policy).computed_tokens is not PrefixAttentionPolicy.computed_tokens:
            raise InvalidArgumentError(
                "decoded",
                f"must be None for {policy.name!r}, which leaves rows out by it: a model of "
                "transformers computes them all",
                "a mask",
                "Leave it out, or use a Decoder in your own loop.",
            )
        self._report()
        self._state.announced = tuple(one.next_pass(decoded, is_save=is_save) for one in self._decoders)
        self._state.decoded = decoded

    def finish_block(self) -> None:
        """End the block and let go of states, pages and metadata; nothing happens between blocks."""
        try:
            self._report()
        finally:
            for decoder in self._decoders:
                decoder.finish_block()
            self._state = BlockState()

    @contextmanager
    def block(self, *, total_passes: int | None = None) -> Iterator[None]:
        """Run a block: `start_block` now and `finish_block` on leaving, whatever happens."""
        self.start_block(total_passes=total_passes)
        try:
            yield
        finally:
            self.finish_block()

    def _warn_of_no_effect(self) -> None:
        """Tell, at the end, what could not be known before: that nothing was sparse, and why."""
        told = ""
        if self.decoder.blocks == 0 and self._passes_outside and not self._attachment.starts_blocks:
            told = (
                f"{self._passes_outside} forward passes ran while attached, none of them within a block: all "
                "used the model's own attention. Run a block's passes within `with sparse.block():`."
            )
        elif self._passes_within and not self._had_context:
            told = (
                "no block had a context to read, so the policy had no effect. Pass the model a cache that "
                "holds what stands before the block, or use SparseAttention(..., scope='sequence') where the "
                "block is the whole sequence."
            )
        if told:
            warnings.warn(told, UserWarning, stacklevel=3)
