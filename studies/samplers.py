"""Which sampler reaches the result of the published 250 steps with the fewest evaluations?

    python studies/samplers.py RUN --reference STORE --out samplers-study --count 1000

Draws the same images (seeds, labels, weights) with every sampler at several numbers of evaluations. Of each it measures
the Fréchet distance to the reference, the distance of its images to the solution of the equation (a very fine grid;
deterministic samplers only), and the time. `results.json`, a table and `quality.png` are in the folder. The same
command again continues where it stopped. The recommendation is the cheapest setting whose Fréchet distance is
within the interval of the anchor, the published 250 steps: what so many images cannot tell apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image
from tyro.conf import Positional

from reglue.commands.evaluate import Evaluate, evaluate
from reglue.commands.sample import Sample, plan, sample
from reglue.config import SamplerName
from reglue.errors import UserError
from reglue.files import TakesPaths, read_json, replacing, to_json
from reglue.pipeline import load

STOCHASTIC: tuple[SamplerName, ...] = ("euler-maruyama",)
RESULTS = "results.json"
ADDS_SETTINGS = ("samplers", "evaluations", "time_shifts", "relative_tolerances", "anchor", "anchor_evaluations")
"""Options that another call may change: they say what is measured, not how."""


@dataclass(frozen=True)
class Study(TakesPaths):
    """Options of the study."""

    run: Positional[Path]
    reference: Path
    """A store, with whose encoder images are compared, or any reference of `reglue evaluate`."""
    out: Path = Path("samplers-study")
    samplers: tuple[SamplerName, ...] = ("euler-maruyama", "euler", "heun", "adams-bashforth")
    """dopri5 may be added: it chooses its evaluations itself, by --relative-tolerances."""
    evaluations: tuple[int, ...] = (10, 25, 50, 100)
    """Per image and branch of guidance; Heun's are odd, so it takes one less where this is even."""
    anchor: SamplerName = "euler-maruyama"
    """The sampler whose result is to be reached …"""
    anchor_evaluations: int = 250
    """… and its evaluations."""
    time_shifts: tuple[float, ...] = (1.0,)
    """Grids, for each of them; the anchor's is the unshifted one."""
    relative_tolerances: tuple[float, ...] = (1e-3,)
    """Errors that dopri5 allows per step, as shares of the values. Its absolute ones are a thousandth of each, as in
    SiT's 1e-3 and 1e-6."""
    guidance_scale: float | None = None
    """As in the run's recipe if not given."""
    count: int = 1000
    """Images per setting."""
    solution_evaluations: int = 1000
    """Of the solution that deterministic samplers are compared with, by Adams and Bashforth's method."""
    solution_count: int = 32
    """Images of that solution, the first ones; dopri5's evaluations are counted on as many."""
    feature_network: str = "store"
    """As in `reglue evaluate`; store is the encoder of the reference."""
    inception: Path | None = None
    """Weights of the FID Inception, for FID beside the other distance; the reference must hold images then."""
    batch_size: int = 100
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.samplers and self.evaluations and self.time_shifts and self.relative_tolerances):
            raise UserError(
                "--samplers, --evaluations, --time-shifts, --relative-tolerances: name at least one of each"
            )
        if self.anchor == "dopri5":
            raise UserError("--anchor dopri5: choose a sampler whose evaluations can be given")
        if min(*self.evaluations, self.anchor_evaluations) < 2:
            raise UserError("--evaluations, --anchor-evaluations: at least 2")


@dataclass(frozen=True)
class Setting:
    """One way to draw the images."""

    sampler: SamplerName
    evaluations: int
    """0 where the sampler chooses."""
    time_shift: float
    relative_tolerance: float | None = None
    """Of a sampler that chooses; None for that of the run's recipe."""

    @property
    def name(self) -> str:
        """Also of its folder."""
        evaluations = f"-{self.evaluations}" if self.evaluations else ""
        shift = "" if self.time_shift == 1 else f"-shift-{self.time_shift:g}"
        tolerance = "" if self.relative_tolerance is None else f"-tolerance-{self.relative_tolerance:g}"
        return f"{self.sampler}{evaluations}{shift}{tolerance}"

    @property
    def absolute_tolerance(self) -> float | None:
        """Beside the relative one."""
        return None if self.relative_tolerance is None else self.relative_tolerance / 1000

    @property
    def steps(self) -> int:
        """Intervals of the grid."""
        return (self.evaluations + 1) // 2 if self.sampler == "heun" else max(self.evaluations, 1)


@dataclass(frozen=True)
class Measured:
    """What came of a setting."""

    setting: Setting
    evaluations: int | None
    """That were made per image, on average where the sampler chose; None where nobody counted."""
    frechet_distance: float
    low: float
    """Of the 95 % interval …"""
    high: float
    fid: float | None
    pixel_distance: float | None
    """Root mean square difference to the solution, in 8-bit steps; None for stochastic samplers."""
    seconds: float | None
    """Of drawing and writing; None if it was interrupted in between."""


@dataclass(frozen=True)
class Results:
    """All that is measured so far, and by which options."""

    options: dict[str, Any]
    settings: tuple[Measured, ...] = ()


def study(options: Study) -> Results:
    """Draw and measure every setting that is not measured yet; then table, plot and recommendation."""
    results = open_results(options)
    solution = options.out / "solution"
    finest = Setting("adams-bashforth", options.solution_evaluations, 1.0)
    sample(drawing(options, finest, solution, options.solution_count))
    done = {measured.setting for measured in results.settings}
    for setting in settings(options):
        if setting not in done:
            results = replace(results, settings=(*results.settings, measure(options, setting, solution)))
            write(options, results)
    print(table(results))
    anchor, best = recommendation(options, results.settings)
    print(f"\nThe cheapest within the interval of {anchor.setting.name}, up to {anchor.high:.2f}: {best.setting.name}")
    draw(options, results.settings, anchor)
    return results


def settings(options: Study) -> Iterator[Setting]:
    """Every setting once, the anchor first."""
    anchor = anchor_of(options)
    yield anchor
    for shift in options.time_shifts:
        for sampler in options.samplers:
            if sampler == "dopri5":
                if shift == options.time_shifts[0]:
                    for tolerance in options.relative_tolerances:
                        yield Setting(sampler, 0, 1.0, tolerance)
                continue
            for evaluations in sorted(options.evaluations, reverse=True):
                if (setting := Setting(sampler, evaluations, shift)) != anchor:
                    yield setting


def anchor_of(options: Study) -> Setting:
    """What the others are compared with."""
    return Setting(options.anchor, options.anchor_evaluations, 1.0)


def drawing(options: Study, setting: Setting, out: Path, count: int) -> Sample:
    """The job that draws a setting."""
    return Sample(
        options.run,
        out,
        count,
        seed=options.seed,
        sampler=setting.sampler,
        steps=setting.steps,
        time_shift=setting.time_shift,
        relative_tolerance=setting.relative_tolerance,
        absolute_tolerance=setting.absolute_tolerance,
        guidance_scale=options.guidance_scale,
        batch_size=options.batch_size,
        device=options.device,
    )


def measure(options: Study, setting: Setting, solution: Path) -> Measured:
    """Draw the images of a setting and compare them."""
    folder = options.out / setting.name
    fresh = not folder.exists()
    started = time.perf_counter()
    sample(drawing(options, setting, folder, options.count))
    seconds = time.perf_counter() - started
    comparison = Evaluate(folder, options.reference, feature_network=options.feature_network, device=options.device)
    distance = evaluate(comparison).metrics.frechet_distance
    fid = None
    if options.inception:
        fid = evaluate(replace(comparison, feature_network=str(options.inception))).metrics.frechet_distance.value
    made = 2 * setting.steps - 1 if setting.sampler == "heun" else setting.evaluations or counted(options, setting)
    return Measured(
        setting,
        made,
        distance.value,
        distance.value if distance.low is None else distance.low,
        distance.value if distance.high is None else distance.high,
        fid,
        None if setting.sampler in STOCHASTIC else pixel_distance(folder, solution),
        seconds if fresh else None,
    )


def counted(options: Study, setting: Setting) -> int:
    """Evaluations per image that a sampler chose, on average: the first images are drawn again, and thrown away."""
    first = drawing(options, setting, options.out, min(options.count, options.solution_count))
    total = 0

    def count() -> None:
        nonlocal total
        total += 1

    plan(first, load(first.run, device=first.device)).draw(range(first.count), count)
    return round(total / first.count)


def pixel_distance(folder: Path, solution: Path) -> float:
    """Root mean square difference of the images that both folders have, in 8-bit steps."""
    names = [file.name for file in sorted(solution.glob("*.png")) if (folder / file.name).is_file()]
    sides = [np.stack([np.asarray(Image.open(side / name), float) for name in names]) for side in (folder, solution)]
    return float(np.sqrt(np.mean((sides[0] - sides[1]) ** 2)))


def recommendation(options: Study, measured: tuple[Measured, ...]) -> tuple[Measured, Measured]:
    """The anchor, and what has the fewest evaluations of all that lie below the upper end of its interval."""
    anchor = next(each for each in measured if each.setting == anchor_of(options))
    good = [each for each in measured if each.evaluations and each.frechet_distance <= anchor.high]
    return anchor, min(good, key=lambda each: (each.evaluations or 0, each.frechet_distance))


def open_results(options: Study) -> Results:
    """What an earlier call measured. Raises UserError if it had options that decide other numbers."""
    protocol = json.loads(
        json.dumps(
            {
                name: str(value) if isinstance(value, Path) else value
                for name, value in asdict(options).items()
                if name not in (*ADDS_SETTINGS, "out", "batch_size", "device")
            }
        )
    )
    file = options.out / RESULTS
    if not file.is_file():
        options.out.mkdir(parents=True, exist_ok=True)
        return Results(protocol)
    before = read_json(file, Results, "remove it to measure anew")
    different = sorted(name for name in protocol if before.options.get(name) != protocol[name])
    if different:
        raise UserError(f"{file} was measured with other options ({', '.join(different)}); choose a new --out")
    return before


def write(options: Study, results: Results) -> None:
    """Write what is measured so far."""
    with replacing(options.out / RESULTS) as beside:
        beside.write_text(to_json(results))


def table(results: Results) -> str:
    """The results as Markdown."""
    lines = [
        "| sampler | shift | tolerance | evaluations | Fréchet distance | FID | pixels from the solution | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in results.settings:
        cells = (
            each.setting.sampler,
            f"{each.setting.time_shift:g}",
            "–" if each.setting.relative_tolerance is None else f"{each.setting.relative_tolerance:g}",
            each.evaluations or "–",
            f"{each.frechet_distance:.2f} [{each.low:.2f}, {each.high:.2f}]",
            "–" if each.fid is None else f"{each.fid:.2f}",
            "–" if each.pixel_distance is None else f"{each.pixel_distance:.2f}",
            "–" if each.seconds is None else f"{each.seconds:.0f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(options: Study, measured: tuple[Measured, ...], anchor: Measured) -> None:
    """Quality against evaluations, as `quality.png`."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, float], list[Measured]] = {}
    for each in measured:
        if each.evaluations:
            lines.setdefault((each.setting.sampler, each.setting.time_shift), []).append(each)
    for (sampler, shift), points in lines.items():
        points.sort(key=lambda each: each.evaluations or 0)
        label = sampler if shift == 1 else f"{sampler}, shift {shift:g}"
        axes.plot(
            [each.evaluations or 0 for each in points], [each.frechet_distance for each in points], "o-", label=label
        )
    axes.axhspan(anchor.low, anchor.high, alpha=0.15, label=f"interval of {anchor.setting.name}")
    axes.set(xscale="log", yscale="log", xlabel="evaluations per image", ylabel="Fréchet distance")
    axes.legend()
    with replacing(options.out / "quality.png") as beside:
        figure.savefig(beside, format="png", dpi=150)


if __name__ == "__main__":
    try:
        study(tyro.cli(Study, description=__doc__))
    except UserError as error:
        raise SystemExit(f"samplers: {error}") from None
