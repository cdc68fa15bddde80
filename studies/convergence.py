"""Does the method learn faster? SiT, REPA, ReDi, REG and REGLUE on one store, alike in all but their parts.

    python studies/convergence.py STORE --reference HELD_OUT --out study --model 6x256x4/2 --plan
    python studies/convergence.py STORE --reference HELD_OUT --out study --model 6x256x4/2 --judge resnet50.safetensors

Seeds, optimiser, size, batch, samples and sampler are equal in all arms; the same seed gives the same order of images,
noise and initial weights, those that arms share. Every figure at a checkpoint is of one set of samples from the
averaged weights, drawn without guidance, with one guided set at the end. The same command continues where it stopped.
With more --steps, --seeds or --arms it adds them; with --inception or --judge it measures more.
`studies/compare.py` sets several studies side by side, such as those of several latent spaces.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import tyro

from reglue.errors import Stopped, UserError
from reglue.papers import PAPERS
from start import start, stop
from study import Arm, StudyOptions, arm_of

SCALED = "redi-unit-variance"
"""An arm besides the published ones."""


@dataclass(frozen=True, kw_only=True)
class Convergence(StudyOptions):
    """Train published methods alike and compare them at equal steps."""

    arms: tuple[str, ...] = tuple(PAPERS)
    """Which methods. Besides the published five redi-unit-variance, whose components have one scale: of an encoder with
    a few strong directions, the published ReDi learns little else."""
    seeds: int = 2
    """How many seeds the --repeated-arms are trained with, counted up from --seed."""
    repeated_arms: tuple[str, ...] = ("sit", "reglue")
    """Arms that are trained with several seeds, if they are among --arms; the others with the first alone."""
    redi_compressor: str = "pca-8-last"
    """The principal components that ReDi learns: of the last layer, as published. Codes KIND-CHANNELS[-last] that the
    store lacks are made first."""
    reglue_compressor: str = "conv-16"
    """The codes that REGLUE learns."""


def arms_of(options: Convergence) -> list[Arm]:
    """The published recipes with this study's sizes and optimisation. Raises UserError for an unknown one."""
    compressors = {"redi": options.redi_compressor, "reglue": options.reglue_compressor}
    arms = []
    for name in options.arms:
        paper = "redi" if name == SCALED else name
        if paper not in PAPERS:
            raise UserError(f"--arms {name}: choose of {', '.join((*PAPERS, SCALED))}")
        recipe = PAPERS[paper].recipe
        if paper in compressors:
            local = replace(recipe.local, compressor=compressors[paper], unit_variance=name == SCALED)
            recipe = replace(recipe, local=local)
        arms.append(arm_of(options, name, recipe))
    return arms


def main(arguments: list[str] | None = None) -> None:
    """Run the study, or plan it."""
    options = tyro.cli(Convergence, description=__doc__, args=arguments)
    try:
        start(options, arms_of(options))
    except UserError as error:
        sys.exit(f"convergence: {error}")
    except Stopped as request:
        stop(request)


if __name__ == "__main__":
    main()
