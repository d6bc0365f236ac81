"""The PyTorch backend: eager, under `torch.compile` and in CUDA graphs, on a CPU or a GPU.

How attention over pages is computed is a parameter, never a silent choice: "gather" copies the selected
pages (CPU), "flex" drives FlexAttention with page lists (GPU), "masked" is the plain way that computes
everything everywhere. See docs/backends/torch.md.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sparse_dlm_attn import AttentionState, Context, PageBounds, Selection, UnavailableError, UnsupportedError
from sparse_dlm_attn.arrays import compute_dtype, dtype_name, namespace
from sparse_dlm_attn.capabilities import Capabilities, Problem
from sparse_dlm_attn.checks import (
    check_attend_block,
    check_attend_pages,
    check_cached,
    check_context,
    check_page_scores,
    check_pooled_scores,
    check_states,
    check_top_pages,
)
from sparse_dlm_attn.ranked import RankedPass, RankedResult, affordable_pages, check_ranked_pass, kept_queries
from sparse_dlm_attn.values import softmax_scale

try:
    import torch
except ImportError as error:
    raise UnavailableError(
        "backend 'torch'", [str(error)], "Install it: pip install 'sparse_dlm_attn[torch]'."
    ) from error

from sparse_dlm_attn.torch_backend import TorchTensors
from sparse_dlm_attn_torch import block_sparse, choice, flex, gather, metadata, ops
from sparse_dlm_attn_torch.states import merged
from sparse_dlm_attn_torch.threads import threads_for

__all__ = ["TorchBackend"]

DTYPES = ("float32", "float64", "bfloat16", "float16")
OTHERS = ("int8", "int32", "int64", "bool")
HALVES = ("bfloat16", "float16")


class TorchBackend(TorchTensors):
    """The operators on ``torch.Tensor``.

    Parameters
    ----------
    device : str
        Where it computes, and where `asarray` puts tensors: "cpu", "cuda" (any GPU) or "cuda:1" (that one).
    attention : {"auto", "gather", "masked", "flex", "block-sparse"}
        How selected pages are attended to. "auto" is "gather" on a CPU; on a GPU it is "flex" for the
        problems that FlexAttention takes and "masked" for the others. "block-sparse" is for long blocks:
        FlashAttention 4's kernel, pages of 128, best with spans of 128.
    dense : {"auto", "matmul", "flash"}
        How the block is attended to. "auto" is "matmul"; "flash" is flash-attn 2, 3 or 4.

    Raises
    ------
    InvalidArgumentError
        If an argument has no such value.
    UnavailableError
        If PyTorch is too old, or the GPU or flash-attn is not there.
    UnsupportedError
        If the way asked for cannot be gone on this device.
    """

    name: ClassVar[str] = "torch"

    def __init__(self, device: str = "cpu", attention: str = "auto", dense: str = "auto") -> None:
        choice.check_version()
        self._device = choice.check_device(device)
        self.device = str(self._device)
        self.attention = choice.check_attention(attention, self._device)
        self.dense = choice.check_dense(dense, self._device)
        namespace(torch.empty(0, device="cpu"))  # looked up before torch.compile can see the look-up

    def __repr__(self) -> str:
        return f"TorchBackend(device={self.device!r}, attention={self.attention!r}, dense={self.dense!r})"

    @property
    def capabilities(self) -> Capabilities:
        """Any shape; half, single and double precision; the device it was made for."""
        paths = {"cpu": "gather", "cuda": "flex where it can, else masked"}
        attention = paths[self._device.type] if self.attention == "auto" else self.attention
        dense = "matmul" if self.dense == "auto" else self.dense
        block_sparse_only = self.attention == "block-sparse"
        return Capabilities(
            dtypes=HALVES if self.dense == "flash" or block_sparse_only else DTYPES,
            devices=(self._device.type,),
            head_dims=block_sparse.HEAD_DIMS if block_sparse_only else None,
            page_sizes=(block_sparse.TILE,) if block_sparse_only else None,
            deterministic=True,
            batch_invariant=False,
            notes=f"device={self.device}, attention={attention}, dense={dense}; computes in float32 or float64.",
        )

    def why_not(self, problem: Problem) -> list[str]:
        """Return every reason against a problem, with what to do about it; empty if it is supported."""
        kind = self._device.type
        reasons = [
            f"{reason}; move the tensors to {self.device!r} or make the backend with device={problem.device!r}"
            if reason.startswith("device ") and problem.device in ("cpu", "cuda")
            else reason
            for reason in self.capabilities.why_not(problem)
        ]
        if self.attention == "flex" and kind == "cuda":
            reasons += [
                f"{reason}; attention='masked' computes it"
                for reason in flex.why_not(problem.dtype, problem.head_dim, problem.page_size)
            ]
        return reasons

    def path_for(self, problem: Problem, context: Context | None = None) -> str:
        """Return the attention path that a problem takes.

        Parameters
        ----------
        problem : Problem
            The facts about a call.
        context : Context, optional
            Its cache: with attention="auto" one that is not laid out as FlexAttention needs (see
            docs/backends/torch.md) is read by "masked". Default: one that is.

        Returns
        -------
        str
            "gather", "masked", "flex" or "block-sparse".
        """
        reasons = () if context is None else flex.why_not_pages(context.k_pages, context.v_pages)
        return self._path(problem.dtype, problem.head_dim, problem.page_size, reasons)

    def _path(self, dtype: str, head_dim: int, page_size: int, reasons: tuple[str, ...] = ()) -> str:
        if self.attention != "auto":
            return self.attention
        if self._device.type == "cpu":
            return "gather"
        return "masked" if flex.why_not(dtype, head_dim, page_size) or reasons else "flex"

    def page_bounds(self, context: Context) -> PageBounds:
        check_context(context)
        self._check_place("context", context.k_pages)
        return PageBounds(*ops.page_bounds(context.k_pages, context.page_table, context.page_lengths))

    def page_scores(self, q: torch.Tensor, bounds: PageBounds, *, active: torch.Tensor | None = None) -> torch.Tensor:
        check_page_scores(q, bounds, active)
        self._check_place("q", q)
        scores: torch.Tensor = ops.page_scores(q, bounds.lower, bounds.upper, active)
        return scores

    def pooled_scores(
        self,
        q: torch.Tensor,
        context: Context,
        *,
        span: int,
        scale: float | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check_pooled_scores(q, context, span, scale, lse)
        self._check_place("q", q)
        scores: torch.Tensor = ops.pooled_scores(
            q,
            context.k_pages,
            context.page_table,
            context.page_lengths,
            min(span, max(q.shape[2], 1)),
            softmax_scale(q.shape[3], scale),
            lse,
        )
        return scores

    def top_pages(self, scores: torch.Tensor, count: int | torch.Tensor, *, eligible: torch.Tensor) -> torch.Tensor:
        check_top_pages(scores, count, eligible)
        self._check_place("scores", scores)
        if not isinstance(count, torch.Tensor):  # any int is legal, but not in every integer dtype
            most = min(max(int(count), 0), scores.shape[-1])
            count = torch.full((), most, dtype=torch.int64, device=scores.device)
        mask: torch.Tensor = ops.top_pages(scores, count.to(scores.device), eligible)
        return mask

    def attend_pages(
        self,
        q: torch.Tensor,
        context: Context,
        selection: Selection,
        active: torch.Tensor,
        *,
        scale: float | None = None,
    ) -> AttentionState:
        check_attend_pages(q, context, selection, active, scale)
        self._check_place("q", q)
        return AttentionState(*ops.attend_pages(q, *self._chosen(q, context, selection, active, scale)))

    def attend_block(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
    ) -> AttentionState:
        check_attend_block(q, k, v, scale)
        self._check_place("q", q)
        return AttentionState(*ops.attend_block(q, k, v, softmax_scale(q.shape[3], scale), self._dense))

    def merge(self, *states: AttentionState) -> AttentionState:
        check_states(*states)
        self._check_place("states", states[0].out)
        dtype = compute_dtype(states[0].out)
        outs, lses = ([getattr(state, side).to(dtype) for state in states] for side in ("out", "lse"))
        out, lse = merged(outs, lses)
        return AttentionState(out.to(states[0].out.dtype), lse.to(torch.float32))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        context: Context,
        selection: Selection,
        active: torch.Tensor,
        cached: AttentionState | None,
        *,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, AttentionState]:
        check_attend_pages(q, context, selection, active, scale)
        check_attend_block(q, k, v, scale)
        if cached is not None:
            check_cached(cached, q)
        self._check_place("q", q)
        kept = (None, None) if cached is None else (cached.out, cached.lse)
        chosen = self._chosen(q, context, selection, active, scale)
        out, *state = ops.attend(q, k, v, *chosen, self._dense, *kept)
        return out, AttentionState(*state)

    def attend_ranked(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        context: Context,
        bounds: PageBounds,
        ranked_pass: RankedPass,
        cached: AttentionState | None,
        *,
        scale: float | None = None,
    ) -> RankedResult:
        """Run the operators one after the other; on a processor, decide about active rows alone.

        What lies between the operators is short there, and must not wake threads that would then keep the
        cores busy.
        """
        arguments = (q, k, v, context, bounds, ranked_pass, cached)
        if self._device.type != "cpu" or torch.compiler.is_compiling() or ranked_pass.union == "row":
            return super().attend_ranked(*arguments, scale=scale)
        check_ranked_pass(*arguments, scale)
        self._check_place("q", q)
        part_bytes = gather.part_bytes(q, context.k_pages, context.page_table)
        with threads_for(context.batch * context.kv_heads, part_bytes):
            active = torch.ones(q.shape[::2], dtype=torch.bool, device=q.device)
            if ranked_pass.reference is not None:
                change = self.query_change(q, ranked_pass.reference)
                active = self.largest_changes(change, count=ranked_pass.count, mass=ranked_pass.mass)
            mask = metadata.ranked_pages(
                q,
                bounds.lower,
                bounds.upper,
                active,
                context.exists,
                affordable_pages(context, ranked_pass.budget, ranked_pass.pages),
                ranked_pass.union == "query_head",
            )
            selection = Selection(mask, max(q.shape[2], 1))
            out, state = self.attend(q, k, v, context, selection, active, cached, scale=scale)
            kept = kept_queries(q, active, ranked_pass.keep, ranked_pass.reference)
            return RankedResult(out, state, active, selection, kept)

    @property
    def _dense(self) -> str:
        return "matmul" if self.dense == "auto" else self.dense

    def _chosen(
        self, q: torch.Tensor, context: Context, selection: Selection, active: torch.Tensor, scale: float | None
    ) -> tuple[Any, ...]:
        """Return the context, the selection and the way, as the custom operators take them."""
        head_dim = context.head_dim
        reasons = flex.why_not_pages(context.k_pages, context.v_pages)
        path = self._path(dtype_name(q), head_dim, context.page_size, reasons)
        if path == "flex" and reasons:
            hint = "attention='masked' computes it"
            raise UnsupportedError(self.name, [f"{reason}; {hint}" for reason in reasons])
        return (
            context.k_pages,
            context.v_pages,
            context.page_table,
            context.page_lengths,
            selection.mask,
            min(selection.span, max(q.shape[2], 1)),
            active,
            softmax_scale(head_dim, scale),
            path,
        )
