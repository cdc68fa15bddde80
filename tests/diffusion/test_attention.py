"""Attention is the same by either way, and the way is chosen by device, precision, size and what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from reglue.diffusion.backbones.attention import FEW_TOKENS, attention, by_products
from reglue.diffusion.backbones.sit import Attention

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    """Query, key and value as a block has them: three views of the output of one layer."""
    batch, heads, tokens, width = shape
    drawn = torch.randn(batch, tokens, 3, heads, width, generator=torch.Generator().manual_seed(0))
    return (size * drawn).to(dtype).requires_grad_()


def values_and_gradients(way: Callable[..., Tensor], qkv: Tensor) -> tuple[Tensor, Tensor]:
    output = way(*qkv.permute(2, 0, 3, 1, 4))
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output.dtype).reshape(output.shape)
    (gradient,) = torch.autograd.grad((output * weights).sum(), qkv)
    return output.detach(), gradient


def fused_kernels(function: Callable[[], object]) -> int:
    """How often the fused kernel of a CPU was called."""
    with profile() as profiled:
        function()
    return sum(event.name == FUSED for event in profiled.events() or [])


@settings(max_examples=40)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (4, 4, 70, 40))),
    dtype=st.sampled_from([*EPSILON]),
    size=st.sampled_from([0.01, 1.0, 4.0]),
)
def test_both_ways_are_the_same_but_for_rounding(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> None:
    qkv = inputs(shape, dtype, size)
    exact = values_and_gradients(F.scaled_dot_product_attention, qkv.detach().double().requires_grad_())
    for way in (by_products, F.scaled_dot_product_attention):
        for found, expected in zip(values_and_gradients(way, qkv), exact, strict=True):
            assert found.dtype == dtype
            # Of what is summed: scores are as large as size², and gradients of values are sums of what is about 1.
            tolerance = 4 * EPSILON[dtype] * max(1, size) ** 2 * expected.abs().max().clamp(min=1).item()
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_a_cpu_takes_products_for_the_gradients_of_few_tokens_in_bfloat16_alone() -> None:
    def kernels(tokens: int, differentiated: bool, dtype: torch.dtype = torch.bfloat16) -> int:
        qkv = inputs((1, 1, tokens, 4), dtype).requires_grad_(differentiated)
        return fused_kernels(lambda: attention(*qkv.permute(2, 0, 3, 1, 4)))

    assert kernels(FEW_TOKENS, differentiated=True) == 0
    assert kernels(FEW_TOKENS + 1, differentiated=True) == 1
    assert kernels(FEW_TOKENS, differentiated=False) == 1
    assert kernels(FEW_TOKENS, differentiated=True, dtype=torch.float32) == 1
    assert kernels(FEW_TOKENS, differentiated=True, dtype=torch.float64) == 1
    with torch.no_grad():
        assert kernels(FEW_TOKENS, differentiated=True) == 1


def test_a_gpu_keeps_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def fused(q: Tensor, *_: Tensor, **how: Any) -> Tensor:
        assert not how, "a mask or a dropout would rule out flash attention"
        asked.append(q.device)
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    with FakeTensorMode():
        q = torch.empty(2, 2, 9, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        attention(q, q, q)
    assert [device.type for device in asked] == ["cuda"]


def test_recomputed_and_compiled_the_same_way_is_taken() -> None:
    qkv = inputs((2, 2, 9, 8), torch.bfloat16)
    expected = values_and_gradients(attention, qkv)

    def recomputed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attention, q, k, v, use_reentrant=False)  # type: ignore[reportReturnType]

    for found, value in zip(values_and_gradients(recomputed, qkv), expected, strict=True):
        assert torch.equal(found, value)
    compiled = torch.compile(attention, dynamic=False, fullgraph=True, backend="aot_eager")
    for found, value in zip(values_and_gradients(compiled, qkv), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=4 * EPSILON[torch.bfloat16])
    assert fused_kernels(lambda: values_and_gradients(compiled, qkv)) == 0


def test_normalised_queries_and_keys_need_nothing_of_their_own() -> None:
    """As a backbone with qk-norm calls it."""
    qkv = inputs((2, 3, 11, 8), torch.bfloat16)

    def normalised(way: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        return values_and_gradients(lambda q, k, v: way(F.rms_norm(q, (8,)), F.rms_norm(k, (8,)), v), qkv)

    for found, expected in zip(normalised(attention), normalised(F.scaled_dot_product_attention), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=4 * EPSILON[torch.bfloat16])


def test_memory_stays_in_proportion() -> None:
    """At the most tokens that products are taken for, a block keeps less than half as much again as its other layers
    do; above, nothing that grows with the square of the tokens."""
    width, kept = 64, dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes_for(tokens: int) -> int:
        kept.clear()
        layer, x = Attention(width, 1).bfloat16(), torch.randn(1, tokens, width, dtype=torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = layer(x)
        del output
        return sum(kept.values())

    of_other_layers = 20 * FEW_TOKENS * width * 2
    assert 0 < bytes_for(FEW_TOKENS) - bytes_for(FEW_TOKENS + 1) < 0.5 * of_other_layers
    assert bytes_for(4 * FEW_TOKENS) < 4 * of_other_layers
