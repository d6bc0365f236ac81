"""Attaching sparse attention to a model: what runs when, and what is kept for how long."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, get_args

import numpy as np
import torch
import transformers

from sparse_dlm_attn import (
    Backend,
    CallOrderError,
    Decoder,
    InvalidArgumentError,
    InvalidTypeError,
    PrefixAttentionPolicy,
    UnsupportedError,
)
from sparse_dlm_attn.decoder import DecoderPass
from sparse_dlm_attn.policy import check_choice, check_count, check_flag
from sparse_dlm_attn_cuda_graphs import CapturedPasses
from sparse_dlm_attn_transformers.attachment import Attachment, Scope, attachment_for, first_input
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
from sparse_dlm_attn_transformers.contracts import ModuleContract
from sparse_dlm_attn_transformers.interface import sessions
from sparse_dlm_attn_transformers.paged_cache import PagedCache

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
        self.page_size, self.on_pass = page_size, on_pass
        self._attachment: Attachment = attachment_for(model, contract, scope)
        self._numbers = {id(module): at for at, module in enumerate(self._attachment.layers)}
        self.decoder = Decoder(policy, backend, layers=len(self._numbers))
        self._others: list[Decoder] = []  # for sequences after the first, where they run one by one
        self._passes_outside, self._passes_within, self._had_context = 0, 0, False
        self._unfollow: dict[int, Callable[[], None]] = {}
        computes = self.decoder.attention.backend
        if not isinstance(computes.asarray([0.0], dtype="float32"), torch.Tensor):
            raise InvalidTypeError(
                "backend",
                "must compute on tensors of PyTorch, as models of transformers do",
                repr(computes.name),
                "Pass 'torch', or 'triton' on a GPU.",
            )
        self._state = BlockState()
        self.graphs = self._graphs() if cuda_graph else None
        self._attachment.attach(self)

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
    def running(self) -> bool:
        """Whether a block is under way."""
        return self.decoder.running

    @property
    def memory_bytes(self) -> int:
        """Bytes that are kept for the next pass: attention states and page bounds of all layers."""
        memories = [memory for decoder in self._decoders for memory in decoder.memories if memory is not None]
        kept = [part for memory in memories for part in (memory.state.out, memory.state.lse)]
        bounds = [memory.bounds for memory in memories if memory.bounds is not None]
        kept += [part for one in bounds for part in (one.lower, one.upper)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @property
    def _decoders(self) -> tuple[Decoder, ...]:
        return (self.decoder, *self._others)

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
