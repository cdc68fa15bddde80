"""A trained model that makes images: image i is a function of (seed, i), whatever the batch or the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.data.batches import Normalisation
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import VelocityFunction, guided_velocity
from reglue.diffusion.modalities import LATENT, State
from reglue.diffusion.paths import PATHS
from reglue.diffusion.samplers import euler, euler_maruyama, heun, stochastic_times, uniform_times
from reglue.errors import UserError
from reglue.latents.autoencoders import Autoencoder, load_autoencoder
from reglue.recipe import Rounding, Sampling
from reglue.runs import checkpoints
from reglue.runs.ranks import autocast, resolve_device
from reglue.runs.record import RunRecord
from reglue.seeds import generator, normals

TRAINING_ONLY = "projector."


def load(
    run: str | Path, *, step: int | None = None, device: str = "auto", autoencoder: str | None = None
) -> ImageModel:
    """Load a trained model from its run folder, with the averaged (EMA) weights.

    `step` picks a checkpoint, the last one if not given; `autoencoder` replaces the one that the run was trained
    with, for decoding (the SD-VAE's ft-ema for ft-mse, say). Raises UserError for anything missing or unfitting.
    """
    folder, target = Path(run), resolve_device(device)
    record = RunRecord.read(folder)
    weights = checkpoints.read_weights(checkpoints.find(folder, step) / checkpoints.EMA)
    denoiser = Denoiser(record.denoiser)
    denoiser.load_state_dict(weights)
    return ImageModel(record, denoiser.to(target), decoder(record, target, autoencoder))


def decoder(record: RunRecord, device: torch.device, name: str | None = None) -> Autoencoder:
    """The autoencoder that turns a run's latents into images. Raises UserError if it is not the run's own.

    A `name` that is given replaces it on purpose, and only channels and downsampling must fit: latents are scaled as
    the run has recorded.
    """
    expected = record.autoencoder
    found = load_autoencoder(name or expected.name, device)
    if name is None and found.spec != expected:
        compared = (part.name for part in fields(expected) if part.compare)
        changed = [part for part in compared if getattr(found.spec, part) != getattr(expected, part)]
        raise UserError(
            f"autoencoder {expected.name} is not the one that the run was trained with, {', '.join(changed)} differ: "
            "put the old one back or choose one with --autoencoder"
        )
    if found.spec.latent_channels != expected.latent_channels:
        raise UserError(
            f"--autoencoder {name} has {found.spec.latent_channels} latent channels, "
            f"the run has {expected.latent_channels}"
        )
    if found.spec.downsampling != expected.downsampling:
        raise UserError(
            f"--autoencoder {name} makes {found.spec.downsampling} pixels of a latent, the run has "
            f"{expected.downsampling}"
        )
    return found


@dataclass
class ImageModel:
    """A denoiser and the decoder of its latents."""

    record: RunRecord
    denoiser: Denoiser
    autoencoder: Autoencoder

    def __post_init__(self) -> None:
        self.denoiser.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.denoiser.positions.device

    @property
    def default_sampling(self) -> Sampling:
        """What the recipe says; without classes there is nothing for classifier-free guidance to compare with."""
        sampling = self.record.recipe.sampling
        if self.record.class_names:
            return sampling
        return replace(sampling, guidance=replace(sampling.guidance, scale=1.0, local_scale=None, cls_scale=None))

    def generate(
        self,
        classes: Sequence[int | str] | None = None,
        *,
        count: int | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
        batch_size: int = 32,
    ) -> list[Image.Image]:
        """Images of the given classes (indices or names), one each; or `count` images of an unconditional model.

        `sampling` replaces `default_sampling`. Image i depends on `seed` and i alone. Raises UserError for an unknown
        class.
        """
        labels = [self.label(c) for c in classes] if classes is not None else [self.denoiser.null_label] * (count or 1)
        sampling = sampling or self.default_sampling
        pictures: list[Image.Image] = []
        for start in range(0, len(labels), batch_size):
            indices = range(start, min(start + batch_size, len(labels)))
            state = self.draw(indices, [labels[i] for i in indices], seed, sampling)
            pictures += [Image.fromarray(pixels) for pixels in self.decode(state, sampling.rounding)]
        return pictures

    def label(self, name: int | str) -> int:
        """The label of a class index or name. Raises UserError if there is no such class."""
        names = self.record.class_names
        if str(name) in names and not isinstance(name, int):
            return names.index(str(name))
        if str(name).isdecimal() and int(name) < len(names):
            return int(name)
        shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        raise UserError(
            f"class {name}: choose 0 to {len(names) - 1} or a name ({shown})"
            if names
            else f"class {name}: this model was trained without classes"
        )

    @torch.no_grad()
    def draw(
        self,
        indices: Sequence[int],
        labels: Sequence[int],
        seed: int,
        sampling: Sampling,
        *,
        weaker: Denoiser | None = None,
        on_evaluation: Callable[[], object] = lambda: None,
    ) -> State:
        """Sample the images `indices` of a seed, with labels as long: normalised states in float64 on the device.

        `weaker` is the second model of autoguidance; `on_evaluation` is called after each evaluation, for progress.
        """
        guidance, device = sampling.guidance, self.device
        if guidance.uses_labels and not self.record.class_names:
            raise UserError(
                "classifier-free guidance needs classes, and this model has none; use a guidance scale of 1"
            )
        generators = [generator(seed, "sample", i) for i in indices]
        shapes = self.record.denoiser.shape.shapes()

        def noise() -> Iterator[State]:
            while True:
                drawn = normals(generators, shapes)
                yield {name: value.to(device, torch.float64) for name, value in drawn.items()}

        inner = guided_velocity(self.denoiser, torch.tensor(list(labels), device=device), guidance, weaker)

        def velocity(state: State, time: float, step_start: float | None = None) -> State:
            with autocast(device, self.record.recipe.optimisation.precision):
                result = inner(state, time, step_start)
            on_evaluation()
            return result

        draws = noise()
        return follow(velocity, next(draws), draws, sampling, self.record)

    @torch.no_grad()
    def decode(self, state: State, rounding: Rounding) -> np.ndarray:
        """The images of a state: uint8 (B, height, width, 3)."""
        return to_pixels(self.autoencoder.decode(self.raw(state, LATENT)), rounding)

    def raw(self, state: State, name: str) -> Tensor:
        """A modality of a state as the autoencoder, encoder or compressor gives it, float32."""
        scaled: Normalisation | None = self.record.normalisation.get(name)
        value = state[name].float()
        return scaled.denormalise(value) if scaled else value


def follow(
    velocity: VelocityFunction, start: State, noise: Iterator[State], sampling: Sampling, record: RunRecord
) -> State:
    """Run the sampler that was asked for."""
    if sampling.sampler == "euler-maruyama":
        path = PATHS[record.recipe.path]
        return euler_maruyama(velocity, start, stochastic_times(sampling.steps), noise, path)
    method = {"euler": euler, "heun": heun}[sampling.sampler]
    return method(velocity, start, uniform_times(sampling.steps))


def evaluations(sampling: Sampling) -> int:
    """How often a sampler evaluates the velocity."""
    return 2 * sampling.steps - 1 if sampling.sampler == "heun" else sampling.steps


def to_pixels(images: Tensor, rounding: Rounding) -> np.ndarray:
    """Images (B, 3, H, W) in [−1, 1] to uint8 (B, H, W, 3); values outside are clamped."""
    scaled = 127.5 * images + 128 if rounding == "round" else 255 * (images + 1) / 2
    return scaled.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
