"""`reglue report`: a page about a run, or about several beside each other."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from reglue.errors import UserError
from reglue.extras import need
from reglue.locks import writes
from reglue.options.report import Report
from reglue.pipeline import ImageModel
from reglue.run import RunRecord, find_run, versions
from reglue.sampling import Sampling
from reglue.training.distributed import resolve_device
from reglue.watching.looking import STEPS, Wanted, differences, look
from reglue.watching.page import Page, write_page


@writes()
def report(options: Report) -> Path:
    """Write the page. Returns its path.

    Raises UserError for what is no run, before anything is drawn, and for classes that a run does not have.
    """
    need("report", "matplotlib")
    if options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder; name a page in it")
    device = resolve_device(options.device)
    folders = [find_run(run) for run in options.runs]
    records = [RunRecord.read(folder) for folder in folders]
    names = names_of(options.runs)
    wanted = Wanted(
        samplings=lambda model: ways(options, model),
        samples_per_class=options.samples_per_class,
        classes=options.classes,
        seed=options.seed,
        store=options.store,
        batch_size=options.batch_size,
        device=options.device,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs = tuple(look(run, name, wanted) for run, name in zip(options.runs, names, strict=True))
    page = Page(
        title=" and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}",
        lead=lead(records),
        runs=runs,
        differing=differences(records),
        protocol={
            "date": date.today().isoformat(),
            "seed": options.seed,
            "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, device {device}",
            "versions": versions(),
        },
    )
    write_page(options.out, page)
    return options.out


def ways(options: Report, model: ImageModel) -> Mapping[str, Sampling]:
    """The one way in which images of a run are drawn, by how the page calls it."""
    own = model.default_sampling
    sampling = own.changed(steps=options.steps or min(own.steps, STEPS), guidance_scale=options.guidance_scale)
    scale = sampling.guidance_scale
    return {f"guidance {scale:g}" if scale != 1 else "without guidance": sampling}


def names_of(runs: tuple[Path, ...]) -> list[str]:
    """A name for each run: its folder's, with as many of the folders above as tell it from the others."""
    parts = [Path(run).absolute().parts if Path(run).exists() else (str(run),) for run in runs]
    names = [str(Path(*part[-1:])) for part in parts]
    depth = 1
    while len({*names}) < len({*parts}):
        depth += 1
        names = [str(Path(*part[-depth:])) for part in parts]
    # The same run twice has two names.
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]


def lead(records: list[RunRecord]) -> str:
    """A sentence on what the runs are."""
    first = records[0]
    height, width = first.resolution
    if len(records) > 1:
        return f"{len(records)} runs beside each other: the same seeds, and their curves over each other."
    classes = f" in {len(first.class_names):,} classes" if first.class_names else ""
    learned = [part.modality for part in first.recipe.learned_parts]
    others = f", drawn together with {' and '.join(learned[1:])}" if learned[1:] else ""
    return f"A {first.recipe.name} model of {height}×{width} images{classes}{others}."
