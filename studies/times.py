"""Does a time of its own help a modality? One recipe, the demo's, on the demo's digits, under schedules of times.

    reglue demo --out demo; python studies/times.py --store demo/store --digits demo/digits --work times

All arms see the same images, noise and clock. Each is trained once and drawn from once, and the same command continues
where it stopped. Recognised: by the demo's judge, of balanced samples. TIMES.md has the table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from measures import mistakes_in
from reglue.commands.demo import DEMO_RECIPE, read_images
from reglue.commands.evaluate import Evaluate, evaluate
from reglue.commands.sample import Sample, sample
from reglue.commands.train import Train, train
from reglue.data.images import ImageFolder
from reglue.metrics.classifier import train_classifier

ARMS = {
    "shared": {},
    "lead 0.3": {"delta": 0.3},
    "independent": {},
    "cascade": {},
    "lead 0.5": {"delta": 0.5},
    "lead 0.15": {"delta": 0.15},
}
"""The schedule, and what tells arms of one apart, to its options."""
QUICK: dict[str, Any] = {"sampler": "adams-bashforth", "steps": 20}


@dataclass(frozen=True)
class Times:
    """What is trained, on what, and how much is drawn."""

    store: Path
    """The demo's store."""
    digits: Path
    """The folder of its images, for the judge."""
    work: Path
    """Where runs, samples and figures go."""
    steps: int = 600
    """Training steps of each arm."""
    count: int = 500
    """Samples of each kind."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which ones."""
    seeds: tuple[int, ...] = (0,)
    """Of training and sampling."""


def study(options: Times) -> None:
    """Train, draw, judge; after every arm write what is known."""
    judge = train_classifier(*read_images(ImageFolder.open(options.digits / "train")), classes=10, seed=0)
    for seed in options.seeds:
        for arm in options.arms:
            optimisation = replace(DEMO_RECIPE.optimisation, steps=options.steps, compile="no")
            recipe = replace(DEMO_RECIPE, times=arm.split()[0], times_options=ARMS[arm], optimisation=optimisation)
            place = options.work / f"{arm.replace(' ', '-')}-seed-{seed}"
            train(Train(recipe, options.store, place / "run", seed, preview_every=0, workers=0))
            figures: dict[str, float] = {}
            for kind, scale in (("guided", recipe.sampling.guidance_scale), ("unguided", 1.0)):
                out, count = place / kind, options.count
                drawn = Sample(
                    place / "run", out, count=count, seed=seed, guidance_scale=scale, batch_size=100, **QUICK
                )
                sample(drawn)
                pixels = read_images(ImageFolder.open(out))[0]
                figures[kind] = judge.accuracy(pixels, torch.arange(count) % 10)
                report = evaluate(Evaluate(out, options.store, place / f"{kind}.json", feature_network="store"))
                figures[f"{kind} FD"] = report.metrics.frechet_distance.value
            (place / "figures.json").write_text(json.dumps({"arm": arm, "seed": seed, **figures}))
            write_table(options.work)


def write_table(work: Path) -> None:
    """The figures of all arms so far."""
    rows = [json.loads(file.read_text()) for file in sorted(work.glob("*/figures.json"))]
    cells = [[*rows[0]], ["---"] * len(rows[0])]
    cells += [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    (work / "TIMES.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in cells))


if __name__ == "__main__":
    with mistakes_in("times"):
        study(tyro.cli(Times, description=__doc__))
