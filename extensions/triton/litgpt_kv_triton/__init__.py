"""Attention in Triton for litgpt_kv: importing this registers the kernel "triton", which CUDA devices then use."""

from litgpt_kv_triton.kernel import Triton

__all__ = ["Triton"]
