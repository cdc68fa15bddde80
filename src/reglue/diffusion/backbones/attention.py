"""Self-attention by the faster way: the one place that chooses it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

FEW_TOKENS = 512
"""Up to so many tokens a CPU trains faster in bfloat16 without the fused kernel, whose backward pass is slow then
(`benchmarks/attention_speed.py`). In float32, and without gradients, the kernel is as fast or faster.

Autograd keeps heads · N² numbers more of an image and block, beside some 20 · N · width: with 64 channels a head, 40 %
more memory at 512 tokens."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v for q, k, v (B, heads, N, D) → (B, heads, N, D): Attention Is All You Need, eq. 1.

    By PyTorch's fused kernels, except for the gradients of `FEW_TOKENS` in bfloat16 on a CPU, and for derivatives in
    forward mode, which they do not have.
    """
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(q).tangent is not None:  # type: ignore[reportUnknownMemberType]
        return by_products(q, k, v)
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if differentiated and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= FEW_TOKENS:
        return by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` as two matrix products and a softmax, whose result (B, heads, N, N) is kept for the gradient."""
    shape = batch, heads, tokens, width = q.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    nothing = q.new_empty(()).expand(batch * heads, tokens, tokens)  # Scaled within the product: one pass less.
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=width**-0.5)
    return (scores.softmax(-1) @ v).view(shape)
