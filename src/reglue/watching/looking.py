"""Looking at a run: what its folder tells, and images that are drawn from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.command_lines import command_line
from reglue.config import ClassToken, LocalSemantics
from reglue.data.images import decode
from reglue.data.pictures import colours_of
from reglue.data.plots import UNITS, curves
from reglue.data.prefetch import in_batches
from reglue.data.store import Store
from reglue.diffusion.modalities import LATENT, State, concatenate_states
from reglue.encoders.vision import load_encoder
from reglue.errors import UserError, one_line
from reglue.files import SEAL, opened_tensors
from reglue.generation import to_pixels
from reglue.metrics.distances import nearest
from reglue.overrides import differing
from reglue.pipeline import ImageModel, load
from reglue.published.sharing import PREVIEWS, Report, read_reports, train_command
from reglue.run import RunRecord, find_run
from reglue.samples import Drawing
from reglue.sampling import Sampling
from reglue.training import checkpoints, tracking
from reglue.watching import words
from reglue.watching.facts import parameters
from reglue.watching.page import Card, Figures, Nearest, RunShown, Semantics
from reglue.watching.words import size

CLASSES = 10
"""Classes that are drawn, if not told which."""
STEPS = 50
"""Sampling steps at most, if not told how many."""
SHOWN = 10
"""Images in the picture of the semantics."""
PREVIEWS_SHOWN = 8
PREVIEW_WIDTH = 640
"""Pixels of a preview on the page at most."""
NEIGHBOURS = 4
COMPARED = 500
"""Training images whose distances to each other are taken for typical."""
NUMBERS = 2**26
"""Of training images that are searched at most, all of them in memory."""
REMEDY = "see `reglue verify`"
LONGEST = 32
"""Characters of a value in a table."""


@dataclass(frozen=True)
class Wanted:
    """What to draw from each run."""

    samplings: Callable[[ImageModel], Mapping[str, Sampling]]
    """The ways to draw, by how the page calls them; the first one is looked at closely."""
    samples_per_class: int = 8
    """0 draws none."""
    classes: tuple[str, ...] = ()
    """The first ones, if not given."""
    seed: int = 0
    store: Path | None = None
    """Where the training store is, if it has moved."""
    batch_size: int = 32
    device: str = "auto"


def look(run: str | Path, name: str, wanted: Wanted) -> RunShown:
    """All that a page shows of a run. What is not at hand, such as its store, is left out, with a note.

    Raises UserError for what is no run, for damage, and for classes that it does not have.
    """
    folder = find_run(run)
    record = RunRecord.read(folder)
    lines = tracking.read(folder)
    saved = checkpoints.steps(folder)
    count = parameters(folder)
    done = max([*saved, *(line["step"] for line in lines)], default=0)
    shown = RunShown(
        name=name,
        about=words.recipe(record, count),
        provenance=words.provenance(record),
        cards=tuple(_cards(lines, done, count)),
        curves=curves(lines, ["loss", *record.recipe.loss_weights(0), *UNITS]),
        previews=tuple(_previews(folder)),
        figures=tuple(_figures(read_reports(folder))),
        checkpoints=tuple(_checkpoint(checkpoints.find(folder, step)) for step in saved),
        recipe=asdict(record.recipe),
        command=train_command(record),
    )
    if not saved or not wanted.samples_per_class:
        missing = "No images were drawn: the run has no checkpoint yet." if not saved else "No images were drawn."
        return replace(shown, notes=(missing,))
    model = load(folder, device=wanted.device)
    return _with_samples(shown, model, wanted, str(run))


def _cards(lines: Sequence[Mapping[str, Any]], done: int, count: int) -> Iterator[Card]:
    if count:
        yield Card(f"{count / 1e6:.1f}", "M", "parameters")
    yield Card(f"{done:,}", "", "training steps")
    rates = [rate for line in lines if isinstance(rate := line.get("images_per_second"), int | float)]
    if rates:
        yield Card(f"{np.median(rates):,.0f}", "/s", "images in training")


def _previews(folder: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Some of a run's previews, the last one among them; those that are damaged are passed over."""
    files = [file for file in sorted((folder / PREVIEWS).glob("*.png")) if file.stem.isdecimal()]
    for i in sorted({round(i) for i in np.linspace(0, len(files) - 1, min(PREVIEWS_SHOWN, len(files)))}):
        try:
            picture = decode(files[i])
        except Exception:  # whatever Pillow raises
            continue
        if picture.width > PREVIEW_WIDTH:
            height = max(1, round(picture.height * PREVIEW_WIDTH / picture.width))
            picture = picture.resize((PREVIEW_WIDTH, height), Image.Resampling.LANCZOS)
        yield int(files[i].stem), np.asarray(picture)


def _figures(reports: Sequence[Report]) -> Iterator[Figures]:
    for report in reports:
        values: dict[str, str] = {}
        for name, value in report.metrics.items():
            low, high = report.intervals.get(name, (None, None))
            values[name.replace("_", " ")] = f"{value:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]")
        scale = report.protocol.get("samples.sampling.guidance_scale")
        said = [
            f"step {report.step:,}" if report.step is not None else report.name,
            f"guidance {scale}" if scale not in (None, "1.0", "1") else "no guidance" if scale else "",
            f"{int(count):,} images" if (count := report.protocol.get("image_count", "")).isdecimal() else "",
        ]
        yield Figures(", ".join(filter(None, said)), values, report.protocol, report.warnings)


def _checkpoint(folder: Path) -> dict[str, str]:
    """Step, time, size and hash of a checkpoint."""
    files = [file for file in folder.iterdir() if file.is_file()]
    said = {
        "step": f"{int(folder.name):,}",
        "written": time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.stat().st_mtime)),
        "size": size(sum(file.stat().st_size for file in files)),
        "holds": ", ".join(sorted(file.stem for file in files if file.suffix == ".safetensors")),
    }
    if (weights := folder / checkpoints.EMA).is_file():
        with opened_tensors(weights, REMEDY, sealed=False) as opened:
            said["SHA-256 of ema"] = (opened.metadata() or {}).get(SEAL, "")[:16]
    return said


# ---- what is drawn


def _with_samples(shown: RunShown, model: ImageModel, wanted: Wanted, run: str) -> RunShown:
    names, each = model.record.class_names, wanted.samples_per_class
    labels = [model.label(name) for name in wanted.classes] or [*range(min(CLASSES, len(names)))] or [model.null_label]
    count = each * len(labels)
    asked = [labels[i % len(labels)] for i in range(count)]  # As `reglue sample` orders them.
    samplings = {name: model.resolved(sampling) for name, sampling in wanted.samplings(model).items()}
    drawn = {
        name: draw(model, sampling, asked, wanted, f"{shown.name}, {name}") for name, sampling in samplings.items()
    }
    (pixels, state), sampling = next(iter(drawn.values())), next(iter(samplings.values()))
    notes: list[str] = []
    store = _training_store(model.record, wanted.store, notes)
    rows_of = lambda images: images.reshape(each, len(labels), *images.shape[1:]).swapaxes(0, 1)  # noqa: E731
    few = {name: values[:SHOWN] for name, values in state.items()}
    return replace(
        shown,
        rows=tuple(names[label] for label in labels) if names else ("",),
        samples={name: rows_of(images) for name, (images, _) in drawn.items()},
        nearest=_nearest(model, store, pixels[:SHOWN], few, notes) if store else None,
        semantics=_semantics(model, store, pixels[:SHOWN], few) if model.record.recipe.local.present else None,
        drawn_by=_command(run, model, sampling, count, labels, wanted.seed),
        notes=tuple(notes),
    )


def draw(
    model: ImageModel, sampling: Sampling, labels: list[int], wanted: Wanted, what: str
) -> tuple[np.ndarray, State]:
    """Images 0, 1, … of a seed with these labels: uint8 (N, H, W, 3), and their states on the CPU."""
    drawing, pixels, states = Drawing(model, None, sampling, labels, wanted.seed), [], []
    for state in drawing.states(in_batches(len(labels), wanted.batch_size), f"draw {what}"):
        pixels.append(model.decode(state, sampling.rounding))
        states.append({name: values.cpu() for name, values in state.items()})
    return np.concatenate(pixels), concatenate_states(states)


def _command(run: str, model: ImageModel, sampling: Sampling, count: int, labels: list[int], seed: int) -> str:
    """The command line that draws the same images."""
    names, scale = model.record.class_names, sampling.guidance_scale
    classes = [names[label] for label in labels] if names and labels != [*range(len(names))] else ()
    changed = None if scale == model.default_sampling.guidance_scale else f"{scale:g}"
    drawn = {"count": count, "seed": seed, "steps": sampling.steps, "classes": classes, "guidance_scale": changed}
    return command_line("sample", run, out="samples", **drawn)


def _training_store(record: RunRecord, moved: Path | None, notes: list[str]) -> Store | None:
    """The store that a run was trained on; None, with a note, where it is not at hand."""
    place = moved or (Path(record.store) if record.store else None)
    if record.store_hash is None or place is None or not place.is_dir():
        notes.append("Its training store is not at hand: no nearest training images, and no real semantics.")
        return None
    store = Store.open(place)
    if not record.trained_on(store):
        notes.append(f"{place} is not the store that it was trained on: no training images are shown.")
        return None
    return store


def _decoded(model: ImageModel, store: Store, rows: Tensor) -> np.ndarray:
    """Images of a store as its latents have them: uint8 (n, H, W, 3). The images themselves may have moved."""
    latents = store.read(LATENT, rows)["mean"].float().to(model.device)
    with torch.no_grad():
        images = [model.autoencoder.decode(part) for part in latents.split(SHOWN)]
    return to_pixels(torch.cat(images), model.record.recipe.sampling.rounding).cpu().numpy()


def _nearest(model: ImageModel, store: Store, pixels: np.ndarray, state: State, notes: list[str]) -> Nearest | None:
    """Samples, and the training images most like them: a copy would have distance 0."""
    described, column, measure = _described(model, store, pixels, state, notes)
    rows = store.originals
    value = "cls" if column == ClassToken.modality else "mean"
    width = math.prod(store.manifest.columns[column].tensors[value].shape)
    rows = rows[_spread(len(rows), max(COMPARED, NUMBERS // width))]
    if len(rows) <= NEIGHBOURS:
        return None
    known = store.read(column, rows)[value].float().flatten(1)
    distances, found = nearest(described, known, k=NEIGHBOURS)
    between = nearest(known[_spread(len(known), COMPARED)], known, k=2)[0][:, 1]
    neighbours = _decoded(model, store, rows[found.flatten()])
    return Nearest(
        samples=pixels,
        neighbours=neighbours.reshape(*found.shape, *neighbours.shape[1:]),
        distances=distances.numpy(),
        typical=float(between.median()),
        measure=measure,
        searched=len(rows),
    )


def _described(
    model: ImageModel, store: Store, pixels: np.ndarray, state: State, notes: list[str]
) -> tuple[Tensor, str, str]:
    """Samples as they are compared: vectors (N, D), the store's column that has the like, and what distances are."""
    spec = store.manifest.encoder
    if spec and ClassToken.modality in store.manifest.columns:
        try:
            encoder = load_encoder(spec.name, spec.image_size)
            if encoder.spec.weights_sha256 != spec.weights_sha256:
                raise UserError(f"{spec.name} has other weights than the store was made with")
            token = encoder.describe(torch.from_numpy(pixels).permute(0, 3, 1, 2)).class_token
            return token.float(), ClassToken.modality, "Euclidean distance of the vision encoder's class tokens"
        except UserError as error:
            notes.append(f"The vision encoder is not at hand ({one_line(error)}): latents are compared.")
    return model.raw(state, LATENT).flatten(1), LATENT, "Euclidean distance of latents"


def _semantics(model: ImageModel, store: Store | None, pixels: np.ndarray, state: State) -> Semantics:
    """Samples and, where there is a store, real images, each beside its compressed semantics in the same colours."""
    code = model.raw(state, LocalSemantics.modality)
    if store is None:
        return Semantics(pixels, colours_of(code))
    rows = store.originals[_spread(len(store.originals), SHOWN)]
    real = store.read(model.record.recipe.local.column, rows)["local"].float()
    return Semantics(pixels, colours_of(code, reference=real), _decoded(model, store, rows), colours_of(real))


def _spread(count: int, most: int) -> Tensor:
    """At most so many of `count` numbers from 0, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


# ---- several runs


def differences(records: Sequence[RunRecord]) -> dict[str, tuple[str, ...]]:
    """The options and other fields in which runs differ, and their values in each."""
    names: dict[str, None] = {}
    for other in records[1:]:
        names |= dict.fromkeys(differing(records[0], other))
    # Sizes and compressors are those of the recipe and the store.
    causes = [name for name in names if not name.startswith(("denoiser.", "compressors"))] or [*names]
    return {_spelt(name): tuple(_brief(record, name) for record in records) for name in causes}


def _spelt(name: str) -> str:
    if name == "recipe.name":
        return "recipe"
    return f"--{name.removeprefix('recipe.').replace('_', '-')}" if name.startswith("recipe.") else name


def _brief(record: RunRecord, name: str) -> str:
    value = reduce(lambda part, field: getattr(part, field, None), name.split("."), record)
    text = str(getattr(value, "name", value))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
