"""`reglue autoencode`: images to an autoencoder whose latents are aligned with a vision encoder (arXiv 2502.00359).

The loop reads top to bottom; running the same command again continues it.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors import SafetensorError
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from tqdm import tqdm
from tyro.conf import Positional

from reglue.commands.train import ema_decay, learning_rate, part_sizes
from reglue.data.images import ImageSource
from reglue.data.opening import open_images
from reglue.data.sources import Reading
from reglue.diffusion.objective import weighted_sum
from reglue.encoders.alignment import FILE as ALIGNMENT_FILE
from reglue.encoders.alignment import AlignmentSpec, cosine_similarities, save_alignment
from reglue.encoders.autoencoders import AutoencoderSpec, load_autoencoder
from reglue.encoders.vision import EncoderSpec, VisionEncoder
from reglue.errors import Stopped, UserError, require
from reglue.files import TakesPaths, read_json, replacing, to_json
from reglue.metrics.latents import LatentStatistics, LatentSummary
from reglue.metrics.perceptual import encoder_distance, encoder_features
from reglue.reals.adversary import adaptive_weight, check_size, hinge
from reglue.reals.config import Architecture, AutoencoderRecipe
from reglue.reals.measuring import (
    Judges,
    check_latents,
    draw,
    evaluate,
    latent_mean_std,
    load_judges,
    semantic_lengths,
    warning_of_dead_channels,
)
from reglue.reals.samples import ImageSamples, all_of, loader, to_images
from reglue.reals.trainable import AlignedAutoencoder, Reconstruction, Trained, network_of, new_network
from reglue.run import differing
from reglue.seeds import generator, permutation
from reglue.training import checkpoints, distributed, parallel
from reglue.training.precision import autocast, matmul_precision
from reglue.training.tracking import MetricsLog, read

RECORD, CONFIG, MEAN_STD = "training.json", "config.json", "mean_std.json"
FORMAT = 1
LENGTH_IMAGES = 1000
"""Held-out images over which the length of the encoder's features is measured, at most."""
UNLABELLED = Reading(no_labels=True)


@dataclass(frozen=True)
class Autoencode(TakesPaths):
    """Train an autoencoder, from scratch or from another, so that its latents say what a vision encoder sees.

    The result is a folder for `reglue prepare --autoencoder`. The same command again continues where it stopped, with
    the same bits. Many GPUs share the work: torchrun … -m reglue autoencode …
    """

    images: Positional[Path]
    """Images of whatever kind `reglue prepare` takes, a folder with folders too: classes make no difference."""
    out: Positional[Path]
    """Folder of the autoencoder: new, or one to continue."""
    recipe: Annotated[AutoencoderRecipe, tyro.conf.arg(name="")] = field(default_factory=AutoencoderRecipe)
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Begin with this AutoencoderKL in place of a new one: a short name, a name on the hub (OWNER/REPOSITORY) or a
    folder in diffusers' layout."""
    resolution: int | tuple[int, int] = 256
    """Side of the images in pixels, or height and width. Images are scaled to cover it, then cropped."""
    encoder: str = "dinov2-b-reg"
    """What the latents are aligned with: starter, a short name, timm:NAME, NAME@FILE, a folder or a file of weights.
    DINOv2's published heads read networks without registers, such as dinov2-b. The figures encoder_distance and
    frechet_distance are distances by it too, which the training has brought down; --measure-lpips and
    --measure-inception are by networks that it has not seen."""
    final_norm: bool = True
    """Align with features after the encoder's final norm. DINOv2's published depth heads read those before it."""
    validation: float | Path = 0.05
    """Share of the images that is held out to measure on, or another folder of images."""
    validation_images: int = 5000
    """Of those, at most so many are measured."""
    measure_lpips: tuple[Path, ...] = ()
    """Measure LPIPS too, whatever the loss: its files, as --perceptual.network takes them. Without them it is measured
    where it is the loss."""
    measure_inception: str | None = None
    """Measure rFID too: inception, whose weights are downloaded, or a file of them, as --feature-network of `reglue
    evaluate`. It is of the images held out, at most --validation-images: published figures are of 50000."""
    statistics_images: int = 10_000
    """The latents' mean and standard deviation are taken over so many training images, drawn at random."""
    seed: int = 0
    """Decides the initial weights, the held-out images, the order of the others and every draw."""
    evaluate_every: int | None = None
    """Steps between measurements and pictures. Default: an epoch, the steps that see as many images as there are."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl, at which latents that collapse or blow up end the training."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """How many checkpoints stay; 0 keeps all."""
    workers: int = 2
    """Processes that decode images, for each of torchrun's; 0 decodes in the same one."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    deterministic: bool = True
    """On a GPU too, the same command gives the same bits as far as PyTorch warns of nothing: gradients of attention and
    of resampling may differ in their last bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "validation_images", "statistics_images", at_least=2)
        require(self, "resolution", "evaluate_every", "log_every", "checkpoint_every", at_least=1)
        require(self, "workers", "seed", "keep", at_least=0)
        if self.recipe.optimisation.compile in ("blocks", "auto"):
            raise UserError(
                f"--optimisation.compile {self.recipe.optimisation.compile} is for transformers; choose model for an "
                "autoencoder, or no"
            )
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise UserError(
                f"--validation {self.validation}: choose a share between 0 and 1, such as 0.05, or a folder"
            )
        if self.source is not None and self.recipe.architecture != Architecture():
            raise UserError("--architecture is for training from scratch; leave it out with --from, which has its own")
        if self.recipe.adversary.present:
            check_size(self.size, self.recipe.adversary.layers)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """`training.json`: how an autoencoder was trained."""

    format: int = FORMAT
    recipe: AutoencoderRecipe
    source: AutoencoderSpec | None
    """What it began with; None for new weights."""
    encoder: EncoderSpec
    resolution: tuple[int, int]
    fingerprint: str
    """Of the images."""
    validation: str
    """The share held out, or the fingerprint of the other folder."""
    validation_images: int
    statistics_images: int
    seed: int
    images: str = field(compare=False)
    versions: dict[str, str] = field(compare=False)
    steps_done: int = field(default=0, compare=False)
    """Of which the folder holds the result; 0 before there is one."""
    figures: dict[str, float] = field(default_factory=dict, compare=False)
    """Of the result, on held-out images."""
    measured_with: dict[str, str] = field(default_factory=dict, compare=False)
    """The files of the networks behind the figures lpips and rfid."""


@distributed.watchdog
@distributed.stopping_deferred()
@distributed.repeatable(strict=False)
def autoencode(options: Autoencode) -> Path:
    """Train until the recipe's last step and write the autoencoder. Returns its folder.

    Raises UserError for options that do not fit together, for a folder of another training, and when the loss is not
    finite or the latents collapse or blow up; Stopped after SIGTERM, with a checkpoint written.
    """
    recipe, optimisation = options.recipe, options.recipe.optimisation
    rank, processes = distributed.join(options.device)
    device = distributed.resolve_device(options.device)
    share, part = part_sizes(optimisation, processes)
    # The first process is the only one that measures.
    lpips, inception = (options.measure_lpips, options.measure_inception) if rank == 0 else ((), None)
    judges = load_judges(
        options.encoder, options.size, recipe.perceptual, device, lpips, inception, final_norm=options.final_norm
    )
    source = load_autoencoder(options.source) if options.source is not None else None
    images = open_images(options.images, UNLABELLED)
    training, held_out = split(options, images)

    torch.manual_seed(int(generator(options.seed, "initial weights").integers(2**63)))
    network = network_of(source) if source else new_network(recipe.architecture, options.size)
    factor = source.spec.downsampling if source else recipe.architecture.downsampling
    shape = (network.config["latent_channels"], *latent_size(options.size, factor))
    alignment = alignment_spec(recipe, shape[0], judges.encoder) if recipe.alignment.present else None
    model = Trained(AlignedAutoencoder(network, alignment), recipe.adversary).to(device)
    averaged = copy.deepcopy(model.autoencoder).requires_grad_(False)
    ema = averaged.state_dict()
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=optimisation.learning_rate,
        betas=optimisation.betas,
        eps=optimisation.epsilon,
        weight_decay=optimisation.weight_decay,
        fused=True,
    )
    record = create_or_resume(options, images, held_out, source.spec if source else None, judges.encoder.spec, rank)
    step = 0
    if checkpoint := checkpoints.last_of_all(options.out):
        step = checkpoints.restore(checkpoint, model, ema, optimiser)
    complete = record.steps_done == step == optimisation.steps and (options.out / CONFIG).is_file()
    if distributed.broadcast_object(complete):
        if rank == 0:
            print(f"{options.out} is complete already: {step} steps")
        return options.out
    distributed.barrier()
    if optimisation.compile == "model":
        # Gradients of single terms keep the graph for those of the others, which must not reuse its memory.
        functorch_config.donated_buffer = False
        model.autoencoder.compile()

    samples = ImageSamples(images, training, options.size, shape, options.seed, "training", recipe.flips)
    held_out = replace(held_out, shape=shape)
    log = MetricsLog(options.out, after_step=step or -1) if rank == 0 else None
    weights_now, averages = list(model.autoencoder.state_dict().values()), list(ema.values())
    evaluate_every = options.evaluate_every or -(-len(training) // optimisation.batch_size)
    tally: dict[str, list[Tensor]] = {}
    logged_step, logged_time = step, time.perf_counter()

    def positions(of_step: int) -> list[range]:
        first = of_step * optimisation.batch_size + rank * share
        return [range(start, start + part) for start in range(first, first + share, part)]

    def last_checkpoint() -> int | None:
        return max(checkpoints.steps(options.out), default=None)

    def measure(at_step: int) -> None:
        """Measure the averaged weights, log the figures and draw a picture, in the first process."""
        if log:
            figures, latents = evaluate(
                averaged, judges, all_of(held_out, part, options.workers, device), optimisation.precision
            )
            epoch = at_step * optimisation.batch_size / len(training)
            log.write(step=at_step, epoch=epoch, images=len(held_out), validation=figures)
            draw(options.out / "previews" / f"{at_step:08d}.png", averaged, judges.encoder, held_out, device)
            tqdm.write(f"step {at_step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
            check_latents(latents, at_step, last_checkpoint())
            if warning := warning_of_dead_channels(latents, at_step):
                tqdm.write(warning, file=sys.stderr)
        distributed.barrier()

    if source and not step:
        measure(0)
    parts = (positions_ for s in range(step, optimisation.steps) for positions_ in positions(s))
    batches = iter(loader(samples, parts, options.workers, device))
    progress = tqdm(
        total=optimisation.steps, initial=step, unit="step", desc="autoencode", disable=rank > 0, smoothing=0.05
    )
    while step < optimisation.steps:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(optimisation, step)

        last = step + 1 == optimisation.steps
        checkpoint_due = last or (step + 1) % options.checkpoint_every == 0
        evaluation_due = last or (step + 1) % evaluate_every == 0
        stop_due = processes == 1 and distributed.asked_to_stop()
        log_due = checkpoint_due or evaluation_due or stop_due or (step + 1) % options.log_every == 0
        latents = LatentStatistics(shape, device) if log_due else None
        weights = recipe.loss_weights(step)
        adversary = model.discriminator if recipe.adversary_active(step) else None
        last_layer_gradients = torch.zeros(2, *model.autoencoder.last_layer.shape, device=device)
        with matmul_precision(device, optimisation.precision):
            for _ in range(optimisation.accumulate):
                pixels, noise = (tensor.to(device, non_blocking=True) for tensor in next(batches))
                originals = to_images(pixels)
                with autocast(device, optimisation.precision):
                    restored: Reconstruction = model.autoencoder(originals, noise)
                    terms = loss_terms(recipe, judges, pixels, originals, restored)
                if latents:
                    latents.update(restored.mean, restored.log_variance, restored.latents)
                loss = weighted_sum(terms, weights)
                if adversary:
                    with autocast(device, optimisation.precision):
                        terms["adversary"] = -adversary.requires_grad_(False)(restored.images).float().mean()
                    visible = {name: terms[name] for name in ("reconstruction", "perceptual") if name in terms}
                    for index, term in enumerate((weighted_sum(visible, weights), terms["adversary"])):
                        (gradient,) = torch.autograd.grad(term, model.autoencoder.last_layer, retain_graph=True)
                        last_layer_gradients[index] += gradient / optimisation.accumulate
                    loss = loss + weights["adversary"] * model.adversary_weight * terms["adversary"]
                (loss / optimisation.accumulate).backward()
                if adversary:
                    adversary.requires_grad_(True)
                    with autocast(device, optimisation.precision):
                        real, fake = adversary(originals).float(), adversary(restored.images.detach()).float()
                    terms["discriminator"] = hinge(real, fake)
                    (terms["discriminator"] / optimisation.accumulate).backward()
                for name, value in {**terms, "loss": loss}.items():
                    tally.setdefault(name, []).append(value.detach())
        distributed.average_gradients(model.parameters())
        norm = parallel.clip_gradients(model.autoencoder.parameters(), optimisation.clip)
        tally.setdefault("gradient_norm", []).append(norm)
        if adversary:
            parallel.clip_gradients(adversary.parameters(), optimisation.clip)
            # Of the whole batch, for the next step: a ratio of each part would depend on how the batch is cut.
            model.adversary_weight.copy_(adaptive_weight(*distributed.average(last_layer_gradients)))
            tally.setdefault("adversary_weight", []).append(model.adversary_weight.clone())
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, weights_now, 1 - ema_decay(optimisation, step))  # type: ignore[reportPrivateImportUsage]
        step += 1
        progress.update()

        if latents:
            means = torch.stack([torch.stack(values).double().mean() for values in tally.values()])
            asked = means.new_tensor([distributed.asked_to_stop()])
            averages_of_all = distributed.average(torch.cat([means, latents.sums, asked]))
            means, sums, asking = averages_of_all.split((len(means), len(latents.sums), 1))
            latents.sums, latents.images = sums * processes, optimisation.batch_size
            # The only place that waits for the device, and where processes agree to stop if one of them is asked to.
            *numbers, any_asked = torch.cat([means, latents.values(), asking]).tolist()
            stop_due = any_asked > 0
            values = dict(zip(tally, numbers, strict=False))
            summary = LatentSummary.of(optimisation.batch_size, numbers[len(tally) :])
            check_finite(values, logged_step, step)
            values |= summary.figures()
            now = time.perf_counter()
            if log:
                rate = (step - logged_step) * optimisation.batch_size / (now - logged_time)
                log.write(
                    step=step, **values, learning_rate=learning_rate(optimisation, step - 1), images_per_second=rate
                )
                progress.set_postfix(loss=f"{values['loss']:.3f}", images_per_second=f"{rate:.1f}")
            check_latents(summary, step, last_checkpoint())
            tally, logged_step, logged_time = {}, step, now
        if evaluation_due:
            measure(step)  # Before the checkpoint: a process killed in between does it again, and no figure is missing.
            logged_time = time.perf_counter()
        if (checkpoint_due or stop_due) and rank == 0:
            checkpoints.save(options.out, step, model, ema, optimiser)
            checkpoints.forget_all_but(options.out, options.keep)
        if stop_due and not last:
            raise Stopped(f"stopped after step {step}, with a checkpoint; the same command continues")
    progress.close()
    if rank == 0:
        chosen = permutation(options.seed, "latent statistics", 0, len(training))[: options.statistics_images]
        measured = ImageSamples(images, training[chosen.sort().values], options.size, shape, options.seed, "statistics")
        mean, std = latent_mean_std(averaged, all_of(measured, part, options.workers, device), optimisation.precision)
        if averaged.alignment:
            spread = torch.linspace(0, len(held_out) - 1, min(LENGTH_IMAGES, len(held_out))).long()
            described = all_of(replace(held_out, rows=held_out.rows[spread]), part, options.workers, device)
            patch_length, token_length = semantic_lengths(judges.encoder, described)
            averaged.alignment.spec = replace(
                averaged.alignment.spec, patch_length=patch_length, class_token_length=token_length
            )
        figures = next(line["validation"] for line in reversed(read(options.out)) if "validation" in line)
        record = replace(record, steps_done=step, figures=figures, measured_with=measuring_files(options, judges))
        write_result(options.out, averaged, mean, std, record)
        print(f"{options.out}: {step} steps, latents of mean {mean:.4g} and standard deviation {std:.4g}")
    distributed.barrier()
    return options.out


def split(options: Autoencode, images: ImageSource) -> tuple[Tensor, ImageSamples]:
    """Ascending rows to train on, and the held-out images. Raises UserError if there are too few of either."""
    if isinstance(options.validation, Path):
        others = open_images(options.validation, UNLABELLED)
        order = permutation(options.seed, "autoencoder validation", 0, len(others))
        training, held_out = torch.arange(len(images)), order[: options.validation_images]
    else:
        others = images
        order = permutation(options.seed, "autoencoder validation", 0, len(images))
        count = max(2, round(options.validation * len(images)))
        training, held_out = order[count:].sort().values, order[: min(count, options.validation_images)]
    if len(training) < 1 or len(held_out) < 2:
        raise UserError(
            f"{len(images)} images in {options.images} are too few: at least two have to be held out "
            "(--validation), and one to train on"
        )
    return training, ImageSamples(others, held_out.sort().values, options.size, (), options.seed, "validation")


def latent_size(image_size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Height and width of the latents. Raises UserError for an image size that the autoencoder does not divide."""
    if image_size[0] % factor or image_size[1] % factor:
        raise UserError(
            f"--resolution {image_size[0]}×{image_size[1]} does not fit an autoencoder that divides both sides by "
            f"{factor}; choose multiples of {factor} pixels"
        )
    return image_size[0] // factor, image_size[1] // factor


def alignment_spec(recipe: AutoencoderRecipe, latent_channels: int, encoder: VisionEncoder) -> AlignmentSpec:
    """The alignment network from latents of so many channels to an encoder's features."""
    spec = encoder.spec
    return AlignmentSpec(
        latent_channels, recipe.alignment.hidden, spec.width, spec.grid, encoder=json.loads(to_json(spec))
    )


def check_finite(values: dict[str, float], since: int, step: int) -> None:
    """Raises UserError if a logged value is infinite or no number."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"the loss is not finite between steps {since} and {step} ({', '.join(bad)}); lower "
            "--optimisation.learning-rate, or raise --kl.weight, in a new folder; the last checkpoint is untouched"
        )


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


def measuring_files(options: Autoencode, judges: Judges) -> dict[str, str]:
    """What the figures lpips and rfid are measured with, where they are."""
    files = {}
    if judges.lpips:
        files["lpips"] = " ".join(map(str, options.measure_lpips or options.recipe.perceptual.network))
    if judges.inception:
        files["rfid"] = f"{judges.inception.name} (SHA-256 {judges.inception.sha256})"
    return files


def create_or_resume(
    options: Autoencode,
    images: ImageSource,
    held_out: ImageSamples,
    source: AutoencoderSpec | None,
    encoder: EncoderSpec,
    rank: int,
) -> TrainingRecord:
    """Make the folder, or check that it is this training's. Raises UserError, naming what differs."""
    path = options.out / RECORD
    by_share = held_out.images is images
    record = TrainingRecord(
        recipe=options.recipe,
        source=source,
        encoder=encoder,
        resolution=options.size,
        fingerprint=images.fingerprint(),
        validation=str(options.validation) if by_share else held_out.images.fingerprint(),
        validation_images=options.validation_images,
        statistics_images=options.statistics_images,
        seed=options.seed,
        images=str(options.images),
        versions={name: version(name) for name in ("reglue", "torch", "diffusers", "safetensors")},
    )
    if path.is_file():
        before = read_json(path, TrainingRecord, "choose a new folder, or delete this one")
        different = differences(before, record)
        if different:
            raise UserError(
                f"{options.out} is of a training with other settings ({', '.join(different)}); choose a new folder, "
                "or the old settings"
            )
        checkpoints.refuse_fewer_steps(options.out, options.recipe.optimisation.steps)
        record = replace(
            record, steps_done=before.steps_done, figures=before.figures, measured_with=before.measured_with
        )
    elif options.out.is_dir() and any(options.out.iterdir()):
        raise UserError(f"{options.out} holds other files; choose a new or an empty folder")
    distributed.barrier()
    if rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(to_json(record))
    return record


def differences(before: TrainingRecord, now: TrainingRecord) -> list[str]:
    """The names of what differs. The number of steps may, where the learning rate does not depend on it."""
    compared = {part.name for part in fields(TrainingRecord) if part.compare}
    names = [name for name in differing(before, now) if name.partition(".")[0] in compared]
    names = [name for name in names if name not in ("encoder.name", "source.name")]
    if now.recipe.optimisation.decay == "constant":
        names = [name for name in names if name != "recipe.optimisation.steps"]
    return names


def write_result(out: Path, averaged: AlignedAutoencoder, mean: float, std: float, record: TrainingRecord) -> None:
    """The averaged weights in diffusers' layout, the alignment network, `mean_std.json` and the finished record.

    All of it is written beside first, and `config.json`, without which nobody takes the folder for an autoencoder, is
    moved last: the result is there whole or not at all.
    """
    (out / CONFIG).unlink(missing_ok=True)
    beside = out / "result.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    # What diffusers' own pipelines and ours normalise by.
    averaged.network.register_to_config(scaling_factor=1 / std, shift_factor=mean, latents_mean=None, latents_std=None)
    try:
        averaged.network.save_pretrained(beside)
        config = json.loads((beside / CONFIG).read_text())
        config.pop("_name_or_path", None)  # The folder of --from is in the record.
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (beside / MEAN_STD).write_text(json.dumps({"mean": mean, "std": std}))
        if averaged.alignment:
            save_alignment(averaged.alignment, beside / ALIGNMENT_FILE)
        for file in sorted(beside.iterdir(), key=lambda file: file.name == CONFIG):
            file.replace(out / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}; free some space and run it again") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    with replacing(out / RECORD) as path:
        path.write_text(to_json(record))
