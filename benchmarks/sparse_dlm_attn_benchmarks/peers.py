"""Other people's kernels on the same tensors: dense attention of a block over its context, with LSE."""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparse_dlm_attn_benchmarks.layer import Layer
from sparse_dlm_attn_benchmarks.shape import Shape
from sparse_dlm_attn_benchmarks.timing import relative_error

__all__ = [
    "DENSE",
    "FAST",
    "TOLERANCE",
    "Peer",
    "dense_peers",
    "differing",
    "expected_dense",
    "flash_attn_3",
    "flashinfer",
    "reason",
    "wait",
    "wrapper_for",
]

Pair = tuple[torch.Tensor, torch.Tensor]
Work = Callable[[], Any]
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-3}
"""Of an output, relative to its norm; the LSE may be wrong by as much, absolutely."""
WORKSPACE = 128 << 20


@dataclass(frozen=True)
class Peer:
    """A library's kernel."""

    # Returns the work on each layer; raises whatever the library raises.
    make: Callable[[Sequence[Layer], Shape], list[Work]]
    log_base: float = math.e  # base of the LSE that it returns
    slow: bool = False  # whether it is asked only by name: it is known to be no match, or risky

    def read(self, result: Any, shape: tuple[int, ...]) -> Pair:
        """Return output ``shape`` and LSE in natural log ``shape[:3]`` of what a work returned."""
        out, lse = result
        return out.reshape(shape), lse.reshape(shape[:3]).float() * math.log(self.log_base)


def _of_each(make: Callable[[Layer, Shape], Work]) -> Callable[[Sequence[Layer], Shape], list[Work]]:
    return lambda layers, shape: [make(layer, shape) for layer in layers]


def _folded(layer: Layer, shape: Shape) -> torch.Tensor:
    """Fold the group into the rows of the queries: ``(batch, kv_heads, group * tokens, head_dim)``."""
    return layer.q_next.reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)


def _sdpa_flash(layer: Layer, shape: Shape) -> Work:
    q, (k, v) = _folded(layer, shape), layer.cache
    return lambda: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _sdpa_cudnn(layer: Layer, shape: Shape) -> Work:
    q, (k, v) = _folded(layer, shape), layer.cache
    return lambda: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]


def _token_major(layer: Layer) -> tuple[torch.Tensor, ...]:
    return tuple(side.transpose(1, 2) for side in (layer.q_next, *layer.cache))


def _with_lse(function: Callable[..., Any], layer: Layer, **options: Any) -> Work:
    q, k, v = _token_major(layer)

    def run() -> Pair:
        out, lse = function(q, k, v, **options)[:2]
        return out.transpose(1, 2), lse

    return run


def _flash_attn_2(layer: Layer, shape: Shape) -> Work:
    function = importlib.import_module("flash_attn").flash_attn_func
    return _with_lse(function, layer, return_attn_probs=True)


def flash_attn_3() -> Any:
    """Return the module of flash-attn 3, built from source or as a wheel of its own (``fa3_fwd``)."""
    try:
        return importlib.import_module("flash_attn_interface")
    except ImportError:
        return importlib.import_module("fa3_fwd_interface")


def _flash_attn_3(layer: Layer, shape: Shape) -> Work:
    splits = 16 if shape.batch == 1 else 0
    return _with_lse(flash_attn_3().flash_attn_func, layer, num_splits=splits, pack_gqa=True, return_attn_probs=True)


def _flash_attn_4(layer: Layer, shape: Shape) -> Work:
    function = importlib.import_module("flash_attn.cute").flash_attn_func
    return _with_lse(function, layer, return_lse=True)


def _flex(layer: Layer, shape: Shape, folded: bool = True) -> Work:
    module = importlib.import_module("torch.nn.attention.flex_attention")
    compiled: Callable[..., Any] = torch.compile(module.flex_attention, dynamic=False)
    q, (k, v) = _folded(layer, shape) if folded else layer.q_next, layer.cache
    request = getattr(module, "AuxRequest", None)
    options: dict[str, Any] = {"return_lse": True} if request is None else {"return_aux": request(lse=True)}
    options["enable_gqa"] = not folded

    def run() -> Pair:
        out, aux = compiled(q, k, v, **options)
        return out, getattr(aux, "lse", aux)

    return run


def flashinfer() -> Any:
    """Return FlashInfer, told for which GPU it compiles unless the environment says so already."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{major}.{minor}{'a' if major >= 9 else ''}")
    return importlib.import_module("flashinfer")


def wrapper_for(device: torch.device, workspace: torch.Tensor | None = None) -> Any:
    """Return FlashInfer's wrapper for paged caches ``(pages, heads, page_size, head_dim)``."""
    if workspace is None:
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    return flashinfer().BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend="fa2")


def wait(device: torch.device) -> None:
    """Wait for a GPU, so that what went wrong there is raised here."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _flashinfer_single(layer: Layer, shape: Shape) -> Work:
    if shape.batch != 1:
        raise NotImplementedError("it takes one sequence")
    function = flashinfer().single_prefill_with_kv_cache
    q, (k, v) = layer.q_next[0].transpose(0, 1).contiguous(), (side[0] for side in layer.cache)

    def run() -> Pair:
        out, lse = function(q, k, v, kv_layout="HND", backend="fa2", return_lse=True)
        return out.transpose(0, 1), lse.transpose(0, 1)

    return run


def _flashinfer_paged(layers: Sequence[Layer], shape: Shape) -> list[Work]:
    context, wrapper = layers[0].context, wrapper_for(layers[0].q.device)
    dtype, pages = layers[0].q.dtype, context.pages
    starts = torch.arange(shape.batch + 1, dtype=torch.int32)
    wrapper.plan(  # one plan for all layers, whose page tables are alike
        starts * shape.tokens,
        starts * pages,
        context.page_table.flatten(),
        torch.full((shape.batch,), shape.page_size, dtype=torch.int32),
        num_qo_heads=shape.q_heads,
        num_kv_heads=shape.kv_heads,
        head_dim_qk=shape.head_dim,
        page_size=shape.page_size,
        causal=False,
        sm_scale=shape.head_dim**-0.5,
        q_data_type=dtype,
        kv_data_type=dtype,
    )

    def work(layer: Layer) -> Work:
        q = layer.q_next.transpose(1, 2).flatten(0, 1).contiguous()
        pools = layer.context.k_pages, layer.context.v_pages

        def run() -> Pair:
            out, lse = wrapper.run(q, pools, return_lse=True)
            sizes = shape.batch, shape.tokens, shape.q_heads
            return out.view(*sizes, -1).transpose(1, 2), lse.view(sizes).transpose(1, 2)

        return run

    return [work(layer) for layer in layers]


DENSE: dict[str, Peer] = {
    "SDPA flash, group folded": Peer(_of_each(_sdpa_flash)),
    "SDPA cuDNN": Peer(_of_each(_sdpa_cudnn)),
    "flash-attn 2": Peer(_of_each(_flash_attn_2)),
    "flash-attn 3": Peer(_of_each(_flash_attn_3)),
    "FlashInfer single prefill": Peer(_of_each(_flashinfer_single), log_base=2.0),
    "FlashInfer paged": Peer(_flashinfer_paged, log_base=2.0),
    "flash-attn 4": Peer(_of_each(_flash_attn_4)),
    "FlexAttention, group folded": Peer(_of_each(_flex), slow=True),
    "FlexAttention, enable_gqa": Peer(_of_each(functools.partial(_flex, folded=False)), slow=True),
}
FAST = tuple(name for name, peer in DENSE.items() if not peer.slow)


def expected_dense(layer: Layer) -> Pair:
    """Return ``(out, lse)`` of dense context attention in float32, one sequence after the other."""
    outs, lses = [], []
    for q, k, v in zip(layer.q_next, *layer.cache, strict=True):
        kv_heads, _, head_dim = k.shape
        rows = q.float().reshape(kv_heads, -1, head_dim)
        logits = rows @ k.float().mT * head_dim**-0.5
        lses.append(logits.logsumexp(-1).reshape(q.shape[:2]))
        outs.append((torch.softmax(logits, -1) @ v.float()).reshape(q.shape))
    return torch.stack(outs), torch.stack(lses)


def reason(error: BaseException) -> str:
    """Return in one line why a peer is not there."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return lines[0][:120]


def dense_peers(layers: Sequence[Layer], shape: Shape, names: Sequence[str] = FAST) -> dict[str, list[Work] | str]:
    """Return for each peer its work on every layer, or in words why it is not there.

    A peer whose result differs from float32 sums is not there either.
    """
    found: dict[str, list[Work] | str] = {}
    wanted = expected_dense(layers[0])
    for name in names:
        peer = DENSE[name]
        try:
            works = peer.make(layers, shape)
            wrong = differing(peer, works[0](), wanted, shape.dtype)
            wait(layers[0].q.device)
        except Exception as error:  # whatever a missing or unfit library raises
            found[name] = reason(error)
        else:
            found[name] = wrong or works
    return found


def differing(peer: Peer, result: Any, wanted: Pair, dtype: str) -> str:
    """Return how a result differs from the wanted one, "" if it does not."""
    out, lse = peer.read(result, tuple(wanted[0].shape))
    error, limit = relative_error(out, wanted[0]), TOLERANCE[dtype]
    off = float((lse - wanted[1]).abs().max())
    if error <= limit and off <= limit:
        return ""
    return f"wrong result: relative error {error:.1e}, LSE off by {off:.1e}, limit {limit:.0e}"
