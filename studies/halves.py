"""Which half of a joint model lags? Its samples where map or class token are real, those of training images.

    python studies/halves.py --run RUN --store STORE --reference inception.npz --inception inception.safetensors \\
        --work halves

What is real is held on its path from noise, as `reglue edit --keep` does; the rest is drawn to fit. If the distance
falls far below that of samples, the real half was what lacked; if it stays, the other half is. WORK has the pictures
and a report of `reglue evaluate` per arm; the same command continues.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

import reglue
from measures import mistakes_in
from reglue.commands.evaluate import Evaluate, evaluate
from reglue.data.batches import TrainingData
from reglue.data.store import Store
from reglue.diffusion.controls import Clamp
from reglue.diffusion.noise import Draws
from reglue.diffusion.paths import PATHS
from reglue.editing.options import CLASS_TOKEN, LOCAL
from reglue.files import replacing
from reglue.metrics.evaluation import Evaluation
from reglue.progress import Bar
from reglue.sampling import Sampling

ARMS = {"local": (LOCAL,), "cls": (CLASS_TOKEN,), "both": (LOCAL, CLASS_TOKEN)}
SAMPLING = Sampling("adams-bashforth", 20, guidance_scale=1.0, rounding="round")
"""As in study.py."""


@dataclass(frozen=True)
class Halves:
    """What is drawn, and what it is compared with."""

    run: Path
    """A run whose recipe learns a map or a class token."""
    store: Path
    """That it was trained on."""
    reference: Path
    """Statistics, a store or a folder to compare with."""
    inception: str
    """The network of `reglue evaluate --feature-network`."""
    work: Path = Path("halves")
    arms: tuple[str, ...] = ("local", "cls", "both")
    count: int = 2000
    batch_size: int = 100
    seed: int = 0
    evaluate: dict[str, Any] = field(default_factory=lambda: {"resamples": 200})


def main(options: Halves) -> dict[str, Evaluation]:
    """Draw and measure every arm. Returns their figures."""
    model, found = reglue.load(options.run, device="cpu"), dict[str, Evaluation]()
    data = TrainingData(Store.open(options.store), model.record.recipe, model.record.denoiser, options.seed)
    shapes, path = model.record.denoiser.shapes(), PATHS[model.record.denoiser.path]
    for arm in options.arms:
        folder = options.work / arm
        folder.mkdir(parents=True, exist_ok=True)
        for start in Bar(range(0, options.count, options.batch_size), desc=arm, unit="batch"):
            indices = range(start, min(start + options.batch_size, options.count))
            files = [folder / f"{i:06d}.png" for i in indices]
            if all(file.is_file() for file in files):
                continue
            real, labels = data.sample(indices).data, data.store.labels[data.rows(indices)].tolist()
            noise = Draws(options.seed, "known", indices, {name: shapes[name] for name in ARMS[arm]})
            clamp = Clamp({name: real[name] for name in ARMS[arm]}, noise, path=path)
            sampling = model.resolved(SAMPLING)
            state = model.draw(indices, model.condition(labels), options.seed, sampling, controls=[clamp])
            for file, pixels in zip(files, model.decode(state, sampling.rounding), strict=True):
                with replacing(file) as beside:
                    Image.fromarray(pixels).save(beside, format="png")
        report = options.work / f"{arm}.json"
        asked = Evaluate(folder, options.reference, report, feature_network=options.inception, **options.evaluate)
        found[arm] = evaluate(asked)
    return found


if __name__ == "__main__":
    with mistakes_in("halves"):
        main(tyro.cli(Halves, description=__doc__))
