"""What is worked on: sizes of published models, and random tensors in the shapes of their data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.modalities import CLS, LATENT, LOCAL
from reglue.diffusion.objective import ALIGNMENT, TrainingSample
from reglue.jobs.demo import DEMO_RECIPE
from reglue.papers import RECIPES
from reglue.recipe import Recipe
from reglue.seeds import generator, normals

Data = Literal["imagenet", "demo", "toy"]


@dataclass(frozen=True)
class Workload:
    """A recipe and the sizes of its data."""

    recipe: Recipe
    config: DenoiserConfig

    @staticmethod
    def of(data: Data, model: str | None = None) -> Workload:
        """REGLUE on ImageNet's sizes at 256 px (SD-VAE, DINOv2-B), on the demo's, or on a toy's."""
        if data == "imagenet":
            recipe = replace(RECIPES["reglue"], model=model or "B/2")
            sizes = {"latent_channels": 4, "grid": (32, 32), "local_channels": 16, "token_width": 768}
        elif data == "demo":
            recipe = DEMO_RECIPE if model is None else replace(DEMO_RECIPE, model=model)
            sizes = {"latent_channels": 4, "grid": (8, 8), "local_channels": 8, "token_width": 128}
        else:
            recipe = replace(DEMO_RECIPE, model=model or "2x32x2/2")
            sizes = {"latent_channels": 4, "grid": (8, 8), "local_channels": 4, "token_width": 32}
        # The published code has the null label fixed at 1000.
        return Workload(recipe, recipe.denoiser_config(classes=1000, **sizes))

    def random_model(self, seed: int = 0) -> Denoiser:
        """A model whose every weight is random: as it is initialised, its outputs are zero and compare with nothing."""
        torch.manual_seed(seed)
        model = Denoiser(self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.02)
        return model


def flops_per_image(workload: Workload, training: bool) -> int:
    """Floating-point operations of matrix products, for one image: forward, or forward and backward.

    Counted by PyTorch on tensors without memory; a multiplication and an addition are two operations.
    """
    config = workload.config
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Denoiser(config)
        state = {name: torch.empty(1, *shape) for name, shape in config.shape.shapes().items()}
        prediction = model(state, torch.empty(1), torch.zeros(1, dtype=torch.long))
        if training:
            outputs = [value.sum() for value in prediction.velocity.values()]
            torch.stack([*outputs, model.projector(prediction.tap).sum()]).sum().backward()
    return counter.get_total_flops()


@dataclass
class StoredSamples:
    """Stands for a store whose rows are in memory: what `TrainingData` does with them once they are read."""

    config: DenoiserConfig
    mean: Tensor
    std: Tensor
    local: Tensor
    cls: Tensor
    tokens: Tensor
    labels: Tensor

    @staticmethod
    def random(config: DenoiserConfig, count: int, seed: int = 0) -> StoredSamples:
        """Random rows in the shapes of a model's data."""
        chance = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=chance)

        shapes = config.shape.shapes()
        rows, columns = config.token_grid
        return StoredSamples(
            config,
            normal(*shapes[LATENT]),
            normal(*shapes[LATENT]).abs() * 0.1,
            normal(*shapes[LOCAL]),
            normal(*shapes[CLS]),
            normal(1 + rows * columns, config.alignment_width),
            torch.randint(config.classes, (count,), generator=chance),
        )

    def sample(self, positions: range) -> TrainingSample:
        """The samples at positions of a run, with noise and times drawn as training draws them."""
        shapes = self.config.shape.shapes()
        generators = [generator(0, "training sample", position) for position in positions]
        uniform = torch.stack([torch.from_numpy(g.random(3)) for g in generators])
        noise = normals(generators, {"posterior": shapes[LATENT], **shapes})
        return TrainingSample(
            data={LATENT: self.mean + self.std * noise.pop("posterior"), LOCAL: self.local, CLS: self.cls},
            noise=noise,
            time=uniform[:, 0].float(),
            label=torch.where(uniform[:, 1] < 0.1, self.config.classes, self.labels),
            alignment_target=self.tokens,
        )


def loss_weights(recipe: Recipe) -> Mapping[str, float]:
    """The weights of the published loss."""
    weights = recipe.loss_weights(0)
    assert set(weights) == {LATENT, LOCAL, CLS, ALIGNMENT}
    return weights


def random_encoder(folder: Path, toy: bool) -> Path:
    """DINOv2-B with registers in timm's folder layout, with random weights: its speed does not depend on them."""
    architecture = "vit_tiny_patch16_224" if toy else "vit_base_patch14_reg4_dinov2"
    sizes: dict[str, Any] = (
        {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2} if toy else {"img_size": 224}
    )
    network = timm.create_model(architecture, num_classes=0, **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    per_patch = 16
    config = {
        "architecture": architecture,
        "model_args": sizes,
        "pretrained_cfg": {"mean": mean, "std": std},
        "reglue_input": {"image_pixels_per_patch": per_patch, "minimum_input": 16},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
