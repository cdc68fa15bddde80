"""Guidance: from a denoiser to the velocity function that a sampler follows.

Every kind of guidance moves the conditional velocity away from that of a worse model: one without the label
(classifier-free), one without the local map (representation guidance, ReDi section 3.4), or a weaker network
(autoguidance, arXiv 2406.02507):

    v = v_c + Σ (w − 1)·(v_c − v_worse)

A scale of 1 is no guidance and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from reglue.diffusion.denoiser import DenoiserFunction
from reglue.diffusion.modalities import (
    CLS,
    LATENT,
    LOCAL,
    State,
    concatenate_states,
    split_state,
)
from reglue.errors import UserError, require


class VelocityFunction(Protocol):
    """What a sampler follows."""

    def __call__(self, state: State, time: float, step_start: float | None = None) -> State:
        """dx/dt of `state` at `time`, in its shapes and precision.

        `step_start` decides in place of `time` whether guidance applies, for a step is guided as a whole or not at all:
        it is where the step began in the published Heun sampler, and the step's middle where steps end at the interval.
        """
        ...


@dataclass(frozen=True)
class Guidance:
    """How strongly samples are guided, and when."""

    scale: float = 1.0
    """Classifier-free guidance scale w; 1 is none."""
    local_scale: float | None = None
    """Scale for the local map; as `scale` if not given, 1 leaves the map conditional."""
    cls_scale: float | None = None
    """Scale for the class token; as `scale` if not given, 1 leaves the token conditional."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guided only while lowest ≤ t ≤ highest, in noise time (t = 1 is noise)."""
    representation_scale: float = 1.0
    """Scale of representation guidance; needs a model trained with dropped local maps."""
    auto_scale: float = 1.0
    """Scale of autoguidance by a weaker model."""
    guided_channels: int | None = None
    """Guide only the first so many latent channels with `scale` (SiT's published samples: 3); all if not given."""

    def __post_init__(self) -> None:
        # Named as for `sample` and in Python; for `train` there is more in front.
        require(self, "scale", prefix="guidance-")
        require(self, "local_scale", "cls_scale", "representation_scale", "auto_scale", prefix="")
        require(self, "guided_channels", prefix="", at_least=1)
        lowest, highest = self.interval
        if not 0 <= lowest <= highest <= 1:
            raise UserError(f"guidance-interval {lowest} {highest}: choose 0 ≤ lowest ≤ highest ≤ 1")

    def label_scales(self, state: State) -> dict[str, float | Tensor]:
        """The classifier-free scale of each modality of a state."""
        chosen = {LATENT: self.scale, LOCAL: self.local_scale, CLS: self.cls_scale}
        scales: dict[str, float | Tensor] = {}
        for name in state:
            value = chosen[name]
            scales[name] = self.scale if value is None else value
        if self.guided_channels is not None:
            latent = state[LATENT]
            per_channel = torch.ones(latent.shape[1], dtype=latent.dtype, device=latent.device)
            per_channel[: self.guided_channels] = self.scale
            scales[LATENT] = per_channel.view(1, -1, 1, 1)
        return scales

    @property
    def uses_labels(self) -> bool:
        """Whether the unconditional branch is ever evaluated."""
        return any(scale not in (None, 1.0) for scale in (self.scale, self.local_scale, self.cls_scale))

    @property
    def discontinuities(self) -> tuple[float, ...]:
        """Where the guided velocity is not continuous in time: the edges of the interval, strictly between 0 and 1."""
        guided = self.uses_labels or self.representation_scale != 1 or self.auto_scale != 1
        return tuple(edge for edge in sorted({*self.interval}) if 0 < edge < 1) if guided else ()


def guided_velocity(
    denoiser: DenoiserFunction,
    label: Tensor,
    guidance: Guidance = Guidance(),
    weaker: DenoiserFunction | None = None,
    dtype: torch.dtype = torch.float32,
) -> VelocityFunction:
    """The velocity function of a guided denoiser for the labels (B,) int64.

    All branches of one network are evaluated in one batch, and only where their scale and the interval ask for them.
    `weaker` is the second network of autoguidance. The networks see `dtype`; velocities come back in the
    precision of the state, so that a sampler may keep its state in float64.
    """
    unconditional = guidance.uses_labels
    without_map = guidance.representation_scale != 1
    by_weaker = weaker if guidance.auto_scale != 1 else None
    # Made once, not in every step.
    null = torch.full_like(label, denoiser.null_label)
    labels_inside = torch.cat([label, *[null] * unconditional, *[label] * without_map])
    scales: list[dict[str, float | Tensor]] = []

    def evaluate(network: DenoiserFunction, states: list[State], time: float, labels: Tensor) -> list[State]:
        together = concatenate_states(states) if len(states) > 1 else states[0]
        t = torch.full(labels.shape, time, dtype=dtype, device=label.device)
        return split_state(network(together, t, labels).velocity, len(states))

    def velocity(state: State, time: float, step_start: float | None = None) -> State:
        lowest, highest = guidance.interval
        seen = {name: x.to(dtype) for name, x in state.items()}
        if not lowest <= (time if step_start is None else step_start) <= highest:
            (conditional,) = evaluate(denoiser, [seen], time, label)
            return {name: conditional[name].to(x.dtype) for name, x in state.items()}

        states = [seen, *[seen] * unconditional]
        if without_map:
            states.append({**seen, LOCAL: torch.zeros_like(seen[LOCAL])})
        conditional, *worse = evaluate(denoiser, states, time, labels_inside)
        if by_weaker is not None:
            worse += evaluate(by_weaker, [seen], time, label)
        if not scales:
            if unconditional:
                scales.append(guidance.label_scales(state))
            if without_map:
                scales.append(dict.fromkeys(state, guidance.representation_scale))
            if by_weaker is not None:
                scales.append(dict.fromkeys(state, guidance.auto_scale))

        conditional = {name: conditional[name].to(x.dtype) for name, x in state.items()}
        result = conditional
        for other, scale in zip(worse, scales, strict=True):
            result = {
                name: v + (scale[name] - 1) * (conditional[name] - other[name].to(v.dtype))
                for name, v in result.items()
            }
        return result

    return velocity
