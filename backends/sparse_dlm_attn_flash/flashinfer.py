"""FlashInfer's paged prefill as a backend."""

from __future__ import annotations

import importlib
import math
from typing import Any, ClassVar

import torch

from sparse_dlm_attn import InvalidArgumentError, UnavailableError
from sparse_dlm_attn.capabilities import Capabilities
from sparse_dlm_attn.values import check_int
from sparse_dlm_attn_flash.backend import FoldedBackend, check_gpu
from sparse_dlm_attn_flash.folding import Pool, Requests

__all__ = ["FlashInferBackend"]

KERNELS = ("auto", "fa2", "fa3")
REMEDY = "Install it: pip install flashinfer-python; or use backend 'torch'."


class FlashInferBackend(FoldedBackend):
    """Context attention by ``BatchPrefillWithPagedKVCacheWrapper``, per-head page lists by folding.

    Nothing is copied but partly filled pages. Each call plans on the host, which for one pass of one layer
    can take longer than the attention.

    Parameters
    ----------
    workspace : int
        Bytes of the kernel's workspace, at least 1 MiB.
    kernel : {"auto", "fa2", "fa3"}
        The library's kernels: "auto" is "fa3" on Hopper and "fa2" elsewhere. "fa2" sums weights that were
        rounded to the dtype of q, so its log-sum-exp is that exact and no more; see
        docs/how-to/existing-kernels.md.
    device : str
        "cuda" (PyTorch's current GPU) or "cuda:1" (that one).

    Raises
    ------
    InvalidArgumentError
        If an argument has no such value.
    UnavailableError
        If FlashInfer cannot be imported here, or there is no GPU.
    """

    name: ClassVar[str] = "flashinfer"

    def __init__(self, workspace: int = 128 << 20, kernel: str = "auto", device: str = "cuda") -> None:
        self.workspace = check_int("workspace", workspace, 1 << 20)
        if kernel not in KERNELS:
            raise InvalidArgumentError("kernel", f"must be one of {', '.join(KERNELS)}", repr(kernel))
        try:
            self.library = importlib.import_module("flashinfer")
        except (ImportError, OSError, RuntimeError) as error:
            raise UnavailableError("backend 'flashinfer'", [str(error)], REMEDY) from error
        self.device = check_gpu(self.name, device)
        hopper = torch.cuda.get_device_capability(self.device)[0] == 9
        self.kernel = {"auto": "fa3" if hopper else "fa2"}.get(kernel, kernel)

    def __repr__(self) -> str:
        chosen = f"workspace={self.workspace}, kernel={self.kernel!r}, device={self.device!r}"
        return f"FlashInferBackend({chosen})"

    @property
    def capabilities(self) -> Capabilities:
        """Half precision and the head sizes that its kernels are made for; plans on the host."""
        return Capabilities(
            dtypes=("bfloat16", "float16"),
            devices=("cuda",),
            head_dims=(64, 128, 256),
            deterministic=True,
            plans_on_host=True,
            notes=f"{self.kernel} kernels, compiled on first use.",
        )

    def run(self, q: torch.Tensor, pool: Pool, requests: Requests, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=q.device)
        wrapper = self.library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=self.kernel)
        return paged_call(wrapper, q, pool, requests, scale)


def paged_call(
    wrapper: Any, q: torch.Tensor, pool: Pool, requests: Requests, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan and run a wrapper made for layout "HND"; its log-sum-exp has base 2."""
    wrapper.plan(
        requests.row_starts,
        requests.page_starts,
        requests.pages,
        requests.last_lengths,
        num_qo_heads=1,
        num_kv_heads=1,
        head_dim_qk=q.shape[1],
        page_size=pool.k.shape[1],
        causal=False,
        sm_scale=scale,
        q_data_type=q.dtype,
        kv_data_type=pool.k.dtype,
    )
    out, lse = wrapper.run(q[:, None], (pool.k[:, None], pool.v[:, None]), return_lse=True)
    return out[:, 0], lse[:, 0] * math.log(2.0)
