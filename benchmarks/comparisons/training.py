"""The training step: ours and the published one, on the same tensors, from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from common import Comparison, alternate, matrix_rate, peak_gpu_memory_mib, ratio, report, seconds_of
from comparisons.official import MODULES, MixedPrecision, Official, OfficialTraining, official_losses
from counting import parameters, training_flops
from reglue.data.batches import TrainingData
from reglue.data.store import Store
from reglue.diffusion.modalities import CLS, LATENT, LOCAL
from reglue.diffusion.objective import TrainingSample, loss_terms
from reglue.diffusion.paths import LINEAR
from reglue.jobs.train import READERS, prefetch
from reglue.recipe import Compile
from reglue.runs import ranks
from reglue.runs.official import export_official, import_official
from reglue.runs.ranks import Precision
from reglue.semantics.encoders import VisionEncoder
from training_step import TrainingStep
from workloads import LAYERS, Data, RandomOnline, Workload, loss_weights, random_encoder, random_store

AGREEMENT = 1e-4
"""Largest relative difference of a term of the loss, ours against theirs, in float32."""


@dataclass(frozen=True)
class Training:
    """Time the training step: noise, forward, backward, clipping, AdamW, moving average.

    Ours is the step of `reglue train` on a store of random rows: read and drawn ahead, fused AdamW, the average in one
    operation. Theirs is the loop of their train.py on one process: accelerate, their loss, AdamW and average as they
    write them, six numbers fetched per step; it has its tensors in memory and draws noise on the device.
    """

    conditions: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)
    data: Data = "imagenet"
    """Sizes: ImageNet at 256 px (SD-VAE, DINOv2-B, 16 channels), or those of `reglue demo`."""
    model: str | None = None
    """B/2, XL/2, … or DEPTHxWIDTHxHEADS/PATCH. Default: B/2, or the demo's own."""
    batch_size: int = 256
    """Halved until it fits where the GPU's memory does not suffice."""
    steps: int = 1
    """Steps per timing."""
    precision: tuple[Precision, ...] = ("bfloat16",)
    """Of our matrix products."""
    compile: tuple[Compile, ...] = ("no",)
    """Ways to compile our model, each of which is timed: no, blocks, model."""
    workers: int | None = None
    """Threads that read ahead for ours. Default: as `reglue train` chooses."""
    official_precision: MixedPrecision = "no"
    """Of theirs, as accelerate calls it: their train.sh has fp16, which needs a GPU."""
    encoder_in_step: bool = False
    """The vision encoder (DINOv2-B, random weights) and the compressor run in each of their steps, as published; ours
    is timed with online targets, too. Otherwise both read its tokens, which theirs cannot."""


def training(options: Training) -> str:
    """Check that both compute the same loss, then time both."""
    conditions = options.conditions
    device = conditions.begin()
    workload = Workload.of("toy" if conditions.toy else options.data, None if conditions.toy else options.model)
    official = Official.load(conditions.official, *MODULES) if conditions.official else None
    figures: dict[str, Any] = {"parameters": parameters(workload.config)}
    if official:
        figures["loss_difference"] = loss_difference(official, workload)
        assert figures["loss_difference"] < AGREEMENT, figures
    batch = 4 if conditions.toy else options.batch_size
    while True:
        try:
            with TemporaryDirectory() as folder:
                store = random_store(Path(folder) / "store", workload, batch)
                figures |= timings(options, workload, store, official, device)
            break
        except torch.OutOfMemoryError:
            batch //= 2
            torch.cuda.empty_cache()
    return report("train", options, figures, device)


def loss_difference(official: Official, workload: Workload) -> float:
    """The largest relative difference of a term of the loss between ours and theirs, on the same draws, in float32."""
    config = workload.config
    model = workload.random_model()
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
    options: Training, workload: Workload, store: Store, official: Official | None, device: torch.device
) -> dict[str, Any]:
    """Seconds per step of every contestant, all rows of the store at once, and what follows from them."""
    conditions, config, batch = options.conditions, workload.config, len(store)
    weights = workload.random_model().state_dict()
    contestants: dict[str, Callable[[], object]] = {}
    cached = TrainingData(store, workload.recipe, config, 0, device)
    kinds = {"": cached}
    if options.encoder_in_step:
        online = TrainingData(store, workload.recipe, config, 0, device)
        online.targets = RandomOnline(random_encoder(workload, LAYERS[-1:], device))
        kinds[", encoder in step"] = online
    for precision in options.precision:
        for compile in options.compile:
            for kind, data in kinds.items():
                name = f"ours {precision}{'' if compile == 'no' else f' compiled {compile}'}{kind}"
                step = TrainingStep(workload.recipe, config, device, precision, compile, weights)
                contestants[name] = repeated(our_steps(step, data, options.workers), options.steps)
    if official:
        model = official.model(config)
        model.load_state_dict(export_official("reglue", config, weights))
        precision, published = options.official_precision, loss_weights(workload.recipe)
        theirs = OfficialTraining(official, model, published, precision, device.type == "cpu")
        rows = torch.arange(batch)
        moments = torch.cat(list(store.read("latent", rows).values()), dim=1)
        sample = cached.finish(cached.read(range(batch)))
        assert sample.alignment_target is not None
        in_memory = sample.data[LOCAL], sample.data[CLS], sample.alignment_target
        semantics = (
            OfficialEncoder.make(official, workload, batch, device) if options.encoder_in_step else lambda: in_memory
        )

        def their_step() -> None:
            theirs.step(moments.to(device), store.labels.to(device), semantics)

        name = f"theirs {precision}{', encoder in step' * options.encoder_in_step}"
        contestants[name] = repeated(their_step, options.steps)

    timed = alternate(contestants, conditions.repeats, device)
    reading = alternate({"read": lambda: cached.read(range(batch))}, conditions.repeats, device)["read"]
    flops = training_flops(config) * batch
    figures: dict[str, Any] = {
        "batch_size": batch,
        "seconds_per_call": timed,
        "steps_per_call": options.steps,
        "reading_seconds_per_step": reading,
        "flops_per_step": flops,
    }
    rates = {
        precision: matrix_rate(device, precision, 256 if conditions.toy else None) for precision in options.precision
    }
    figures["matrix_flops_per_second"] = rates
    figures["share_of_matrix_rate"] = {
        name: flops * options.steps / seconds_of(timing, device) / rates[name.split()[1].rstrip(",")]  # type: ignore[index]
        for name, timing in timed.items()
        if name.startswith("ours")
    }
    figures["times_faster"] = {
        ours: ratio(timed[name], timed[ours], device)
        for name in timed
        if name.startswith("theirs")
        for ours in timed
        if ours.startswith("ours")
    }
    figures["peak_gpu_memory_mib"] = peak_gpu_memory_mib(device)
    return figures


def our_steps(step: TrainingStep, data: TrainingData, workers: int | None) -> Callable[[], None]:
    """A function that makes one step, on samples read ahead as in `jobs/train.py`."""
    batch, on_cpu = len(data.store), data.device.type == "cpu"
    positions: Iterable[range] = (range(i * batch, (i + 1) * batch) for i in count())
    drafts = prefetch(data, positions, workers if workers is not None else 0 if on_cpu else READERS)

    def one() -> None:
        draft = next(drafts)
        with ranks.autocast(data.device, step.precision):
            sample = data.finish(draft)
        step(sample)

    return one


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
        return OfficialEncoder(encoder, compressor, pixels, workload.config.shape.grid)

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
