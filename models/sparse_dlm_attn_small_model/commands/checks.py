"""What `sparse-dlm-attn doctor` asks about the small model."""

from __future__ import annotations

from sparse_dlm_attn import SparseAttentionError
from sparse_dlm_attn.cli.doctor import Check
from sparse_dlm_attn_small_model.config import parameter_count
from sparse_dlm_attn_small_model.weights import load_weights


def weights() -> Check:
    """Check that the shipped weights can be read."""
    try:
        config, _ = load_weights()
    except SparseAttentionError as error:
        return Check("model weights", "broken", str(error), "Reinstall sparse_dlm_attn.")
    return Check(
        "model weights",
        "ok",
        f"{parameter_count(config) / 1e6:.1f} M parameters, context of {config.max_context} bytes",
    )
