"""What few evaluations of a student are worth, beside many of its teacher: on the digits of `reglue demo`.

    reglue demo --out demo
    reglue train --from demo/runs/reglue --store demo/store --out meanflow --student meanflow
    python benchmarks/few_steps.py --demo demo --students meanflow --folder few-steps

Rows are of the same labels and the same noise: the share of samples that a classifier recognises as their class, the
Fréchet distance of class tokens of the starter's encoder to the store, and CPU seconds of an image with its decoding.
The teacher is guided as its recipe says: inside of the interval, one of its evaluations is two of the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from common import Benchmark, core_seconds, report, run
from reglue.commands.demo import read_images
from reglue.commands.evaluate import Evaluate, evaluate
from reglue.commands.sample import Sample, sample
from reglue.data.images import ImageFolder
from reglue.data.pictures import image_grid
from reglue.diffusion.specs import MEAN_VELOCITY
from reglue.metrics.classifier import train_classifier

SHOWN = 20
"""Images of a row of the picture."""


@dataclass(frozen=True, kw_only=True)
class FewSteps(Benchmark):
    """Samples in few steps: recognised, Fréchet distance, seconds."""

    demo: Path
    """What `reglue demo` wrote."""
    students: tuple[Path, ...] = ()
    """Runs that were trained from the demo's."""
    folder: Path
    """For samples, their reports and `picture.png`. Samples that are there are measured again, but not timed."""
    count: int = 1000
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Of the students."""
    teacher: tuple[tuple[str, int], ...] = (
        *(("euler", steps) for steps in (1, 2, 4, 8)),
        *(("euler-maruyama", steps) for steps in (20, 40, 250)),
    )
    """Sampler and steps of the teacher."""


def main(options: FewSteps) -> str:
    """Draw and measure, print a row for each way to sample. Returns the line of JSON."""
    torch.set_num_threads(1)
    ways = [(options.demo / "runs" / "reglue", *way) for way in options.teacher]
    ways += [(student, MEAN_VELOCITY, steps) for student in options.students for steps in options.steps]
    parts = (ImageFolder.open(options.demo / "digits" / part) for part in ("train", "held-out"))
    training, held_out = map(read_images, parts)
    classes = int(training[1].max()) + 1
    judge = train_classifier(*training, classes=classes, seed=0)
    print(f"recognised of the held-out digits: {judge.accuracy(*held_out):.1%}\n")
    print("| run | sampler | evaluations | recognised | Fréchet distance | CPU ms |\n|---|---|---|---|---|---|")
    rows, pictures = [], []
    for drawn_from, sampler, steps in ways:
        folder = options.folder / f"{drawn_from.name}-{sampler}-{steps}"
        begun = core_seconds()
        sample(Sample(drawn_from, folder, sampler=sampler, steps=steps, count=options.count, batch_size=100))
        seconds = (core_seconds() - begun) / options.count
        asked = Evaluate(folder, options.demo / "store", folder.with_suffix(".json"), feature_network="store")
        distance = evaluate(asked).metrics.frechet_distance
        images, _ = read_images(ImageFolder.open(folder))
        recognised = judge.accuracy(images, torch.arange(len(images)) % classes)
        row = drawn_from.name, sampler, steps, recognised, distance.value, distance.low, distance.high, seconds
        print("| {} | `{}` | {} | {:.1%} | {:.3f} ({:.3f} to {:.3f}) | {:.1f} |".format(*row[:-1], 1000 * seconds))
        rows.append(row)
        pictures.append(images[:SHOWN])
    shown = torch.cat(pictures).permute(0, 2, 3, 1).numpy()
    Image.fromarray(image_grid(shown, columns=SHOWN)).save(options.folder / "picture.png")
    return report(options, {"rows": rows})


if __name__ == "__main__":
    run(FewSteps, main, __doc__)
