"""The controls that Draw and Edit share: class, count, seed, sampler, steps, guidance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from reglue.app import drawing
from reglue.app.drawing import EACH, NO_CLASS
from reglue.app.parts import QUICK
from reglue.app.workshop import Run
from reglue.diffusion.samplers import SAMPLERS

NAMES = {"local": "local map", "cls": "class token", "latent": "latents"}
"""What modalities are called; others have their own names."""
MOST_IMAGES, MOST_STEPS, MOST_SCALE = 16, 250, 8


@dataclass(frozen=True)
class Knobs:
    """The controls, in the order of `Wish`."""

    classes: gr.Dropdown
    count: gr.Slider
    seed: gr.Number
    sampler: gr.Dropdown
    steps: gr.Slider
    scales: dict[str, gr.Slider]
    """Guidance, by modality."""

    @classmethod
    def lay_out(cls, runs: Sequence[Run], classes: str, count: int) -> Knobs:
        """Put them where gradio is; `classes` is what is chosen at first."""
        names = list(dict.fromkeys(name for run in runs for name in run.record.class_names))
        special = [EACH] if classes == EACH else []
        if classes == NO_CLASS or all(run.record.has_null_class for run in runs):
            special.append(NO_CLASS)
        sampling = runs[0].record.recipe.sampling
        label = gr.Dropdown(
            [*special, *names], value=classes if names else NO_CLASS, label="class", visible=bool(names)
        )
        counted = gr.Slider(1, MOST_IMAGES, count, step=1, label="count")
        with gr.Row(equal_height=True):
            seed = gr.Number(0, label="seed", precision=0, minimum=0, min_width=90)
            another = gr.Button("Another", size="sm", scale=0, min_width=90, elem_classes="beside")
            another.click(lambda: random.randrange(10**6), None, seed, **QUICK)
        sampler = gr.Dropdown(list(SAMPLERS), value=sampling.sampler, label="sampler")
        steps = gr.Slider(1, MOST_STEPS, min(sampling.steps, MOST_STEPS), step=1, label="steps")
        scales = drawing.scales_of(runs)
        with gr.Accordion("guidance (1 is none)", open=classes == EACH):
            dials = {
                name: gr.Slider(0, MOST_SCALE, scale, step=0.1, label=NAMES.get(name, name))
                for name, scale in scales.items()
            }
        return cls(label, counted, seed, sampler, steps, dials)

    @property
    def inputs(self) -> list[Any]:
        """All of them."""
        return [self.classes, self.count, self.seed, self.sampler, self.steps, *self.scales.values()]

    def wish(self, values: Sequence[Any]) -> dict[str, Any]:
        """The fields of `Wish` from the values of `inputs`, which come from a browser, within their bounds."""
        classes, count, seed, sampler, steps, *scales = values
        strengths = {name: min(float(scale), MOST_SCALE) for name, scale in zip(self.scales, scales, strict=True)}
        return {
            "classes": classes or NO_CLASS,
            "count": min(max(int(count), 1), MOST_IMAGES),
            "seed": max(int(seed or 0), 0),
            "sampler": sampler,
            "steps": min(max(int(steps), 1), MOST_STEPS),
            "strengths": strengths,
        }
