"""Which latent space is easiest to learn? The same models in the spaces of several autoencoders (ReaLS, Fig. 5).

    python scripts/reals_study.py IMAGES --out autoencoders
    python studies/spaces.py STORE --reference HELD_OUT --out spaces --autoencoders autoencoders/*-kl-*

STORE holds what the vision encoder sees in the images, in any latent space; for every autoencoder a second store of the
same images is made with `reglue reencode`, and the methods are trained in it. Autoencoders are folders of
`reglue autoencode`. Beside the table and plots of `studies/study.py` there is `kl-weight.png`: how far generated and
reconstructed images are from real ones over the weight of the KL term. The same command continues where it stopped;
with more --autoencoders or --arms it adds them. On another machine it finds an autoencoder where --autoencoders says.
With --plan stores are made, and arms are not trained.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from convergence import Convergence, arms_of
from reglue.commands.compress import compress
from reglue.commands.reencode import Reencode, reencode
from reglue.data.manifest import MANIFEST
from reglue.data.store import Store
from reglue.encoders.autoencoders import load_autoencoder
from reglue.errors import Stopped, UserError
from reglue.files import replacing
from reglue.training.tracking import read as read_log
from start import missing_codes, start, stop
from study import Arm

TRAINING = "training.json"
"""What `reglue autoencode` writes beside the weights."""


@dataclass(frozen=True, kw_only=True)
class Spaces(Convergence):
    """Train the same methods in the latent spaces of several autoencoders."""

    autoencoders: tuple[Path, ...]
    """Folders of `reglue autoencode`, with names of their own."""
    arms: tuple[str, ...] = ("sit",)
    """Which methods, in each space."""
    checkpoints: int = 1
    """How often arms are measured: after all steps, half of them, a quarter …"""
    seeds: int = 1
    """How many seeds the --repeated-arms are trained with, counted up from --seed."""
    repeated_arms: tuple[str, ...] = ()
    """Arms that are trained with several seeds, METHOD-in-SPACE; the others with the first alone."""
    decoding_workers: int = 2
    """Processes that decode images for the stores."""


@dataclass(frozen=True)
class Space:
    """An autoencoder, and what its training says of it."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / TRAINING).is_file():
            raise UserError(f"--autoencoders {self.folder} has no {TRAINING}; give folders of `reglue autoencode`")

    @property
    def recipe(self) -> dict[str, Any]:
        """Of the autoencoder's training."""
        return json.loads((self.folder / TRAINING).read_text())["recipe"]

    @property
    def kl_weight(self) -> float:
        """Of the KL term, per latent number."""
        return self.recipe["kl"]["weight"]

    @property
    def aligned(self) -> bool:
        """Whether it was aligned with a vision encoder."""
        alignment = self.recipe["alignment"]
        return bool(alignment["weight"] or alignment["class_weight"])

    @property
    def reconstruction_distance(self) -> float | None:
        """Fréchet distance of reconstructions at the end of its training; None if it held out no images."""
        lines = [line["validation"] for line in read_log(self.folder) if "validation" in line]
        return lines[-1].get("frechet_distance") if lines else None


def arms_in(options: Spaces, spaces: list[Space]) -> list[Arm]:
    """Every method in every space: METHOD-in-SPACE, with the space's own store and autoencoder."""
    arms = []
    for space in spaces:
        own: dict[str, Any] = {"store": store_of(options, space), "autoencoder": str(space.folder)}
        for arm in arms_of(options):
            name = f"{arm.name}-in-{space.folder.name}"
            arms.append(replace(arm, name=name, recipe=replace(arm.recipe, name=name), **own))
    return arms


def store_of(options: Spaces, space: Space) -> Path:
    """Where the images of the study are in a space."""
    return options.out / "stores" / space.folder.name


def make_stores(options: Spaces, spaces: list[Space]) -> None:
    """The codes that methods learn, then a store for every space, where they are missing."""
    for job in missing_codes(options, arms_of(options)):
        compress(job)
    for space in spaces:
        store = store_of(options, space)
        if is_made(store, space, options.store):
            continue
        details: dict[str, Any] = {"workers": options.decoding_workers, "device": options.device}
        reencode(Reencode(options.store, store, str(space.folder), **details))
    for job in missing_codes(options, arms_in(options, spaces)):  # Of stores that were made for fewer arms.
        compress(job)


def is_made(store: Path, space: Space, of: Path) -> bool:
    """Whether a store has the images of another one in a space: it may have been packed, and its images be gone."""
    if not (store / MANIFEST).is_file():
        return False
    manifest = Store.open(store).manifest
    same_images = manifest.source == Store.open(of).manifest.source and manifest.encoder is not None
    return same_images and manifest.autoencoder == load_autoencoder(str(space.folder)).spec


def draw_kl_weights(options: Spaces, spaces: list[Space], arms: dict[str, Any]) -> None:
    """`kl-weight.png`: Fréchet distances of generated images, and of reconstructions, over the weight of the KL term.

    Aligned autoencoders are joined by lines; others are crosses.
    """
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    panel = figure.subplots()
    curves = {name: [generated(space, name, options, arms) for space in spaces] for name in options.arms}
    curves["reconstructions"] = [space.reconstruction_distance for space in spaces]
    for colour, (name, distances) in enumerate(curves.items()):
        for aligned, kind in ((True, "o-"), (False, "x")):
            pairs = zip(spaces, distances, strict=True)
            points = sorted((x.kl_weight, y) for x, y in pairs if x.aligned == aligned and y is not None)
            if points:
                label = f"{name}, {'aligned' if aligned else 'plain'}"
                panel.plot(*zip(*points, strict=True), kind, color=f"C{colour}", label=label)
    panel.set(xscale="log", xlabel="weight of KL", ylabel="Fréchet distance (encoder)")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    with replacing(options.out / "kl-weight.png") as beside:
        figure.savefig(beside, format="png", dpi=110)


def generated(space: Space, method: str, options: Spaces, arms: dict[str, Any]) -> float | None:
    """Fréchet distance of the last samples of a method in a space; None if they were not measured."""
    trial = arms.get(f"{method}-in-{space.folder.name}-seed-{options.seed}", {"steps": {}})
    figures = trial["steps"].get(str(options.steps))
    return figures["encoder"]["frechet_distance"]["value"] if figures else None


def main(arguments: list[str] | None = None) -> None:
    """Run the study, or plan it."""
    options = tyro.cli(Spaces, description=__doc__, args=arguments)
    try:
        spaces = [Space(folder) for folder in options.autoencoders]
        names = [space.folder.name for space in spaces]
        if len(set(names)) < len(names):
            raise UserError("--autoencoders: two folders have the same name; rename one of them")
        if not options.references_only:
            make_stores(options, spaces)  # Planned with, too: what a step costs depends on the size of the latents.
        if results := start(options, arms_in(options, spaces)):
            draw_kl_weights(options, spaces, results["arms"])
    except UserError as error:
        sys.exit(f"spaces: {error}")
    except Stopped as request:
        stop(request)


if __name__ == "__main__":
    main()
