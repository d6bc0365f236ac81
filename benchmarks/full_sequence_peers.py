"""What `full_sequence.py` compares with: dense kernels, and block-sparse kernels over the same lists."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from sparse_dlm_attn import UnavailableError
from sparse_dlm_attn_benchmarks.flex_peer import flex_listed
from sparse_dlm_attn_benchmarks.peers import flash_attn_3, reason
from sparse_dlm_attn_torch.block_sparse import attend_pages, check_installed, flash_attn_listed
from sparse_dlm_attn_torch.layout import Lists, lists_of

__all__ = ["block_sparse", "dense", "dense_with_lse"]

Calls = dict[str, Callable[[], Any]]
LIBRARY = "torch:attention=block-sparse"


def dense(problem: Any, quick: bool) -> Calls:
    """Return dense attention by every kernel that imports here."""
    q, k, v = problem.q, problem.k, problem.v
    calls: Calls = {
        "SDPA flash": lambda: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2],
        "SDPA cuDNN": lambda: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2],
    }
    modules: dict[str, Callable[[], Any]] = {
        "flash-attn 3": flash_attn_3,
        "flash-attn 4": functools.partial(importlib.import_module, "flash_attn.cute"),
    }
    for name, module in modules.items():
        try:
            function = module().flash_attn_func
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            print(f"  {name}: not here ({reason(error)})")
            continue
        calls[name] = functools.partial(_flash_attn, function, q, k, v)
    if not quick:
        flex = torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=False)
        calls["FlexAttention Triton"] = lambda: flex(q, k, v)
    return calls


def _flash_attn(function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    result = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out.transpose(1, 2)


def dense_with_lse(problem: Any) -> Callable[[], Any]:
    """Return the fastest dense kernel that is here and gives the LSE, which the choice needs."""
    q, k, v = problem.q, problem.k, problem.v
    try:
        function = flash_attn_3().flash_attn_func
        calls = functools.partial(function, *(side.transpose(1, 2) for side in (q, k, v)), return_attn_probs=True)

        def flash_3() -> Any:
            out, lse = calls()[:2]
            return out.transpose(1, 2), lse

        if problem.error(flash_3(), True) <= 1:
            return flash_3
    except (ImportError, AttributeError, OSError, RuntimeError, TypeError):
        pass  # said when the dense kernels were timed

    def cudnn() -> Any:
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]

    def flash() -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]

    try:
        right = problem.error(cudnn(), True) <= 1
    except RuntimeError:
        right = False
    return cudnn if right else flash


def block_sparse(problem: Any, quick: bool) -> Calls:
    """Return block-sparse attention over the problem's lists, by every library kernel that can."""
    q, k, v, size = problem.q, problem.k, problem.v, problem.size
    scale = q.shape[3] ** -0.5
    calls: Calls = {}
    if size == 128:
        lists = _int32(problem.mask)
        calls["FlexAttention Triton"] = lambda: flex_listed(q, k, v, lists, (128, 128), scale)
        calls["FlexAttention FLASH"] = lambda: flex_listed(q, k, v, lists, (128, 128), scale, kernel="FLASH")
        calls["flash-attn 4 block-sparse"] = lambda: flash_attn_listed(q, k, v, lists, scale)
        try:
            check_installed()
        except UnavailableError as error:
            print(f"  {LIBRARY}: not here ({'; '.join(error.reasons)[:100]})")
        else:  # the backend's own way to it: pages copied in reading order, lists made in every call
            calls[LIBRARY] = lambda: attend_pages(*problem.arguments())
        return calls
    if quick:
        return calls
    own = _int32(problem.mask)
    calls[f"FlexAttention Triton {size}x{size}"] = lambda: flex_listed(
        q, k, v, own, (size, size), scale, options={"BLOCK_M": size, "BLOCK_N": size}
    )
    # As the authors of SparseD drive it: tiles of 128, of which some parts are wanted, and a mask_mod.
    ratio, mask = 128 // size, problem.mask
    tiles = mask.unflatten(2, (-1, ratio)).unflatten(4, (-1, ratio))
    every, some = tiles.all(5).all(3), tiles.any(5).any(3)
    full, part = _int32(every), _int32(some & ~every)

    def mask_mod(b: Any, h: Any, query: Any, key: Any) -> Any:
        return mask[b, h, query // size, key // size]

    calls["FlexAttention Triton 128x128 masked"] = lambda: flex_listed(
        q, k, v, full, (128, 128), scale, partial=part, mask_mod=mask_mod
    )
    return calls


def _int32(mask: torch.Tensor) -> Lists:
    """List pages, with the numbers in the kernels' own type, so that no call converts them."""
    parts = [lists_of(mask[:, head : head + 1], 1) for head in range(mask.shape[1])]
    pages, counts = (
        torch.cat([getattr(part, side).to(torch.int32) for part in parts], 1) for side in ("pages", "counts")
    )
    return Lists(pages, counts, 1)
