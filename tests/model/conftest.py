"""A small random model, and its logits changed at will."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sparse_dlm_attn.arrays import to_numpy
from sparse_dlm_attn_small_model.config import MASK_ID, TinyConfig, weight_shapes
from sparse_dlm_attn_small_model.model import TinyModel

SMALL = TinyConfig(layers=3, width=32, query_heads=4, kv_heads=2, head_dim=8, hidden=48, max_context=512)


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


class Changed(TinyModel):
    """The small model with its logits changed: ``change(logits, masked, pass)``, all of a batch."""

    def __init__(self, base: TinyModel, change: Callable[[np.ndarray, np.ndarray, int], None]) -> None:
        self.__dict__.update(base.__dict__)
        self.change = change
        self.infos: list[Any] = []
        self.inputs: list[Any] = []

    def forward(self, tokens: Any, cache: Any, attention: Any, info: Any, *given: Any, **named: Any) -> Any:
        logits, memories = super().forward(tokens, cache, attention, info, *given, **named)
        values = np.array(to_numpy(logits))
        self.change(values, np.asarray(tokens) == MASK_ID, len(self.infos))
        self.infos.append(info)
        self.inputs.append(np.asarray(tokens).tolist())
        assert len(self.infos) < 100, "the loop does not end"
        return values, memories


@pytest.fixture(scope="session")
def changed() -> type[Changed]:
    return Changed


@pytest.fixture(scope="session")
def small_weights() -> dict[str, np.ndarray]:
    return random_weights(SMALL)


@pytest.fixture(scope="session")
def make_model(small_weights: dict[str, np.ndarray]) -> Callable[..., TinyModel]:
    def make(backend: Any = "reference", seed: int = 0) -> TinyModel:
        return TinyModel(SMALL, random_weights(SMALL, seed) if seed else small_weights, backend)

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., TinyModel]) -> TinyModel:
    return make_model()


@pytest.fixture(scope="session")
def text() -> bytes:
    """Bytes of all values, stop bytes included."""
    return np.random.default_rng(1).integers(0, 256, 400).astype(np.uint8).tobytes()
