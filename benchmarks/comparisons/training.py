"""The training step: ours and the published ones, on the same tensors, from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from common import Comparison, Maker, alternate, free, matrix_rate, measured, ratio, report, seconds_of
from comparisons.official import (
    MODULES,
    MixedPrecision,
    Official,
    OfficialSiT,
    OfficialTraining,
    official_losses,
    official_sit_loss,
)
from counting import parameters, training_flops
from reglue.config import Compile, Precision
from reglue.data.batches import HostBatch, TrainingData
from reglue.data.prefetch import READERS, prefetch
from reglue.data.store import Store
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.modalities import CLS, LATENT, LOCAL
from reglue.diffusion.objective import TrainingSample, loss_terms
from reglue.diffusion.paths import LINEAR
from reglue.encoders.vision import VisionEncoder
from reglue.errors import UserError
from reglue.published.weights import export_official, import_official
from reglue.training.precision import autocast, to_compile
from training_step import TrainingStep
from workloads import LAYERS, Data, RandomOnline, Workload, loss_weights, random_encoder, random_store

AGREEMENT = 1e-4
"""Largest relative difference of a term of the loss, ours against theirs, in float32."""
SCALE = 0.18215
"""By which SiT's own train.py multiplies the SD-VAE's latents."""


@dataclass(frozen=True)
class Training:
    """Time the training step: noise, forward, backward, clipping, AdamW, moving average.

    Ours is the step of `reglue train` on a store of random rows: read and drawn ahead, fused AdamW, the average in one
    operation. Theirs is the loop of their train.py on one process: accelerate, their loss, AdamW and average as they
    write them, six numbers fetched per step; it has its tensors in memory and draws noise on the device.

    A timing is a turn of `--steps` steps, within which our threads begin to read, and end; figures are of a step, the
    turn's mean. Ours is timed without reading too, on one sample again and again, as theirs always is.
    """

    conditions: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)
    recipe: Literal["sit", "reglue"] = "reglue"
    """Whose step: with sit, `--official` names a checkout of SiT's own code."""
    data: Data = "imagenet"
    """Sizes: ImageNet at 256 px (SD-VAE, DINOv2-B, 16 channels), or those of `reglue demo`."""
    model: str | None = None
    """B/2, XL/2, … or DEPTHxWIDTHxHEADS/PATCH. Default: B/2, or the demo's own."""
    batch_size: int = 256
    """Halved until it fits where the GPU's memory does not suffice."""
    steps: int = 1
    """Steps per turn: many on a GPU, where the first of a turn waits for its data and no other should. That takes 0.2 s
    for a batch of 256, so with steps of 0.1 s it is 2 % of a turn of 100."""
    precision: tuple[Precision, ...] = ("bfloat16",)
    """Of our matrix products."""
    compile: tuple[Compile, ...] = ("no",)
    """Ways to compile our model, each of which is timed: no, blocks, model."""
    workers: int | None = None
    """Threads that read ahead for ours. Default: as `reglue train` chooses."""
    official_precision: MixedPrecision = "no"
    """Of theirs, as accelerate calls it: their train.sh has fp16, which needs a GPU. SiT's own has none."""
    encoder_in_step: bool = False
    """The vision encoder (DINOv2-B, random weights) and the compressor run in each of their steps, as published; ours
    is timed with online targets, too. Otherwise both read its tokens, which theirs cannot."""


def training(options: Training) -> str:
    """Check that both compute the same loss, then time both."""
    conditions = options.conditions
    if options.recipe == "sit" and options.encoder_in_step:
        raise UserError("--encoder-in-step: SiT has no vision encoder; choose --recipe reglue")
    device = conditions.begin()
    data, model = ("toy", None) if conditions.toy else (options.data, options.model)
    workload = Workload.of(data, model, options.recipe)
    start, official = workload.random_model(), None  # Made once: of XL/2's size that takes a quarter of a minute.
    figures: dict[str, Any] = {"parameters": parameters(workload.config)}
    if conditions.official:
        of_sit = options.recipe == "sit"
        official = Official.load_sit(conditions.official) if of_sit else Official.load(conditions.official, *MODULES)
        difference = sit_loss_difference if of_sit else loss_difference
        figures["loss_difference"] = difference(official, workload, start)
        assert figures["loss_difference"] < AGREEMENT, figures
    figures |= fitting_timings(options, workload, start, official, device)
    return report("train", options, figures, device)


def fitting_timings(
    options: Training, workload: Workload, start: Denoiser, official: Official | None, device: torch.device
) -> dict[str, Any]:
    """The `timings` of the largest batch that everybody can make a step of, by halving."""
    batch = 4 if options.conditions.toy else options.batch_size
    while batch:
        with suppress(torch.OutOfMemoryError), TemporaryDirectory() as folder:
            store = random_store(Path(folder) / "store", workload, batch)
            return timings(options, workload, start, store, official, device)
        free(device)  # Here no traceback holds any more what has failed.
        batch //= 2
    raise UserError("--model: the GPU has no memory for a step of one image; choose a smaller one")


def sit_loss_difference(official: Official, workload: Workload, model: Denoiser) -> float:
    """The relative difference of the loss between ours and SiT's own, on the same draws, in float32."""
    config = workload.config
    theirs = official.sit_model(config)
    theirs.load_state_dict(export_official("sit", config, model.state_dict()))
    latents, labels = torch.randn(2, *config.shape.shapes()[LATENT]), torch.arange(2)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = official_sit_loss(official, theirs.eval(), latents, labels)
        torch.manual_seed(1)
        noise, times = torch.randn_like(latents), torch.rand(2)
        sample = TrainingSample({LATENT: latents}, {LATENT: noise}, 1 - times, labels)
        found = loss_terms(model, LINEAR, sample)[LATENT]
    return ((found - expected).abs() / expected.abs()).item()


def loss_difference(official: Official, workload: Workload, model: Denoiser) -> float:
    """The largest relative difference of a term of the loss between ours and theirs, on the same draws, in float32."""
    config = workload.config
    theirs = official.model(config)
    theirs.load_state_dict(export_official("reglue", config, model.state_dict()))
    ours = import_official(theirs.state_dict(), heads=config.heads, alignment_depth=config.alignment_depth).denoiser()
    state = {name: torch.randn(2, *shape) for name, shape in config.shape.shapes().items()}
    images = torch.cat([state[LATENT], state[LOCAL]], dim=1)
    labels = torch.arange(2)
    rows, columns = config.token_grid
    tokens = torch.randn(2, 1 + rows * columns, config.alignment_width)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = official_losses(official, theirs.eval(), images, state[CLS], labels, tokens)
        torch.manual_seed(1)
        times = torch.rand(2, 1, 1, 1).flatten()
        noise, of_class_token = torch.randn_like(images), torch.randn_like(state[CLS])
        latent, local = noise.split([state[LATENT].shape[1], state[LOCAL].shape[1]], dim=1)
        drawn = {LATENT: latent, LOCAL: local, CLS: of_class_token}
        sample = TrainingSample(state, drawn, times, labels, tokens)
        terms = loss_terms(ours, LINEAR, sample)
    differences = torch.stack([(terms[name] - value).abs() / value.abs() for name, value in expected.items()])
    return differences.max().item()  # NaN, if one is


def timings(
    options: Training,
    workload: Workload,
    start: Denoiser,
    store: Store,
    official: Official | None,
    device: torch.device,
) -> dict[str, Any]:
    """Seconds per step of every contestant, all rows of the store at once, and what follows from them."""
    conditions, config, batch = options.conditions, workload.config, len(store)
    # Theirs first: it needs the most memory, so that what does not fit is known soon.
    makers = {
        **theirs(options, workload, start, store, official, device),
        **ours(options, workload, start, store, device),
    }
    found = measured(makers, conditions.repeats, device)
    timed = {name: one.timing.of_one(options.steps) for name, one in found.items()}
    data = TrainingData(store, workload.recipe, config, 0, device)
    reading = alternate({"read": lambda: data.read(range(batch))}, conditions.repeats, device)["read"]
    flops = training_flops(config) * batch
    rates = {
        precision: matrix_rate(device, precision, 256 if conditions.toy else None) for precision in options.precision
    }
    return {
        "batch_size": batch,
        "seconds_per_step": timed,
        "steps_per_turn": options.steps,
        "images_per_second": {name: batch / seconds_of(timing, device) for name, timing in timed.items()},
        "reading_seconds_per_step": reading,
        "flops_per_step": flops,
        "matrix_flops_per_second": rates,
        "share_of_matrix_rate": {
            name: flops / seconds_of(timing, device) / rates[name.split()[1].rstrip(",")]  # type: ignore[index]
            for name, timing in timed.items()
            if name.startswith("ours")
        },
        "times_faster": {
            mine: ratio(timed[name], timed[mine], device)
            for name in timed
            if name.startswith("theirs")
            for mine in timed
            if mine.startswith("ours")
        },
        "peak_gpu_memory_mib": {name: one.peak_gpu_memory_mib for name, one in found.items()},
    }


def ours(
    options: Training, workload: Workload, start: Denoiser, store: Store, device: torch.device
) -> dict[str, Maker]:
    """Ours in every precision and way of compilation."""
    ways: list[Compile] = [to_compile(asked, device) for asked in options.compile]

    def make(precision: Precision, compile: Compile, online: bool) -> dict[str, Callable[[], object]]:
        data = TrainingData(store, workload.recipe, workload.config, 0, device)
        if online:
            data.targets = RandomOnline(random_encoder(workload, LAYERS[-1:], device))
        step = TrainingStep(workload.recipe, workload.config, device, precision, compile, start)
        return our_turns(step, data, options.steps, options.workers)

    return {
        f"ours {precision}{'' if compile == 'no' else f' compiled {compile}'}{', encoder in step' * online}": partial(
            make, precision, compile, online
        )
        for precision in options.precision
        for compile in ways
        for online in (False, True)[: 1 + options.encoder_in_step]
    }


def our_turns(
    step: TrainingStep, data: TrainingData, steps: int, workers: int | None
) -> dict[str, Callable[[], object]]:
    """A turn of steps on samples read ahead as in `jobs/train.py`, by threads that the turn begins and ends.

    And one on a sample that has been read, as theirs have.
    """
    batch, on_cpu = len(data.store), data.device.type == "cpu"
    threads = workers if workers is not None else 0 if on_cpu else READERS
    at_hand = data.read(range(batch))

    def turn(drafts: Iterable[HostBatch]) -> None:
        for draft in drafts:
            with autocast(data.device, step.precision):
                sample = data.finish(draft)
            step(sample)

    return {
        "": lambda: turn(
            prefetch(data.read, (range(i * batch, (i + 1) * batch) for i in range(steps)), threads, data.device)
        ),
        ", without reading": lambda: turn(repeat(at_hand, steps)),
    }


def as_loaded(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor as their DataLoader hands it over: in pinned memory where there is a GPU to copy it."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def theirs(
    options: Training,
    workload: Workload,
    start: Denoiser,
    store: Store,
    official: Official | None,
    device: torch.device,
) -> dict[str, Maker]:
    """The published step, where there is its code."""
    if official is None:
        return {}
    published, batch = official, len(store)
    weights = start.state_dict()
    latent = {name: as_loaded(value, device) for name, value in store.read("latent", torch.arange(batch)).items()}
    labels = as_loaded(store.labels, device)

    def make_sit() -> dict[str, Callable[[], object]]:
        model = published.sit_model(workload.config)
        model.load_state_dict(export_official("sit", workload.config, weights))
        sit = OfficialSiT(published, model, device)

        def step() -> None:
            mean, std = latent["mean"].to(device), latent["std"].to(device)
            sit.step((mean + std * torch.randn_like(mean)) * SCALE, labels.to(device))

        return {"": repeated(step, options.steps)}

    def make() -> dict[str, Callable[[], object]]:
        model = published.model(workload.config)
        model.load_state_dict(export_official("reglue", workload.config, weights))
        on_cpu, of_losses = device.type == "cpu", loss_weights(workload.recipe)
        training = OfficialTraining(published, model, of_losses, options.official_precision, on_cpu)
        moments = as_loaded(torch.cat(list(latent.values()), dim=1), device)
        sample = TrainingData(store, workload.recipe, workload.config, 0, device).sample(range(batch))
        assert sample.alignment_target is not None
        in_memory = sample.data[LOCAL], sample.data[CLS], sample.alignment_target
        encoder = OfficialEncoder.make(published, workload, batch, device) if options.encoder_in_step else None

        def step() -> None:
            training.step(moments.to(device), labels.to(device), encoder or (lambda: in_memory))

        return {"": repeated(step, options.steps)}

    if options.recipe == "sit":
        return {"theirs SiT": make_sit}
    return {f"theirs {options.official_precision}{', encoder in step' * options.encoder_in_step}": make}


def repeated(step: Callable[[], object], times: int) -> Callable[[], None]:
    """A function that makes several steps."""

    def steps() -> None:
        for _ in range(times):
            step()

    return steps


@dataclass(frozen=True)
class OfficialEncoder:
    """The vision encoder and the compressor inside of their step."""

    encoder: VisionEncoder
    compressor: nn.Module
    pixels: Tensor
    grid: tuple[int, int]

    @staticmethod
    def make(official: Official, workload: Workload, batch: int, device: torch.device) -> OfficialEncoder:
        """Networks of random weights, and random images on the CPU."""
        encoder = random_encoder(workload, LAYERS, device)
        channels = [len(LAYERS) * encoder.spec.width, 256, workload.local_channels]
        module = Official.load(official.folder, "compressor").modules["compressor"]
        compressor = module.EncoderDecoder(channels).encoder.to(device).eval()
        pixels = torch.randint(256, (batch, 3, *encoder.spec.image_size), dtype=torch.uint8)
        return OfficialEncoder(encoder, compressor, as_loaded(pixels, device), workload.config.shape.grid)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, class token and tokens, in the order of their loop; autocast is on around it.

        The network is timm's, with fused attention, since theirs comes from a hub: no slower than the original.
        """
        described = self.encoder.describe(self.pixels.to(next(self.compressor.parameters()).device))
        features = described.features
        last = features[:, -self.encoder.spec.width :].flatten(2).transpose(1, 2)
        tokens = torch.cat([described.class_token.unsqueeze(1), last], dim=1)
        codes = self.compressor((features - 0.1) / 1.1)
        return F.interpolate(codes, size=self.grid, mode="bilinear"), described.class_token, tokens
