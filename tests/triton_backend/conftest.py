"""Kernels run on a GPU where there is one, and under Triton's interpreter on the CPU elsewhere."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("torch") and importlib.util.find_spec("triton"):
    import torch

    # The choice is made when Triton is imported, hence here, before any module of kernels is.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import triton  # noqa: F401
