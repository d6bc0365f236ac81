"""flash-attn 2, 3 and 4 as a backend: whichever is installed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast, get_args

import torch

from sparse_dlm_attn import AttentionState, InvalidArgumentError, UnavailableError
from sparse_dlm_attn.capabilities import Capabilities, Problem
from sparse_dlm_attn.values import check_int
from sparse_dlm_attn_flash.backend import FoldedBackend, check_gpu
from sparse_dlm_attn_flash.folding import Pool, Requests

__all__ = ["FlashAttentionBackend", "build_flags"]

MODULES = ("flash_attn_interface", "fa3_fwd_interface", "flash_attn", "flash_attn.cute")
"""Where versions 3 (built from source, and the wheel `fa3_fwd`), 2 and 4 put their functions."""

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
    module : str, optional
        One of `MODULES`, where several versions are installed; default: the first that has the function.
    num_splits : int
        Parts that version 3 cuts the keys of a request into, to fill the GPU; 0 lets it choose. Version 4
        takes it too, but on a datacenter Blackwell GPU alone: elsewhere it is 1. Version 2 always chooses.
    device : str
        "cuda" (PyTorch's current GPU) or "cuda:1" (that one).

    Raises
    ------
    UnavailableError
        If no version of flash-attn can be imported here, or there is no GPU.
    InvalidArgumentError
        If ``pages``, ``module`` or ``device`` is something else.
    """

    name: ClassVar[str] = "flash-attn"

    def __init__(
        self, pages: Pages = "packed", module: str | None = None, num_splits: int = 0, device: str = "cuda"
    ) -> None:
        if pages not in get_args(Pages):
            raise InvalidArgumentError("pages", f"must be one of {', '.join(get_args(Pages))}", repr(pages))
        if module is not None and module not in MODULES:
            raise InvalidArgumentError("module", f"must be one of {', '.join(MODULES)}", repr(module))
        self.pages, self.num_splits = pages, check_int("num_splits", num_splits, 0)
        self.module, self.function = _installed(
            "flash_attn_varlen_func" if pages == "packed" else "flash_attn_with_kvcache",
            MODULES if module is None else (module,),
        )
        self.device = check_gpu(self.name, device)

    def __repr__(self) -> str:
        return f"FlashAttentionBackend(pages={self.pages!r}, module={self.module!r}, device={self.device!r})"

    @property
    def capabilities(self) -> Capabilities:
        """Half precision on a GPU; plans on the host."""
        half = not build_flags(self.module).get("FLASHATTENTION_DISABLE_FP16", False)
        return Capabilities(
            dtypes=("bfloat16", "float16") if half else ("bfloat16",),
            devices=("cuda",),
            deterministic=True,
            plans_on_host=True,
            notes=f"{self.module}, pages {self.pages}.",
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
            packed = FlashAttentionBackend("packed", self.module, self.num_splits, self.device)
            return packed.attend_block(q, k, v, scale=scale)
        return super().attend_block(q, k, v, scale=scale)

    def run(self, q: torch.Tensor, pool: Pool, requests: Requests, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        call, splits = (packed_call if self.pages == "packed" else paged_call), self.num_splits
        if self.module == "flash_attn.cute" and torch.cuda.get_device_capability(q.device)[0] not in (10, 11):
            splits = 1
        return call(self.function, q, pool, requests, scale, splits)


def packed_call(
    function: Callable[..., Any], q: torch.Tensor, pool: Pool, requests: Requests, scale: float, num_splits: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call ``flash_attn_varlen_func`` on copies of the selected tokens, packed without gaps."""
    lengths = requests.lengths(pool.k.shape[1])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    # Only the last page of a request may have slots to leave out.
    held = lengths.new_full((requests.pages.numel(),), pool.k.shape[1], dtype=torch.int64)
    held[requests.page_starts[1:].long() - 1] = requests.last_lengths.long()
    kept = (torch.arange(pool.k.shape[1], device=held.device) < held[:, None]).flatten().to(q.device)
    keys, values = (
        side.index_select(0, requests.pages.long()).flatten(0, 1)[kept][:, None] for side in (pool.k, pool.v)
    )
    # A tile of keys reaches into the next request, whose values count 0 times: 0 x NaN would be NaN.
    finite = values.isfinite()
    clean = bool(finite.all())
    if not clean:
        values = values.masked_fill(~finite, 0.0)
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {"softmax_scale": scale, "causal": False}
    options |= {switch: True for switch in LSE_SWITCHES if switch in known}
    if "num_splits" in known:  # their own default, 1, leaves most of a GPU idle at a small batch
        options["num_splits"] = num_splits
    result = function(
        q[:, None],
        keys,
        values,
        cu_seqlens_q=requests.row_starts.to(q.device),
        cu_seqlens_k=starts.to(q.device),
        max_seqlen_q=int(requests.row_starts.diff().max()),
        max_seqlen_k=int(lengths.max()),
        **options,
    )
    out, lse = _with_lse(result)
    if lse.shape != (1, q.shape[0]):
        raise UnavailableError(
            "backend 'flash-attn'",
            [f"this version returns log-sum-exps of shape {tuple(lse.shape)}"],
            "Upgrade it: pip install -U flash-attn (2.6 or newer).",
        )
    again = lse[0].isinf()
    if not clean:  # requests that do read such values
        missing = (~finite).flatten(1).any(dim=1).cpu()
        read = torch.nn.functional.pad(missing.long().cumsum(0), (1, 0))[starts.long()].diff() > 0
        again |= read.repeat_interleave(requests.row_starts.diff().long()).to(q.device)
    return _unhidden(q, pool, requests, scale, out[:, 0], lse[0], again)


def paged_call(
    function: Callable[..., Any], q: torch.Tensor, pool: Pool, requests: Requests, scale: float, num_splits: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call ``flash_attn_with_kvcache`` with a block table; rows of a request are padded to the most."""
    counts = requests.row_starts.diff().long()
    inside = (torch.arange(int(counts.max()), device=counts.device) < counts[:, None]).to(q.device)
    padded = q.new_zeros((*inside.shape, q.shape[1])).masked_scatter(inside[..., None], q)
    known = inspect.signature(function).parameters
    name = "page_table" if "block_table" not in known else "block_table"
    options: dict[str, Any] = {name: requests.block_table()}
    if "num_splits" in known:
        options["num_splits"] = num_splits
    result = function(
        padded[:, :, None],
        pool.k[:, :, None],
        pool.v[:, :, None],
        cache_seqlens=requests.lengths(pool.k.shape[1]).to(q.device),
        softmax_scale=scale,
        causal=False,
        return_softmax_lse=True,
        **options,
    )
    out, lse = _with_lse(result)
    out, lse = out[:, :, 0][inside], lse[:, 0][inside]
    return _unhidden(q, pool, requests, scale, out, lse, lse.isinf())


def _unhidden(
    q: torch.Tensor,
    pool: Pool,
    requests: Requests,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    hidden: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute anew the rows that are ``hidden``, bool ``(rows,)``: among them those of an infinite LSE.

    These kernels take a sum that is NaN for one of no keys. No request is without a key, so such a row has
    read NaN or infinity, which has to show (MERGE-4).
    """
    if not bool(hidden.any()):
        return out, lse
    out, lse, lengths = out.clone(), lse.clone(), requests.lengths(pool.k.shape[1]).tolist()
    for number, length in enumerate(lengths):
        first, last = requests.row_starts[number : number + 2].tolist()
        rows = hidden[first:last].nonzero()[:, 0] + first
        if rows.numel() == 0:
            continue
        pages = requests.pages[slice(*requests.page_starts[number : number + 2].tolist())].long()
        keys, values = (side[pages].flatten(0, 1)[:length].to(torch.float32) for side in (pool.k, pool.v))
        logits = scale * (q[rows].to(torch.float32) @ keys.T)
        lse[rows] = logits.logsumexp(-1)
        empty = lse[rows].isneginf()[:, None]
        out[rows] = torch.where(empty, 0.0, logits.softmax(-1) @ values).to(out.dtype)
    return out, lse


def _with_lse(result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(result, tuple) or len(result) < 2 or result[1] is None:
        raise UnavailableError(
            "backend 'flash-attn'", ["this version returns no log-sum-exp"], "Upgrade it: pip install -U flash-attn."
        )
    return result[0], result[1]


def build_flags(module: str) -> dict[str, bool]:
    """Return what a build of version 3 was made without; empty for other versions.

    Parameters
    ----------
    module : str
        One of `MODULES`.
    """
    if not module.endswith("_interface"):
        return {}
    try:
        config = importlib.import_module(module.replace("_interface", "_config"))
    except ImportError:
        return {}
    return dict(getattr(config, "CONFIG", {}).get("build_flags", {}))


def _installed(wanted: str, modules: tuple[str, ...]) -> tuple[str, Callable[..., Any]]:
    """Return the module that has a function, and the function."""
    reasons = []
    for name in modules:
        try:
            function = cast("Callable[..., Any]", getattr(importlib.import_module(name), wanted))
        except (ImportError, AttributeError, OSError, RuntimeError) as error:  # built for another CUDA, too
            reasons.append(f"{name}: {error}")
            continue
        if wanted == "flash_attn_with_kvcache" and build_flags(name).get("FLASHATTENTION_DISABLE_PAGEDKV"):
            reasons.append(f"{name}: built without paged KV; pages='packed' does without")
            continue
        return name, function
    raise UnavailableError(
        "backend 'flash-attn'",
        reasons,
        "Install flash-attn for your GPU and PyTorch: pip install flash-attn (version 2), fa3_fwd (3) or "
        "flash-attn-4 (4); or use backend 'torch'.",
    )
