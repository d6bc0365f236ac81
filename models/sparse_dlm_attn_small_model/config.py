"""Shape, vocabulary and weight names of the small byte-level block-diffusion model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

MASK_ID = 256
"""Token that stands for "not decoded yet"; bytes are tokens 0..255."""

STOP_BYTE = 0
"""Byte that ends an answer; it also fills the rest of the answer's last block."""


@dataclass(frozen=True)
class TinyConfig:
    """Everything that fixes the architecture."""

    layers: int = 8
    width: int = 256
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 704  # inner width of the SwiGLU
    input_vocabulary: int = 257  # rows of the embedding: 256 bytes and the mask token
    output_vocabulary: int = 256  # rows of the head: the mask token is never predicted
    rope_theta: float = 1e5  # base of the rotary angles
    norm_eps: float = 1e-6  # added to the mean square in every RMSNorm, the QK-norms included
    block_length: int = 16  # tokens denoised together by default (8 and 32 were trained too)
    max_context: int = 16384  # longest sequence in bytes that training has shown

    def to_json(self) -> str:
        """Return the configuration as a JSON object, as the metadata of the weights file holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TinyConfig:
        """Return the configuration that `to_json` wrote; absent fields take their defaults."""
        return cls(**json.loads(text))


def weight_shapes(config: TinyConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the weights file, in the order in which the model uses them.

    Matrices are ``(out, in)``: a layer computes ``x @ matrix.T``.
    """
    width, hidden, dim = config.width, config.hidden, config.head_dim
    q, kv = config.query_heads * dim, config.kv_heads * dim
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (width,),
        "query": (q, width),
        "key": (kv, width),
        "value": (kv, width),
        "query_norm": (dim,),
        "key_norm": (dim,),
        "output": (width, q),
        "mlp_norm": (width,),
        "gate": (hidden, width),
        "up": (hidden, width),
        "down": (width, hidden),
    }
    return {
        "embedding": (config.input_vocabulary, width),
        **{f"layers.{i}.{name}": shape for i in range(config.layers) for name, shape in layer.items()},
        "final_norm": (width,),
        "head": (config.output_vocabulary, width),
    }


def parameter_count(config: TinyConfig) -> int:
    """Return the number of trained numbers."""
    return sum(map(math.prod, weight_shapes(config).values()))
