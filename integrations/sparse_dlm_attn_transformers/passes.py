"""Passes over a block: what attention modules and attachments of an attached model call, and its graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from sparse_dlm_attn import CallOrderError, Decoder, InvalidArgumentError, UnsupportedError
from sparse_dlm_attn.decoder import DecoderPass
from sparse_dlm_attn_cuda_graphs import CapturedPasses
from sparse_dlm_attn_transformers.attachment import Attachment, first_input
from sparse_dlm_attn_transformers.block_state import (
    BlockState,
    PassReport,
    autocasts,
    in_one_dtype,
    pages_of,
    whole_block,
)
from sparse_dlm_attn_transformers.caches import CachedLayer, cache_argument, cached_layer, follow_sequences
from sparse_dlm_attn_transformers.compilation import eager_throughout
from sparse_dlm_attn_transformers.paged_cache import PagedCache

__all__ = ["ModelPasses"]


class ModelPasses(ABC):
    """What `SparseAttention` does within a forward pass.

    Parameters
    ----------
    attachment : Attachment
        How the model is attached to.
    decoder : Decoder
        Of its layers.
    page_size : int
        Tokens a page.
    on_pass : callable or None
        Called with a `PassReport` when a pass is over.
    """

    def __init__(
        self, attachment: Attachment, decoder: Decoder, page_size: int, on_pass: Callable[[PassReport], None] | None
    ) -> None:
        self._attachment, self.decoder, self.page_size, self.on_pass = attachment, decoder, page_size, on_pass
        self._numbers = {id(module): at for at, module in enumerate(attachment.layers)}
        self._others: list[Decoder] = []  # for sequences after the first, where they run one by one
        self._passes_outside, self._passes_within, self._had_context = 0, 0, False
        self._unfollow: dict[int, Callable[[], None]] = {}
        self._state = BlockState()
        self.graphs: CapturedPasses | None = None

    @abstractmethod
    def start_block(self, *, total_passes: int | None = None) -> None: ...

    @abstractmethod
    def next_pass(self, decoded: torch.Tensor | None = None, *, is_save: bool = False) -> None: ...

    @abstractmethod
    def finish_block(self) -> None: ...

    @abstractmethod
    def reset(self) -> None: ...

    @abstractmethod
    def reorder(self, indices: torch.Tensor) -> None: ...

    @property
    def running(self) -> bool:
        """Whether a block is under way."""
        return self.decoder.running

    @property
    def _decoders(self) -> tuple[Decoder, ...]:
        return (self.decoder, *self._others)

    def _graphs(self) -> CapturedPasses:
        reasons = self._attachment.why_no_graphs()
        if int(transformers.__version__.split(".")[0]) < 5:
            reasons.append(f"transformers {transformers.__version__} counts cached tokens on the host; 5 does not")
        try:
            graphs = CapturedPasses(self.decoder, self._run_layers)
        except UnsupportedError as error:
            reasons += error.reasons
        if reasons:
            raise UnsupportedError("cuda_graph=True", reasons)
        return graphs

    def attends(self, module: torch.nn.Module) -> bool:
        """Whether a module's attention is ours at this moment."""
        return self.running and id(module) in self._numbers

    @eager_throughout
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
        block_cache: Any = None,
        block_start: int | None = None,
    ) -> torch.Tensor:
        """Attend in one layer of the pass under way; for attention modules, not for users.

        Parameters
        ----------
        module : torch.nn.Module
            The attention module.
        q, k, v : torch.Tensor
            ``(batch, heads, tokens, head_dim)`` of the block, or of the rows that this pass computes.
        mask : torch.Tensor, optional
            What the block may see, if the module knows; default: what the model was called with.
        cache : Cache, optional
            What stands before the block; default: what the module was given.
        scale : float, optional
            Softmax scale.
        block_cache : Cache, optional
            Keys and values of all rows of the block; those of the rows computed are written into it.
        block_start : int, optional
            Where the rows computed begin in the block.

        Returns
        -------
        torch.Tensor
            ``(batch, q_heads, tokens, head_dim)``.
        """
        state, number = self._state, self._numbers[id(module)]
        if not state.running:
            raise CallOrderError(
                "an attention module",
                "must run within the model's forward pass",
                "a call on its own",
                "Call the model.",
            )
        q, k, v = in_one_dtype(q, k, v)
        if self._attachment.scope == "sequence":
            return self._whole_sequences(number, q, k, v, scale)
        layer_idx = self._attachment.layer_idx(module)
        cached = self._attachment.cached(module) if cache is None else cached_layer(cache, layer_idx)
        if cached is None:
            cached = CachedLayer(k[:, :, :0], v[:, :, :0], 0, False)
        else:
            self._had_context = True
        layer = state.layer(number, cached, mask, q.shape[0], q.shape[2], self.page_size, version=self.decoder.blocks)
        first = block_start or 0
        rows = slice(first, first + q.shape[2]) if block_cache is not None else slice(None)
        if block_cache is not None:
            q, k, v = whole_block(layer, block_cache, layer_idx, rows, q, k, v)
        (step,) = state.running
        out: torch.Tensor = step(number, q, k, v, layer.context, scale=scale)
        if step.info.is_save and cache is not None:
            cache.update(k, v, layer_idx)
        return out[:, :, rows]

    def _whole_sequences(
        self, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attend where the block is the whole sequence, whose keys are those of this pass."""
        state, version = self._state, self.decoder.blocks
        self._had_context = True
        exists = state.existing_tokens(q)
        if exists.all():
            (step,) = state.running
            whole: torch.Tensor = step(number, q, None, None, pages_of(k, v, self.page_size, version), scale=scale)
            return whole
        # One by one, so that each gets what it gets alone: spans and active rows count its own tokens.
        self._divide(len(exists))
        out = torch.zeros_like(q)
        for at, step in enumerate(state.running):
            rows = torch.from_numpy(np.flatnonzero(exists[at])).to(q.device)
            own_q, own_k, own_v = (x[at : at + 1].index_select(2, rows) for x in (q, k, v))
            pages = pages_of(own_k, own_v, self.page_size, version)
            out[at : at + 1].index_copy_(2, rows, step(number, own_q, None, None, pages, scale=scale))
        return out

    def _divide(self, batch: int) -> None:
        """Give each sequence a decoder of its own, in the block's first pass."""
        state, attention = self._state, self.decoder.attention
        if state.decoded is not None:
            raise InvalidArgumentError(
                "decoded",
                "must be None where whole sequences are padded, which run one by one",
                "a mask",
                "Leave it out, or run sequences of one length together.",
            )
        for _ in range(len(state.running), batch):
            other = Decoder(attention.policy, attention.backend, layers=self.decoder.layers)
            other.start_block(total_passes=state.total_passes)
            self._others.append(other)
            state.running += (other.next_pass(is_save=bool(state.running[0].info.is_save)),)

    @contextmanager
    def model_pass(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Run a forward pass of the layers; called by the attachment."""
        if self._state.running or not self._enter_pass(arguments):  # it runs already where graphs are made
            yield
            return
        try:
            yield
        except BaseException:
            self._state.end_pass()
            raise
        self._leave_pass()

    def graphed_pass(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run a forward pass of the whole model, within a block as a graph; called by the attachment."""
        if not self._enter_pass(arguments):
            return forward(**arguments)
        graphs, state, cache = self.graphs, self._state, cache_argument(arguments)
        assert graphs is not None
        try:
            tokens = first_input(arguments)
            if not state.layers:
                self._use_buffers(cache, *tokens.shape[:2])
            elif state.mask is not state.layers[0].mask:
                state.check_same_mask(state.layers[0], state.mask, *tokens.shape[:2])
            (step,) = state.running
            if step.info.is_save:
                state.check_room(int(tokens.shape[1]))
            before = cache.get_seq_length() if isinstance(cache, PagedCache) else None
            out = graphs(step, forward, **self._attachment.without_mask(arguments))
            if step.info.is_save and isinstance(cache, PagedCache) and cache.get_seq_length() == before:
                cache.advance(tokens.shape[1])  # which the graph has written
        except BaseException:
            state.end_pass()
            raise
        self._leave_pass()
        return out

    def _run_layers(self, step: DecoderPass, forward: Callable[..., Any], **arguments: Any) -> Any:
        """Run the model for a pass, which a graph may record."""
        running, self._state.running = self._state.running, (step,)
        try:
            return forward(**arguments)
        finally:
            self._state.running = running

    def _use_buffers(self, cache: Any, batch: int, tokens: int) -> None:
        """View what all layers read, before the first of them runs."""
        graphs, state, layers = self.graphs, self._state, self._attachment.layers
        assert graphs is not None
        for number, module in enumerate(layers):
            cached = cached_layer(cache, self._attachment.layer_idx(module))
            if cached is None or not cached.stays:
                raise InvalidArgumentError(
                    "cache",
                    "must be a PagedCache or a StaticCache that holds the prompt, as graphs read it where it lies",
                    "an empty one" if cached is None else f"a {type(cache).__name__}",
                    "Prefill with past_key_values=PagedCache(model.config, batch, tokens).",
                )
            if autocasts(cached.keys):
                raise InvalidArgumentError(
                    "cuda_graph",
                    "must be False under torch.autocast",
                    True,
                    "Load the model in the dtype it shall have.",
                )
            state.layer(number, cached, None, batch, tokens, self.page_size, version=0)
        self._had_context = True
        fixed = graphs.use_contexts([state.layers[number].context for number in range(len(layers))])
        for number, context in enumerate(fixed):
            state.layers[number].context = context

    def _enter_pass(self, arguments: dict[str, Any]) -> bool:
        """Begin a pass, and its block where the model's own loop shows it; return whether there is one."""
        cache = cache_argument(arguments)
        if self._state.cache is not None and cache is not self._state.cache:
            self.finish_block()  # the model's own loop gave the block up
        if not self.running:
            if not self._attachment.begins_block(arguments):
                self.prefill(cache)
                return False
            self._begin(cache)
        self._attachment.check_still_ours()
        if not self._state.announced:
            self.next_pass(is_save=self._attachment.is_save(arguments))
        self._state.begin_pass(self._attachment.mask(arguments))
        return True

    def prefill(self, cache: Any) -> None:
        """Take note of a forward pass outside of blocks; called by the attachment."""
        self._passes_outside += 1
        if cache is None or (hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) == 0):
            self.reset()
        keeps = self.decoder.attention.policy.memory_scope == "sequence"
        if keeps and cache is not None and id(cache) not in self._unfollow:
            for undo in self._unfollow.values():
                undo()
            self._unfollow = {id(cache): follow_sequences(cache, self._sequences_moved)}

    def _sequences_moved(self, indices: torch.Tensor) -> None:
        if not self.running and self.decoder.memories[0] is not None:
            self.reorder(indices)

    def _begin(self, cache: Any) -> None:
        """Begin a block because the model's own loop does."""
        self._attachment.check_still_ours()
        self.start_block()
        if self._attachment.ends_with_save:
            self._state.cache = cache

    def _leave_pass(self) -> None:
        steps = self._state.end_pass()
        if not steps or not self.running:
            return
        if missing := sorted({layer for step in steps for layer in step.missing}):
            raise CallOrderError(
                "a forward pass",
                "must run attention in every layer",
                f"layers {missing} left out",
                "Their attention does not reach us: check the model's attn_implementation.",
            )
        self._state.reportable, self._passes_within = steps, self._passes_within + 1
        if self._state.cache is not None and steps[0].info.is_save:
            self.finish_block()

    def _report(self) -> None:
        """Tell what the pass before read, once."""
        steps, self._state.reportable = self._state.reportable, ()
        if not steps or self.on_pass is None:
            return
        index, is_save = steps[0].info.index, steps[0].info.is_save
        assert isinstance(index, int) and isinstance(is_save, bool)
        traffic = tuple(traffic for step in steps for traffic in step.traffic)
        self.on_pass(PassReport(self.decoder.blocks - 1, index, is_save, traffic))
