"""Which part of REGLUE does what? One table per question, ours beside the published figures.

    python studies/ablations.py STORE --reference HELD_OUT --out ablations --questions parts compressors --steps 4000

Every variant is an arm of `studies/study.py`, trained and measured as in `studies/convergence.py`; arms that several
questions share are trained once. Codes that the store lacks are made first, by `reglue compress`, and smaller sets by
`studies/pack.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from pack import Pack, pack
from plan import print_plan
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.files import replacing
from reglue.jobs.compress import Compress, compress
from reglue.papers import PAPERS, REGLUE
from reglue.recipe import Alignment, ClassToken, LocalSemantics, Recipe
from study import Arm, StudyOptions, arm_of, run_study
from summary import table

CAUTION = """
Published figures are of ImageNet 256×256 (1.3 million images, B/2, 400,000 steps, FID of 50,000 samples without
guidance, unless it says otherwise), ours of the store's images: compare orders and ratios, not numbers.
"""
KL_WEIGHT = 1e-6
LOCAL_WEIGHTS = (0.25, 0.5, 2.0)
ALIGNMENT_WEIGHTS = (0.1, 0.25, 1.0)
CHANNELS = (4, 8, 16, 32)
SHARES = (0.2, 0.5)


@dataclass(frozen=True, kw_only=True)
class Ablations(StudyOptions):
    """Train variants of REGLUE alike and compare them."""

    questions: tuple[str, ...] = ("parts", "compressors", "kl", "weights", "data", "guidance")
    """Of parts, layers, compressors, kl, weights, targets, data, guidance."""
    compressor: str = "conv-16"
    """The codes of the base that is varied."""
    compressor_epochs: int = 25
    """Passes of the compressors that are made."""
    compressor_hidden: int = 256
    last_layer_store: Path | None = None
    """For the question of layers: the same images prepared with the last layer alone."""
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
        if self.options.last_layer_store is None:
            raise UserError("--questions layers needs --last-layer-store: prepare the images again with the last layer")
        recipe = without(self.recipe, "class_token")
        last = self._arm("local-alignment-last-layer", recipe, self.options.last_layer_store)
        yield Row(last, "last layer 14.3")
        yield Row(self._arm("local-alignment", recipe), "last four 13.3")

    def compressors(self) -> Iterator[Row]:
        """Principal components and convolutional codes of several widths."""
        mean_iou = {"pca-8": "59.1", "conv-8": "67.1", "conv-16": "68.7"}
        for kind in ("pca", "conv"):
            for channels in CHANNELS:
                name = f"{kind}-{channels}"
                published = f"mIoU of a probe, Cityscapes: {mean_iou[name]}" if name in mean_iou else "–"
                yield Row(self._with(name), published)

    def kl(self) -> Iterator[Row]:
        """A KL term in the compressor."""
        yield Row(self._with("conv-16"), "MSE 14.3")
        yield Row(self._with("conv-16-kl"), "with KL 17.2")

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
        ahead = {0.2: "5.5", 0.5: "3.4", 1.0: "2.3"}
        reg = without(self.recipe, "local")
        for share in (*SHARES, 1.0):
            store = self._share(share)
            suffix = "" if share == 1 else f"-{share:.0%}".replace("%", "-percent")
            yield Row(self._arm(f"class-token-alignment{suffix}", reg, store))
            arm = self.base if share == 1 else self._arm(f"reglue{suffix}", self.recipe, store)
            yield Row(arm, f"{ahead[share]} FID ahead of REG (80 epochs)")

    def guidance(self) -> Iterator[Row]:
        """Which modalities are guided; all by the same scale, of the base's model."""
        yield Row(self.base, "all modalities: 1.61 (XL/2, 80 epochs, scale 2.8 on [0, 0.9])")
        for name, fixed in (("latents-and-class-token", "local"), ("latents-and-local", "cls"), ("latents", "")):
            scales = ((f"{fixed}_scale", 1.0),) if fixed else (("local_scale", 1.0), ("cls_scale", 1.0))
            yield Row(replace(self.base, name=f"guided-{name}", trained_as="reglue", guidance=scales))

    def _arm(self, name: str, recipe: Recipe, store: Path | None = None, guided: bool = False) -> Arm:
        return arm_of(self.options, name, recipe, store, guided=guided)

    def _with(self, compressor: str) -> Arm:
        if compressor == self.options.compressor:
            return self.base
        recipe = replace(self.recipe, local=replace(self.recipe.local, compressor=compressor))
        return self._arm(f"reglue-{compressor}", recipe)

    def _share(self, share: float) -> Path:
        if share == 1:
            return self.options.store
        folder = self.options.out / "data" / f"{share:.0%}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            columns = ("latent", "cls", "features", f"local.{self.options.compressor}")
            pack(Pack(self.options.store, folder, columns, last_layer=True, share=share))
        return folder


def make_codes(options: Ablations, arms: list[Arm]) -> None:
    """The codes that arms learn and their stores lack."""
    for arm in arms:
        name = arm.recipe.local.compressor
        if not arm.recipe.local.present or f"local.{name}" in Store.open(arm.store).manifest.columns:
            continue
        kind, channels, *kl = name.split("-")
        details: dict[str, Any] = {"kl_weight": KL_WEIGHT} if kl else {}
        if kind != "pca":
            details |= {"epochs": options.compressor_epochs, "hidden": options.compressor_hidden}
        compress(Compress(arm.store, kind, channels=int(channels), device=options.device, **details))  # type: ignore[arg-type]


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
        make_codes(options, arms)
        if options.plan:
            print_plan(options, arms)
            return
        results = run_study(options, arms, options.out.name)
        for name, some in rows.items():
            write_table(options, results, name, some)
    except UserError as error:
        sys.exit(f"ablations: {error}")


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
        beside.write_text(table({question: {"arms": arms}}, last=True) + CAUTION)


if __name__ == "__main__":
    main()
