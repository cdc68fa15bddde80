"""The training step: ours and the published one, on the same tensors, from the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from common import Conditions, alternate, ratio, report, seconds_of
from official import MODULES, MixedPrecision, Official, OfficialTraining, official_losses
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.modalities import CLS, LATENT, LOCAL
from reglue.diffusion.objective import TrainingSample, loss_terms, weighted_sum
from reglue.diffusion.paths import LINEAR
from reglue.jobs.train import prefetch
from reglue.runs import ranks
from reglue.runs.official import export_official, import_official
from reglue.runs.ranks import Precision
from reglue.semantics.encoders import VisionEncoder, load_encoder
from workloads import Data, StoredSamples, Workload, flops_per_image, loss_weights, random_encoder

AGREEMENT = 1e-4
"""Largest relative difference of a term of the loss, ours against theirs, in float32."""


@dataclass(frozen=True)
class Training:
    """Time the training step: noise, forward, backward, clipping, AdamW, moving average.

    Ours is the step of `reglue train`: samples drawn ahead, fused AdamW, the average in one operation. Theirs is the
    loop of their train.py on one process: accelerate, their loss, AdamW and average as they write them, six numbers
    fetched per step; it has its tensors in memory and draws noise on the device.
    """

    conditions: Annotated[Conditions, tyro.conf.arg(name="")] = field(default_factory=Conditions)
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
    compile: bool = False
    """Time our model compiled, too."""
    official_precision: MixedPrecision = "no"
    """Of theirs, as accelerate calls it: their train.sh has fp16, which needs a GPU."""
    encoder_in_step: bool = False
    """The vision encoder (DINOv2-B, random weights) and the compressor run in each of their steps, as published; ours
    is timed with `--alignment.targets online`, too. Otherwise both have its tokens in memory, which theirs cannot."""


class OurTraining:
    """The step of `reglue train`."""

    def __init__(
        self,
        workload: Workload,
        weights: dict[str, Tensor],
        device: torch.device,
        precision: Precision,
        compiled: bool,
        samples: Iterator[TrainingSample],
    ) -> None:
        self.precision: Precision = precision
        self.device, self.samples = device, samples
        self.loss_weights = dict(loss_weights(workload.recipe))
        self.model = Denoiser(workload.config)
        self.model.load_state_dict(weights)
        self.model.to(device)
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.now, self.averages = list(self.model.state_dict().values()), list(self.ema.values())
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        self.sums: dict[str, Any] = {}
        if compiled:
            self.model.compile()

    def step(self) -> None:
        """One step, as in `jobs/train.py`."""
        sample = next(self.samples)
        with ranks.autocast(self.device, self.precision):
            terms = loss_terms(self.model, LINEAR, sample)
        loss = weighted_sum(terms, self.loss_weights)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for name, value in {**terms, "loss": loss, "gradient_norm": norm}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.averages, self.now, 1e-4)  # type: ignore[reportPrivateImportUsage]


def training(options: Training) -> str:
    """Check that both compute the same loss, then time both."""
    conditions = options.conditions
    device = ranks.resolve_device(conditions.device)
    torch.set_num_threads(conditions.threads)
    workload = Workload.of("toy" if conditions.toy else options.data, None if conditions.toy else options.model)
    official = Official.load(conditions.official, *MODULES) if conditions.official else None
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in Denoiser(workload.config).parameters())}
    if official:
        figures["loss_difference"] = loss_difference(official, workload)
        assert figures["loss_difference"] < AGREEMENT, figures
    batch = 4 if conditions.toy else options.batch_size
    while True:
        try:
            figures |= timings(options, workload, official, batch, device)
            break
        except torch.OutOfMemoryError:
            batch //= 2
            torch.cuda.empty_cache()
    return report("train", options, conditions, figures, device)


def loss_difference(official: Official, workload: Workload) -> float:
    """The largest relative difference of a term of the loss between ours and theirs, on the same draws, in float32."""
    config = workload.config
    model = workload.random_model()
    theirs = official.model(config)
    theirs.load_state_dict(export_official("reglue", config, model.state_dict()))
    ours = import_official(theirs.state_dict(), heads=config.heads, alignment_depth=config.alignment_depth).denoiser()
    stored = StoredSamples.random(config, 2)
    images = torch.cat([stored.mean, stored.local], dim=1)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = official_losses(official, theirs.eval(), images, stored.cls, stored.labels, stored.tokens)
        torch.manual_seed(1)
        times = torch.rand(2, 1, 1, 1).flatten()
        noise, of_class_token = torch.randn_like(images), torch.randn_like(stored.cls)
        latent, local = noise.split([stored.mean.shape[1], stored.local.shape[1]], dim=1)
        sample = TrainingSample(
            {LATENT: stored.mean, LOCAL: stored.local, CLS: stored.cls},
            {LATENT: latent, LOCAL: local, CLS: of_class_token},
            times,
            stored.labels,
            stored.tokens,
        )
        terms = loss_terms(ours, LINEAR, sample)
    differences = torch.stack([(terms[name] - value).abs() / value.abs() for name, value in expected.items()])
    return differences.max().item()  # NaN, if one is


def timings(
    options: Training, workload: Workload, official: Official | None, batch: int, device: torch.device
) -> dict[str, Any]:
    """Seconds per step of every contestant, and what follows from them."""
    conditions, config = options.conditions, workload.config
    stored = StoredSamples.random(config, batch)
    weights = workload.random_model().state_dict()
    contestants: dict[str, Callable[[], object]] = {}
    with TemporaryDirectory() as folder:
        online = (
            OnlineEncoder.make(Path(folder), workload, batch, device, conditions) if options.encoder_in_step else None
        )

    def samples(encode: Callable[[], object]) -> Iterator[TrainingSample]:
        positions = (range(i * batch, (i + 1) * batch) for i in count())
        for sample in prefetch(stored, positions, device):  # type: ignore[arg-type], it asks for `sample` alone
            encode()
            yield sample

    for precision in options.precision:
        for compiled in (False, True) if options.compile else (False,):
            name = f"ours {precision}{' compiled' if compiled else ''}"
            ours = OurTraining(workload, weights, device, precision, compiled, samples(lambda: None))
            contestants[name] = repeated(ours.step, options.steps)
        if online:
            ours = OurTraining(workload, weights, device, precision, options.compile, samples(online.ours))
            contestants[f"ours {precision}{' compiled' * options.compile}, encoder in step"] = repeated(
                ours.step, options.steps
            )
    if official:
        model = official.model(config)
        model.load_state_dict(export_official("reglue", config, weights))
        theirs = OfficialTraining(
            official, model, loss_weights(workload.recipe), options.official_precision, device.type == "cpu"
        )
        moments, labels = torch.cat([stored.mean, stored.std], dim=1), stored.labels
        cached = stored.local.to(device), stored.cls.to(device), stored.tokens.to(device)

        def their_step() -> None:
            theirs.step(moments.to(device), labels.to(device), online.theirs if online else lambda: cached)

        name = f"theirs {options.official_precision}{', encoder in step' if online else ''}"
        contestants[name] = repeated(their_step, options.steps)

    timed = alternate(contestants, conditions.repeats, device)
    started = time.perf_counter()
    stored.sample(range(batch))
    drawing = time.perf_counter() - started
    flops = flops_per_image(workload, training=True) * batch
    figures: dict[str, Any] = {
        "batch_size": batch,
        "seconds_per_call": timed,
        "steps_per_call": options.steps,
        "drawing_seconds_per_step": drawing,
        "flops_per_step": flops,
    }
    rates = {precision: matrix_rate(device, precision, conditions.toy) for precision in options.precision}
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
    if device.type == "cuda":
        figures["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def repeated(step: Callable[[], object], times: int) -> Callable[[], None]:
    """A function that makes several steps."""

    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def matrix_rate(device: torch.device, precision: Precision, toy: bool = False) -> float:
    """Operations per second of a large square matrix product: what a step could reach at most."""
    size = 256 if toy else 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    timed = alternate({"product": lambda: a @ b}, 10, device, warmup=3)["product"]
    return 2 * size**3 / (timed.cpu_minimum if device.type == "cpu" else timed.minimum)


@dataclass
class OnlineEncoder:
    """The vision encoder inside the step: as `--alignment.targets online` calls it, and as their loop does."""

    encoder: VisionEncoder
    compressor: nn.Module | None
    pixels: Tensor
    device: torch.device
    grid: tuple[int, int]

    @staticmethod
    def make(
        folder: Path, workload: Workload, batch: int, device: torch.device, conditions: Conditions
    ) -> OnlineEncoder:
        """A network of random weights and random images."""
        config = workload.config
        resolution = config.token_grid[0] * 16
        encoder = load_encoder(str(random_encoder(folder, conditions.toy)), resolution, device=device)
        compressor = None
        if conditions.official:
            channels = [len(encoder.spec.layers) * encoder.spec.width, 256, config.shape.local_channels]
            whole = Official.load(conditions.official, "compressor").modules["compressor"].EncoderDecoder(channels)
            compressor = whole.encoder.to(device).eval()
        pixels = torch.randint(256, (batch, 3, resolution, resolution), dtype=torch.uint8)
        return OnlineEncoder(encoder, compressor, pixels, device, config.shape.grid)

    @torch.no_grad()
    def ours(self) -> None:
        """What online targets cost: the encoder on every image, before the step."""
        self.encoder.describe(self.pixels.to(self.device))

    def theirs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, class token and tokens, in the order of their loop; autocast is on around it.

        The network is timm's, with fused attention, since theirs comes from a hub: no slower than the original.
        """
        assert self.compressor is not None
        described = self.encoder.describe(self.pixels.to(self.device))
        features = described.features
        last = features[:, -self.encoder.spec.width :].flatten(2).transpose(1, 2)
        tokens = torch.cat([described.class_token.unsqueeze(1), last], dim=1)
        codes = self.compressor((features - 0.1) / 1.1)
        return F.interpolate(codes, size=self.grid, mode="bilinear"), described.class_token, tokens
