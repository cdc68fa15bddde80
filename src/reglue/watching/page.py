"""The page of a report: one HTML file about one run, or about several beside each other, with everything inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reglue.contact_sheet import template
from reglue.data.pictures import enlarge, png_address
from reglue.data.plots import COLOURS, Curve, as_svg
from reglue.files import replacing
from reglue.watching.words import duration

HERO = 20
"""Images at the top of the page at most."""
BESIDE = 4
"""Sets of samples that find room beside each other."""


@dataclass(frozen=True)
class Card:
    """A number that stands out."""

    value: str
    unit: str
    meaning: str


@dataclass(frozen=True)
class Nearest:
    """Samples beside the training images that are most like them."""

    samples: np.ndarray
    """uint8 (N, H, W, 3)."""
    neighbours: np.ndarray
    """uint8 (N, k, H, W, 3), nearest first."""
    distances: np.ndarray
    """(N, k), in the measure that the text names."""
    typical: float
    """Median distance of a training image to its nearest other training image, for comparison."""
    measure: str
    """What the distances are, `Euclidean distance of class tokens` for example."""
    searched: int
    """How many training images were looked at."""


@dataclass(frozen=True)
class Semantics:
    """Images beside their compressed semantics as colours (`data.pictures.colours_of`, one reference for all)."""

    generated_images: np.ndarray
    """Samples, uint8 (M, H, W, 3)."""
    generated_colours: np.ndarray
    """Of the codes that the model drew together with them, uint8 (M, h, w, 3)."""
    images: np.ndarray | None = None
    """Real images, uint8 (N, H, W, 3); None where the store is not at hand."""
    colours: np.ndarray | None = None
    """Of the codes that the encoder and the compressor give for them, uint8 (N, h, w, 3)."""


@dataclass(frozen=True)
class Figures:
    """One evaluation."""

    about: str
    """What was evaluated: `step 1,500, guidance 2`."""
    values: Mapping[str, str]
    """Each figure with its interval, if it has one."""
    protocol: Mapping[str, str]
    """All that the figures depend on."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunShown:
    """One run, and what there is to see of it. What is empty is left out of the page."""

    name: str
    about: Mapping[str, str]
    """The recipe in words, by what they are about."""
    provenance: Mapping[str, str]
    cards: tuple[Card, ...] = ()
    rows: tuple[str, ...] = ()
    """What each row of samples is of: names of classes."""
    samples: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Samples by how they were drawn, `guidance 2`: uint8 (rows, N, H, W, 3)."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    previews: tuple[tuple[int, np.ndarray], ...] = ()
    """Steps, ascending, and the pictures, uint8 (h, w, 3)."""
    nearest: Nearest | None = None
    semantics: Semantics | None = None
    figures: tuple[Figures, ...] = ()
    checkpoints: tuple[Mapping[str, str], ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """As plain data."""
    command: str | None = None
    """That trains it."""
    drawn_by: str | None = None
    """The command that draws these samples."""
    notes: tuple[str, ...] = ()
    """Why something is not there."""


@dataclass(frozen=True)
class Page:
    """Everything that the page shows."""

    title: str
    lead: str
    """A sentence or two below it."""
    runs: tuple[RunShown, ...]
    """The first one is at the top."""
    differing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Options in which the runs differ, and their values in each."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """Duration of each stage, in order."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """Plain data about all of it: versions, hardware, date …"""
    commands: tuple[str, ...] = ()
    """Shell lines that do the same by hand."""
    note: str = ""
    """Below the cards."""


def write_page(path: Path, page: Page) -> None:
    """Writes the page, whole or not at all: pictures and plots are inside it, and it loads nothing.

    No text of a run is trusted: names may be anything. Raises UserError when the file cannot be written.
    """
    sets = [(run, drawn, images) for run in page.runs for drawn, images in run.samples.items()]
    figures = [(run, one) for run in page.runs for one in run.figures]
    data = partial(json.dumps, indent=2, ensure_ascii=False, default=str)
    text = template("report.html", picture=png_address, duration=duration, data=data).render(
        page=page,
        hero=next((_hero(run) for run in page.runs if run.samples), None),
        sets=sets,
        beside=len(sets) <= BESIDE and len({run.rows for run, _, _ in sets}) == 1,
        curves=as_svg([run.curves for run in page.runs]),
        colours={run.name: COLOURS[i % len(COLOURS)] for i, run in enumerate(page.runs)},
        figures=figures,
        figure_names=list(dict.fromkeys(name for _, one in figures for name in one.values)),
        paired=_paired,
    )
    with replacing(path) as beside:
        # Names of folders may hold bytes that are no characters.
        beside.write_text(text, encoding="utf-8", errors="replace")


def _hero(run: RunShown) -> np.ndarray:
    """The first sample of each class, or of a model without classes the first ones."""
    drawn = next(iter(run.samples.values()))
    return drawn[:HERO, 0] if len(drawn) > 1 else drawn[0, :HERO]


def _paired(images: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A row of images over a row of colours, enlarged to the same size without smoothing: uint8 (2N, H, W, 3)."""
    return np.concatenate([images, enlarge(colours, images.shape[1:3])])
