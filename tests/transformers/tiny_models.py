"""Models small enough for a test, and the budget within which attention may change their logits."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import transformers
from transformers import DynamicCache

VOCABULARY, CANVAS = 64, 8


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def diffusion_gemma() -> Any:
    """A sliding and a full layer, with the head sizes of the released model: 256 and 512."""
    text = transformers.DiffusionGemmaTextConfig(
        **SIZES,
        num_hidden_layers=2,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=1,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        num_experts=2,
        top_k_experts=1,
        moe_intermediate_size=16,
    )
    vision = transformers.Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=CANVAS)
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # the others do not compute in float64
    for parameter in model.parameters():  # the released initialisation makes attention nearly uniform
        parameter.data.mul_(4.0)
    return model


EXTRAS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": None},
    "Qwen3Moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}
FAMILIES = ("Qwen3", "Llama", "Qwen2", "Mistral", "Qwen3Moe")


def causal_shape(family: str, layers: int = 3) -> Any:
    """A causal model of transformers, two query heads a KV head."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SIZES, num_hidden_layers=layers, head_dim=16, attn_implementation="eager", **EXTRAS.get(family, {})
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8.0)
    return model


def tokens(batch: int, count: int, seed: int = 1) -> torch.Tensor:
    """Token ids that are no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, count), generator=generator)


def new_cache(model: Any) -> Any:
    """A cache that grows, with the layers of the model."""
    if "config" not in inspect.signature(DynamicCache).parameters:  # before transformers 4.56
        return DynamicCache()
    return DynamicCache(config=model.config.get_text_config())


def cache_name(module: Any) -> str:
    """What the installed version calls the cache."""
    return "cache" if "cache" in inspect.signature(type(module).forward).parameters else "past_key_values"


def in_double(model: Any) -> Any:
    """The same model in float64, by "sdpa": eager attention gives NaN for rows that see nothing there."""
    double = copy.deepcopy(model).double()
    if hasattr(double, "set_experts_implementation"):
        double.set_experts_implementation("eager")  # the others do not compute in float64
    if hasattr(double, "set_attn_implementation"):
        double.set_attn_implementation("sdpa")
    else:  # before transformers 4.53
        double.config._attn_implementation = "sdpa"
    return double


def assert_within_budget(actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """Allow twice the error that the model's own eager attention makes against float64, and a rounding band.

    The budget of the specification (ACCURACY-2), of whole logits: their natural scale is the largest of them.
    """
    band = torch.finfo(torch.float32).eps * exact.abs().max().item() * 4
    budget = 2 * ((eager.double() - exact).abs().max().item() + band)
    error = (actual.double() - exact).abs().max().item()
    assert error <= budget, f"{error:.2e} > {budget:.2e}"
