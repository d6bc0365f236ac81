"""Existing kernels as backends, by head folding: `flash-attn` and `flashinfer`.

See docs/how-to/existing-kernels.md.
"""

from sparse_dlm_attn import UnavailableError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise UnavailableError(
        "backends 'flash-attn' and 'flashinfer'", [str(error)], "Install PyTorch: pip install 'sparse_dlm_attn[torch]'."
    ) from error

from sparse_dlm_attn_flash.backend import FoldedBackend
from sparse_dlm_attn_flash.flash_attn import FlashAttentionBackend
from sparse_dlm_attn_flash.flashinfer import FlashInferBackend
from sparse_dlm_attn_flash.folding import Pool, Requests

__all__ = ["FlashAttentionBackend", "FlashInferBackend", "FoldedBackend", "Pool", "Requests"]
