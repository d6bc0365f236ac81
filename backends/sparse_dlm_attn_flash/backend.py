"""What both backends share: everything but the call of the kernel."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch

from sparse_dlm_attn import (
    AttentionState,
    Context,
    InvalidArgumentError,
    InvalidTypeError,
    PageBounds,
    Selection,
    UnavailableError,
)
from sparse_dlm_attn.checks import check_attend_block, check_attend_pages, check_context, check_page_scores
from sparse_dlm_attn.torch_backend import TorchTensors, bound_scores
from sparse_dlm_attn.values import softmax_scale
from sparse_dlm_attn_flash.folding import Pool, Requests, folded, full_pages, partial_pages, rows_of_lists

__all__ = ["FoldedBackend", "check_gpu"]


def check_gpu(backend: str, device: str) -> str:
    """Return ``device``, the GPU that a library's kernels are to run on.

    Parameters
    ----------
    backend : str
        Name of the backend that asks.
    device : str
        "cuda" (PyTorch's current GPU) or "cuda:1" (that one).

    Raises
    ------
    InvalidArgumentError
        If it is something else, or a GPU that is not there.
    UnavailableError
        If there is no GPU.
    """
    kind, _, number = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind != "cuda" or device == "cuda:" or (number and not number.isdecimal()):
        raise InvalidArgumentError(
            "device",
            "must be 'cuda' or 'cuda:N': these kernels run on GPUs",
            repr(device),
            "Use backend 'torch' on a CPU.",
        )
    if not torch.cuda.is_available():
        raise UnavailableError(
            f"backend '{backend}'", ["no usable GPU was found"], "Use backend 'torch' on this machine."
        )
    if number and int(number) >= torch.cuda.device_count():
        raise InvalidArgumentError(
            "device", f"must name one of {torch.cuda.device_count()} GPUs, from cuda:0", repr(device)
        )
    return device


class FoldedBackend(TorchTensors):
    """An existing kernel for paged attention, with page lists per head by head folding.

    A subclass has a kernel: `run`. It plans on the host, so no pass can be captured in a CUDA graph.
    """

    @abstractmethod
    def run(self, q: torch.Tensor, pool: Pool, requests: Requests, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the kernel.

        Parameters
        ----------
        q : torch.Tensor
            ``(rows, head_dim)``: the rows of the requests, one after the other.
        pool : Pool
            Pages of one head.
        requests : Requests
            Which pages each run of rows attends to; at least one request, none without a page.
        scale : float
            Factor on q.k.

        Returns
        -------
        tuple of torch.Tensor
            ``out`` like ``q`` and float32 ``lse`` ``(rows,)``, natural log.
        """

    def page_bounds(self, context: Context) -> PageBounds:
        check_context(context)
        self._check_place("context", context.k_pages)
        return super().page_bounds(context)

    def page_scores(self, q: torch.Tensor, bounds: PageBounds, *, active: torch.Tensor | None = None) -> torch.Tensor:
        check_page_scores(q, bounds, active)
        self._check_place("q", q)
        return bound_scores(q, bounds.lower, bounds.upper)

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
        factor, pool = softmax_scale(context.head_dim, scale), folded(context, self.name)
        lists = rows_of_lists(context, selection, active, q.shape[1])
        states = []
        full = full_pages(context, lists, pool)
        if full is not None:
            states.append(self._state(q, pool, full, factor))
        rest = partial_pages(context, lists)
        if rest is not None:
            states.append(self._state(q, rest[1], rest[0], factor))
        if not states:
            return AttentionState.empty_like(q)
        return states[0] if len(states) == 1 else self.merge(*states)

    def attend_block(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
    ) -> AttentionState:
        check_attend_block(q, k, v, scale)
        self._check_place("q", q)
        if 0 in k.shape or 0 in q.shape:
            return AttentionState.empty_like(q)
        batch, q_heads, tokens, dim = q.shape
        kv_heads, keys = k.shape[1:3]
        count, share = batch * kv_heads, q_heads // kv_heads * tokens
        numbers = torch.arange(count + 1, dtype=torch.int32, device="cpu")
        requests = Requests(
            torch.arange(count * share, device=q.device),
            numbers * share,
            numbers[:-1].to(q.device),
            numbers,
            numbers.new_full((count,), keys),
        )
        pool = Pool(k.reshape(count, keys, dim), v.reshape(count, keys, dim), 1, 0)
        return self._state(q, pool, requests, softmax_scale(dim, scale))

    def _state(self, q: torch.Tensor, pool: Pool, requests: Requests, scale: float) -> AttentionState:
        """Run the kernel on the rows of the requests; all other rows are empty."""
        flat = q.reshape(-1, q.shape[3])
        given = flat[requests.rows].contiguous()
        part, part_lse = self._checked(self.run(given, pool, requests, scale), given)
        out = torch.zeros_like(flat).index_copy(0, requests.rows, part.to(q.dtype))
        lse = torch.full((flat.shape[0],), -math.inf, dtype=torch.float32, device=q.device)
        lse = lse.index_copy(0, requests.rows, part_lse.to(torch.float32))
        return AttentionState(out.view(q.shape), lse.view(q.shape[:3]))

    def _checked(self, result: Any, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `run` returned if it is what it owes: whoever writes a kernel may not have seen it."""
        where, shape = f"run() of backend {self.name!r}", tuple(given.shape)
        rule = f"must return tensors out {shape} and lse {shape[:1]}, a row each for those of q"
        remedy = "Return (out, lse), lse with natural logarithm."
        parts = result if isinstance(result, tuple | list) else [result]
        if len(parts) != 2 or not all(isinstance(part, torch.Tensor) for part in parts):
            raise InvalidTypeError(where, rule, ", ".join(type(part).__name__ for part in parts), remedy)
        got = [tuple(part.shape) for part in parts]
        if got != [shape, shape[:1]]:
            raise InvalidArgumentError(where, rule, ", ".join(map(str, got)), remedy)
        places = {str(part.device) for part in parts}
        if places != {str(given.device)}:
            raise InvalidArgumentError(
                where,
                f"must return tensors on {given.device}, as q is",
                ", ".join(sorted(places)),
                "Compute where the arguments lie.",
            )
        return parts[0], parts[1]
