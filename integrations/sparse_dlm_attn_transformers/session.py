"""Attaching sparse attention to a model: what runs when, and what is kept for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch

from sparse_dlm_attn import (
    Backend,
    CallOrderError,
    Context,
    Decoder,
    InvalidArgumentError,
    InvalidTypeError,
    PrefixAttentionPolicy,
    StaleMemoryError,
)
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn.runs import largest_page_size
from sparse_dlm_attn_transformers.attachment import Attachment, attachment_for
from sparse_dlm_attn_transformers.block_state import BlockState, LayerState, PassReport
from sparse_dlm_attn_transformers.caches import cached_layer
from sparse_dlm_attn_transformers.interface import sessions
from sparse_dlm_attn_transformers.masks import visible_context

__all__ = ["SparseAttention"]


class SparseAttention:
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
        As for :class:`sparse_dlm_attn.PrefixAttention`; on a GPU for instance "torch:device=cuda".
    page_size : int
        Tokens a page. A prefix of fewer tokens gets smaller pages.
    on_pass : callable, optional
        Called with a `PassReport` when a pass is over.

    Attributes
    ----------
    decoder : Decoder
        The memories, and who says when they end.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If the model cannot be attached to; it is unchanged then.
    UnknownNameError, UnavailableError
        If policy or backend cannot be had.

    Notes
    -----
    DiffusionGemma's blocks are found by themselves: its decoder starts them, and its encoder, or the end of
    ``generate``, finishes them. For other models the loop says so, by `block` or by `start_block` and
    `finish_block`; each forward pass between them is a pass over the block, and one with ``is_save`` (or the
    model's own flag for it) appends the block to the cache.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        policy: str | PrefixAttentionPolicy[Any] = "dense",
        backend: str | Backend = "torch",
        *,
        page_size: int = 16,
        on_pass: Callable[[PassReport], None] | None = None,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise InvalidTypeError(
                "model", "must be a torch.nn.Module", type(model).__name__, "Pass the loaded model."
            )
        check_count("page_size", page_size, 1)
        if on_pass is not None and not callable(on_pass):
            raise InvalidTypeError("on_pass", "must be callable or None", type(on_pass).__name__)
        self.page_size, self.on_pass = page_size, on_pass
        self._attachment: Attachment = attachment_for(model)
        self._numbers = {id(module): at for at, module in enumerate(self._attachment.layers)}
        self.decoder = Decoder(policy, backend, layers=len(self._numbers))
        computes = self.decoder.attention.backend
        if not isinstance(computes.asarray([0.0], dtype="float32"), torch.Tensor):
            raise InvalidTypeError(
                "backend", "must compute on tensors of PyTorch, as models of transformers do",
                repr(computes.name), "Pass 'torch', or 'triton' on a GPU.",
            )
        self._state = BlockState()
        self._attachment.attach(self)

    def __repr__(self) -> str:
        return f"SparseAttention({self._attachment.description}, {self.decoder!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

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
    def running(self) -> bool:
        """Whether a block is under way."""
        return self.decoder.running

    @property
    def memory_bytes(self) -> int:
        """Bytes that are kept for the next pass: attention states and page bounds of all layers."""
        total = 0
        for memory in self.decoder.memories:
            if memory is not None:
                kept = [memory.state.out, memory.state.lse]
                kept += [] if memory.bounds is None else [memory.bounds.lower, memory.bounds.upper]
                total += sum(tensor.numel() * tensor.element_size() for tensor in kept)
        return total

    def detach(self) -> None:
        """Give the model back as it was, and let go of everything; doing it again changes nothing."""
        try:
            self.finish_block()  # whose `on_pass` is the user's, and may raise
        finally:
            self.decoder.reset()
            self._attachment.detach()

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
                "start_block()", "must be called while attached", "a model that was detached from",
                "Make another SparseAttention(model, ...).",
            )
        self.decoder.start_block(total_passes=total_passes)
        self._state = BlockState()

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
                "decoded", f"must be None for {policy.name!r}, which leaves rows out by it: a model of "
                "transformers computes them all", "a mask",
                "Leave it out, or use a Decoder in your own loop.",
            )
        self._report()
        self._state.announced = self.decoder.next_pass(decoded, is_save=is_save)

    def finish_block(self) -> None:
        """End the block and let go of states, pages and metadata; nothing happens between blocks."""
        try:
            self._report()
        finally:
            self.decoder.finish_block()
            self._state = BlockState()

    @contextmanager
    def block(self, *, total_passes: int | None = None) -> Iterator[None]:
        """Run a block: `start_block` now and `finish_block` on leaving, whatever happens."""
        self.start_block(total_passes=total_passes)
        try:
            yield
        finally:
            self.finish_block()

    def attends(self, module: torch.nn.Module) -> bool:
        """Whether a module's attention is ours at this moment."""
        return self.running and id(module) in self._numbers

    def attend(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        cache: Any = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attend in one layer of the pass under way; for attention modules, not for users.

        Parameters
        ----------
        module : torch.nn.Module
            The attention module.
        q, k, v : torch.Tensor
            ``(batch, heads, tokens, head_dim)`` of the block.
        mask : torch.Tensor, optional
            What the block may see, if the module knows; default: what the model was called with.
        cache : Cache, optional
            What stands before the block; default: what the module was given.
        scale : float, optional
            Softmax scale.

        Returns
        -------
        torch.Tensor
            ``(batch, q_heads, tokens, head_dim)``.
        """
        step = self._state.running
        if step is None:
            raise CallOrderError(
                "an attention module", "must run within the model's forward pass", "a call on its own",
                "Call the model.",
            )
        number = self._numbers[id(module)]
        if self._attachment.scope == "sequence":
            out: torch.Tensor = step(number, q, None, None, self._sequence(k, v), scale=scale)
            return out
        layer_idx = self._attachment.layer_idx(module)
        cached = self._attachment.cached(module) if cache is None else cached_layer(cache, layer_idx)
        keys, values = (k[:, :, :0], v[:, :, :0]) if cached is None else cached
        context = self._context(number, keys, values, self._state.mask if mask is None else mask, q)
        out = step(number, q, k, v, context, scale=scale)
        if step.info.is_save and cache is not None:
            cache.update(k, v, layer_idx)
        return out

    def enter_pass(self, arguments: dict[str, Any]) -> None:
        """Begin a forward pass of the layers; called by the attachment."""
        if not self.running and not self._attachment.starts_blocks:
            return
        self._attachment.check_still_ours()
        if not self.running:
            self.start_block()
        is_save = self._attachment.is_save(arguments)
        if self._state.announced is None:
            self.next_pass(is_save=is_save)
        state = self._state
        state.running, state.announced = state.announced, None
        state.mask = self._attachment.mask(arguments)
        state.masks = {key: read for key, read in state.masks.items() if read[0] is state.mask}

    def leave_pass(self) -> None:
        """End a forward pass of the layers; called by the attachment."""
        state = self._state
        step, state.running, state.mask = state.running, None, None
        if step is None or not self.running:
            return
        if step.missing:
            raise CallOrderError(
                "a forward pass", "must run attention in every layer",
                f"layers {list(step.missing)} left out",
                "Their attention does not reach us: check the model's attn_implementation.",
            )
        state.reportable = step

    def _report(self) -> None:
        """Tell what the pass before read, once."""
        step, self._state.reportable = self._state.reportable, None
        if step is None or self.on_pass is None:
            return
        index, is_save = step.info.index, step.info.is_save
        assert isinstance(index, int) and isinstance(is_save, bool)
        self.on_pass(PassReport(self.decoder.blocks - 1, index, is_save, step.traffic))

    def _context(
        self, number: int, keys: torch.Tensor, values: torch.Tensor, mask: Any, q: torch.Tensor
    ) -> Context:
        """Return the pages of a layer: viewed in the block's first pass, the same ones after it."""
        layer = self._state.layers.get(number)
        if layer is None:
            if keys.shape[0] != q.shape[0]:
                raise InvalidArgumentError(
                    "cache", f"must hold as many sequences as the block, {q.shape[0]}", int(keys.shape[0]),
                    "Prefill it with the same batch, or call its batch_repeat_interleave().",
                )
            valid = self._visible(mask, q, int(keys.shape[2]))
            size = largest_page_size(valid, self.page_size)
            context = Context.from_dense(keys, values, size, valid=valid, version=self.decoder.blocks)
            layer = self._state.layers[number] = LayerState(keys, context, mask, valid)
        elif layer.keys.shape != keys.shape or (keys.numel() and layer.keys.data_ptr() != keys.data_ptr()):
            raise StaleMemoryError(
                f"the cache of layer {number} changed in the middle of a block: {tuple(layer.keys.shape)} "
                f"became {tuple(keys.shape)} or moved. Call finish_block() before anything is appended."
            )
        elif mask is not layer.mask:
            self._check_same_mask(layer, mask, q)
        return layer.context

    def _check_same_mask(self, layer: LayerState, mask: Any, q: torch.Tensor) -> None:
        """Raise if another mask than the first pass's hides other tokens, where that can be seen at no wait.

        A mask on a device is read only where the first pass had none.
        """
        on_device = isinstance(mask, torch.Tensor) and mask.device.type != "cpu"
        if on_device and layer.mask is not None:
            return
        if not np.array_equal(self._visible(mask, q, int(layer.keys.shape[2])), layer.valid):
            raise InvalidArgumentError(
                "attention_mask", "must hide the same tokens of the cache in every pass of a block",
                "other tokens than in its first pass",
                "Pass one mask to all of them, or call finish_block() first.",
            )

    def _sequence(self, k: torch.Tensor, v: torch.Tensor) -> Context:
        """Return the pages of a whole sequence, whose keys are those of this pass."""
        valid = self._visible(self._state.mask, k, int(k.shape[2]))
        if not valid.all():
            raise InvalidArgumentError(
                "attention_mask", "must hide nothing where the block is the whole sequence", "padding",
                "Run sequences of different lengths one by one.",
            )
        k, v = k.contiguous(), v.contiguous()
        size = largest_page_size(valid, self.page_size)
        return Context.from_dense(k, v, size, valid=valid, version=self.decoder.blocks)

    def _visible(self, mask: Any, q: torch.Tensor, context_tokens: int) -> np.ndarray[Any, Any]:
        """Read a mask, once for all the layers that share it."""
        key = (id(mask), context_tokens)
        if key not in self._state.masks:
            valid = visible_context(mask, int(q.shape[0]), context_tokens, int(q.shape[2]))
            self._state.masks[key] = (mask, valid)  # the mask too, lest another one get its id
        return self._state.masks[key][1]
