"""Attention as a fused kernel and as two products and a softmax: what `FEW_TOKENS` is decided by.

    python benchmarks/attention_speed.py --device cpu

Each shape is (images, heads, tokens, channels of a head), with query, key and value out of one layer, as in a block.
Compiled or not makes no difference here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common import Comparison, alternate, report, run
from counting import show
from reglue.diffusion.backbones.attention import attention, by_products

Shape = tuple[int, int, int, int]
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fused": F.scaled_dot_product_attention,
    "products": by_products,
    "ours": attention,
}


@dataclass(frozen=True)
class AttentionSpeed(Comparison):
    """Milliseconds of forward and backward pass, and of the forward pass alone as in sampling."""

    shapes: tuple[Shape, ...] = (
        (96, 2, 17, 64),
        (64, 3, 65, 64),
        (16, 6, 129, 64),
        (8, 6, 257, 64),
        (4, 6, 513, 64),
        (2, 6, 1025, 64),
    )
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")


def main(options: AttentionSpeed) -> str:
    """Time all ways, and print the table and then the line of JSON. Returns the line."""
    device = options.begin()
    rows: list[dict[str, Any]] = []
    for shape, dtype in product([(2, 2, 5, 8)] if options.toy else options.shapes, options.dtype):
        images, heads, tokens, width = shape
        qkv = torch.randn(images, tokens, 3, heads, width, device=device, dtype=getattr(torch, dtype))
        row: dict[str, Any] = {"shape": ", ".join(map(str, shape)), "precision": dtype}
        for what, run_once in (("training", differentiate), ("sampling", evaluate)):
            contestants = {name: partial(run_once, way, qkv) for name, way in WAYS.items()}
            measured = alternate(contestants, options.repeats, device)
            row |= {f"{what}, {name}": 1e3 * each.median for name, each in measured.items()}
        rows.append(row)
    show(rows)
    return report(options, {"milliseconds": rows}, device)


def differentiate(way: Callable[..., Tensor], qkv: Tensor) -> None:
    """Forward and backward pass."""
    qkv = qkv.detach().requires_grad_()
    way(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2).sum().backward()


@torch.no_grad()
def evaluate(way: Callable[..., Tensor], qkv: Tensor) -> None:
    """Forward pass."""
    way(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)


if __name__ == "__main__":
    run(AttentionSpeed, main, __doc__)
