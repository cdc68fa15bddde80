"""`reglue train`: a recipe and a store to a run. The loop reads top to bottom; running it again continues it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from reglue import fine_tuning
from reglue.config import OptimiserConfig, Recipe
from reglue.data.batches import HostBatch, TrainingData
from reglue.data.pictures import image_grid
from reglue.data.store import Store, compressor_of
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.objective import TrainingSample, loss_terms, weighted_sum
from reglue.diffusion.paths import PATHS
from reglue.diffusion.paths import Path as Interpolant
from reglue.diffusion.samplers import SAMPLERS, adaptive_solver
from reglue.encoders.compressors import SPEC_FILE, load_compressor
from reglue.errors import Stopped, UserError, require
from reglue.files import TakesPaths, replacing
from reglue.pipeline import ImageModel, decoder
from reglue.run import COMPRESSORS, RunRecord, Weights
from reglue.training import checkpoints, distributed, parallel
from reglue.training.precision import autocast, compile_parts, matmul_precision, to_compile
from reglue.training.tracking import MetricsLog

READERS = 4
"""Threads that read ahead for a GPU."""


@dataclass(frozen=True)
class Train(TakesPaths):
    """Train a recipe on a store. The same command again continues where it stopped, with the same bits."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    store: Path
    """Folder that `reglue prepare` made."""
    out: Path
    """Folder of the run: new, or one to continue."""
    seed: int = 0
    """Decides the initial weights, the order of images and every draw."""
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder of a run whose weights are the start (fine-tuning), OWNER/NAME of one on the Hugging Face hub, or starter,
    the small model of this package. Resolution, classes and parts may differ; what both have must be equal in size. To
    continue, it is not needed any more."""
    start_step: Annotated[int | None, tyro.conf.arg(name="from-step")] = None
    """Which checkpoint of that run. Default: its last."""
    start_weights: Annotated[Weights, tyro.conf.arg(name="from-weights")] = "ema"
    """Its averaged weights, or those that were trained."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints."""
    keep: int = 3
    """How many checkpoints stay; 0 keeps all."""
    preview_every: int = 10_000
    """Steps between grids of samples from the averaged weights; 0 draws none."""
    preview_count: int = 16
    """Images per grid."""
    preview_steps: int = 50
    """Sampling steps of the grids."""
    workers: int | None = None
    """Threads that read samples ahead of their use. Default: 4 with a GPU, none without."""
    device: str = "auto"
    """auto, cpu or cuda."""
    deterministic: bool = True
    """On a GPU too, the same command gives the same bits, continued or not, on the same kind of GPU with the same
    versions. Without it attention's backward pass is a little faster."""
    shards: int = 1
    """Under torchrun: how many processes share one copy of the model. With 1 each has its own; more are for models that
    outgrow one device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "log_every", "checkpoint_every", "preview_count", "preview_steps", "shards", at_least=1)
        require(self, "seed", "keep", "preview_every", "workers", at_least=0)
        if self.start is None and (self.start_step is not None or self.start_weights != "ema"):
            raise UserError("--from-step and --from-weights say what to take of another run; give --from too")


class Losses(nn.Module):
    """`loss_terms` as a module: all that a step differentiates, which is what processes share."""

    def __init__(self, denoiser: Denoiser, path: Interpolant) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.path = path

    def forward(self, sample: TrainingSample) -> dict[str, Tensor]:
        """The unweighted terms, as scalars."""
        return loss_terms(self.denoiser, self.path, sample)


@distributed.watchdog
@distributed.stopping_deferred()
@distributed.repeatable(strict=True)
def train(options: Train) -> Path:
    """Train until the recipe's last step. Returns the run folder.

    Raises UserError for a store that lacks what the recipe needs, for a run folder of another recipe, store or seed,
    and when the loss is not finite; Stopped after SIGTERM, at the next line of the log, with a checkpoint written.
    """
    start = fine_tuning.begin(options.out, options.start, options.start_step, options.start_weights)
    recipe = start.recipe(options.recipe) if start else options.recipe
    optimisation = recipe.optimisation
    rank, processes = distributed.join(options.device)
    device = distributed.resolve_device(options.device)
    store = Store.open(options.store)
    share, part = part_sizes(optimisation, processes)
    parallel.check_shards(options.shards, processes)
    if options.preview_every and SAMPLERS[recipe.sampling.sampler].adaptive:
        adaptive_solver()  # If it is missing, say so before hours of training rather than at the first pictures.

    record = RunRecord.of(store, recipe, options.seed)
    if start:
        record = start.record(record)
    create_or_resume(options.out, record, rank)
    if rank == 0:
        take_compressors(store, record, options.out)
    model = Denoiser(record.denoiser, options.seed)
    if start and start.weights and rank == 0:
        start.take_weights(model, record)
        checkpoints.save_start(options.out, model)  # From here on the other run is not needed.
    model.backbone.recomputed_blocks = round(optimisation.checkpoint_blocks * record.denoiser.depth)
    losses = Losses(model, PATHS[recipe.path])
    compile_parts(losses, model.backbone.blocks, to_compile(optimisation.compile, device))
    losses = parallel.parallelise(losses, model.backbone.blocks, options.shards, device, optimisation.precision)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=optimisation.learning_rate,
        betas=optimisation.betas,
        eps=optimisation.epsilon,
        weight_decay=optimisation.weight_decay,
        fused=True,
    )
    step = 0
    distributed.barrier()
    if checkpoint := checkpoints.last_of_all(options.out):
        step = checkpoints.restore(checkpoint, model, ema, optimiser)
    distributed.barrier()

    data = TrainingData(store, recipe, record.denoiser, options.seed, device)
    log = MetricsLog(options.out, after_step=step) if rank == 0 else None
    writer = checkpoints.Writer(options.out, options.keep, sharded=options.shards > 1)
    weights_now, averages = list(model.state_dict().values()), list(ema.values())
    sums: dict[str, Tensor] = {}
    logged_step, logged_time = step, time.perf_counter()

    def positions(of_step: int) -> list[range]:
        first = of_step * optimisation.batch_size + rank * share
        return [range(start, start + part) for start in range(first, first + share, part)]

    # On the CPU itself there is nothing to overlap: threads would take its cores from the step.
    workers = options.workers if options.workers is not None else 0 if device.type == "cpu" else READERS
    drafts = prefetch(data, (parts for s in range(step, optimisation.steps) for parts in positions(s)), workers)
    progress = tqdm(
        total=optimisation.steps,
        initial=step,
        unit="step",
        desc=f"train {recipe.name}",
        disable=rank > 0,
        smoothing=0.05,
    )
    while step < optimisation.steps:
        loss_weights = recipe.loss_weights(step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(optimisation, step)

        for number in range(optimisation.accumulate):
            draft, last_part = next(drafts), number == optimisation.accumulate - 1
            with matmul_precision(device, optimisation.precision), parallel.accumulating(losses, last_part):
                with autocast(device, optimisation.precision):
                    terms = losses(data.finish(draft))
                loss = weighted_sum(terms, loss_weights) / optimisation.accumulate
                loss.backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() / optimisation.accumulate
            sums["loss"] = sums.get("loss", 0) + loss.detach()
        norm = parallel.clip_gradients(model.parameters(), optimisation.clip)
        sums["gradient_norm"] = sums.get("gradient_norm", 0) + norm
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, weights_now, 1 - ema_decay(optimisation, step))  # type: ignore[reportPrivateImportUsage]
        step += 1
        progress.update()

        last = step == optimisation.steps
        checkpoint_due = last or step % options.checkpoint_every == 0
        preview_due = options.preview_every and (last or step % options.preview_every == 0)
        stop_due = processes == 1 and distributed.asked_to_stop()
        if step % options.log_every == 0 or checkpoint_due or preview_due or stop_due:
            # The only place that waits for the device, and where processes agree to stop if one of them is asked to.
            means = torch.stack(list(sums.values())).double() / (step - logged_step)
            asked = means.new_tensor([distributed.asked_to_stop()])
            *numbers, asking = distributed.average(torch.cat([means, asked])).tolist()
            stop_due = asking > 0
            values = dict(zip(sums, numbers, strict=True))
            if not all(map(math.isfinite, values.values())):
                bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
                raise UserError(
                    f"the loss is not finite between steps {logged_step} and {step} ({bad}); lower "
                    "--optimisation.learning-rate or use --optimisation.clip 1; the last checkpoint is untouched"
                )
            now = time.perf_counter()
            if log:
                images = (step - logged_step) * optimisation.batch_size
                rate = learning_rate(optimisation, step - 1)
                log.write(step=step, **values, learning_rate=rate, images_per_second=images / (now - logged_time))
                progress.set_postfix(loss=f"{values['loss']:.3f}")
            sums, logged_step, logged_time = {}, step, now
        writer.check()
        if checkpoint_due or stop_due:
            writer.save(step, model, ema, optimiser)
        if preview_due:
            averaged = parallel.gathered(ema)
            if rank == 0:
                preview(options, record, averaged, device, step)
            logged_time = time.perf_counter()
        if stop_due and not last:
            writer.wait()
            raise Stopped(f"stopped after step {step}, with a checkpoint; the same command continues")
    writer.wait()
    progress.close()
    distributed.barrier()
    return options.out


def part_sizes(optimisation: OptimiserConfig, processes: int) -> tuple[int, int]:
    """Images per step of one process, and of one accumulated part. Raises UserError if they do not divide."""
    share, rest = divmod(optimisation.batch_size, processes)
    part, rest_of_share = divmod(share, optimisation.accumulate)
    if rest or rest_of_share or not part:
        raise UserError(
            f"a batch size of {optimisation.batch_size} does not divide into {processes} processes × "
            f"{optimisation.accumulate} accumulated parts"
        )
    return share, part


def create_or_resume(out: Path, record: RunRecord, rank: int) -> None:
    """Make the run folder, or check that it is this run's. Raises UserError, naming what differs."""
    if (out / "run.json").is_file():
        before = RunRecord.read(out)
        if before.origin:
            raise UserError(f"{out} was imported from {before.origin} and cannot be trained on; choose a new --out")
        different = before.differences(record)
        if different:
            raise UserError(
                f"{out} is a run with other settings ({', '.join(different)}); choose a new --out, or the old settings"
            )
        checkpoints.refuse_fewer_steps(out, record.recipe.optimisation.steps)
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds other files; choose a new or an empty folder for --out")
    distributed.barrier()
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        record.write(out)


def take_compressors(store: Store, record: RunRecord, out: Path) -> None:
    """Copy the compressors into the run: what the model's codes mean must not get lost with the store."""
    for modality in record.denoiser.modalities:
        folder = out / COMPRESSORS / modality.name
        if modality.name in record.compressors and not (folder / SPEC_FILE).is_file():
            load_compressor(store.folder / COMPRESSORS / compressor_of(modality.column)).save(folder)


def learning_rate(optimisation: OptimiserConfig, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    rate = optimisation.learning_rate
    if step < optimisation.warmup:
        return rate * (step + 1) / optimisation.warmup
    if optimisation.decay == "cosine":
        done = (step - optimisation.warmup) / max(optimisation.steps - optimisation.warmup, 1)
        return rate * (1 + math.cos(math.pi * done)) / 2
    return rate


def ema_decay(optimisation: OptimiserConfig, step: int) -> float:
    """The decay of the moving average at a step, counted from 0."""
    return min(optimisation.ema, (1 + step) / (10 + step)) if optimisation.ema_warmup else optimisation.ema


def prefetch(data: TrainingData, positions: Iterable[range], workers: int) -> Generator[HostBatch, None, None]:
    """Drafts of the samples at positions, in order. So many threads read ahead of their use; 0 reads when asked.

    What a thread raises is raised here, in its place in the order. The threads end with the iterator.
    """
    if not workers:
        yield from map(data.read, positions)
        return
    # A new thread begins on the first GPU, and would take memory of it that is another process's.
    own = partial(torch.cuda.set_device, data.device) if data.device.type == "cuda" else None
    reader = ThreadPoolExecutor(workers, "read ahead", initializer=own)
    ahead: deque[Future[HostBatch]] = deque()
    try:
        for part in positions:
            ahead.append(reader.submit(data.read, part))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        reader.shutdown(cancel_futures=True)


def preview(options: Train, record: RunRecord, ema: dict[str, Tensor], device: torch.device, step: int) -> None:
    """A grid of samples from the averaged weights, as `previews/STEP.png`: the same noise at every step."""
    denoiser = Denoiser(record.denoiser).to(device)
    denoiser.load_state_dict(ema)
    model = ImageModel(record, denoiser, decoder(record, device))
    sampling = replace(model.default_sampling, steps=min(options.preview_steps, model.default_sampling.steps))
    classes = max(len(record.class_names), 1)
    indices = range(options.preview_count)
    labels = [i % classes for i in indices] if record.class_names else [model.null_label] * len(indices)
    images = model.decode(model.draw(indices, model.condition(labels), options.seed, sampling), sampling.rounding)
    folder = options.out / "previews"
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"{step:08d}.png") as beside:
        columns = math.ceil(options.preview_count**0.5)
        Image.fromarray(image_grid(images, columns)).save(beside, format="png")
