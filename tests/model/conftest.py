"""A small random model, and a backend on any array API library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn import AttentionState, Backend, Capabilities, PageBounds, operators
from sparse_dlm_attn.arrays import compute_dtype, namespace
from sparse_dlm_attn.values import softmax_scale
from sparse_dlm_attn_tiny.config import TinyConfig, weight_shapes
from sparse_dlm_attn_tiny.model import TinyModel

SMALL = TinyConfig(
    layers=3, width=32, query_heads=4, kv_heads=2, head_dim=8, hidden=48, max_context=512
)


def random_weights(config: TinyConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights with which every part of the forward pass matters."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        if len(shape) == 1:
            weights[name] = rng.uniform(0.8, 1.6, shape).astype(np.float32)
        else:
            weights[name] = (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)
    weights["head"] *= 3
    return weights


@pytest.fixture(scope="session")
def small_config() -> TinyConfig:
    return SMALL


@pytest.fixture(scope="session")
def small_weights() -> dict[str, np.ndarray]:
    return random_weights(SMALL)


@pytest.fixture(scope="session")
def model(small_weights: dict[str, np.ndarray]) -> TinyModel:
    return TinyModel(SMALL, small_weights)


@pytest.fixture(scope="session")
def text() -> bytes:
    """Bytes of all values, stop bytes included."""
    return np.random.default_rng(1).integers(0, 256, 400).astype(np.uint8).tobytes()


class LibraryBackend(Backend):
    """The four obligatory operators on the array API, in the precision of the inputs."""

    name = "library"

    def __init__(self, make: Callable[..., Any], dtypes: dict[str, Any]) -> None:
        self._make, self._dtypes = make, dtypes

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(devices=("cpu", "array_api_strict.device('cpu_device')"))

    def asarray(self, values: Any, *, dtype: str | None = None) -> Any:
        host = np.asarray(values, dtype=dtype)
        return self._make(host.copy(), dtype=self._dtypes[str(host.dtype)])

    def page_bounds(self, context: Any) -> PageBounds:
        keys = operators.gather_pages(context.k_pages, context)
        xp = namespace(keys)
        valid = operators.valid_tokens(context)[:, None, :, :, None]
        lower = xp.min(xp.where(valid, keys, math.inf), axis=3)
        upper = xp.max(xp.where(valid, keys, -math.inf), axis=3)
        exists = context.exists[:, None, :, None]
        return PageBounds(xp.where(exists, lower, 0.0), xp.where(exists, upper, 0.0))

    def page_scores(self, q: Any, bounds: PageBounds, *, active: Any = None) -> Any:
        xp = namespace(q)
        group = q.shape[1] // bounds.lower.shape[1]
        lower, upper = (xp.repeat(side, group, axis=1)[:, :, None, ...]
                        for side in (bounds.lower, bounds.upper))
        rows = q[:, :, :, None, :]
        return xp.sum(xp.maximum(rows * lower, rows * upper), axis=-1)

    def attend_pages(
        self, q: Any, context: Any, selection: Any, active: Any, *, scale: float | None = None
    ) -> AttentionState:
        xp = namespace(q)
        batch, heads, tokens, dim = q.shape
        k, v = (
            xp.reshape(operators.gather_pages(pages, context), (batch, context.kv_heads, -1, dim))
            for pages in (context.k_pages, context.v_pages)
        )
        pages = selection.for_rows(heads, tokens) & active[:, None, :, None]
        seen = pages[..., None] & operators.valid_tokens(context)[:, None, None, :, :]
        return self._softmax(q, k, v, xp.reshape(seen, (batch, heads, tokens, -1)), scale)

    def attend_block(self, q: Any, k: Any, v: Any, *, scale: float | None = None) -> AttentionState:
        xp = namespace(q)
        seen = xp.ones((*q.shape[:3], k.shape[2]), dtype=xp.bool, device=q.device)
        return self._softmax(q, k, v, seen, scale)

    def _softmax(self, q: Any, k: Any, v: Any, seen: Any, scale: float | None) -> AttentionState:
        xp = namespace(q)
        group = q.shape[1] // k.shape[1]
        k, v = xp.repeat(k, group, axis=1), xp.repeat(v, group, axis=1)
        logits = softmax_scale(q.shape[3], scale) * (q @ xp.matrix_transpose(k))
        logits = xp.where(seen, logits, -math.inf)
        peak = xp.max(logits, axis=-1, keepdims=True)
        peak = xp.where(peak == -math.inf, 0.0, peak)
        weights = xp.exp(logits - peak)
        total = xp.sum(weights, axis=-1, keepdims=True, dtype=compute_dtype(q))
        safe = xp.where(total == 0, 1.0, total)
        lse = xp.where(total == 0, -math.inf, peak + xp.log(safe))
        return AttentionState((weights @ v) / safe, lse[..., 0])


@pytest.fixture(params=["torch", "array_api_strict"])
def library_backend(request: pytest.FixtureRequest) -> Backend:
    library = pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    names = ("float32", "int8", "int32", "int64", "bool")
    return LibraryBackend(library.asarray, {name: getattr(library, name) for name in names})


@pytest.fixture(scope="session")
def make_weights() -> Callable[..., dict[str, np.ndarray]]:
    return random_weights
