"""Training an autoencoder whose latents are aligned with a vision encoder: the terms of the loss, and a step."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn import functional as F

from reglue.diffusion.objective import weighted_sum
from reglue.encoders.alignment import AlignmentSpec, cosine_similarities
from reglue.encoders.vision import VisionEncoder
from reglue.errors import option
from reglue.files import to_json
from reglue.metrics.latents import LatentStatistics, LatentSummary
from reglue.metrics.perceptual import encoder_distance, encoder_features
from reglue.progress import Bar
from reglue.reals.adversary import adaptive_weight, hinge
from reglue.reals.config import AutoencoderRecipe
from reglue.reals.measuring import Judges, check_latents, draw, evaluate, warning_of_dead_channels
from reglue.reals.samples import ImageSamples, all_of, to_images
from reglue.reals.trainable import AlignedAutoencoder, Reconstruction, Trained
from reglue.sampling import Precision
from reglue.training import distributed, parallel
from reglue.training.loop import Task, adamw
from reglue.training.precision import autocast, matmul_precision, to_precision


class AutoencoderTask(Task[tuple[Tensor, Tensor]]):
    """Training an autoencoder, with its alignment network and its adversary."""

    name = "autoencode"

    def __init__(
        self,
        recipe: AutoencoderRecipe,
        judges: Judges,
        model: Trained,
        average: AlignedAutoencoder,
        samples: ImageSamples,
        held_out: ImageSamples,
        part: int,
        workers: int,
        device: torch.device,
    ) -> None:
        """`average` is a copy of the model's autoencoder, to become its moving average."""
        optimiser, ema = adamw(model.parameters(), recipe.optimisation), average.state_dict()
        super().__init__(recipe.optimisation, device, part, model, optimiser, model.autoencoder, ema)
        self.precision: Precision = to_precision(recipe.optimisation.precision, device)
        self.remedy = f"lower {option('optimisation.learning_rate')}, or raise {option('kl.weight')}, in a new folder"
        self.recipe, self.judges, self.trained, self.average = recipe, judges, model, average
        self.samples, self.held_out, self.workers = samples, held_out, workers
        self.summary: LatentSummary | None = None
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        """Of the latents of the last step's parts: means, logarithms of variances, and what was drawn."""
        self._begin_step()
        if recipe.optimisation.compile == "model":
            # Gradients of single terms keep the graph for those of the others, which must not reuse its memory.
            functorch_config.donated_buffer = False
            model.autoencoder.compile()

    def _begin_step(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        # By the visible terms of the loss, and by the adversary.
        self.last_layer_gradients = torch.zeros(2, *self.trained.autoencoder.last_layer.shape, device=self.device)

    def read(self, positions: range) -> tuple[Tensor, Tensor]:
        """See `Task`."""
        return self.samples.batch(positions, pinned=self.device.type == "cuda")

    def backward(self, batch: tuple[Tensor, Tensor], step: int, last_part: bool) -> dict[str, Tensor]:
        """See `Task`."""
        recipe, model, precision, parts = self.recipe, self.trained, self.precision, self.optimisation.accumulate
        weights = recipe.loss_weights(step)
        adversary = model.discriminator if recipe.adversary_active(step) else None
        with matmul_precision(self.device, precision):
            pixels, noise = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            originals = to_images(pixels)
            with autocast(self.device, precision):
                restored: Reconstruction = model.autoencoder(originals, noise)
                terms = loss_terms(recipe, self.judges, pixels, originals, restored)
            latents = restored.mean, restored.log_variance, restored.latents
            self.parts.append(tuple(tensor.detach() for tensor in latents))  # type: ignore[reportArgumentType]
            loss = weighted_sum(terms, weights)
            if adversary:
                with autocast(self.device, precision):
                    terms["adversary"] = -adversary.requires_grad_(False)(restored.images).float().mean()
                visible = {name: terms[name] for name in ("reconstruction", "perceptual") if name in terms}
                for index, term in enumerate((weighted_sum(visible, weights), terms["adversary"])):
                    (gradient,) = torch.autograd.grad(term, model.autoencoder.last_layer, retain_graph=True)
                    self.last_layer_gradients[index] += gradient / parts
                loss = loss + weights["adversary"] * model.adversary_weight * terms["adversary"]
            (loss / parts).backward()
            if adversary:
                adversary.requires_grad_(True)
                with autocast(self.device, precision):
                    real, fake = adversary(originals).float(), adversary(restored.images.detach()).float()
                terms["discriminator"] = hinge(real, fake)
                (terms["discriminator"] / parts).backward()
        return {**terms, "loss": loss}

    def before_update(self, step: int) -> dict[str, Tensor]:
        """See `Task`."""
        model, clip = self.trained, self.optimisation.clip
        distributed.average_gradients(model.parameters())
        logged = {"gradient_norm": parallel.clip_gradients(model.autoencoder.parameters(), clip)}
        if model.discriminator and self.recipe.adversary_active(step):
            parallel.clip_gradients(model.discriminator.parameters(), clip)
            # Of the whole batch, for the next step: a ratio of each part would depend on how the batch is cut.
            ratio = adaptive_weight(*distributed.average(self.last_layer_gradients))
            logged["adversary_weight"] = model.adversary_weight.copy_(ratio)
        self.seen = self.parts
        self._begin_step()
        return logged

    def line(self, step: int, values: dict[str, float]) -> dict[str, Any]:
        """See `Task`: with figures of the last step's latents."""
        latents = LatentStatistics(self.samples.shape, self.device)
        for part in self.seen:
            latents.update(*part)
        _, processes = distributed.rank_and_count()
        latents.sums, latents.images = distributed.average(latents.sums) * processes, self.optimisation.batch_size
        self.summary = latents.summary()
        return {**values, **self.summary.figures()}

    def check(self, step: int, saved: int | None) -> None:
        """See `Task`."""
        assert self.summary
        check_latents(self.summary, step, saved)

    def evaluate(self, step: int) -> dict[str, Any]:
        """See `Task`: figures of the average on held-out images."""
        held_out = all_of(self.held_out, self.part, self.workers, self.device)
        figures, self.summary = evaluate(self.average, self.judges, held_out, self.precision)
        Bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if warning := warning_of_dead_channels(self.summary, step):
            Bar.write(warning, file=sys.stderr)
        epoch = step * self.optimisation.batch_size / len(self.samples)
        return {"epoch": epoch, "images": len(self.held_out), "validation": figures}

    def preview(self, step: int) -> Image.Image | None:
        """See `Task`."""
        return draw(self.average, self.judges.encoder, self.held_out, self.device) if distributed.is_first() else None


def loss_terms(
    recipe: AutoencoderRecipe, judges: Judges, pixels: Tensor, originals: Tensor, restored: Reconstruction
) -> dict[str, Tensor]:
    """Every term of the loss but the adversary's: scalars, each the mean over its own elements.

    `pixels` uint8 and `originals` in [−1, 1] are the same images (B, 3, H, W).
    """
    terms = {"reconstruction": F.l1_loss(restored.images, originals)}
    by_encoder = recipe.perceptual.present and not judges.perceptual
    seen = judges.encoder.describe(pixels) if by_encoder or restored.semantics else None
    if recipe.perceptual.present and judges.perceptual:
        terms["perceptual"] = judges.perceptual(originals, restored.images).mean()
    if seen and by_encoder:
        features = encoder_features(judges.encoder, restored.images)
        terms["perceptual"] = encoder_distance(seen.features, features, len(judges.encoder.spec.layers)).mean()
    if recipe.kl.present:
        terms["kl"] = restored.kl().mean()
    if seen and restored.semantics:
        by_patch, by_class = cosine_similarities(restored.semantics, *judges.encoder.last_layer(seen))
        terms |= {"alignment": 1 - by_patch.mean(), "class_alignment": 1 - by_class.mean()}
    return terms


def alignment_spec(recipe: AutoencoderRecipe, latent_channels: int, encoder: VisionEncoder) -> AlignmentSpec:
    """The alignment network from latents of so many channels to an encoder's features."""
    spec = encoder.spec
    return AlignmentSpec(
        latent_channels, recipe.alignment.hidden, spec.width, spec.grid, encoder=json.loads(to_json(spec))
    )
