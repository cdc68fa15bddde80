"""Published code, imported from where it was checked out: our calls of its classes, and no line of it.

It is a folder of scripts, so that it is put on the module path for as long as it is imported, one of them in a process:
REGLUE's (`train.py`, `loss.py`, `samplers.py`, `compressor.py`, `models/sit.py`), whose `train.py` needs `accelerate`,
or SiT's (`train.py`, `models.py`, `transport/`), which needs `torchdiffeq`.
"""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reglue.diffusion.denoiser import DenoiserConfig
from reglue.diffusion.modalities import CLS, LATENT, LOCAL, State
from reglue.errors import UserError

MODULES = ("models.sit", "loss", "samplers", "compressor", "train")
SIT_MODULES = ("models", "transport", "train")
MixedPrecision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True)
class Official:
    """The modules of a checkout."""

    folder: Path
    modules: Mapping[str, ModuleType]

    @staticmethod
    def load(folder: Path, *modules: str) -> Official:
        """Import some of its modules. Raises UserError, naming what is missing."""
        sys.path.insert(0, str(folder))
        try:
            return Official(folder, {name: importlib.import_module(name) for name in modules})
        except ImportError as error:
            raise UserError(f"--official {folder}: {error}; check out the published code there") from None
        finally:
            sys.path.remove(str(folder))

    @staticmethod
    def load_sit(folder: Path) -> Official:
        """Import SiT's own code, as `load`; it allows TF32 for the whole process, as its train.py does."""
        # Their train.py imports what shows curves in a browser, none of which is called here.
        without = find_spec("wandb") is None
        if without:
            sys.modules["wandb"] = ModuleType("wandb")
        try:
            return Official.load(folder, *SIT_MODULES)
        finally:
            if without:
                del sys.modules["wandb"]

    def sit_model(self, config: DenoiserConfig) -> nn.Module:
        """SiT's own model of our sizes."""
        return self.modules["models"].SiT(
            input_size=config.shape.grid[0],
            patch_size=config.patch,
            in_channels=config.shape.latent_channels,
            hidden_size=config.width,
            depth=config.depth,
            num_heads=config.heads,
            num_classes=config.classes,
        )

    def model(self, config: DenoiserConfig, fused_attention: bool = True) -> nn.Module:
        """Their model of our sizes. By default their train.py fuses attention, and their generate.py does not."""
        shape = config.shape
        return self.modules["models.sit"].SiT(
            input_size=shape.grid[0],
            patch_size=config.patch,
            in_channels=shape.latent_channels + shape.local_channels,
            hidden_size=config.width,
            # Their S/2 leaves this at B/2's width and cannot run; here it fits.
            decoder_hidden_size=config.width,
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


class OfficialTraining:
    """Their loop's step: accelerate, AdamW as they make it, their loss class, their loop over the averaged weights."""

    def __init__(
        self, official: Official, model: nn.Module, weights: Mapping[str, float], precision: MixedPrecision, cpu: bool
    ) -> None:
        from accelerate import Accelerator  # type: ignore[reportMissingImports], theirs needs it, ours does not

        self.official, self.train = official, official.modules["train"]
        self.weights = weights
        self.accelerator: Any = Accelerator(mixed_precision=precision, cpu=cpu)
        if not cpu:  # --allow-tf32 of their train.sh
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        self.bare = model.to(self.accelerator.device)
        self.ema = deepcopy(self.bare).requires_grad_(False).eval()
        # Not fused, and over all modules alike, as published.
        optimiser = torch.optim.AdamW(self.bare.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
        self.bare.train()
        self.model, self.optimiser = self.accelerator.prepare(self.bare, optimiser)
        self.logged: dict[str, float] = {}

    def latents(self, moments: Tensor) -> Tensor:
        """A draw from the autoencoder's posterior, as they make it on the device in every step."""
        return self.train.sample_posterior(moments, latents_scale=0.18215)

    def step(self, moments: Tensor, labels: Tensor, semantics: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
        """One step. `semantics` gives codes (B, K, H, W), class token (B, D) and tokens (B, N, D)."""
        with torch.no_grad():
            latent = self.latents(moments)
            with self.accelerator.autocast():
                codes, class_token, tokens = semantics()
            images = torch.cat([latent, codes], dim=1)
        with self.accelerator.accumulate(self.model):
            terms = official_losses(self.official, self.model, images, class_token, labels, tokens)
            weighted = {name: self.weights[name] * term for name, term in terms.items()}
            loss = weighted["latent"] + weighted["local"] + weighted["alignment"] + weighted["cls"]
            self.accelerator.backward(loss)
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.train.update_ema(self.ema, self.model)
        # Six numbers are gathered and fetched from the device in every step.
        self.logged = {
            name: self.accelerator.gather(value).mean().detach().item()
            for name, value in {"loss": loss, **weighted, "gradient_norm": norm}.items()
        }


class OfficialSiT:
    """The step of SiT's own loop on one process: float32, which may be TF32 on a GPU, AdamW as they make it, their
    transport's loss and their loop over the averaged weights. Without DistributedDataParallel, and on latents."""

    def __init__(self, official: Official, model: nn.Module, device: torch.device) -> None:
        self.official = official
        self.model = model.to(device).train()
        self.ema = deepcopy(self.model).requires_grad_(False).eval()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0)
        self.running_loss = 0.0

    def step(self, latents: Tensor, labels: Tensor) -> None:
        """One step on latents (B, C, H, W) as the model sees them, and labels (B,)."""
        loss = official_sit_loss(self.official, self.model, latents, labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.official.modules["train"].update_ema(self.ema, self.model)
        self.running_loss += loss.item()  # One number is fetched from the device in every step.


def official_sit_loss(official: Official, model: nn.Module, latents: Tensor, labels: Tensor) -> Tensor:
    """The loss of SiT's own code, a scalar.

    Noise like `latents` (B, C, H, W) comes from PyTorch's generator, then times (B,), on the CPU, which are 1 at the
    data. In training mode their model drops labels after that.
    """
    transport = official.modules["transport"].create_transport()
    return transport.training_losses(model, latents, {"y": labels})["loss"].mean()


def official_losses(
    official: Official, model: nn.Module, images: Tensor, class_token: Tensor, labels: Tensor, tokens: Tensor
) -> dict[str, Tensor]:
    """The unweighted terms of their loss, under our names.

    Times and noise come from PyTorch's generator: times (B, 1, 1, 1) on the CPU, then noise like `images` (B, C + K,
    H, W), then like `class_token` (B, D). In training mode their model drops labels after that.
    """
    loss = official.modules["loss"].SILoss(prediction="v", path_type="linear", weighting="uniform")
    latent, local, alignment, _, _, cls = loss(model, images, {"y": labels}, zs=[tokens], cls_token=class_token)
    terms = {"latent": latent, "local": local, "cls": cls, "alignment": alignment}
    return {name: term.mean() for name, term in terms.items()}


@torch.no_grad()
def official_samples(
    official: Official,
    model: nn.Module,
    start: State,
    labels: Tensor,
    steps: int,
    scale: float,
    interval: tuple[float, float],
) -> Tensor:
    """Their Euler–Maruyama sampler with all modalities guided: latents and map (B, C + K, H, W), float64.

    Its noise comes from PyTorch's generator: one draw for the map, then one for the class token, per step.
    """
    lowest, highest = interval
    return official.modules["samplers"].euler_maruyama_sampler(
        model,
        torch.cat([start[LATENT], start[LOCAL]], dim=1),
        labels,
        num_steps=steps,
        cfg_scale=scale,
        guidance_low=lowest,
        guidance_high=highest,
        path_type="linear",
        cls_latents=start[CLS],
        args=Namespace(vae_cfg="false", cls_cfg_scale=scale),
    )
