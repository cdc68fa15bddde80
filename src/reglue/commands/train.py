"""`reglue train`: a recipe and a store to a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from reglue import fine_tuning
from reglue.data.batches import HostBatch, TrainingData, student_of
from reglue.data.manifest import compressor_of
from reglue.data.pictures import image_grid
from reglue.data.prefetch import READERS
from reglue.data.store import Store
from reglue.diffusion.conditions import Condition
from reglue.diffusion.denoiser import Denoiser, Prediction
from reglue.diffusion.modalities import State, TensorTimes
from reglue.diffusion.objective import TrainingSample, loss_terms, weighted_sum
from reglue.diffusion.paths import PATHS
from reglue.diffusion.paths import Path as Interpolant
from reglue.diffusion.samplers import SAMPLERS
from reglue.diffusion.students import Student
from reglue.encoders.compressors import SPEC_FILE, load_compressor
from reglue.errors import UserError, option
from reglue.extras import need
from reglue.files import refuse_filled
from reglue.locks import writes
from reglue.options.train import Train
from reglue.pipeline import ImageModel
from reglue.run import COMPRESSORS, RunRecord, decoder
from reglue.sampling import Precision
from reglue.training import checkpoints, distributed, parallel, stopping
from reglue.training.loop import Task, adamw, fit, part_size
from reglue.training.precision import agreed, autocast, compile_parts, matmul_precision, to_compile, to_precision
from reglue.training.tracking import check_trackers
from reglue.training.watchdog import watchdog


class Losses(nn.Module):
    """`loss_terms` as a module: all that a step differentiates, which is what processes share."""

    def __init__(
        self, denoiser: Denoiser, path: Interpolant, cosine: bool = False, student: Student | None = None
    ) -> None:
        super().__init__()
        self.denoiser, self.path, self.cosine, self.student = denoiser, path, cosine, student
        self.averages: dict[str, Tensor] = {}
        """Of the denoiser's weights, for students that ask the averaged one."""

    def forward(self, sample: TrainingSample) -> dict[str, Tensor]:
        """The unweighted terms, as scalars."""
        averaged = Averaged(self.denoiser, self.averages)
        return loss_terms(self.denoiser, self.path, sample, self.cosine, self.student, averaged)


@dataclass(frozen=True)
class Averaged:
    """A denoiser with other weights, see `DenoiserFunction`."""

    denoiser: Denoiser
    weights: Mapping[str, Tensor]

    def null(self, batch: int) -> Condition:
        """That of the denoiser."""
        return self.denoiser.null(batch)

    def __call__(self, state: State, time: Tensor | TensorTimes, condition: Condition) -> Prediction:
        """That of the denoiser, by the other weights."""
        return functional_call(self.denoiser, dict(self.weights), (state, time, condition))


class DenoiserTask(Task[HostBatch]):
    """Training a recipe's denoiser: what `losses` of samples gives is weighed as the recipe has it."""

    remedy = "lower --optimisation.learning-rate or use --optimisation.clip 1"

    def __init__(self, options: Train, record: RunRecord, data: TrainingData, part: int, losses: Losses) -> None:
        self.options, self.record, self.recipe, self.data = options, record, record.recipe, data
        self.name = f"train {self.recipe.name}"
        optimisation, model = self.recipe.optimisation, losses.denoiser
        blocks = model.backbone.blocks
        self.precision: Precision = to_precision(optimisation.precision, data.device)
        self.losses = parallel.parallelise(losses, blocks, options.shards, data.device, self.precision)
        losses.averages = ema = {name: value.clone() for name, value in model.state_dict().items()}
        optimiser = adamw(model.parameters(), optimisation)
        super().__init__(optimisation, data.device, part, model, optimiser, averaged=model, ema=ema)

    def read(self, positions: range) -> HostBatch:
        """See `Task`."""
        return self.data.read(positions)

    def backward(self, batch: HostBatch, step: int, last_part: bool) -> dict[str, Tensor]:
        """See `Task`."""
        with matmul_precision(self.device, self.precision), parallel.accumulating(self.losses, last_part):
            with autocast(self.device, self.precision):
                terms = self.losses(self.data.finish(batch))
            loss = weighted_sum(terms, self.recipe.loss_weights(step, self.data.shapes))
            (loss / self.optimisation.accumulate).backward()
        return {**terms, "loss": loss}

    def preview(self, step: int) -> Image.Image | None:
        """A grid of samples from the averaged weights: the same noise at every step."""
        ema = parallel.gathered(self.ema)
        if not distributed.is_first():
            return None
        options, record = self.options, self.record
        denoiser = Denoiser(record.denoiser).to(self.device)
        denoiser.load_state_dict(ema)
        model = ImageModel(record, denoiser, decoder(record, self.device))
        sampling = replace(model.default_sampling, steps=min(options.preview_steps, model.default_sampling.steps))
        classes = max(len(record.class_names), 1)
        indices = range(options.preview_count)
        labels = [i % classes for i in indices] if record.class_names else [model.null_label] * len(indices)
        state = model.draw(indices, model.condition(labels), options.seed, sampling)
        images = model.decode(state, sampling.rounding, sampling.tile)
        return Image.fromarray(image_grid(images, columns=math.ceil(options.preview_count**0.5)))


@writes()
@watchdog
@stopping.deferred()
@distributed.repeatable(strict=True)
def train(options: Train) -> Path:
    """Train until the recipe's last step. Returns the run folder.

    Raises UserError for a store that lacks what the recipe needs, for a run folder of another recipe, store or seed,
    and when the loss is not finite; Stopped after SIGTERM, at the next line of the log, with a checkpoint written.
    """
    need("train", "matplotlib")
    check_trackers(options.track)
    start = fine_tuning.begin(options.out, options.start, options.start_step, options.start_weights)
    recipe = (start.recipe(options.recipe) if start else options.recipe).settled()
    rank, processes = distributed.join(options.device)
    device = distributed.resolve_device(options.device)
    optimisation = recipe.optimisation
    store = Store.open(options.store)
    part = part_size(optimisation, processes)
    parallel.check_shards(options.shards, processes)
    if recipe.student and options.shards > 1:
        raise UserError(f"{option('shards')} {options.shards}: a student needs whole weights for its targets; choose 1")
    if options.preview_every:
        SAMPLERS[
            recipe.sampling.sampler
        ].check()  # If it is missing, say so before hours of training rather than at the first pictures.

    record = RunRecord.of(store, recipe, options.seed)
    if start:
        record = start.record(record)
    record = create_or_resume(options.out, record, device, rank)
    if rank == 0:
        take_compressors(store, record, options.out)
    model = Denoiser(record.denoiser, options.seed)
    if start and start.weights and rank == 0:
        start.take_weights(model, record)
        checkpoints.save_start(options.out, model)  # From here on the other run is not needed.
    model.backbone.recomputed_blocks = round(optimisation.checkpoint_blocks * len(model.backbone.blocks))
    losses = Losses(model, PATHS[recipe.path], recipe.cosine.present, student_of(recipe))
    compile_parts(losses, model.backbone.blocks, to_compile(optimisation.compile, device, optimisation.steps))
    data = TrainingData(store, recipe, record.denoiser, options.seed, device)
    # On the CPU itself there is nothing to overlap: threads would take its cores from the step.
    workers = options.workers if options.workers is not None else 0 if device.type == "cpu" else READERS
    fit(
        DenoiserTask(options, record, data, part, losses),
        options.out,
        log_every=options.log_every,
        checkpoint_every=options.checkpoint_every,
        keep=options.keep,
        preview_every=options.preview_every,
        workers=workers,
        track=options.track,
        sharded=options.shards > 1,
    )
    return options.out


def create_or_resume(out: Path, record: RunRecord, device: torch.device, rank: int) -> RunRecord:
    """Make the run folder, or check that it is this run's. Returns its record, in which everything is decided.

    Raises UserError, naming what differs.
    """
    before = RunRecord.read(out) if (out / "run.json").is_file() else None
    record = record.settled(before, agreed(device))
    if before:
        if before.origin:
            raise UserError(f"{out} was imported from {before.origin} and cannot be trained on; choose a new --out")
        different = before.differences(record)
        if different:
            raise UserError(
                f"{out} is a run with other settings: {', '.join(different)}; choose a new --out, or the old settings"
            )
        checkpoints.refuse_fewer_steps(out, record.recipe.optimisation.steps)
    else:
        refuse_filled(out)
    distributed.barrier()
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        record.write(out)
        if checkpoints.steps(out)[-1:] == [record.recipe.optimisation.steps]:
            print(f"{out} is complete already: {record.recipe.optimisation.steps} steps")
    return record


def take_compressors(store: Store, record: RunRecord, out: Path) -> None:
    """Copy the compressors into the run: what the model's codes mean must not get lost with the store."""
    for modality in record.denoiser.modalities:
        folder = out / COMPRESSORS / modality.name
        if modality.name in record.compressors and not (folder / SPEC_FILE).is_file():
            source = store.folder / COMPRESSORS / compressor_of(modality.column)
            load_compressor(source, f"delete {source} and run `reglue compress` again").save(folder)
