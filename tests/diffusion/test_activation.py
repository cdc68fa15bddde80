"""GELU is PyTorch's own, and the same but for rounding where it is compiled."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reglue.diffusion.backbones.activation import Gelu


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_compiled_it_is_the_same_but_for_rounding(dtype: torch.dtype, rounding: float) -> None:
    x = torch.linspace(-12, 12, 4001).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    assert torch.equal(Gelu()(x), F.gelu(x, approximate="tanh"))
    compiled = torch.compile(Gelu(), dynamic=False, fullgraph=True, backend="aot_eager")(x)
    assert compiled.dtype == dtype
    torch.testing.assert_close(compiled.double(), expected, rtol=rounding, atol=rounding)
    (found,) = torch.autograd.grad(compiled.float().sum(), x)
    torch.testing.assert_close(found.double(), slope, rtol=rounding, atol=rounding)
