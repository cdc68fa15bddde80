"""Do the methods learn faster, and what decides it? Named lists of arms, trained, drawn from and measured alike.

    python studies/study.py convergence --work study --images imagenette/train --held-out imagenette/val
    python studies/study.py parts weights --work study --milestones 5000 10000 --train="--model 8x320x5/2"

A question is a list of arms, and an arm is what the public commands are given. Images, their order, noise, times and
those initial weights that arms share depend on the seed alone, so they are equal in all arms. All arms reach a
milestone, and are measured there, before any goes on to the next. The same command continues where it stopped; an arm
of several questions is trained once. Everything is in the folder --work, which may be copied to another machine:

    stores/, autoencoders/, runs/    what the commands make; what has its figures needs them no more
    samples/ARM-seed-S/              samples of each milestone, and the closest ones above their training images
    results.jsonl                    every figure, with network, options, machine, versions, commit and date
    QUESTION.md, QUESTION*.png       a table, curves over steps and over time, the same seeds of all arms
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tyro.conf import Positional

from measures import BATCH, copying, load_judge, photographs, pictures, share_of, views
from reglue import cli
from reglue.data.manifest import MANIFEST
from reglue.data.pictures import image_grid
from reglue.data.store import Store
from reglue.encoders.autoencoders import load_autoencoder
from reglue.errors import Stopped, UserError
from reglue.files import read_jsonl, read_tensors, replacing
from reglue.machine import commit, machine
from reglue.metrics.distances import GaussianStatistics
from reglue.metrics.features import describe_images, load_encoder_features
from reglue.metrics.inception import INCEPTION, load_inception
from reglue.reals.samples import to_pixels
from reglue.seeds import permutation
from reglue.training import checkpoints
from reglue.training.distributed import resolve_device
from reglue.training.tracking import read as read_log
from report import write_report

PREPARE = "--resolution 64 --features"
TRAIN = (
    "--model 6x192x3/1 --no-learn-sigma --optimisation.batch-size 64 --optimisation.learning-rate 1e-3 "
    "--optimisation.warmup 50 --optimisation.clip 1 --optimisation.ema 0.999 --optimisation.ema-warmup yes "
    "--optimisation.compile auto --optimisation.time-shift 3 --alignment.hidden 512 "
    "--log-every 50 --checkpoint-every 500 --keep 2 --preview-every 0"
)
SAMPLE = (
    "--count 400 --sampler euler-maruyama --steps 25 --guidance-scale 1 --guided-channels all --rounding truncate "
    "--batch-size 100"
)
AUTOENCODE = (
    "--architecture.widths 16 32 64 128 --architecture.latent-channels 16 --architecture.layers-per-block 1 "
    "--architecture.norm-groups 16 --alignment.hidden 256 --optimisation.steps 1600 --optimisation.batch-size 8 "
    "--optimisation.learning-rate 5e-4 --optimisation.warmup 100 --optimisation.decay cosine "
    "--optimisation.betas 0.9 0.95 --optimisation.ema 0.995 --evaluate-every 400 "
    "--checkpoint-every 160 --keep 1 --validation-images 1000"
)
SPACES = {
    "plain": "--kl.weight 1e-5 --alignment.weight 0 --alignment.class-weight 0",
    "aligned": "--kl.weight 1e-5",
    **{f"aligned-kl-{weight}": f"--kl.weight {weight}" for weight in ("1e-3", "1e-2", "1e-1")},
}
"""Latent spaces besides that of --prepare, by the options of `reglue autoencode`."""
FREE = {"--checkpoint-every", "--keep", "--workers", "--optimisation.compile", "--autoencoder", "--batch-size"}
"""Options that decide no figure. The batch size of a training is --optimisation.batch-size."""
REAL_IMAGES = 2000
"""Of either store that the judge looks at, at most."""
PENALTIES = tuple(np.logspace(-1, 5, 7))
"""Of the judge's last layer, of which one is chosen by leaving out one image at a time."""


@dataclass(frozen=True)
class Arm:
    """One way to train, or to draw from, a model."""

    name: str
    train: str
    """The recipe and options of `reglue train`. Empty: no model, but training images as an autoencoder shows them."""
    published: str = ""
    """For the table."""
    sample: str = ""
    """Options of `reglue sample`."""
    space: str = ""
    """One of SPACES, or given. Empty: that of --space."""
    run: str | None = None
    """The arm whose run this one draws from, after the last milestone alone. None for its own."""
    measured_by: tuple[str, ...] = ("encoder", "copies", "inception", "judge")
    seed: int = 0
    """Of training; samples have seed 0 throughout."""

    @property
    def title(self) -> str:
        """Also of its folders."""
        return f"{self.name}-seed-{self.seed}"

    @property
    def run_title(self) -> str:
        """Of the run that it draws from."""
        return f"{self.run or self.name}-seed-{self.seed}"


REGLUE = "reglue --local.compressor conv-16"
NO_TOKEN, NO_ALIGNMENT = "--class-token.weight 0", "--alignment.weight 0"
DIT = "dit --learn-sigma --optimisation.time-shift 1"
SCALED, LAST_LAYER = "--local.unit-variance", "--local.compressor conv-16-last"
WHICH = {"all": "", "map": "--cls-scale 1", "token": "--local-scale 1", "latents": "--local-scale 1 --cls-scale 1"}
"""What is guided besides the latents."""
GRIDS = {
    ("euler-maruyama", 1): (250, 80, 40, 20, 10),
    ("euler-maruyama", 2): (40, 20, 10),
    ("euler", 1): (80, 40, 20, 10),
    ("heun", 1): (40, 20, 10, 5),
    ("adams-bashforth", 1): (80, 40, 20, 10),
    ("adams-bashforth", 2): (40,),
}
"""Steps by sampler and --time-shift; Heun evaluates twice in each step but the last."""
COMPRESSORS = [
    Arm(f"reglue-{kind}-{channels}", f"reglue --local.compressor {kind}-{channels}")
    for kind in ("pca", "conv")
    for channels in (4, 8, 16, 32)
]
GUIDED = [
    Arm(
        f"guided-{scale}-{name}",
        REGLUE,
        "",
        f"--guidance-scale {scale} --guidance-interval 0 0.9 {other}",
        run="reglue",
    )
    for scale in ("1.5", "2", "2.8")
    for name, other in WHICH.items()
]
SAMPLERS = [
    Arm(
        f"{sampler}-{number}-shift-{shift}",
        REGLUE,
        sample=f"--sampler {sampler} --steps {number} --time-shift {shift}",
        run="reglue",
        measured_by=("encoder", "inception"),
    )
    for (sampler, shift), numbers in GRIDS.items()
    for number in numbers
]
ARMS = {
    arm.name: arm
    for arm in (
        Arm("sit", "sit", "33.0"),
        Arm("repa", "repa", "24.4"),
        Arm("redi", "redi --local.compressor pca-8-last", "21.4"),
        Arm("redi-unit-variance", f"redi --local.compressor pca-8-last {SCALED}"),
        Arm("reg", "reg", "15.2"),
        Arm("reglue", REGLUE, "12.9"),
        Arm("local", f"{REGLUE} {NO_TOKEN} {NO_ALIGNMENT}"),
        Arm("no-alignment", f"{REGLUE} {NO_ALIGNMENT}"),
        Arm("no-token", f"{REGLUE} {NO_TOKEN}", "13.3"),
        *(Arm(f"map-weight-{weight}", f"{REGLUE} --local.weight {weight}") for weight in ("0.25", "0.5", "2")),
        *(Arm(f"alignment-{weight}", f"{REGLUE} --alignment.weight {weight}") for weight in ("0.1", "0.25", "1")),
        Arm("last-layer", f"{REGLUE} {LAST_LAYER}"),
        Arm("last-layer-no-token", f"{REGLUE} {LAST_LAYER} {NO_TOKEN}", "14.3"),
        Arm("last-layer-kl-no-token", f"{REGLUE} {LAST_LAYER}-kl {NO_TOKEN}", "17.2"),
        Arm("unit-variance", f"{REGLUE} {SCALED}"),
        Arm("unit-variance-pca-16", f"{REGLUE} --local.compressor pca-16 {SCALED}"),
        Arm("unit-variance-no-token", f"{REGLUE} {SCALED} {NO_TOKEN}"),
        Arm("unit-variance-last-layer-no-token", f"{REGLUE} {LAST_LAYER} {SCALED} {NO_TOKEN}"),
        *(Arm(f"targets-{kind}", f"{REGLUE} --alignment.targets {kind}") for kind in ("decoded", "online")),
        Arm("sit-uniform-times", "sit --optimisation.time-shift 1"),
        Arm("uniform-times", f"{REGLUE} --optimisation.time-shift 1"),
        *(Arm(f"sit-in-{space}", "sit", space=space) for space in SPACES),
        *(Arm(f"reglue-in-{space}", REGLUE, space=space) for space in ("plain", "aligned")),
        *(Arm(f"dit-in-{space}", DIT, sample="--sampler ddpm", space=space) for space in ("plain", "aligned")),
        *(*COMPRESSORS, *GUIDED, *SAMPLERS),
    )
}
QUESTIONS = {
    "convergence": ["sit", "repa", "redi", "redi-unit-variance", "reg", "reglue"],
    "parts": ["sit", "repa", "reg", "local", "no-alignment", "no-token", "reglue"],
    "weights": ["reglue", *(name for name in ARMS if name.startswith(("map-weight-", "alignment-")))],
    "layers": ["last-layer-no-token", "last-layer-kl-no-token", "no-token"],
    "compressors": [arm.name for arm in COMPRESSORS],
    "scale": [
        *("reglue-pca-16", "unit-variance-pca-16", "reglue", "unit-variance", "no-token", "unit-variance-no-token"),
        *("last-layer-no-token", "unit-variance-last-layer-no-token"),
    ],
    "targets": ["reglue", "targets-decoded", "targets-online"],
    "times": ["sit", "sit-uniform-times", "reglue", "uniform-times"],
    "changes": [  # one at a time
        *("reglue", "map-weight-0.25", "map-weight-0.5", "unit-variance", "last-layer", "reglue-conv-8"),
        *("no-alignment", "no-token", "uniform-times"),
    ],
    "guidance": ["reglue", *(arm.name for arm in GUIDED)],
    "samplers": [arm.name for arm in SAMPLERS],
    "spaces": ["sit-in-plain", "reglue-in-plain", "sit-in-aligned", "reglue-in-aligned"],
    "reals": [f"sit-in-{space}" for space in SPACES],
    "reals-dit": ["dit-in-plain", "dit-in-aligned"],
}


@dataclass(frozen=True)
class Options:
    """What is asked, of which images, and how. Options of the commands, as in --train="--model B/2", come last."""

    questions: Positional[tuple[str, ...]]
    """Of convergence, parts, weights, layers, compressors, scale, targets, times, changes, guidance, samplers, spaces,
    reals, reals-dit."""
    work: Path = Path("study")
    """Folder of the study: new, or one to continue."""
    images: Path | None = None
    """Training images: a folder with a sub-folder per class, or a store; where a share is held out, a .tar of a folder
    too. Not needed once the study has its stores."""
    held_out: float | Path = 0.1
    """Images to compare with: a share of each class of --images, a folder, or a store."""
    run: Path | None = None
    """Draw from this run in place of REGLUE's, for guidance and samplers."""
    arms: tuple[str, ...] = ()
    """Only these of the arms."""
    milestones: tuple[int, ...] = (250, 500, 1000)
    """Training steps at which arms are measured."""
    seeds: int = 2
    """How often the --repeated arms are trained; the others once."""
    repeated: tuple[str, ...] = ("sit", "reglue")
    space: str = "given"
    """Where arms are trained that name no latent space: given, by --prepare, or plain, aligned or aligned-kl-WEIGHT."""
    prepare: str = ""
    compress: str = ""
    """For codes KIND-CHANNELS[-last][-kl] that arms learn and the store lacks."""
    autoencode: str = ""
    train: str = ""
    sample: str = ""
    evaluate: str = "--resamples 200"
    inception: str | None = None
    """Measure FID, by a file of weights, or by `inception`, which is downloaded."""
    judge: str | None = None
    """Measure class accuracy, by a file of scripts/convert_classifier.py, or timm:NAME: the last layer is a ridge
    classifier on its features, fitted to real training images."""
    device: str = "auto"


def arms_of(options: Options, question: str) -> list[Arm]:
    """The arms of a question with all of their options and seeds, after the real images of their latent spaces.

    Raises UserError for an unknown question, arm or latent space.
    """
    for asked, known in (((question,), QUESTIONS), (options.arms, ARMS), ((options.space,), {"given": "", **SPACES})):
        if unknown := set(asked) - known.keys():
            raise UserError(f"{min(unknown)} is not known to this study; choose of {', '.join(known)}")
    named = [ARMS[name] for name in QUESTIONS[question] if not options.arms or name in options.arms]
    arms = []
    for arm in named:
        recipe, _, own = arm.train.partition(" ")
        texts = f"{recipe} {TRAIN} {options.train} {own}", f"{SAMPLE} {options.sample} {arm.sample}"
        for seed in range(options.seeds if arm.name in options.repeated else 1):
            space = arm.space or options.space
            arms.append(replace(arm, train=texts[0], sample=texts[1], space=space, seed=seed))
    if options.run:
        return [arm for arm in arms if arm.run]
    spaces, count = dict.fromkeys(arm.space for arm in arms), merged(SAMPLE, options.sample)["--count"][0]
    return [*(Arm(f"reconstructed-{space}", "", sample=f"--count {count}", space=space) for space in spaces), *arms]


Words = dict[str, list[str]]
"""Options of a command: the words behind each."""


def merged(*texts: str) -> Words:
    """Options of a command, without what comes before them; of one that is given several times the last counts."""
    words: Words = {}
    for word in chain.from_iterable(map(shlex.split, texts)):
        if word.startswith("--"):
            name, given, value = word.partition("=")
            words.pop(name, None)
            words[name] = [value] if given else []
        elif words:
            words[next(reversed(words))].append(word)
    return words


def reglue(command: str, *places: str | Path, words: Words | None = None, **options: Any) -> None:
    """A command as on the command line, in this process; what it prints goes to stderr."""
    words = (words or {}) | {f"--{name.replace('_', '-')}": [str(value)] for name, value in options.items()}
    given = [command, *map(str, places), *chain.from_iterable((name, *values) for name, values in words.items())]
    print(f"reglue {shlex.join(given)}", file=sys.stderr, flush=True)
    with redirect_stdout(sys.stderr):
        cli.execute(cli.parse(given))


class Study:
    """The loop over the commands, and the figures of their samples."""

    def __init__(self, options: Options):
        self.options, self.work, self.device = options, options.work, resolve_device(options.device)
        self.networks: dict[str, Any] = {}
        self.lines = read_jsonl(self.work / "results.jsonl", dict[str, Any], "fix that line, or delete that line alone")

    def answer(self, question: str, arms: Sequence[Arm]) -> None:
        """Train, draw and measure what is missing, and write the report whenever all arms have come further."""
        steps = sorted(self.options.milestones)
        plan = [(0, [arm for arm in arms if not arm.train])]
        plan += [(step, [arm for arm in arms if arm.train and not arm.run]) for step in steps]
        plan += [(steps[-1], [arm for arm in arms if arm.run])]
        missing = [[self.missing(arm, step) for arm in some] for step, some in plan]  # Refuses before anything is done.
        for (step, some), kinds in zip(plan, missing, strict=True):
            for arm, lacks in zip(some, kinds, strict=True):
                if lacks:
                    self.observe(arm, step, lacks)
            if any(kinds):
                write_report(self.work, question, arms, self.lines)
        if not any(map(any, missing)):
            write_report(self.work, question, arms, self.lines)

    def find(self, arm: str, step: int, by: str) -> dict[str, Any] | None:
        """The line with the figures of an arm, by its title, of one kind."""
        return next((line for line in self.lines if (line["arm"], line["step"], line["by"]) == (arm, step, by)), None)

    def record(self, arm: str, step: int, by: str, figures: dict[str, Any], **about: Any) -> None:
        """Add a line to `results.jsonl`, which is written whole or not at all."""
        line = {"arm": arm, "step": step, "by": by, "figures": figures, **about, "machine": machine(self.device)}
        line["versions"] = {name: version(name) for name in ("reglue", "torch", "timm", "diffusers", "numpy")}
        line |= {"commit": commit(Path(__file__).parent), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.lines.append(line)
        self.work.mkdir(parents=True, exist_ok=True)
        with replacing(self.work / "results.jsonl") as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def missing(self, arm: Arm, step: int) -> list[str]:
        """The kinds of figures that an arm lacks at a step. Raises UserError for some that were made otherwise."""
        asked = [by for by in arm.measured_by if by not in ("inception", "judge") or getattr(self.options, by)]
        found = {by: self.find(arm.title, step, by) for by in asked}
        for by, line in found.items():
            if line is None:
                continue
            other = {*line["options"].split(" --")} ^ {*said(arm).split(" --")}
            if other or line["network"] != self.network(by).sha256:
                what = f"other options ({', '.join(sorted(other))})" if other else f"another network ({by})"
                raise UserError(
                    f"{arm.title} at step {step} was measured with {what}, so that figures would not compare; use what "
                    "was used, or another --work"
                )
        return [by for by, line in found.items() if line is None]

    def observe(self, arm: Arm, step: int, missing: Sequence[str]) -> None:
        """Measure an arm at a step, from samples that are drawn if need be, of a model that is trained if need be."""
        samples, words = self.work / "samples" / arm.title / f"step-{step}", merged(arm.sample)
        count = int(words["--count"][0])
        if not arm.train:
            count = self.reconstruct(arm, samples, count)
        elif not all((samples / f"{i:06d}.png").is_file() for i in range(count)):
            run = self.options.run
            if not run:
                run, words["--step"] = self.trained(arm, step), [str(step)]
                if arm.space in SPACES:
                    words["--autoencoder"] = [str(self.work / "autoencoders" / arm.space)]
            fresh, began = not samples.exists(), time.perf_counter()
            reglue("sample", run, words=words, out=samples, device=self.options.device)
            seconds = {"seconds": time.perf_counter() - began} if fresh else {}
            self.record(arm.title, step, "drawing", seconds)
        for by in missing:
            figures = getattr(self, f"by_{by}")(samples, count)
            self.record(arm.title, step, by, figures, network=self.network(by).sha256, options=said(arm))

    def trained(self, arm: Arm, step: int) -> Path:
        """The run that an arm draws from, trained to a step. With a constant learning rate parts equal one long run."""
        run, words = self.work / "runs" / arm.run_title, merged(arm.train)
        noted = run.with_name(f"{run.name}.machines")
        if not any(done >= step for done in checkpoints.steps(run)):
            store = self.store_of(arm.space, words)
            # Seconds of several machines do not add up, so it is noted which ones have worked on a run.
            known: list[str] = noted.read_text().splitlines() if noted.is_file() else []
            machines = sorted({*known, machine(self.device)})
            noted.parent.mkdir(parents=True, exist_ok=True)
            noted.write_text("\n".join(machines))
            words |= {"--optimisation.steps": [str(step)], "--device": [self.options.device]}
            reglue("train", arm.train.partition(" ")[0], words=words, store=store, out=run, seed=arm.seed)
        if self.find(arm.run_title, step, "training") is None:
            weights = checkpoints.read_weights(checkpoints.find(run) / checkpoints.EMA)
            # By the log: work that was lost and done again does not count.
            log = [line for line in read_log(run) if line["step"] <= step]
            starts, images = [0, *(line["step"] for line in log)], int(words["--optimisation.batch-size"][0])
            seconds = [images * (x["step"] - y) / x["images_per_second"] for x, y in zip(log, starts, strict=False)]
            figures = {"machines": noted.read_text().splitlines(), "seconds": sum(seconds), "log": log[-1]}
            figures["parameters"] = sum(tensor.numel() for tensor in weights.values())
            self.record(arm.run_title, step, "training", figures)
        return run

    # Images: stores, codes and latent spaces

    @cached_property
    def given(self) -> list[Store]:
        """The stores of training and of held-out images, in the latent space of --prepare."""
        sides: list[Any] = [self.options.images, self.options.held_out]
        stores = [self.work / "stores" / name for name in ("given", "held-out")]
        stores = [side if is_store(side) else store for side, store in zip(sides, stores, strict=True)]
        if not all(map(is_store, stores)):
            if sides[0] is None:
                raise UserError("--images is missing, and the study has no store of training images yet")
            if not isinstance(sides[1], Path):
                sides = divided(sides[0], sides[1], self.work / "images")
            for images, store in zip(sides, stores, strict=True):
                if not is_store(store):
                    words = merged(PREPARE, self.options.prepare)
                    reglue("prepare", images, store, words=words, device=self.options.device)
        return [Store.open(store) for store in stores]

    @cached_property
    def held_out(self) -> Store:
        """The held-out images, which need no training images beside them where nothing is trained."""
        return Store.open(str(self.options.held_out)) if is_store(self.options.held_out) else self.given[1]

    def store_of(self, space: str, train: Words) -> Path:
        """The training images in a latent space, with the codes that an arm learns."""
        store, codes, device = self.given[0].folder, train.get("--local.compressor", []), self.options.device
        for name in codes:
            if f"local.{name}" not in Store.open(store).manifest.columns:
                kind, channels, *others = name.split("-")
                more = {"last": "--layers last", "kl": "--kl-weight 1e-6"}
                words = merged(self.options.compress, *(more[other] for other in others))
                reglue("compress", store, words=words, kind=kind, channels=channels, name=name, device=device)
        if space == "given":
            return store
        fitted, store = store / "compressors", self.make_space(space)
        for name in codes:
            if f"local.{name}" not in Store.open(store).manifest.columns:
                reglue("compress", store, fitted=fitted / name, name=name, device=device)
        return store

    def make_space(self, space: str) -> Path:
        """An autoencoder, the stores of its latents, and figures of both."""
        device, autoencoder = self.options.device, self.work / "autoencoders" / space
        stores = [self.work / "stores" / name for name in (space, f"{space}-held-out")]
        if self.find(space, 0, "space") and is_store(stores[0]):
            return stores[0]
        source, encoder = self.given[0].manifest.source, self.given[0].manifest.encoder
        words = merged(AUTOENCODE, self.options.autoencode, SPACES[space])
        words |= {"--resolution": list(map(str, source.resolution)), "--encoder": [encoder.name if encoder else ""]}
        held_out = self.given[1].manifest.source.path
        reglue("autoencode", source.path, autoencoder, words=words, validation=held_out, device=device)
        for first, second in zip(self.given, stores, strict=True):
            reglue("reencode", first.folder, second, autoencoder=autoencoder, device=device)
        words, probes = {"--no-conv": [], "--columns": ["latent"]}, self.work / "probes" / space
        reglue("probe", stores[0], words=words, validation=stores[1], out=probes, device=device)
        figures = next(line["validation"] for line in reversed(read_log(autoencoder)) if "validation" in line)
        for result in json.loads((probes / "report.json").read_text())["results"]:
            figures[f"probe, {result['probe'].removeprefix('linear, ')}"] = result["score"]
        self.record(space, 0, "space", figures)
        return stores[0]

    def reconstruct(self, arm: Arm, samples: Path, count: int) -> int:
        """Training images as an autoencoder shows them: as good as samples can be, and copies. Returns their number."""
        store, own = Store.open(self.store_of(arm.space, {})), self.work / "autoencoders" / arm.space
        rows = store.originals[torch.linspace(0, len(store.originals) - 1, min(count, len(store.originals))).long()]
        autoencoder = load_autoencoder(str(own) if own.is_dir() else store.manifest.autoencoder.name, self.device)
        samples.mkdir(parents=True, exist_ok=True)
        for numbers in torch.arange(len(rows)).split(BATCH):
            with torch.inference_mode():
                latents = store.read("latent", rows[numbers])["mean"].float().to(self.device)
                images = to_pixels(autoencoder.decode(latents)).permute(0, 2, 3, 1).cpu().numpy()
            for number, image in zip(numbers.tolist(), images, strict=True):
                Image.fromarray(image).save(samples / f"{number:06d}.png")
        (samples / "samples.json").write_text(json.dumps({"labels": store.labels[rows].tolist()}))
        return len(rows)

    # Figures

    def network(self, by: str) -> Any:
        """What a kind of figures is by: the vision encoder that the methods learn from, FID's Inception, the judge."""
        by = "encoder" if by == "copies" else by
        if by not in self.networks:
            name, manifest = str(getattr(self.options, by, "")), self.held_out.manifest
            if by == "judge" and not manifest.source.class_names:
                raise UserError(f"--judge {name} needs images with classes; leave it out")
            if by == "judge":
                self.networks[by] = load_judge(name, self.device)
            elif by == "inception":
                self.networks[by] = load_inception(None if name == INCEPTION else Path(name), self.device)
            elif manifest.encoder is None:
                raise UserError(f"{self.held_out.folder} was prepared without a vision encoder, which figures are by")
            else:
                size = manifest.source.resolution
                self.networks[by] = load_encoder_features(manifest.encoder.name, size, "class-token", self.device)
        return self.networks[by]

    def kept(self, name: str, by: str, find: Callable[[], Tensor]) -> Tensor:
        """What a network says of real images, once: afterwards they are not needed any more."""
        file = self.work / "references" / f"{name}-{self.network(by).sha256[:12]}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as beside:
                save_file({"found": find().contiguous()}, beside)
        return read_tensors(file, "delete it, and it is found out again")["found"]

    def by_encoder(self, samples: Path, count: int) -> dict[str, Any]:
        """Fréchet distance, KID, precision and recall by the encoder's class tokens."""
        return self.evaluated(samples, self.held_out.folder, "store")

    def by_inception(self, samples: Path, count: int) -> dict[str, Any]:
        """FID, against statistics of the held-out images."""
        network, file = self.network("inception"), self.work / "references" / "inception.npz"

        def features() -> Tensor:
            return describe_images(network, photographs(self.held_out)[0].split(BATCH)).features

        found = GaussianStatistics(network.width).update(self.kept("held-out", "inception", features)).gaussian
        np.savez(file, mu=found.mean.numpy(), sigma=found.covariance.numpy())
        return self.evaluated(samples, file, self.options.inception or "")

    def evaluated(self, samples: Path, reference: Path, network: str) -> dict[str, Any]:
        """The figures of `reglue evaluate`, and of how many images they are."""
        file, words = samples.with_name(f"{samples.name}.report.json"), merged(self.options.evaluate)
        where: dict[str, Any] = {"out": file, "device": self.options.device}
        reglue("evaluate", samples, words=words, reference=reference, feature_network=network, **where)
        report = json.loads(file.read_text())
        file.unlink()
        figures = {name: figure for name, figure in report["metrics"].items() if figure is not None}
        return {**figures, "images": report["image_count"], "held_out_images": report["reference_count"]}

    def by_copies(self, samples: Path, count: int) -> dict[str, Any]:
        """How many samples are copies, or mirror images of copies; also a picture of the closest ones."""
        training, encoder = self.given[0], self.network("copies")
        images = torch.cat(list(pictures(samples, count)))
        figures, closest, places = copying(
            views(encoder, images.split(BATCH)),
            training.read("cls", training.originals)["cls"].float(),
            self.kept("held-out", "copies", lambda: views(encoder, photographs(self.held_out)[0].split(BATCH))),
        )
        source, rows = training.manifest.source, training.originals[places].tolist()
        with suppress(UserError):  # The images were left behind on another machine.
            real = source.open()
            pairs = [*images[closest], *(torch.as_tensor(real.load(row, source.resolution)) for row in rows)]
            grid = image_grid(torch.stack(pairs).permute(0, 2, 3, 1).numpy(), columns=len(closest))
            with replacing(samples.with_name(f"{samples.name}.closest.png")) as beside:
                Image.fromarray(grid).save(beside, format="png")
        return figures

    def by_judge(self, samples: Path, count: int) -> dict[str, Any]:
        """The share of samples that the judge takes for what they were drawn as, and the same of held-out images."""

        judge, names = self.network("judge"), ("training", "held-out")

        def described(store: Store) -> Tensor:
            images, labels = photographs(store, REAL_IMAGES)
            return torch.cat([judge.features(images.split(BATCH)), torch.tensor(labels)[:, None].float()], 1)

        known, real = (self.kept(n, "judge", lambda s=s: described(s)) for n, s in zip(names, self.given, strict=True))
        classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES)).fit(known[:, :-1], known[:, -1])
        labels = json.loads((samples / "samples.json").read_text())["labels"][:count]
        right = classifier.score(judge.features(pictures(samples, count)), labels)
        of_real_images = classifier.score(real[:, :-1], real[:, -1])
        return {"accuracy": share_of(float(right), count), "of_real_images": float(of_real_images)}


def said(arm: Arm) -> str:
    """The options that decide the figures of an arm."""
    words = {**merged(arm.train), **merged(arm.sample)}
    kept = (shlex.join([name, *words[name]]) for name in sorted(set(words) - FREE))
    return " ".join([arm.train.partition(" ")[0], f"in {arm.space}:", *kept])


def is_store(path: Any) -> bool:
    """Whether a path is that of a finished store."""
    return isinstance(path, Path) and (path / MANIFEST).is_file()


def divided(images: Path, share: float, out: Path) -> list[Path]:
    """Copies of images in two folders, the second with a share of each class. A .tar is unpacked first."""
    if images.suffix == ".tar":
        with tarfile.open(images) as archive:
            archive.extractall(out / "unpacked", filter="data")
        images = out / "unpacked"
        while len(inside := list(images.iterdir())) == 1 and any(path.is_dir() for path in inside[0].iterdir()):
            (images,) = inside
    sides = [out / "training", out / "held-out"]
    for folder in sorted(path for path in images.iterdir() if path.is_dir()):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        for place, index in enumerate(permutation(0, f"held out of {folder.name}", 0, len(files)).tolist()):
            to = sides[place < round(share * len(files))] / folder.name
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(files[index], to)
    return sides


def main(arguments: list[str] | None = None) -> None:
    """Answer every question. A user's mistake ends with one line and exit code 2, a request to stop with 143."""
    try:
        options = tyro.cli(Options, description=__doc__, args=arguments)
        asked = {question: arms_of(options, question) for question in options.questions}
        study = Study(options)
        for question, arms in asked.items():
            study.answer(question, arms)
            print((options.work / f"{question}.md").read_text())
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as request:
        print(request, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
