"""Why did the joint model lag behind plain SiT on the demo's digits, and what mends it?

    python scripts/demo_study.py --demo demo-output --arms sit reglue reglue-uniform-times

Trains variants of the demo's recipe on its store (run `reglue demo` first), draws samples from each, and prints one
line of JSON per arm: the share that the demo's judge recognises, guided and unguided. An arm that is there already is
only measured again.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from reglue.commands.demo import DEMO_RECIPE, read_images
from reglue.commands.sample import Sample, sample
from reglue.commands.train import Train, train
from reglue.config import Alignment, ClassToken, LocalSemantics, Recipe, SamplerName
from reglue.data.images import ImageFolder
from reglue.metrics.classifier import train_classifier

SIT = replace(DEMO_RECIPE, name="sit", local=LocalSemantics(), class_token=ClassToken(), alignment=Alignment())


def with_times(recipe: Recipe, shift: float) -> Recipe:
    """The recipe with another distribution of training times."""
    return replace(recipe, optimisation=replace(recipe.optimisation, time_shift=shift))


ARMS = {
    "sit": SIT,
    "sit-uniform-times": with_times(SIT, 1.0),
    "repa": replace(DEMO_RECIPE, name="repa", local=LocalSemantics(), class_token=ClassToken()),
    "redi": replace(DEMO_RECIPE, name="redi", class_token=ClassToken(), alignment=Alignment()),
    "reg": replace(DEMO_RECIPE, name="reg", local=LocalSemantics()),
    "reglue": DEMO_RECIPE,
    "reglue-uniform-times": with_times(DEMO_RECIPE, 1.0),
    "reglue-light-map": replace(DEMO_RECIPE, local=replace(DEMO_RECIPE.local, weight=0.3)),
}

SAMPLERS: dict[SamplerName, int] = {"euler-maruyama": DEMO_RECIPE.sampling.steps, "heun": 25}


@dataclass(frozen=True)
class Study:
    """Options of the study."""

    demo: Path = Path("demo-output")
    """What `reglue demo` made."""
    arms: tuple[str, ...] = ("sit", "sit-uniform-times", "reglue", "reglue-uniform-times")
    """Which variants, of those in ARMS."""
    steps: int = 1000
    samples_per_class: int = 20
    seed: int = 0


def study(options: Study) -> None:
    """Train, draw and judge each arm."""
    parts = [read_images(ImageFolder.open(options.demo / "digits" / part)) for part in ("train", "held-out")]
    judge = train_classifier(*parts[0], classes=10, seed=options.seed)
    for arm in options.arms:
        recipe = replace(ARMS[arm], optimisation=replace(ARMS[arm].optimisation, steps=options.steps))
        folder = options.demo / "study" / f"{arm}-{options.steps}-{options.seed}"
        started = time.perf_counter()
        run = train(Train(recipe, options.demo / "store", folder / "run", options.seed, preview_every=0))
        figures: dict[str, object] = {"arm": arm, "steps": options.steps, "seconds": time.perf_counter() - started}
        for kind, scale in (("guided", recipe.sampling.guidance.scale), ("unguided", 1.0)):
            for sampler, sampler_steps in SAMPLERS.items():
                name = f"{kind}-{sampler}"
                count = 10 * options.samples_per_class
                out = sample(
                    Sample(
                        run,
                        folder / name,
                        count=count,
                        seed=options.seed,
                        sampler=sampler,
                        steps=sampler_steps,
                        guidance_scale=scale,
                    )
                )
                drawn = read_images(ImageFolder.open(out))[0]
                figures[name] = judge.accuracy(drawn, torch.arange(count) % 10)
        print(json.dumps(figures | {"judge": judge.accuracy(*parts[1])}), flush=True)


if __name__ == "__main__":
    study(tyro.cli(Study, description=__doc__))
