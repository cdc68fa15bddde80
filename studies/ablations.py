"""Which part of REGLUE does what? One table per question, ours beside the published figures.

    python studies/ablations.py STORE --reference HELD_OUT --out ablations --questions parts compressors --steps 4000

Every variant is an arm of `studies/study.py`, trained and measured as in `studies/convergence.py`; arms that several
questions share are trained once. Codes that the store lacks are made first, by `reglue compress`, and smaller sets by
`studies/pack.py`; with --plan neither.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from pack import Pack, pack
from reglue.config import Alignment, ClassToken, LocalSemantics, Recipe
from reglue.data.store import Store
from reglue.errors import Stopped, UserError
from reglue.files import replacing
from reglue.papers import PAPERS, REGLUE
from start import start, stop
from study import Arm, StudyOptions, arm_of
from summary import table

CAUTION = """
Published figures are of ImageNet 256×256 (1.3 million images, B/2, 400,000 steps, FID of 50,000 samples without
guidance, unless it says otherwise), ours of the store's images: compare orders and ratios, not numbers.
"""
NOTES = {
    "kl": "Both compressors take the last layer alone and the model learns no class token, as in the published row.",
    "layers": "The model learns no class token, as in the published rows.",
    "compressors": "Published is what a probe tells of the codes (`reglue probe`); no FID is.",
    "scale": (
        "Squared errors weigh as the square of the codes' scale. Here the same codes with a standard deviation of 1 in "
        "every channel; compare with the rows of layers and compressors."
    ),
    "data": (
        "Compressors are fitted to all images. Each arm takes equally many steps, so more passes over fewer images; "
        "the published models were trained for 80 epochs."
    ),
    "guidance": "Ours by the interval of the options; published is one scale, of another size and length of training.",
}
"""What a table must say beside its figures."""
LOCAL_WEIGHTS = (0.25, 0.5, 2.0)
ALIGNMENT_WEIGHTS = (0.1, 0.25, 1.0)
CHANNELS = (4, 8, 16, 32)
SHARES = (0.2, 0.5)


@dataclass(frozen=True, kw_only=True)
class Ablations(StudyOptions):
    """Train variants of REGLUE alike and compare them."""

    questions: tuple[str, ...] = ("parts", "compressors", "kl", "weights", "data", "guidance")
    """Of parts, layers, compressors, scale, kl, weights, targets, data, guidance. data needs a store without mirror
    images."""
    compressor: str = "conv-16"
    """The codes of the base that is varied: KIND-CHANNELS, such as conv-16."""
    guidance_scales: tuple[float, ...] = (1.5, 2.8)
    """For the question of guidance: scales beside --guidance. 2.8 is REGLUE's."""
    int8_store: Path | None = None
    """For the question of targets: the same images prepared with --features-dtype int8. Without it that row is left
    out."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    arm: Arm
    published: str = "–"


def without(recipe: Recipe, *parts: str) -> Recipe:
    """The recipe without local semantics (local), class_token or alignment."""
    absent = {"local": LocalSemantics(), "class_token": ClassToken(), "alignment": Alignment()}
    return replace(recipe, **{part: absent[part] for part in parts})


class Questions:
    """The arms of every question. A question is a method that gives rows."""

    def __init__(self, options: Ablations):
        self.options = options
        self.recipe = replace(REGLUE, local=replace(REGLUE.local, compressor=options.compressor))
        self.base = self._arm("reglue", self.recipe, guided="guidance" in options.questions)
        self.shares: dict[Path, float] = {}
        """Stores of a share of the images that arms learn from."""

    def parts(self) -> Iterator[Row]:
        """Local semantics, class token and alignment, each on and off."""
        yield Row(self._arm("sit", PAPERS["sit"].recipe), "SiT 33.0")
        yield Row(self._arm("alignment", without(self.recipe, "local", "class_token")), "REPA 24.4")
        yield Row(self._arm("class-token-alignment", without(self.recipe, "local")), "REG 15.2")
        yield Row(self._arm("local", without(self.recipe, "class_token", "alignment")))
        yield Row(self._arm("local-class-token", without(self.recipe, "alignment")))
        yield Row(self._arm("local-alignment", without(self.recipe, "class_token")), "REGLUE, local only 13.3")
        yield Row(self.base, "REGLUE 12.9")

    def layers(self) -> Iterator[Row]:
        """Codes of the last layer against those of the last four, without a class token as in the paper's table."""
        yield Row(self._last_layer(), "last layer 14.3")
        yield Row(self._arm("local-alignment", without(self.recipe, "class_token")), "last four 13.3")

    def compressors(self) -> Iterator[Row]:
        """Principal components and convolutional codes of several widths."""
        mean_iou = {"pca-8": "59.1", "conv-8": "67.1", "conv-16": "68.7"}
        for kind in ("pca", "conv"):
            for channels in CHANNELS:
                name = f"{kind}-{channels}"
                published = f"mIoU of a probe, Cityscapes: {mean_iou[name]}" if name in mean_iou else "–"
                yield Row(self._with(name), published)

    def scale(self) -> Iterator[Row]:
        """Codes of unit variance, which tells what codes are from how much they weigh."""
        codes, components = self.options.compressor, self.options.compressor.replace("conv", "pca")
        yield Row(self.base)
        yield Row(self._scaled("reglue-unit-variance", self.recipe))
        if components != codes:
            recipe = replace(self.recipe, local=replace(self.recipe.local, compressor=components))
            yield Row(self._scaled(f"reglue-{components}-unit-variance", recipe))
        for arm in (self._last_layer(), self._arm("local-alignment", without(self.recipe, "class_token"))):
            yield Row(self._scaled(f"{arm.name}-unit-variance", arm.recipe))

    def kl(self) -> Iterator[Row]:
        """A KL term in the compressor, on the parts and the layer of the published row."""
        yield Row(self._last_layer(), "MSE 14.3")
        yield Row(self._last_layer("-kl"), "with KL 17.2")

    def weights(self) -> Iterator[Row]:
        """The weights of the local semantics' and the alignment's terms."""
        yield Row(self.base, "λ 1, alignment 0.5: 12.9")
        for weight in LOCAL_WEIGHTS:
            recipe = replace(self.recipe, local=replace(self.recipe.local, weight=weight))
            yield Row(self._arm(f"local-weight-{weight:g}", recipe))
        for weight in ALIGNMENT_WEIGHTS:
            recipe = replace(self.recipe, alignment=replace(self.recipe.alignment, weight=weight))
            yield Row(self._arm(f"alignment-weight-{weight:g}", recipe))

    def targets(self) -> Iterator[Row]:
        """Where the alignment's targets come from: stored features, the compressor's decoder, or the encoder itself.

        Seconds in this table are the price, beside the disk that stored features take.
        """
        yield Row(self.base)
        if self.options.int8_store is not None:
            yield Row(self._arm("targets-cached-int8", self.recipe, self.options.int8_store))
        for kind in ("decoded", "online"):
            recipe = replace(self.recipe, alignment=replace(self.recipe.alignment, targets=kind))
            yield Row(self._arm(f"targets-{kind}", recipe))

    def data(self) -> Iterator[Row]:
        """REG and REGLUE on a share of each class, for as many steps."""
        if Store.open(self.options.store).manifest.source.flips:
            raise UserError(
                "--questions data takes shares of a store without mirror images; prepare one without --flips"
            )
        ahead = {0.2: "5.5", 0.5: "3.4", 1.0: "2.3"}
        reg = without(self.recipe, "local")
        for share in (*SHARES, 1.0):
            store = self._share(share)
            suffix = "" if share == 1 else f"-{share:.0%}".replace("%", "-percent")
            yield Row(self._arm(f"class-token-alignment{suffix}", reg, store))
            arm = self.base if share == 1 else self._arm(f"reglue{suffix}", self.recipe, store)
            yield Row(arm, f"{ahead[share]} FID ahead of REG (80 epochs)")

    def guidance(self) -> Iterator[Row]:
        """Which modalities are guided, and how much: one scale for those that are, of the base's model."""
        low, high = self.options.guidance_interval
        which: dict[str, tuple[str, ...]] = {
            "all": (),
            "latents-and-class-token": ("local_scale",),
            "latents-and-local": ("cls_scale",),
            "latents": ("local_scale", "cls_scale"),
        }
        for scale in dict.fromkeys((self.options.guidance, *self.options.guidance_scales)):
            ours = f"here scale {scale:g} on [{low:g}, {high:g}]"
            for name, unguided in which.items():
                if name == "all" and scale == self.options.guidance:
                    yield Row(self.base, f"{ours}; all modalities: 1.61 (XL/2, 80 epochs, scale 2.8 on [0, 0.9])")
                    continue
                suffix = "" if scale == self.options.guidance else f"-by-{scale:g}"
                scales = (("guidance_scale", scale), *((part, 1.0) for part in unguided))
                arm = replace(self.base, name=f"guided-{name}{suffix}", trained_as="reglue", guidance=scales)
                yield Row(arm, ours)

    def _arm(self, name: str, recipe: Recipe, store: Path | None = None, guided: bool = False) -> Arm:
        return arm_of(self.options, name, recipe, store, guided=guided)

    def _with(self, compressor: str) -> Arm:
        if compressor == self.options.compressor:
            return self.base
        recipe = replace(self.recipe, local=replace(self.recipe.local, compressor=compressor))
        return self._arm(f"reglue-{compressor}", recipe)

    def _scaled(self, name: str, recipe: Recipe) -> Arm:
        return self._arm(name, replace(recipe, local=replace(recipe.local, unit_variance=True)))

    def _last_layer(self, ending: str = "") -> Arm:
        """Local semantics of the encoder's last layer, without a class token."""
        recipe = replace(
            self.recipe, local=replace(self.recipe.local, compressor=f"{self.options.compressor}-last{ending}")
        )
        return self._arm(f"local-alignment-last-layer{ending}", without(recipe, "class_token"))

    def _share(self, share: float) -> Path:
        """A store with a share of each class: `make_shares` makes it."""
        if share == 1:
            return self.options.store
        folder = self.options.out / "data" / f"{share:.0%}"
        self.shares[folder] = share
        return folder


def make_shares(options: Ablations, shares: Mapping[Path, float]) -> None:
    """The smaller stores that arms learn from. --store has the codes by now."""
    for folder, share in shares.items():
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            columns = ("latent", "cls", "features", f"local.{options.compressor}")
            pack(Pack(options.store, folder, columns, last_layer=True, share=share))


def main(arguments: list[str] | None = None) -> None:
    """Run the study, or plan it."""
    options = tyro.cli(Ablations, description=__doc__, args=arguments)
    try:
        questions = Questions(options)
        known = [name for name in vars(Questions) if not name.startswith("_")]
        for name in options.questions:
            if name not in known:
                raise UserError(f"--questions {name}: choose of {', '.join(known)}")
        rows = {name: list(getattr(questions, name)()) for name in options.questions}
        arms = list({row.arm.name: row.arm for some in rows.values() for row in some}.values())
        if results := start(options, arms, lambda: make_shares(options, questions.shares)):
            for name, some in rows.items():
                write_table(options, results, name, some)
    except UserError as error:
        sys.exit(f"ablations: {error}")
    except Stopped as request:
        stop(request)


def write_table(options: Ablations, results: dict[str, Any], question: str, rows: list[Row]) -> None:
    """`tables/QUESTION.md`: the last figures of each arm beside the published ones."""
    published = {row.arm.name: row.published for row in rows}
    trials = [trial for row in rows for trial in results["arms"].values() if trial["arm"] == row.arm.name]
    if question != "guidance":
        trials = [{**trial, "guided": {}} for trial in trials]
    arms = {f"{trial['arm']}-{trial['seed']}": {**trial, "note": published[trial["arm"]]} for trial in trials}
    folder = options.out / "tables"
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"{question}.md") as beside:
        note = f"\n{NOTES[question]}\n" if question in NOTES else ""
        beside.write_text(table({question: {"arms": arms}}, last=True) + CAUTION + note)


if __name__ == "__main__":
    main()
