"""What an arm costs, and how that is counted for a GPU that is not here."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from measures import Measures
from pack import MEGABYTE, Pack, rows_per_shard, take_of
from reglue.data.manifest import MANIFEST
from reglue.data.store import Store
from reglue.pipeline import decoder
from reglue.run import RunRecord, needed_columns
from study import Arm, StudyOptions

# Operations are counted as the benchmarks count them.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from counting import H200_PRODUCTS, forward_flops, training_flops


@dataclass(frozen=True)
class Cost:
    """What one arm costs."""

    images_per_second: float
    """Of training."""
    start_seconds: float
    """Of training to a milestone, beside its steps: the model is made, compiled if asked for, and written."""
    drawing_seconds: float
    """For all samples of one checkpoint, without guidance."""
    measuring_seconds: float
    """For the networks to look at them; where it is timed, the arithmetic of the figures is left out."""
    inception_seconds: float
    """The same of the Inception, which may only look at the last ones."""


@dataclass(frozen=True)
class Rates:
    """Operations per second of a GPU, of which a share is reached."""

    bfloat16: float
    float32: float
    """Without TF32, as the frozen networks compute."""


GPUS = {"h200": Rates(H200_PRODUCTS, 67e12)}
"""bfloat16 as reached in products of large matrices, float32 by the data sheet."""

# Assumed beside the operations, in seconds. No GPU has been seen yet.
START = 15.0
"""Of training to a milestone, with compiled blocks; the first takes longer, the others find kernels in a cache."""
STEP, EVALUATION = 0.02, 0.01
"""The least of a training step and of an evaluation in sampling: the host starts their kernels one by one."""
DRAWING = 3.0
"""Of a set of samples beside the networks: models are loaded, pictures written."""
FIGURES, INCEPTION_FIGURES = 5.0, 15.0
"""Of the figures' arithmetic, in a few hundred dimensions and in the Inception's 2,048. One core took 5 and 35 for
2,000 samples and 200 resamples, and the host of a GPU has many."""


def counted_cost(options: StudyOptions, arm: Arm, measures: Measures) -> Cost:
    """What an arm costs on the GPU `options.counted_on`, by counts and assumptions alone. Raises UserError as a run."""
    assert options.counted_on is not None
    rates, count = GPUS[options.counted_on], options.count
    exact = options.assumed_share * rates.float32
    products = options.assumed_share * rates.bfloat16 if options.precision == "bfloat16" else exact
    record = RunRecord.of(Store.open(arm.store), arm.recipe, options.seed)
    step = options.batch_size * training_flops(record.denoiser) / products
    batch = min(options.sampling_batch, count)
    evaluation = batch * forward_flops(record.denoiser) / products
    evaluations = math.ceil(count / batch) * options.sampling_steps * (2 if options.sampler == "heun" else 1)
    decoding = count * decoding_operations(record, arm.autoencoder or options.autoencoder) / exact
    looked, by_inception = measures.operations()
    return Cost(
        images_per_second=options.batch_size / max(STEP, step),
        start_seconds=START,
        drawing_seconds=DRAWING + evaluations * max(EVALUATION, evaluation) + decoding,
        measuring_seconds=FIGURES + count * looked / exact,
        inception_seconds=INCEPTION_FIGURES + count * by_inception / exact if options.inception else 0.0,
    )


def decoding_operations(record: RunRecord, autoencoder: str | None) -> int:
    """Operations that decode one image."""
    shape = record.denoiser.shape
    decode = decoder(record, torch.device("cpu"), autoencoder).decode
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        decode(torch.zeros(1, shape.latent_channels, *shape.grid))
    return counter.get_total_flops()


@dataclass(frozen=True)
class Parcel:
    """What has to be brought to another machine."""

    name: str
    megabytes: float
    files: int
    """As `studies/pack.py` makes them, none above its limit."""


def parcels(options: StudyOptions, arms: Sequence[Arm]) -> Iterator[Parcel]:
    """What the study reads: columns of stores, of features the last layer alone, and networks that are single files.

    Of the held-out images the latents and class tokens, beside which `studies/pack.py` puts what is known of them.
    """
    columns: dict[Path, set[str]] = {}
    for arm in arms:
        columns.setdefault(arm.store, set()).update(needed_columns(arm.recipe))
    for store, names in columns.items():
        yield packed(Store.open(store), sorted(names))
    if (options.reference / MANIFEST).is_file():
        yield packed(Store.open(options.reference), ["label", "latent", "cls"])
    spec = Store.open(options.store).manifest.encoder
    for network in (options.inception, options.judge, options.encoder or (spec and spec.name)):
        if network and (file := Path(network)).is_file():
            size = file.stat().st_size / MEGABYTE
            yield Parcel(file.name, size, math.ceil(size / Pack.megabytes))


def packed(store: Store, names: Sequence[str]) -> Parcel:
    """The size of some columns of a store; without images it is nothing."""
    encoder, rows = store.manifest.encoder, torch.arange(len(store))
    last = encoder is not None and encoder.layers[-1] == encoder.depth - 1
    width = encoder.width if encoder else 0
    slices = {name: slice(-width, None) if name == "features" and last else slice(None) for name in names}
    takes = {name: take_of(store, name, channels, eight_bits=False) for name, channels in slices.items()}
    sizes = [tensor.nbytes for take in takes.values() for tensor in take(rows[:1]).values()]
    shards = math.ceil(len(rows) / rows_per_shard(store, rows, takes, Pack.megabytes * MEGABYTE))
    return Parcel(store.folder.name, len(rows) * sum(sizes) / MEGABYTE, len(names) * shards)
