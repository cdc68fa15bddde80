"""The published REGLUE code, imported from a checkout: our calls of its classes, and no line of it.

It is a folder of scripts (`train.py`, `loss.py`, `samplers.py`, `compressor.py`, `models/sit.py`), which is on the
module path while it is imported. Its `train.py` needs `accelerate`, which ours does not.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.modalities import LATENT, State
from reglue.diffusion.objective import ALIGNMENT
from reglue.errors import UserError
from reglue.published.weights import export_official
from reglue.training.precision import matmul_precision

MixedPrecision = Literal["no", "fp16", "bf16"]
LOCAL, CLS = "local", "cls"
"""The modalities beside the latents that their model learns."""
LATENT_SCALE = 0.18215


def load(folder: Path, module: str) -> ModuleType:
    """Import a module of a checkout. Raises UserError, naming what is missing."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--official {folder}: {error}; check out the published code there") from None
    finally:
        sys.path.remove(str(folder))


def preprocess(folder: Path, *arguments: str) -> None:
    """Run their `dataset_tools.py` in a process of its own. Raises UserError if it fails."""
    command = [sys.executable, str(folder / "preprocessing/dataset_tools.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"--official {folder}: {arguments[0]} failed: {result.stderr.strip()[-300:]}")


def model(folder: Path, ours: Denoiser, *, fused_attention: bool) -> nn.Module:
    """Their model with the weights of ours. Their train.py fuses attention, their generate.py does not."""
    config = ours.config
    theirs = load(folder, "models.sit").SiT(
        input_size=config.grid[0],
        patch_size=config.patch,
        in_channels=config.channels,
        hidden_size=config.width,
        decoder_hidden_size=config.width,  # Their S/2 leaves this at B/2's width, and cannot run.
        depth=config.depth,
        num_heads=config.heads,
        num_classes=config.classes,
        use_cfg=True,
        encoder_depth=config.alignment_depth,
        z_dims=[config.alignment_width],
        projector_dim=config.alignment_hidden,
        fused_attn=fused_attention,
        qk_norm=False,
    )
    theirs.load_state_dict(export_official("reglue", config, ours.state_dict()))
    return theirs


def losses(folder: Path, model: nn.Module, images: Tensor, cls: Tensor, label: Tensor, tokens: Tensor) -> State:
    """The unweighted terms of their loss, under our names.

    Drawn from PyTorch's generator: times (B, 1, 1, 1) on the CPU, noise like `images` (B, C + K, H, W), noise like
    `cls` (B, D). In training mode their model then drops labels.
    """
    loss = load(folder, "loss").SILoss(prediction="v", path_type="linear", weighting="uniform")
    latent, local, alignment, _, _, token = loss(model, images, {"y": label}, zs=[tokens], cls_token=cls)
    terms = {LATENT: latent, LOCAL: local, CLS: token, ALIGNMENT: alignment}
    return {name: term.mean() for name, term in terms.items()}


@torch.no_grad()
def samples(
    folder: Path, model: nn.Module, start: State, label: Tensor, steps: int, scale: float, interval: tuple[float, float]
) -> Tensor:
    """Their Euler–Maruyama sampler with all modalities guided: latents and map (B, C + K, H, W), float64.

    Drawn from PyTorch's generator in each step: noise like the maps, then like the class token.
    """
    return load(folder, "samplers").euler_maruyama_sampler(
        model,
        torch.cat([start[LATENT], start[LOCAL]], dim=1),
        label,
        num_steps=steps,
        cfg_scale=scale,
        guidance_low=interval[0],
        guidance_high=interval[1],
        path_type="linear",
        cls_latents=start[CLS],
        args=Namespace(vae_cfg="false", cls_cfg_scale=scale),
    )


class TrainingStep:
    """A step of their loop in one process: accelerate, AdamW as they make it, their loss, their moving average."""

    def __init__(
        self, folder: Path, model: nn.Module, weights: Mapping[str, float], precision: MixedPrecision, cpu: bool
    ) -> None:
        from accelerate import Accelerator  # type: ignore[reportMissingImports]

        self.folder, self.weights = folder, weights
        self.train = load(folder, "train")
        self.accelerator: Any = Accelerator(mixed_precision=precision, cpu=cpu)
        model.to(self.accelerator.device).train()
        self.ema = deepcopy(model).requires_grad_(False).eval()
        # Not fused, as published.
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
        self.model, self.optimiser = self.accelerator.prepare(model, optimiser)

    def __call__(self, moments: Tensor, label: Tensor, codes: Tensor, cls: Tensor, tokens: Tensor) -> None:
        """One step on moments (B, 2C, H, W), labels (B,), codes (B, K, H, W), class tokens (B, D) and all tokens
        (B, 1 + N, D) on the device."""
        accelerator = self.accelerator
        with matmul_precision(accelerator.device, "tf32"):  # --allow-tf32 in their train.sh
            with torch.no_grad():
                latent = self.train.sample_posterior(moments, latents_scale=LATENT_SCALE)
                images = torch.cat([latent, codes], dim=1)
            with accelerator.accumulate(self.model):
                terms = losses(self.folder, self.model, images, cls, label, tokens)
                weighted = {name: self.weights[name] * term for name, term in terms.items()}
                loss = weighted[LATENT] + weighted[LOCAL] + weighted[ALIGNMENT] + weighted[CLS]
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimiser.step()
                self.optimiser.zero_grad(set_to_none=True)
                self.train.update_ema(self.ema, self.model)
            for value in (loss, *weighted.values(), norm):  # Six numbers are fetched from the device in every step.
                accelerator.gather(value).mean().detach().item()
