"""Shape, vocabulary and weight names of the small byte-level block-diffusion model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

MASK_ID = 256
"""Token that stands for "not decoded yet"; bytes are tokens 0..255."""

STOP_BYTE = 0
"""Byte that ends an answer; it also fills the rest of the answer's last block."""


@dataclass(frozen=True)
class TinyConfig:
    """Everything that fixes the architecture.

    Parameters
    ----------
    layers, width, query_heads, kv_heads, head_dim, hidden : int
        Transformer shape; ``hidden`` is the inner width of the SwiGLU.
    input_vocabulary : int
        Rows of the embedding: 256 bytes and the mask token.
    output_vocabulary : int
        Rows of the head: 256, since the mask token is never predicted.
    rope_theta : float
        Base of the rotary angles.
    norm_eps : float
        Added to the mean square in every RMSNorm, the QK-norms included.
    block_length : int
        Default number of tokens denoised together (8 and 32 were trained too).
    max_context : int
        Longest sequence in bytes that training has shown.
    """

    layers: int = 8
    width: int = 256
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 704
    input_vocabulary: int = 257
    output_vocabulary: int = 256
    rope_theta: float = 1e5
    norm_eps: float = 1e-6
    block_length: int = 16
    max_context: int = 16384

    def to_json(self) -> str:
        """Return the configuration as a JSON object (kept in the weights file's metadata)."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TinyConfig:
        """Return the configuration that `to_json` wrote.

        Parameters
        ----------
        text : str
            A JSON object with (a subset of) this class's fields.
        """
        return cls(**json.loads(text))


def weight_shapes(config: TinyConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the name and shape of every tensor in the weights file.

    Matrices are ``(out, in)``: a layer computes ``x @ matrix.T``.

    Parameters
    ----------
    config : TinyConfig
        The architecture.

    Returns
    -------
    Mapping[str, tuple[int, ...]]
        Names in the order in which the forward pass uses them.
    """
    width, hidden, dim = config.width, config.hidden, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.input_vocabulary, width)}
    for index in range(config.layers):
        prefix = f"layers.{index}."
        shapes[prefix + "attention_norm"] = (width,)
        shapes[prefix + "query"] = (config.query_heads * dim, width)
        shapes[prefix + "key"] = (config.kv_heads * dim, width)
        shapes[prefix + "value"] = (config.kv_heads * dim, width)
        shapes[prefix + "query_norm"] = (dim,)
        shapes[prefix + "key_norm"] = (dim,)
        shapes[prefix + "output"] = (width, config.query_heads * dim)
        shapes[prefix + "mlp_norm"] = (width,)
        shapes[prefix + "gate"] = (hidden, width)
        shapes[prefix + "up"] = (hidden, width)
        shapes[prefix + "down"] = (width, hidden)
    shapes["final_norm"] = (width,)
    shapes["head"] = (config.output_vocabulary, width)
    return shapes


def parameter_count(config: TinyConfig) -> int:
    """Return the number of trained numbers.

    Parameters
    ----------
    config : TinyConfig
        The architecture.
    """
    total = 0
    for shape in weight_shapes(config).values():
        size = 1
        for extent in shape:
            size *= extent
        total += size
    return total
