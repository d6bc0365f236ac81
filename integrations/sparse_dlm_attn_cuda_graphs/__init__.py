"""Whole forward passes as CUDA graphs, for models that attend through a `sparse_dlm_attn.Decoder`."""

from sparse_dlm_attn_cuda_graphs.passes import CapturedPasses, CudaGraph, is_capturing, why_not

__all__ = ["CapturedPasses", "CudaGraph", "is_capturing", "why_not"]
