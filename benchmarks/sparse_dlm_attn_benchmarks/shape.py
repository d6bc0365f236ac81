"""Sizes of a problem and the budget of a policy, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_dlm_attn import InvalidArgumentError, get_policy
from sparse_dlm_attn.registry import split_parameters

__all__ = ["Shape", "with_budget"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem; those that do not fit each other are an `InvalidArgumentError`."""

    batch: int = 1  # sequences
    context: int = 65536  # context tokens, a multiple of ``page_size``
    tokens: int = 16  # rows of a block
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128  # channels of a head
    page_size: int = 64  # tokens a page
    dtype: str = "bfloat16"  # or "float16" or "float32"

    def __post_init__(self) -> None:
        for name in ("batch", "context", "tokens", "q_heads", "kv_heads", "head_dim", "page_size"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(name, "must be at least 1", getattr(self, name))
        if self.q_heads % self.kv_heads:
            raise InvalidArgumentError("q_heads", f"must be a multiple of kv_heads={self.kv_heads}", self.q_heads)
        if self.context % self.page_size:
            raise InvalidArgumentError(
                "context", f"must be a multiple of page_size={self.page_size} tokens", self.context
            )
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise InvalidArgumentError("dtype", "must be bfloat16, float16 or float32", repr(self.dtype))

    @property
    def element_bytes(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def cache_bytes(self) -> int:
        """Bytes of the context's keys and values."""
        return 2 * self.batch * self.kv_heads * self.context * self.head_dim * self.element_bytes

    @property
    def metadata_bytes(self) -> int:
        """Bytes of the bounds of all pages."""
        return self.cache_bytes // self.page_size

    def __str__(self) -> str:
        return f"B{self.batch} {self.context // 1024}K T{self.tokens} p{self.page_size}"


def with_budget(policy: str, budget: int) -> str:
    """Return a policy's text with its budget in tokens; a typed error if it has one already or knows none."""
    if "budget" in split_parameters("policy", policy)[1]:
        raise InvalidArgumentError("policy", "must leave its budget out, which follows from the density", repr(policy))
    written = f"{policy}{',' if '=' in policy else ':'}budget={budget}"
    get_policy(written)
    return written
