"""The Draw tab: images of a class, of the same seeds in several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from reglue.app.work import Work
from reglue.app.workshop import Run
from reglue.command_lines import changed, command_line
from reglue.pipeline import ImageModel
from reglue.sampling import MODALITY_SCALES

EACH = "each in turn"
"""In place of a class."""
NO_CLASS = "none"


@dataclass(frozen=True)
class Wish:
    """What is to be drawn."""

    classes: str = EACH
    """A class by name, each in turn, or none."""
    count: int = 8
    seed: int = 0
    sampler: str = "euler"
    steps: int = 40
    strengths: Mapping[str, float] = field(default_factory=dict[str, float])
    """Guidance scale of each modality by name; a run passes over those that it does not learn."""

    def sampling(self, model: ImageModel) -> dict[str, Any]:
        """The options of sampling, as keywords: sampler, steps and the scales."""
        learned = [modality.name for modality in model.record.denoiser.modalities]
        scales = model.strengths(**{name: scale for name, scale in self.strengths.items() if name in learned})
        # Whatever has no scale of its own has that of the latents.
        same = [name for name in MODALITY_SCALES if scales.get(name) == scales["guidance_scale"]]
        return {"sampler": self.sampler, "steps": self.steps, **scales, **dict.fromkeys(same)}


def scales_of(runs: Sequence[Run]) -> dict[str, float]:
    """The guidance scale of each modality that one of the runs learns, as the recipe of the first such run has it."""
    found: dict[str, float] = {}
    for run in runs:
        guidance = run.record.recipe.sampling.guidance
        guided = bool(run.record.class_names) and run.record.has_null_class
        for name in run.modalities:
            found.setdefault(name, guidance.scale_of(name) if guided else 1.0)
    return found


def classes_of(run: Run, wish: Wish) -> list[int] | list[str] | None:
    """The class of each image, by number where each has its turn, as `reglue sample` counts; None for no class."""
    names = run.record.class_names
    if not names or wish.classes == NO_CLASS:
        return None
    return [i % len(names) for i in range(wish.count)] if wish.classes == EACH else [wish.classes] * wish.count


def alts(run: Run, wish: Wish) -> list[str]:
    """A few words about each image, for those who hover and those who listen."""
    classes = classes_of(run, wish) or ["image"] * wish.count
    names = [run.record.class_names[one] if isinstance(one, int) else one for one in classes]
    return [f"{name}, seed {wish.seed}, number {i}" for i, name in enumerate(names)]


def draw(run: Run, wish: Wish, work: Work) -> list[Image.Image]:
    """Draw with one run. Image i is a function of the seed and i. Raises UserError for what the run cannot do."""
    model = run.model()
    return model.generate(
        classes_of(run, wish),
        count=wish.count,
        seed=wish.seed,
        controls=[work.watching(model)],
        **wish.sampling(model),
    )


def draw_all(runs: Sequence[Run], wish: Wish, work: Work) -> dict[str, list[Image.Image]]:
    """Draw the same with each run, one after the other: images by the run's title."""
    drawn: dict[str, list[Image.Image]] = {}
    for run in runs:
        work.what = run.title
        drawn[run.title] = draw(run, wish, work)
    return drawn


def command(run: Run, wish: Wish, out: str = "samples") -> str:
    """The command line that draws the same into a folder; empty for images of no class from a run that has some."""
    if run.record.class_names and wish.classes == NO_CLASS:
        return ""
    model = run.model()
    classes = () if wish.classes == EACH or not run.record.class_names else (wish.classes,)
    options = changed(wish.sampling(model), model.default_sampling)
    own = {"classes": classes, "count": wish.count, "seed": wish.seed}
    device = None if run.device == "auto" else run.device
    return command_line("sample", run.name, out=out, **own, **options, device=device)
