"""Time a training step on made-up data: `python benchmarks/training_step.py --model B/2 --compile blocks`.

Ends with one line of JSON. Weights, images and features are random; sizes, arithmetic and files are those of training.
Times are the shortest of all repetitions, since other programs on a machine only make a step longer.
"""

from __future__ import annotations

import datetime
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import timm
import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reglue.data.batches import TrainingData, denoiser_config
from reglue.data.store import Contents, Source, Store, StoreWriter, in_8_bits
from reglue.data.targets import AlignmentTargets, Tokens
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.objective import loss_terms, weighted_sum
from reglue.diffusion.paths import PATHS
from reglue.jobs.train import compile_parts, prefetch
from reglue.latents.autoencoders import AutoencoderSpec
from reglue.papers import RECIPES
from reglue.recipe import Compile
from reglue.runs import ranks
from reglue.semantics.compressors import ConvCompressor
from reglue.semantics.encoders import EncoderSpec, load_encoder

DOWNSAMPLING = 8
LAYERS = (8, 9, 10, 11)
DEPTH = 12


@dataclass(frozen=True)
class Step:
    """What is timed."""

    recipe: Literal["sit", "repa", "redi", "reg", "reglue"] = "reglue"
    model: str = "B/2"
    batch_size: int = 256
    grid: int = 32
    """Side of the latents."""
    channels: int = 4
    """Of the latents."""
    local_channels: int = 16
    token_width: int = 768
    """Of the vision encoder."""
    token_grid: int = 16
    """Side of the vision encoder's map."""
    targets: Literal["cached", "int8", "decoded", "online"] = "cached"
    """int8: cached in 8 bits. online: a DINOv2-B with registers and random weights, on random pixels."""
    precision: ranks.Precision = "bfloat16"
    compile: Compile = "no"
    checkpoint_blocks: float = 0.0
    workers: int = 4
    """Threads that read ahead; 0: the step waits for its data."""
    steps: int = 20
    """How many are timed, after three that are not."""
    device: str = "auto"


def synthetic_store(options: Step, folder: Path) -> Store:
    """A store of two batches of random rows."""
    count, channels, tokens = 2 * options.batch_size, options.channels, options.token_grid
    pixels = (options.grid * DOWNSAMPLING,) * 2
    width, eight_bits = options.token_width, options.targets == "int8"
    contents = Contents(
        source=Source("random", "0", pixels, ("a", "b"), count),
        autoencoder=AutoencoderSpec(
            "random", "AutoencoderKL", "0", channels, DOWNSAMPLING, (0.0,) * channels, (0.18215,) * channels
        ),
        encoder=EncoderSpec(
            "random", "random", "0", width, DEPTH, LAYERS, 14, (tokens, tokens), pixels, pixels, (0.5,) * 3, (0.5,) * 3,
            "bicubic", False,
        ),
        features=True,
        features_dtype="int8" if eight_bits else "float16",
        latent_dtype="float32",
        shard_rows=128,
        statistics_images=16,
        statistics_seed=0,
    )  # fmt: skip
    writer = StoreWriter(folder, contents)
    for block in writer.pending:
        rows = len(block)
        latents = torch.randn(2, rows, channels, options.grid, options.grid)
        features = torch.randn(rows, len(LAYERS) * width, tokens, tokens)
        columns = {
            "label": {"label": torch.randint(2, (rows,))},
            "latent": {"mean": latents[0], "std": latents[1].abs()},
            "cls": {"cls": torch.randn(rows, width)},
            "features": in_8_bits(features) if eight_bits else {"features": features.half()},
        }
        writer.write(block, [f"{row}.png" for row in block], [], columns)
    store = writer.finish(torch.arange(min(count, 16)))
    spec = ConvCompressor(len(LAYERS) * width, 256, options.local_channels).save(folder / "compressors" / "conv-16")
    shards = (shard.rows for shard in store.manifest.columns["label"].shards)
    return store.add_codes(
        "conv-16", spec, (torch.randn(rows, options.local_channels, tokens, tokens) for rows in shards)
    )


class RandomOnline(AlignmentTargets):
    """An encoder of the usual size on pixels that need no decoding."""

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        name = "vit_base_patch14_reg4_dinov2.lvd142m"
        with tempfile.TemporaryDirectory() as folder:
            save_file(timm.create_model(name, num_classes=0).state_dict(), Path(folder) / "model.safetensors")
            statistics = {"mean": [0.5] * 3, "std": [0.5] * 3}
            config = json.dumps({"architecture": name, "pretrained_cfg": statistics})
            (Path(folder) / "config.json").write_text(config)
            self.encoder = load_encoder(folder, size, (DEPTH - 1,), device)
        self.size = size

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """See `AlignmentTargets.read`."""
        return {"pixels": torch.randint(256, (len(rows), 3, *self.size), dtype=torch.uint8)}

    def tokens(self, read: Mapping[str, Tensor]) -> Tokens:
        """See `AlignmentTargets.tokens`."""
        described = self.encoder.describe(read["pixels"])
        return Tokens(described.class_token, described.features)


def shortest(action: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Seconds."""
    times: list[float] = []
    for _ in range(repetitions):
        ranks.synchronize(device)
        started = time.perf_counter()
        action()
        ranks.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def matmul_rate(device: torch.device, precision: ranks.Precision) -> float:
    """Floating-point operations per second of the device in a large product of matrices."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device, dtype=getattr(torch, precision))
    return 2 * side**3 / shortest(lambda: a @ b, device, 10)


def measure(options: Step, folder: Path) -> dict[str, object]:
    """The figures of a training step."""
    device = ranks.resolve_device(options.device)
    store = synthetic_store(options, folder)
    paper = RECIPES[options.recipe]
    recipe = replace(
        paper,
        model=options.model,
        local=replace(paper.local, compressor="conv-16"),
        alignment=replace(paper.alignment, targets="decoded" if options.targets == "decoded" else "cached"),
    )
    torch.manual_seed(0)
    data = TrainingData(store, recipe, denoiser_config(store, recipe), 0, device)
    if options.targets == "online" and data.targets is not None:
        data.targets = RandomOnline(store.manifest.source.resolution, device)
    model = Denoiser(data.config).to(device)
    model.transformer.recomputed_blocks = round(options.checkpoint_blocks * data.config.depth)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    weights_now, averages = list(model.state_dict().values()), list(ema.values())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    path, weights = PATHS[recipe.path], recipe.loss_weights(0)
    positions = [range(n * options.batch_size, (n + 1) * options.batch_size) for n in range(options.steps + 4)]

    def step(draft) -> None:
        sample = data.finish(draft)
        with ranks.autocast(device, options.precision):
            terms = loss_terms(model, path, sample)
        weighted_sum(terms, weights).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, weights_now, 1e-4)  # type: ignore[reportPrivateImportUsage]

    draft = data.read(positions[0])
    # Counted without compiling and without recomputation: what has to be computed, not what is.
    recomputed, model.transformer.recomputed_blocks = model.transformer.recomputed_blocks, 0
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        step(draft)
    with FlopCounterMode(display=False) as target_flops, sdpa_kernel(SDPBackend.MATH):
        data.finish(draft)
    model.transformer.recomputed_blocks = recomputed

    compile_parts(model, options.compile)
    started = time.perf_counter()
    step(draft)
    ranks.synchronize(device)
    first_step = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    drafts = prefetch(data, positions[1:], options.workers)
    for _ in range(3):
        step(next(drafts))
    seconds = shortest(lambda: step(next(drafts)), device, options.steps)
    ranks.synchronize(device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    rate = matmul_rate(device, options.precision)
    per_step = flops.get_total_flops()
    column = store.manifest.columns["features"] if options.targets in ("cached", "int8") else None
    return {
        **asdict(options),
        "images_per_second": options.batch_size / seconds,
        "ms_per_step": seconds * 1e3,
        "ms_first_step": first_step * 1e3,
        "ms_read": shortest(lambda: data.read(positions[0]), device, 3) * 1e3,
        "ms_finish": shortest(lambda: data.finish(draft), device, 3) * 1e3,
        "ms_without_data": shortest(lambda: step(draft), device, max(3, options.steps // 4)) * 1e3,
        "flops_per_step": per_step,
        "flops_of_targets": target_flops.get_total_flops(),
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": per_step / seconds / rate,
        "bytes_of_features_per_image": sum(s.bytes for s in column.shards) / len(store) if column else 0,
        "peak_memory_mib": peak / 2**20,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("reglue", "torch", "timm", "numpy")},
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    }


def main() -> None:
    """Measure, and print the line."""
    options = tyro.cli(Step, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder) / "store")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
