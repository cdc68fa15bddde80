"""The step of `reglue train` by itself, for the benchmarks that time or count it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from reglue.commands.train import Losses
from reglue.config import Compile, Precision, Recipe
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.objective import TrainingSample, weighted_sum
from reglue.diffusion.paths import PATHS
from reglue.training import distributed, parallel
from reglue.training.loop import ema_decay
from reglue.training.precision import autocast, compile_parts, matmul_precision, to_compile


class TrainingStep:
    """What `jobs/train.py` makes before its loop, and what it does in it with one sample: the same calls."""

    def __init__(
        self,
        recipe: Recipe,
        config: DenoiserConfig,
        device: torch.device,
        precision: Precision,
        compile: Compile = "no",
        start: Denoiser | None = None,
        checkpoint_blocks: float = 0.0,
        deterministic: bool = True,
    ) -> None:
        """`start`: a model to copy, which is quicker than to draw initial weights."""
        optimisation = recipe.optimisation
        self.recipe, self.device = recipe, device
        self.precision: Precision = precision
        self.deterministic = deterministic
        self.model = Denoiser(config) if start is None else deepcopy(start)
        blocks = self.model.transformer.blocks
        self.model.transformer.recomputed_blocks = round(checkpoint_blocks * config.depth)
        losses = Losses(self.model, PATHS[recipe.path])
        compile_parts(losses, blocks, to_compile(compile, device))
        self.losses = parallel.parallelise(losses, blocks, 1, device, precision)
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.weights, self.averages = list(self.model.state_dict().values()), list(self.ema.values())
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimisation.learning_rate,
            betas=optimisation.betas,
            eps=optimisation.epsilon,
            weight_decay=optimisation.weight_decay,
            fused=True,
        )
        self.sums: dict[str, Any] = {}

    def __call__(self, sample: TrainingSample) -> None:
        """One step."""
        with distributed.deterministic(self.device, self.deterministic):
            self._step(sample)

    def _step(self, sample: TrainingSample) -> None:
        optimisation = self.recipe.optimisation
        with matmul_precision(self.device, self.precision), parallel.accumulating(self.losses, last=True):
            with autocast(self.device, self.precision):
                terms = self.losses(sample)
            loss = weighted_sum(terms, self.recipe.loss_weights(0)) / optimisation.accumulate
            loss.backward()
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach() / optimisation.accumulate
        self.sums["loss"] = self.sums.get("loss", 0) + loss.detach()
        norm = parallel.clip_gradients(self.model.parameters(), optimisation.clip)
        self.sums["gradient_norm"] = self.sums.get("gradient_norm", 0) + norm
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        decay = ema_decay(optimisation, 0)
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)  # type: ignore[reportPrivateImportUsage]
