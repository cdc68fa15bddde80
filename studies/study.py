"""Do the methods learn faster, and what decides it? Lists of arms, trained, drawn from and measured alike.

    python studies/study.py convergence --work study --images flowers-128.tar --held-out 0.2 \
        --prepare="--autoencoder autoencoder --encoder dinov2-s" --inception inception.safetensors \
        --judge resnet50.safetensors

A question is a list of arms, and an arm is what the public commands are given. Images, their order, noise, times and
those initial weights that arms share depend on the seed alone, so they are equal in all arms. First the two ends go
from milestone to milestone in turn, then their other seeds, then the arms between. The same command continues where it
stopped, in the middle of a training too; an arm of several questions is trained once. Everything is in the folder
--work, which may be copied to another machine:

    stores/, runs/              what the commands make; what has its figures needs them no more
    samples/ARM-seed-S/         samples of each milestone, and the closest ones above their training images
    results.jsonl               every figure, with network, options, seconds, machine, versions, commit and date
    QUESTION.md, QUESTION*.png  a table, what was saved, curves over steps and over time, the same seeds of all arms
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from itertools import chain, groupby
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

from measures import BATCH, copying, load_judge, mistakes_in, photographs, pictures, share_of, views
from reglue import cli
from reglue.data.manifest import MANIFEST
from reglue.data.pictures import image_grid
from reglue.data.store import Store
from reglue.encoders.autoencoders import load_autoencoder
from reglue.errors import UserError
from reglue.files import read_jsonl, read_tensors, replacing
from reglue.machine import commit, machine
from reglue.metrics.distances import GaussianStatistics
from reglue.metrics.features import describe_images, load_encoder_features
from reglue.metrics.inception import INCEPTION, load_inception
from reglue.reals.samples import to_pixels
from reglue.seeds import permutation
from reglue.training import checkpoints
from reglue.training.distributed import resolve_device
from report import write_report

PREPARE = "--resolution 64 --features"
TRAIN = (
    "--model 8x256x4/2 --no-learn-sigma --optimisation.batch-size 64 --optimisation.learning-rate 1e-3 "
    "--optimisation.warmup 100 --optimisation.clip 1 --optimisation.ema 0.999 --optimisation.ema-warmup yes "
    "--optimisation.compile auto --alignment.hidden 512 --log-every 100 --checkpoint-every 250 --keep 2 "
    "--preview-every 0"
)
SAMPLE = (
    "--count 2000 --sampler adams-bashforth --steps 20 --guidance-scale 1 --guided-channels all --rounding round "
    "--batch-size 100"
)
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
    """The recipe and options of `reglue train`. Empty: no model, but training images as the autoencoder shows them."""
    published: str = ""
    """For the table."""
    sample: str = ""
    """Options of `reglue sample`."""
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


SIT = Arm("sit", "sit", "33.0")
REGLUE = "reglue --local.compressor conv-16"
GRIDS = {
    ("euler-maruyama", 1): (250, 80, 40, 20, 10),
    ("euler-maruyama", 2): (40, 20, 10),
    ("euler", 1): (80, 40, 20, 10),
    ("heun", 1): (40, 20, 10, 5),
    ("adams-bashforth", 1): (80, 40, 20, 10),
    ("adams-bashforth", 2): (40,),
}
"""Steps by sampler and --time-shift; Heun evaluates twice in each step but the last."""
WHICH = {"all": "", "map": "--cls-scale 1", "token": "--local-scale 1", "latents": "--local-scale 1 --cls-scale 1"}
"""What is guided besides the latents."""
QUESTIONS = {
    "convergence": [
        SIT,
        Arm("reglue", REGLUE, "12.9"),
        Arm("repa", "repa", "24.4"),
        Arm("redi", "redi --local.compressor pca-8-last --local.unit-variance", "21.4"),
        Arm("reg", "reg", "15.2"),
    ],
    "changes": [  # one at a time
        Arm("reglue", REGLUE),
        *(Arm(f"map-weight-{weight}", f"{REGLUE} --local.weight {weight}") for weight in ("0.25", "0.5")),
        Arm("unit-variance", f"{REGLUE} --local.unit-variance"),
        *(Arm(kind, f"{REGLUE} --local.compressor {kind}") for kind in ("conv-16-last", "conv-8", "pca-16")),
        Arm("no-alignment", f"{REGLUE} --alignment.weight 0"),
        Arm("no-token", f"{REGLUE} --class-token.weight 0"),
        Arm("time-shift-3", f"{REGLUE} --optimisation.time-shift 3"),
    ],
    "successors": [  # REGLUE with one thing of those that came after it
        Arm("reglue", REGLUE),
        Arm("irepa", f"{REGLUE} --alignment.projector convolution --alignment.spatial-norm 0.6"),
        Arm("alignment-stops", f"{REGLUE} --alignment.schedule 2500 0"),
        Arm("data-prediction", f"{REGLUE} --prediction data"),
        Arm("lightning", f"{REGLUE} --backbone lightning"),
        Arm("logit-normal", f"{REGLUE} --optimisation.time-distribution logit-normal"),
        *(Arm(f"lead-{delta}", f"{REGLUE} --times lead --times-options delta {delta}") for delta in (0.15, 0.3, 0.5)),
        *(Arm(times, f"{REGLUE} --times {times}") for times in ("cascade", "independent")),
    ],
    "reals": [SIT, Arm("dit", "dit --learn-sigma", sample="--sampler ddpm")],  # in the space of --prepare
    "guidance": [
        Arm(f"{name}-{s}", train, "", f"--guidance-scale {s} --guidance-interval 0 0.9 {other}", run)
        for s in ("1.5", "2", "2.8")
        for name, train, run, other in [
            ("sit-guided", "sit", "sit", ""),
            *((f"guided-{which}", REGLUE, "reglue", other) for which, other in WHICH.items()),
        ]
    ],
    "samplers": [
        Arm(f"{name}-{n}-shift-{s}", REGLUE, "", f"--sampler {name} --steps {n} --time-shift {s}", "reglue", measured)
        for measured in [("encoder", "inception")]
        for (name, s), numbers in GRIDS.items()
        for n in numbers
    ],
}


@dataclass(frozen=True)
class Options:
    """What is asked, of which images, and how. Options of the commands, as in --train="--model B/2", come last."""

    questions: Positional[tuple[str, ...]]
    """Of convergence, changes, successors, reals, guidance, samplers."""
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
    milestones: tuple[int, ...] = (1000, 2000, 5000, 10_000, 20_000)
    """Training steps at which arms are measured."""
    seeds: int = 2
    """How often the --repeated arms are trained; the others once."""
    repeated: tuple[str, ...] = ("sit", "reglue")
    """The two ends, which come first."""
    prepare: str = ""
    compress: str = ""
    """For codes KIND-CHANNELS[-last][-kl] that arms learn and the store lacks."""
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
    """The arms of a question with all of their options and seeds, in their order, after the real images.

    Raises UserError for an unknown question or arm, and where none is trained.
    """
    names = [arm.name for arms in QUESTIONS.values() for arm in arms]
    for asked, known in (((question,), [*QUESTIONS]), (options.arms, names)):
        if unknown := set(asked) - {*known}:
            raise UserError(f"{min(unknown)} is not known to this study; choose of {', '.join(dict.fromkeys(known))}")
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds} counts trainings of one arm; choose 1 or more")
    arms = []
    for arm in QUESTIONS[question]:
        if options.arms and arm.name not in options.arms:
            continue
        recipe, _, own = arm.train.partition(" ")
        train, sample = f"{recipe} {TRAIN} {options.train} {own}", f"{SAMPLE} {options.sample} {arm.sample}"
        seeds = options.seeds if arm.name in options.repeated else 1
        arms += [replace(arm, train=train, sample=sample, seed=seed) for seed in range(seeds)]
    if options.run:
        return [arm for arm in arms if arm.run]
    arms.sort(key=lambda arm: arm.seed if arm.name in options.repeated else options.seeds)
    return [Arm("reconstructed", "", sample=f"--count {merged(SAMPLE, options.sample)['--count'][0]}"), *arms]


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
        # On a CPU its own time, which other programs disturb least.
        self.clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self.networks: dict[str, Any] = {}
        self.lines = read_jsonl(self.work / "results.jsonl", dict[str, Any], "fix that line, or delete that line alone")

    def answer(self, question: str, arms: Sequence[Arm]) -> None:
        """Train, draw and measure what is missing, and write the report whenever an arm has come further."""
        steps, plan = sorted(self.options.milestones), list[tuple[Arm, int]]()
        trained = [arm for arm in arms if arm.train and not arm.run]
        for _, turn in groupby(trained, lambda arm: (arm.name in self.options.repeated, arm.seed)):
            own = [*turn]
            plan += [(arm, step) for step in steps for arm in own]
        plan += [(arm, steps[-1] if arm.run else 0) for arm in arms if arm not in trained]
        # Whatever does not compare is refused before anything is done.
        for arm, step, lacks in [(arm, step, self.missing(arm, step)) for arm, step in plan]:
            if lacks:
                self.observe(arm, step, lacks)
                write_report(self.work, question, arms, self.lines)
        write_report(self.work, question, arms, self.lines)

    def find(self, arm: str, step: int, by: str) -> dict[str, Any] | None:
        """The line with the figures of an arm, by its title, of one kind."""
        return next((line for line in self.lines if (line["arm"], line["step"], line["by"]) == (arm, step, by)), None)

    def record(self, arm: str, step: int, by: str, figures: dict[str, Any], seconds: float, **about: Any) -> None:
        """Add a line to `results.jsonl`, which is written whole or not at all; `seconds` are what the figures took."""
        line = {"arm": arm, "step": step, "by": by, "figures": figures, **about, "seconds": round(seconds, 2)}
        line |= {"machine": machine(self.device), "commit": commit(Path(__file__).parent)}
        line["versions"] = {name: version(name) for name in ("reglue", "torch", "timm", "diffusers", "numpy")}
        line["date"] = datetime.now(UTC).isoformat(timespec="seconds")
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
            count = self.reconstruct(samples, count)
        elif not all((samples / f"{i:06d}.png").is_file() for i in range(count)):
            run = self.options.run
            if not run:
                run, words["--step"] = self.trained(arm, step), [str(step)]
            began = self.clock()
            reglue("sample", run, words=words, out=samples, device=self.options.device)
            self.record(arm.title, step, "drawing", {"images": count}, self.clock() - began)
        for by in missing:
            network, began = self.network(by), self.clock()
            figures = getattr(self, f"by_{by}")(samples, count)
            self.record(arm.title, step, by, figures, self.clock() - began, network=network.sha256, options=said(arm))

    def trained(self, arm: Arm, step: int) -> Path:
        """The run that an arm draws from, trained to a step. With a constant learning rate parts equal one long run."""
        run, words = self.work / "runs" / arm.run_title, merged(arm.train)
        done, began = max(checkpoints.steps(run), default=0), self.clock()
        if done < step:
            words |= {"--optimisation.steps": [str(step)], "--device": [self.options.device]}
            store = self.store_for(words)
            began = self.clock()
            reglue("train", arm.train.partition(" ")[0], words=words, store=store, out=run, seed=arm.seed)
        if self.find(arm.run_title, step, "training") is None:
            weights = checkpoints.read_weights(checkpoints.find(run) / checkpoints.EMA)
            # Where an interrupted training went on, the seconds are of these last steps.
            figures = {"steps": step - min(done, step), "parameters": sum(one.numel() for one in weights.values())}
            self.record(arm.run_title, step, "training", figures, self.clock() - began)
        return run

    # Images: stores and codes

    @cached_property
    def given(self) -> list[Store]:
        """The stores of training and of held-out images."""
        sides: list[Any] = [self.options.images, self.options.held_out]
        stores = [self.work / "stores" / name for name in ("given", "held-out")]
        stores = [side if is_store(side) else store for side, store in zip(sides, stores, strict=True)]
        if not all(map(is_store, stores)):
            if sides[0] is None:
                raise UserError("--images is missing, and the study has no store of training images yet")
            if not isinstance(sides[1], Path):
                sides = divided(sides[0], sides[1], self.work / "images")
            words = merged(PREPARE, self.options.prepare)
            for images, store in zip(sides, stores, strict=True):
                if not is_store(store):
                    reglue("prepare", images, store, words=words, device=self.options.device)
                words.pop("--flips", None)  # Held-out images are looked at as they are.
        return [Store.open(store) for store in stores]

    @cached_property
    def held_out(self) -> Store:
        """The held-out images, which need no training images beside them where nothing is trained."""
        return Store.open(str(self.options.held_out)) if is_store(self.options.held_out) else self.given[1]

    def store_for(self, train: Words) -> Path:
        """The training images with the codes that an arm learns."""
        store, device = self.given[0].folder, self.options.device
        for name in train.get("--local.compressor", []):
            if f"local.{name}" not in Store.open(store).manifest.columns:
                kind, channels, *others = name.split("-")
                more = {"last": "--layers last", "kl": "--kl-weight 1e-6"}
                words = merged(self.options.compress, *(more[other] for other in others))
                reglue("compress", store, words=words, kind=kind, channels=channels, name=name, device=device)
        return store

    def reconstruct(self, samples: Path, count: int) -> int:
        """Training images as the autoencoder shows them: the best that samples can be, and copies. Returns how many."""
        store = self.given[0]
        rows = store.originals[torch.linspace(0, len(store.originals) - 1, min(count, len(store.originals))).long()]
        autoencoder = load_autoencoder(store.manifest.autoencoder.name, self.device)
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
    return " ".join([arm.train.partition(" ")[0], *kept])


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
    with mistakes_in("study"):
        options = tyro.cli(Options, description=__doc__, args=arguments)
        asked = {question: arms_of(options, question) for question in options.questions}
        study = Study(options)
        for question, arms in asked.items():
            study.answer(question, arms)
            print((options.work / f"{question}.md").read_text())


if __name__ == "__main__":
    main()
