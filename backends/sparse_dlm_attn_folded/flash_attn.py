"""flash-attn 2, 3 and 4 as a backend: whichever is installed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast, get_args

import torch

from sparse_dlm_attn import AttentionState, Capabilities, InvalidArgumentError, Problem, UnavailableError
from sparse_dlm_attn_folded.backend import FoldedBackend
from sparse_dlm_attn_folded.folding import Pool, Requests

__all__ = ["FlashAttentionBackend"]

MODULES = ("flash_attn_interface", "fa3_fwd_interface", "flash_attn", "flash_attn.cute")
"""Where versions 3 (from source, as a wheel of its own), 2 and 4 put their functions."""

LSE_SWITCHES = ("return_attn_probs", "return_lse", "return_softmax_lse")
PAGED_SIZES = 256
"""Tokens of which version 2 wants a multiple in a page."""

Pages = Literal["packed", "paged"]


class FlashAttentionBackend(FoldedBackend):
    """Context attention by flash-attn, per-head page lists by head folding.

    Parameters
    ----------
    pages : {"packed", "paged"}
        "packed" copies the selected tokens side by side and calls the function for sequences of
        different lengths, which all versions and builds have: any page size, at the price of writing and
        reading the selection once more. "paged" gives the kernel a block table and copies nothing but
        partly filled pages: version 2 for pages of a multiple of 256 tokens, version 3 where it was built
        with paged KV.

    Raises
    ------
    UnavailableError
        If no version of flash-attn can be imported here, or there is no GPU.
    InvalidArgumentError
        If ``pages`` is something else.
    """

    name: ClassVar[str] = "flash-attn"

    def __init__(self, pages: Pages = "packed") -> None:
        if pages not in get_args(Pages):
            raise InvalidArgumentError("pages", f"must be one of {', '.join(get_args(Pages))}", repr(pages))
        self.pages = pages
        self.module, self.function = _installed(
            "flash_attn_varlen_func" if pages == "packed" else "flash_attn_with_kvcache"
        )
        if not torch.cuda.is_available():
            raise UnavailableError(
                "backend 'flash-attn'", ["no usable GPU was found"], "Use backend 'torch' on this machine."
            )

    def __repr__(self) -> str:
        return f"FlashAttentionBackend(pages={self.pages!r}, module={self.module!r})"

    @property
    def capabilities(self) -> Capabilities:
        """Half precision on a GPU; plans on the host."""
        return Capabilities(
            dtypes=("bfloat16", "float16"), devices=("cuda",), deterministic=True,
            notes=f"{self.module}, pages {self.pages}; reads selections on the host.",
        )

    def why_not(self, problem: Problem) -> list[str]:
        reasons = self.capabilities.why_not(problem)
        if problem.head_dim % 8 or problem.head_dim > 256:
            reasons.append(f"head_dim {problem.head_dim} is not a multiple of 8 up to 256")
        if self.pages == "paged" and self.module == "flash_attn" and problem.page_size % PAGED_SIZES:
            reasons.append(
                f"page_size {problem.page_size} is not a multiple of {PAGED_SIZES}, which flash-attn 2 wants "
                "in a block table; pages='packed' computes it"
            )
        return reasons

    def attend_block(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
    ) -> AttentionState:
        if self.pages == "paged":  # a block is no page of 256 tokens; packed it is a view
            return FlashAttentionBackend("packed").attend_block(q, k, v, scale=scale)
        return super().attend_block(q, k, v, scale=scale)

    def run(
        self, q: torch.Tensor, pool: Pool, requests: Requests, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        call = packed_call if self.pages == "packed" else paged_call
        return call(self.function, q, pool, requests, scale)


def packed_call(
    function: Callable[..., Any], q: torch.Tensor, pool: Pool, requests: Requests, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call ``flash_attn_varlen_func`` on copies of the selected tokens, packed without gaps."""
    lengths = requests.lengths(pool.k.shape[1])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    # Only the last page of a request may have slots to leave out.
    held = torch.full((requests.pages.numel(),), pool.k.shape[1])
    held[requests.page_starts[1:].long() - 1] = requests.last_lengths.long()
    kept = (torch.arange(pool.k.shape[1]) < held[:, None]).flatten().to(q.device)
    keys, values = (
        side.index_select(0, requests.pages.long()).flatten(0, 1)[kept][:, None] for side in (pool.k, pool.v)
    )
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {"softmax_scale": scale, "causal": False}
    options |= {switch: True for switch in LSE_SWITCHES if switch in known}
    result = function(
        q[:, None], keys, values, cu_seqlens_q=requests.row_starts.to(q.device),
        cu_seqlens_k=starts.to(q.device), max_seqlen_q=int(requests.row_starts.diff().max()),
        max_seqlen_k=int(lengths.max()), **options,
    )
    out, lse = _with_lse(result)
    if lse.shape != (1, q.shape[0]):
        raise UnavailableError(
            "backend 'flash-attn'", [f"this version returns log-sum-exps of shape {tuple(lse.shape)}"],
            "Upgrade it: pip install -U flash-attn (2.6 or newer).",
        )
    return out[:, 0], lse[0]


def paged_call(
    function: Callable[..., Any], q: torch.Tensor, pool: Pool, requests: Requests, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call ``flash_attn_with_kvcache`` with a block table; rows of a request are padded to the most."""
    counts, pages = requests.row_starts.diff().long(), requests.page_starts.diff().long()
    inside = (torch.arange(int(counts.max())) < counts[:, None]).to(q.device)
    padded = q.new_zeros((*inside.shape, q.shape[1])).masked_scatter(inside[..., None], q)
    listed = (torch.arange(int(pages.max())) < pages[:, None]).to(q.device)
    table = torch.zeros(listed.shape, dtype=torch.int32, device=q.device)
    table = table.masked_scatter(listed, requests.pages)
    name = "page_table" if "block_table" not in inspect.signature(function).parameters else "block_table"
    result = function(
        padded[:, :, None], pool.k[:, :, None], pool.v[:, :, None],
        cache_seqlens=requests.lengths(pool.k.shape[1]).to(q.device), softmax_scale=scale, causal=False,
        return_softmax_lse=True, **{name: table},
    )
    out, lse = _with_lse(result)
    return out[:, :, 0][inside], lse[:, 0][inside]


def _with_lse(result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(result, tuple) or len(result) < 2 or result[1] is None:
        raise UnavailableError(
            "backend 'flash-attn'", ["this version returns no log-sum-exp"],
            "Upgrade it: pip install -U flash-attn.",
        )
    return result[0], result[1]


def _installed(wanted: str) -> tuple[str, Callable[..., Any]]:
    """Return the module that has a function, and the function."""
    reasons = []
    for name in MODULES:
        try:
            return name, cast("Callable[..., Any]", getattr(importlib.import_module(name), wanted))
        except (ImportError, AttributeError, OSError, RuntimeError) as error:  # built for another CUDA, too
            reasons.append(f"{name}: {error}")
    raise UnavailableError(
        "backend 'flash-attn'", reasons,
        "Install flash-attn for your GPU and PyTorch: pip install flash-attn (version 2), fa3_fwd (3) or "
        "flash-attn-4 (4); or use backend 'torch'.",
    )
