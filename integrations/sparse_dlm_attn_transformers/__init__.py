"""Sparse attention for diffusion language models that run on Hugging Face transformers.

`SparseAttention` attaches to a model for as long as a ``with`` block lasts. DiffusionGemma, which is part of
transformers, is served through its attention interface and keeps its own generation loop; models with code of
their own have their attention modules patched, by a table of contracts.
"""

from __future__ import annotations

from sparse_dlm_attn import UnavailableError

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise UnavailableError(
        "sparse_dlm_attn_transformers", [str(error)], "Install it: pip install 'sparse_dlm_attn[transformers]'."
    ) from error

from sparse_dlm_attn_transformers.block_state import PassReport
from sparse_dlm_attn_transformers.contracts import CONTRACTS, ModuleContract
from sparse_dlm_attn_transformers.interface import NAME, register
from sparse_dlm_attn_transformers.paged_cache import PagedCache
from sparse_dlm_attn_transformers.session import SparseAttention

__all__ = ["CONTRACTS", "NAME", "ModuleContract", "PagedCache", "PassReport", "SparseAttention", "register"]
