"""What all studies share: arms are trained, drawn from and measured alike, milestone by milestone.

All arms reach a milestone, are drawn from and measured there before any goes on to the next, so a study that stops
early still compares arms at equal steps. Milestones double: a method that learns faster is one that reaches at N steps
what another reaches at 2N, and quality changes about as much from N to 2N whatever N is.

Everything is a file in the folder of the study, written whole or not at all, so the same command continues, also on
another machine after the folder was copied there. Runs are large; without them, what has its figures is not trained
again, and what goes on begins anew:

    study.json                              what the study is of; another study is refused
    log.jsonl                               each phase with its wall time
    references/                             features of real images, and what is known of them
    ARM-seed-S/run                          the run
    ARM-seed-S/step-N, ARM-seed-S/guided-N  the samples, and beside each its figures: KIND.json, of which
                                            training.json has the seconds of training up to there, and closest.png:
                                            those closest to training images, above these images
    grids/                                  the first samples of all arms, side by side
    results.json, table.md, *.png           everything together
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw
from tyro.conf import Positional

from circumstances import UNKNOWN, machine
from measures import Measures, fingerprint
from reglue.commands.sample import PROTOCOL, Sample, sample
from reglue.commands.train import Train, train
from reglue.config import Compile, Optimisation, Precision, Recipe, SamplerName, Sampling
from reglue.data.pictures import image_grid
from reglue.data.store import Store
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.noise import STREAMS
from reglue.errors import UserError
from reglue.files import TakesPaths, replacing
from reglue.image_sets import open_images
from reglue.pipeline import decoder
from reglue.run import RunRecord, data_hash
from reglue.training import checkpoints
from reglue.training.distributed import resolve_device
from reglue.training.tracking import read as read_log
from summary import MEASURED_BY, refuse_mixtures, summarise

SHOWN = 10
"""Images of each arm in the grids."""
FigureKind = Literal["encoder", "judge", "inception"]
"""Who looks at samples."""
KINDS: tuple[FigureKind, ...] = get_args(FigureKind)
CHECKPOINT_MINUTES = 5.0
FIRST_CHECKPOINT = 500
"""Steps between checkpoints where no speed is known yet."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions(TakesPaths):
    """Options of every study."""

    store: Positional[Path]
    """Training images: a store with everything that the arms learn."""
    reference: Path
    """Held-out images to compare with: a store prepared alike, or a folder of images."""
    out: Path
    """Folder of the study: new, or one to continue."""
    seed: int = 0
    """Of training. Samples are drawn with seed 0 throughout."""
    seeds: int = 1
    """How many seeds the --repeated-arms are trained with, counted up from --seed."""
    repeated_arms: tuple[str, ...] = ()
    """Arms that are trained with several seeds; the others with the first alone."""

    model: str = "B/2"
    """Size of the transformer, of all arms."""
    steps: int = 4000
    """Training steps. A finished study can be prolonged to twice as many, with one checkpoint more."""
    checkpoints: int = 4
    """How often arms are measured: after all steps, half of them, a quarter …"""
    batch_size: int = 64
    learning_rate: float = 3e-4
    warmup: int = 100
    """Steps over which the learning rate rises from 0; it stays constant afterwards."""
    time_shift: float = 1.0
    """Training times nearer to noise; 1 is uniform, as published."""
    ema: float = 0.999
    """Decay of the moving average of the weights, after a warm-up; samples are drawn from the average."""
    alignment_hidden: int = 2048
    """Hidden width of the alignment's projector; a smaller one suits a small model."""
    unit_variance: bool = False
    """Scale each latent channel to unit variance, instead of as the autoencoder says."""
    precision: Precision = "bfloat16"
    """Of the matrix products."""
    compile: Compile = "auto"
    """Compile blocks or models. auto is blocks on a GPU, whose minutes are dear, and nothing on a CPU."""

    compressor_epochs: int = 25
    """Passes of the compressors that are made, where the store lacks the codes of an arm."""
    compressor_hidden: int = 256
    """Their channels between."""

    count: int = 1000
    """Samples per checkpoint."""
    sampler: SamplerName = "euler-maruyama"
    sampling_steps: int = 50
    guidance: float = 2.0
    """Scale of guidance of the last samples, of all modalities; 1 leaves them out."""
    guidance_interval: tuple[float, float] = (0.0, 0.9)

    inception: str | None = None
    """Weights of FID's Inception network, or `inception` to download them; FID is left out if not given."""
    inception_everywhere: bool = False
    """FID at every checkpoint, not only at the last."""
    judge: str | None = None
    """A classifier of ImageNet: a file of scripts/convert_classifier.py, timm:NAME or torchvision:NAME."""
    encoder: str | None = None
    """The vision encoder whose features are compared; that of the store if not given."""
    autoencoder: str | None = None
    """Where the store's autoencoder is, if not where it was."""
    resamples: int = 200
    """Of images, for 95 % intervals."""

    sampling_batch: int = 100
    """Images drawn and described at once."""
    workers: int | None = None
    """Threads that read training samples ahead of their use. Default: 4 with a GPU, none without."""
    checkpoint_every: int | None = None
    """Steps between checkpoints from which an interrupted run continues. Default: as many as take five minutes, by the
    speed so far. Each is four times as large as the model."""
    plan: bool = False
    """Time a few steps of each arm, write how long the study takes into OUT-plan.md and OUT-plan.json, and stop."""
    counted_on: Literal["h200"] | None = None
    """With --plan: time nothing, but count operations for this GPU, which may be elsewhere."""
    assumed_share: float = 0.25
    """With --counted-on: the share of its rates that is reached."""
    minutes: float | None = None
    """With --plan: say which --steps take about so many minutes in all."""
    references_only: bool = False
    """Only find out what the figures need of real images, into `references` in the folder, and stop: for a machine that
    has the images, before `studies/pack.py --references`."""
    device: str = "auto"

    def milestones(self) -> list[int]:
        """The steps at which arms are measured, ascending."""
        return sorted({max(1, self.steps >> halvings) for halvings in range(self.checkpoints)})


MAY_CHANGE = {
    *("store", "reference", "out", "seed", "seeds", "repeated_arms", "arms", "questions", "steps", "checkpoints"),
    *("inception_everywhere", "autoencoder", "autoencoders", "int8_store", "compile", "guidance_scales"),
    *("sampling_batch", "checkpoint_every", "inception", "judge", "encoder", "workers", "decoding_workers", "device"),
    *("plan", "counted_on", "assumed_share", "minutes", "references_only"),
}
"""Options that do not decide what a figure of an arm is, or that are compared in another way."""
NETWORKS = ("inception", "judge", "encoder")
"""Options that name networks: may be given later, but then stay."""


@dataclass(frozen=True)
class Arm:
    """One way to train, with a name for tables."""

    name: str
    recipe: Recipe
    store: Path
    note: str = ""
    """What is published for it, or anything else that a table should say."""
    guidance: tuple[tuple[str, float], ...] = ()
    """Options of `reglue sample` that draw this arm's guided samples otherwise: pairs of a name and a value."""
    guided: bool = True
    """Whether guided samples are drawn at the end."""
    trained_as: str | None = None
    """The arm whose last model this one draws guided samples from, without training; None if it trains."""
    autoencoder: str | None = None
    """Where the autoencoder of its store is, if not where it was; None for that of the options."""


def arm_of(options: StudyOptions, name: str, recipe: Recipe, store: Path | None = None, **details: Any) -> Arm:
    """An arm with the parts of a recipe, trained as the options say: what is not a part is equal in all arms."""
    optimisation = Optimisation(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup=options.warmup,
        clip=1.0,
        ema=options.ema,
        ema_warmup=True,
        precision=options.precision,
        compile=options.compile,
        time_shift=options.time_shift,
    )
    recipe = replace(
        recipe,
        name=name,
        model=options.model,
        learn_sigma=False,  # SiT's unused output channels are there for its published checkpoints alone.
        latent=replace(recipe.latent, unit_variance=options.unit_variance),
        alignment=replace(recipe.alignment, hidden=options.alignment_hidden),
        optimisation=optimisation,
        sampling=Sampling(),
    )
    return Arm(name, recipe, store or options.store, **details)


@dataclass(frozen=True)
class Trial:
    """An arm with a seed, in a folder of its own."""

    arm: Arm
    seed: int
    folder: Path
    run: Path

    def samples(self, step: int, guided: bool) -> Path:
        """Where samples are."""
        return self.folder / samples_folder(step, guided)


def samples_folder(step: int, guided: bool) -> str:
    """The name of a folder of samples."""
    return f"{'guided' if guided else 'step'}-{step:08d}"


@dataclass(frozen=True)
class SampleSet:
    """Samples of a trial at a step."""

    trial: Trial
    step: int
    guided: bool = False

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.trial.samples(self.step, self.guided)


def trials_of(options: StudyOptions, arms: Sequence[Arm]) -> list[Trial]:
    """Each arm with its seeds. Raises UserError for a repeated arm that is none of them, unless nobody asked for it."""
    unknown = set(options.repeated_arms) - {arm.name for arm in arms}
    if unknown and options.repeated_arms != type(options).repeated_arms:
        names = ", ".join(arm.name for arm in arms)
        raise UserError(f"--repeated-arms {min(unknown)} is none of the arms; choose of {names}")
    trials = []
    for arm in arms:
        for seed in range(options.seed, options.seed + (options.seeds if arm.name in options.repeated_arms else 1)):
            run = options.out / f"{arm.trained_as or arm.name}-seed-{seed}" / "run"
            trials.append(Trial(arm, seed, options.out / f"{arm.name}-seed-{seed}", run))
    return trials


def run_study(options: StudyOptions, arms: Sequence[Arm], title: str) -> dict[str, Any]:
    """Train, draw and measure all arms, writing tables and plots after every milestone. Returns the results.

    Raises UserError for stores that lack what an arm learns, for a folder that holds another study, and for networks
    that cannot be opened; all of them before anything is trained.
    """
    trials = trials_of(options, arms)
    measures = Measures(options)
    results: dict[str, Any] = {}
    trained = [trial for trial in trials if trial.arm.trained_as is None]
    guided = [trial for trial in trials if trial.arm.guided and options.guidance != 1]
    sets = [SampleSet(trial, step) for step in options.milestones() for trial in trained]
    sets += [SampleSet(trial, options.steps, guided=True) for trial in guided]
    kinds: list[FigureKind] = [kind for kind in KINDS if any(kind in missing_figures(options, each) for each in sets)]
    create_or_resume(options, trials, lambda: open_networks(options, measures, sets, kinds))
    measures.know(kinds)
    for step in options.milestones():
        for trial in trained:
            observe(options, measures, SampleSet(trial, step))
            results = gather(options, trials, measures, title)
        draw_grid(options, results, step)
    for trial in guided:
        observe(options, measures, SampleSet(trial, options.steps, guided=True))
        results = gather(options, trials, measures, title)
    if guided:
        draw_grid(options, results, options.steps, guided=True)
    return results


def open_networks(
    options: StudyOptions, measures: Measures, sets: Sequence[SampleSet], kinds: Sequence[FigureKind]
) -> None:
    """Open every network that is still needed, once. Raises UserError for one that is missing or does not fit."""
    measures.open(kinds)
    wanted = [each for each in sets if missing_figures(options, each) and not is_drawn(options, each.folder)]
    undrawn = {each.trial.arm.store: each.trial for each in wanted}
    for trial in undrawn.values():
        decoder(checked(trial), torch.device("cpu"), trial.arm.autoencoder or options.autoencoder)


def create_or_resume(options: StudyOptions, trials: Sequence[Trial], check: Callable[[], None]) -> None:
    """Make the study's folder, or check that it is this study's. Raises UserError, naming what differs.

    Also checks that every store has what its arm learns, before hours are spent on the others, and calls `check` before
    anything is written.
    """
    settings = {part.name: getattr(options, part.name) for part in fields(options) if part.name not in MAY_CHANGE}
    # Files may lie elsewhere on another machine, but must not become others.
    settings |= {name: Path(value).name for name in NETWORKS if (value := getattr(options, name))}
    stores = {trial.arm.name: data_hash(Store.open(trial.arm.store), checked(trial).recipe) for trial in trials}
    stores["--reference"] = fingerprint(open_images(options.reference, None, 1, "cpu"))
    settings = json.loads(json.dumps(settings))
    path = options.out / "study.json"
    if path.is_file():
        before = json.loads(path.read_text())
        if what := difference(before, settings, stores):
            raise UserError(f"{options.out} is a study with another {what}; choose another --out, or as it was before")
        settings, stores = {**before["settings"], **settings}, {**before["stores"], **stores}
    check()
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": settings, "stores": stores})


def difference(before: dict[str, Any], settings: dict[str, Any], stores: dict[str, str]) -> str:
    """What differs from `study.json`, for a message; empty if nothing does. What is new there is no difference."""
    options = [name for name in settings if before["settings"].get(name, settings[name]) != settings[name]]
    if options:
        return ", ".join("--" + name.replace("_", "-") for name in options)
    changed = [name for name, digest in stores.items() if before["stores"].get(name, digest) != digest]
    return ", ".join(name if name.startswith("--") else f"store of {name}" for name in changed)


def checked(trial: Trial) -> RunRecord:
    """The record of a trial's run. Raises UserError if its store does not fit its recipe."""
    return RunRecord.of(Store.open(trial.arm.store), trial.arm.recipe, trial.seed)


def is_trained(trial: Trial, step: int) -> bool:
    """Whether the run of a trial has come to a step."""
    return any(done >= step for done in checkpoints.steps(trial.run))


def train_to(options: StudyOptions, trial: Trial, step: int) -> None:
    """Train, or prolong, the run of a trial. With a constant learning rate that gives the bits of one long run."""
    optimisation = replace(trial.arm.recipe.optimisation, steps=step)
    train(
        Train(
            replace(trial.arm.recipe, optimisation=optimisation),
            trial.arm.store,
            trial.run,
            trial.seed,
            log_every=max(1, min(50, options.milestones()[0] // 4)),
            checkpoint_every=options.checkpoint_every or steps_between_checkpoints(options, trial),
            keep=2,
            preview_every=0,
            workers=options.workers,
            device=options.device,
        )
    )


def steps_between_checkpoints(options: StudyOptions, trial: Trial) -> int:
    """As many as take `CHECKPOINT_MINUTES`, by the speed of the run so far, or of another one of this study."""
    logs = (read_log(run) for run in (trial.run, *sorted(options.out.glob("*/run"))))
    speed = next((log[-1]["images_per_second"] for log in logs if log), None)
    if speed is None:
        return FIRST_CHECKPOINT
    return max(1, round(CHECKPOINT_MINUTES * 60 * speed / options.batch_size))


def observe(options: StudyOptions, measures: Measures, samples: SampleSet) -> None:
    """Measure a set of samples: one file of figures per kind, of those that are not there yet.

    It is drawn if need be, from a model that is trained if need be.
    """
    missing = missing_figures(options, samples)
    if not missing:
        return
    trial, step = samples.trial, samples.step
    if not is_drawn(options, samples.folder):  # Otherwise an early checkpoint may be gone by now.
        if not is_trained(trial, step):
            with phase(options, "train", trial, step):
                train_to(options, trial, step)
        if not samples.guided:
            by_machine = seconds_by_machine(options, trial, step)
            seconds = {"seconds": logged_seconds(trial, step), "by_machine": by_machine}
            write_json(figures_of(samples.folder, "training"), seconds)
        with phase(options, "draw, guided" if samples.guided else "draw", trial, step):
            draw(options, samples)
    if "encoder" in missing:
        with phase(options, "draw the closest pairs", trial, step):
            measures.draw_closest(samples.folder, samples.folder.with_name(f"{samples.folder.name}.closest.png"))
    for kind in missing:
        with phase(options, f"measure by {kind}", trial, step):
            write_json(figures_of(samples.folder, kind), measures.of(kind, samples.folder))


def kinds_of(options: StudyOptions) -> list[FigureKind]:
    """The kinds of figures that are asked for."""
    return [kind for kind in KINDS if kind == "encoder" or getattr(options, kind)]


def missing_figures(options: StudyOptions, samples: SampleSet) -> list[FigureKind]:
    """The kinds of figures of a set of samples that are asked for and not there yet."""
    kinds = kinds_of(options)
    if "inception" in kinds and samples.step != options.steps and not options.inception_everywhere:
        kinds.remove("inception")
    return [kind for kind in kinds if not figures_of(samples.folder, kind).is_file()]


def figures_of(samples: Path, kind: str) -> Path:
    """The file with one kind of figures of a folder of samples."""
    return samples.with_name(f"{samples.name}.{kind}.json")


def is_drawn(options: StudyOptions, folder: Path) -> bool:
    """Whether all samples of a folder are there."""
    return all((folder / f"{i:06d}.png").is_file() for i in range(options.count))


def draw(options: StudyOptions, samples: SampleSet) -> None:
    """Draw the samples that are missing: same seeds, labels and sampler for all arms."""
    trial, out = samples.trial, samples.folder
    protocol = out / PROTOCOL
    if protocol.is_file():
        before = json.loads(protocol.read_text())
        weights = checkpoints.weights_sha256(trial.run, samples.step)
        now: dict[str, Any] = {"weights_sha256": weights, "noise": STREAMS}
        now["versions"] = {name: version(name) for name in before.get("versions", {})}
        if any(before.get(name) != value for name, value in now.items()):
            shutil.rmtree(out)  # Begun by another model, or by an earlier version.
    guidance: dict[str, Any] = {"guidance_scale": 1.0}
    if samples.guided:
        guidance = {"guidance_scale": options.guidance, "guidance_interval": options.guidance_interval}
        guidance |= dict(trial.arm.guidance)
    sample(
        Sample(
            trial.run,
            out,
            options.count,
            step=samples.step,
            sampler=options.sampler,
            steps=options.sampling_steps,
            autoencoder=trial.arm.autoencoder or options.autoencoder,
            batch_size=options.sampling_batch,
            device=options.device,
            **guidance,
        )
    )


def draw_grid(options: StudyOptions, results: dict[str, Any], step: int, guided: bool = False) -> None:
    """The first samples of all arms at a step as one picture: a row of each, columns of one seed and class.

    Arms of earlier commands too, as far as their samples are there: they may have been left behind on another machine.
    """
    folder = samples_folder(step, guided)
    shown = min(SHOWN, options.count)
    files = {name: [options.out / name / folder / f"{i:06d}.png" for i in range(shown)] for name in results["arms"]}
    files = {name: paths for name, paths in files.items() if all(path.is_file() for path in paths)}
    if not files:
        return
    pictures = image_grid(np.stack([np.asarray(Image.open(path)) for paths in files.values() for path in paths]), shown)
    heading = 14
    height = pictures.shape[0]
    names = max(map(len, files)) * 7 + 8
    page = Image.new("RGB", (pictures.shape[1] + names, height + heading), "white")
    page.paste(Image.fromarray(pictures), (names, heading))
    text = ImageDraw.Draw(page)
    text.text((names, 1), f"{'guided, ' if guided else ''}step {step}", "black")
    for row, name in enumerate(files):
        text.text((2, heading + row * (height + 2) / len(files) + 2), name, "black")
    (options.out / "grids").mkdir(exist_ok=True)
    with replacing(options.out / "grids" / f"{folder}.png") as beside:
        page.save(beside, format="png")


def gather(options: StudyOptions, trials: Sequence[Trial], measures: Measures, title: str) -> dict[str, Any]:
    """All figures so far as `results.json`, a table and plots."""
    record, path = checked(trials[0]), options.out / "results.json"
    before = json.loads(path.read_text()) if path.is_file() else {"arms": {}}
    results = {
        "title": title,
        "options": json.loads(json.dumps(asdict(options), default=str)),
        "space": {
            "autoencoder": record.autoencoder.name,
            "latent": [record.denoiser.shape.latent_channels, *record.denoiser.shape.grid],
            "resolution": list(record.resolution),
        },
        "references": measures.references,
        # Those of an earlier command with other arms stay.
        "controls": {**before.get("controls", {}), **controls_of(trials, measures)},
        "arms": {**before["arms"], **{trial.folder.name: report_of(options, trial) for trial in trials}},
    }
    refuse_mixtures({title: results})
    write_json(path, results)
    summarise(options.out, {title: results})
    return results


def controls_of(trials: Sequence[Trial], measures: Measures) -> dict[str, Any]:
    """What autoencoders make of real images, by the names of the autoencoders' folders."""
    stores = {Path(checked(trial).autoencoder.name).name: trial.arm.store for trial in reversed(trials)}
    return {name: figures for name, store in stores.items() if (figures := measures.controls(store))}


def report_of(options: StudyOptions, trial: Trial) -> dict[str, Any]:
    """What is known of a trial."""
    measured = {}
    for step in options.milestones():
        found = {kind: figures_of(trial.samples(step, False), kind) for kind in MEASURED_BY}
        if found["encoder"].is_file():
            measured[str(step)] = {
                "training_seconds": training_seconds(options, trial, step),
                "training_seconds_by_machine": seconds_by_machine(options, trial, step),
                **{kind: json.loads(file.read_text()) for kind, file in found.items() if file.is_file()},
            }
    found = {kind: figures_of(trial.samples(options.steps, True), kind) for kind in MEASURED_BY}
    return {
        "arm": trial.arm.name,
        "seed": trial.seed,
        "note": trial.arm.note,
        "parameters": parameters_of(checked(trial).denoiser),
        "steps": measured,
        "guided": {kind: json.loads(file.read_text()) for kind, file in found.items() if file.is_file()},
        "guided_step": options.steps,
    }


@cache
def parameters_of(config: DenoiserConfig) -> int:
    """How many numbers are trained, the alignment's projector included."""
    return sum(parameter.numel() for parameter in Denoiser(config).parameters())


def training_seconds(options: StudyOptions, trial: Trial, step: int) -> float:
    """Seconds of training up to a step, of which the figures were taken.

    Studies of earlier versions have them in the run's log, or in the results if the run was left behind.
    """
    file, results = figures_of(trial.samples(step, False), "training"), options.out / "results.json"
    if file.is_file():
        return json.loads(file.read_text())["seconds"]
    arms = json.loads(results.read_text())["arms"] if not trial.run.is_dir() and results.is_file() else {}
    known = arms.get(trial.folder.name, {"steps": {}})["steps"].get(str(step))
    return known["training_seconds"] if known else logged_seconds(trial, step)


def logged_seconds(trial: Trial, step: int) -> float:
    """Seconds of training up to a step, by the run's log: work that was lost and done again does not count."""
    seconds, before = 0.0, 0
    for line in read_log(trial.run):
        if line["step"] <= step:
            images = (line["step"] - before) * trial.arm.recipe.optimisation.batch_size
            seconds, before = seconds + images / line["images_per_second"], line["step"]
    return seconds


def seconds_by_machine(options: StudyOptions, trial: Trial, step: int) -> dict[str, float]:
    """Seconds of training up to a step on each machine, which must not be added.

    As they were noted beside the samples; while they are not, by the log of the study.
    """
    file = figures_of(trial.samples(step, False), "training")
    noted = json.loads(file.read_text()) if file.is_file() else {}
    if "by_machine" in noted:
        return noted["by_machine"]
    log = options.out / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    lines = [line for line in lines if line["phase"] == "train" and line["arm"] == trial.folder.name]
    machines: dict[int, str] = {}
    for line in lines:
        if line["step"] <= step:  # The first to reach a step did the work; others only found it done.
            machines.setdefault(line["step"], line.get("machine", UNKNOWN))
    seconds: dict[str, float] = {}
    before = 0.0
    for reached in sorted({*machines, step}):
        until = training_seconds(options, trial, reached)
        machine = machines.get(reached, UNKNOWN)
        seconds[machine] = seconds.get(machine, 0.0) + until - before
        before = until
    return seconds


@contextmanager
def phase(options: StudyOptions, name: str, trial: Trial, step: int) -> Iterator[None]:
    """Log a phase with its wall time to `log.jsonl`; one that had nothing to do is left out, unless it is training."""
    began = time.time()
    yield
    seconds = time.time() - began
    if seconds < 0.05 and name != "train":
        return
    line = {"phase": name, "arm": trial.folder.name, "step": step, "began": round(began), "seconds": seconds}
    line["machine"] = machine(resolve_device(options.device))
    with (options.out / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    print(f"{trial.folder.name}, step {step}: {name} took {seconds:.1f} s", file=sys.stderr, flush=True)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1))
