"""`reglue autoencode`: images to an autoencoder whose latents are aligned with a vision encoder (arXiv 2502.00359)."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from reglue.data.images import ImageSource
from reglue.data.opening import open_images
from reglue.data.reading import Reading
from reglue.encoders.autoencoders import AutoencoderSpec, load_autoencoder
from reglue.encoders.vision import EncoderSpec
from reglue.errors import UserError
from reglue.extras import need
from reglue.files import read_json, refuse_filled, to_json, write_text
from reglue.locks import writes
from reglue.options.autoencode import Autoencode
from reglue.reals.measuring import Judges, latent_mean_std, load_judges, semantic_lengths
from reglue.reals.record import CONFIG, RECORD, TrainingRecord, differences, write_result
from reglue.reals.samples import ImageSamples, all_of
from reglue.reals.trainable import AlignedAutoencoder, Trained, network_of, new_network
from reglue.reals.training import AutoencoderTask, alignment_spec
from reglue.seeds import generator, permutation
from reglue.training import checkpoints, distributed, stopping
from reglue.training.loop import fit, part_size
from reglue.training.precision import agreed, to_precision
from reglue.training.tracking import check_trackers, read
from reglue.training.watchdog import watchdog

LENGTH_IMAGES = 1000
"""Held-out images over which the length of the encoder's features is measured, at most."""
UNLABELLED = Reading(no_labels=True)


@writes()
@watchdog
@stopping.deferred()
@distributed.repeatable(strict=False)
def autoencode(options: Autoencode) -> Path:
    """Train until the recipe's last step and write the autoencoder. Returns its folder.

    Raises UserError for options that do not fit together, for a folder of another training, and when the loss is not
    finite or the latents collapse or blow up; Stopped after SIGTERM, with a checkpoint written.
    """
    need("autoencode", "matplotlib")
    check_trackers(options.track)
    recipe, optimisation = options.recipe, options.recipe.optimisation
    rank, processes = distributed.join(options.device)
    device = distributed.resolve_device(options.device)
    part = part_size(optimisation, processes)
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
    average = copy.deepcopy(model.autoencoder).requires_grad_(False)
    record = create_or_resume(
        options, images, held_out, source.spec if source else None, judges.encoder.spec, device, rank
    )
    complete = record.steps_done == optimisation.steps in checkpoints.steps(options.out)
    if distributed.broadcast_object(complete and (options.out / CONFIG).is_file()):
        if rank == 0:
            print(f"{options.out} is complete already: {optimisation.steps} steps")
        return options.out

    samples = ImageSamples(images, training, options.size, shape, options.seed, "training", recipe.flips)
    held_out = replace(held_out, shape=shape)
    evaluate_every = options.evaluate_every or -(-len(training) // optimisation.batch_size)
    fit(
        AutoencoderTask(record.recipe, judges, model, average, samples, held_out, part, options.workers, device),
        options.out,
        log_every=options.log_every,
        checkpoint_every=options.checkpoint_every,
        keep=options.keep,
        evaluate_every=evaluate_every,
        preview_every=evaluate_every,
        evaluate_first=source is not None,
        workers=options.workers,
        track=options.track,
    )
    if rank == 0:
        chosen = permutation(options.seed, "latent statistics", 0, len(training))[: options.statistics_images]
        measured = ImageSamples(images, training[chosen.sort().values], options.size, shape, options.seed, "statistics")
        precision = to_precision(record.recipe.optimisation.precision, device)
        mean, std = latent_mean_std(average, all_of(measured, part, options.workers, device), precision)
        if average.alignment:
            spread = torch.linspace(0, len(held_out) - 1, min(LENGTH_IMAGES, len(held_out))).long()
            described = all_of(replace(held_out, rows=held_out.rows[spread]), part, options.workers, device)
            patch_length, token_length = semantic_lengths(judges.encoder, described)
            average.alignment.spec = replace(
                average.alignment.spec, patch_length=patch_length, class_token_length=token_length
            )
        figures = next(line["validation"] for line in reversed(read(options.out)) if "validation" in line)
        record = replace(
            record, steps_done=optimisation.steps, figures=figures, measured_with=measuring_files(options, judges)
        )
        write_result(options.out, average, mean, std, record)
        print(f"{options.out}: {optimisation.steps} steps, latents of mean {mean:.4g} and standard deviation {std:.4g}")
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
    device: torch.device,
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
    before = None
    if path.is_file():
        before = read_json(path, TrainingRecord, "choose a new folder, or delete this one")
    record = record.settled(before, agreed(device))
    if before:
        different = differences(before, record)
        if different:
            raise UserError(
                f"{options.out} is of a training with other settings: {', '.join(different)}; choose a new folder, "
                "or the old settings"
            )
        checkpoints.refuse_fewer_steps(options.out, options.recipe.optimisation.steps)
        record = replace(
            record, steps_done=before.steps_done, figures=before.figures, measured_with=before.measured_with
        )
    else:
        refuse_filled(options.out)
    distributed.barrier()
    if rank == 0:
        write_text(path, to_json(record))
    return record
