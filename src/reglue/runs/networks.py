"""Denoisers as samplers evaluate them: in a precision, and compiled if asked for."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from reglue.diffusion.denoiser import Denoiser, Prediction
from reglue.diffusion.modalities import State
from reglue.runs import ranks
from reglue.runs.ranks import Precision


class SamplingNetwork:
    """A frozen denoiser, for velocities alone.

    The weights of its matrix products are brought to their precision once: autocast would do it in every evaluation,
    with the same bits. What training needs besides, hidden tokens for alignment, is not returned.
    """

    def __init__(self, denoiser: Denoiser, precision: Precision, *, compiled: bool = False) -> None:
        self.null_label = denoiser.null_label
        device = denoiser.positions.device
        network = with_products_in(denoiser, torch.bfloat16) if precision == "bfloat16" else denoiser

        def velocity(state: State, time: Tensor, label: Tensor) -> State:
            with ranks.autocast(device, precision):
                return network(state, time, label).velocity

        self._products = partial(ranks.products, device, precision)
        self._velocity = ranks.compiled(velocity, device) if compiled else velocity

    def __call__(self, state: State, time: Tensor, label: Tensor) -> Prediction:
        """See `diffusion.denoiser.DenoiserFunction`."""
        with self._products():
            return Prediction(self._velocity(state, time, label), None)


def with_products_in(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """A copy whose linear and convolutional weights are in `dtype`, all else as it is; to be run under autocast."""
    copy = deepcopy(denoiser)
    for module in copy.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    return copy
