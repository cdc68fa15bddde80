"""The published recipes. Each is one value, with the command that trains it and the result that its paper reports.

Results: ImageNet 256×256, B/2 after 400,000 steps, 50,000 samples without guidance, FID of the ADM evaluator. Training
B/2 takes about a day on eight A100s.
"""

from __future__ import annotations

from dataclasses import dataclass

from reglue.config import Alignment, ClassToken, FewSteps, LocalSemantics, Optimisation, Recipe
from reglue.sampling import Sampling


@dataclass(frozen=True)
class Paper:
    """A published method."""

    recipe: Recipe
    title: str
    arxiv: str
    needs: str
    """What the store must hold: the commands before `train`."""
    command: str
    published_fid: float
    setting: str = "B/2 | 400K | none"
    """Of that figure: model, steps and guidance, as a row of the method's page has them."""


PLAIN = Optimisation(compile="auto")
"""Of SiT's code, and of ReDi's."""
CLIPPED = Optimisation(clip=1.0, compile="auto")

SIT = Recipe(
    name="sit",
    learn_sigma=True,
    optimisation=PLAIN,
    sampling=Sampling("heun", 125, diffusion="sigma", guidance_scale=1.5, guided_channels=3, rounding="round"),
)
REPA = Recipe(
    name="repa",
    alignment=Alignment(0.5),
    optimisation=CLIPPED,
    sampling=Sampling(guidance_scale=1.8, guidance_interval=(0.0, 0.7)),
)
REDI = Recipe(
    name="redi",
    local=LocalSemantics(1.0, compressor="pca-8"),
    optimisation=PLAIN,
    sampling=Sampling(diffusion="sigma", guidance_scale=2.4, local_scale=1.0, rounding="round"),
)
REG = Recipe(
    name="reg",
    class_token=ClassToken(0.03),
    alignment=Alignment(0.5),
    optimisation=CLIPPED,
    sampling=Sampling(guidance_scale=2.3, guidance_interval=(0.0, 0.85)),
)
REGLUE = Recipe(
    name="reglue",
    local=LocalSemantics(1.0),
    class_token=ClassToken(0.03),
    alignment=Alignment(0.5),
    optimisation=CLIPPED,
    sampling=Sampling(guidance_scale=2.8, guidance_interval=(0.0, 0.9)),
)
MEANFLOW = Recipe(
    name="meanflow",
    student="meanflow",
    few_steps=FewSteps(guidance_scale=2.0, mix=0.5),
    optimisation=Optimisation(steps=1_200_000, betas=(0.9, 0.95), clip=1.0, compile="auto"),
    sampling=Sampling("mean-velocity", 1),
)

PAPERS = {
    paper.recipe.name: paper
    for paper in (
        Paper(
            SIT,
            "SiT: flow and diffusion models with scalable interpolant transformers",
            "2401.08740",
            "reglue prepare IMAGES STORE --encoder none --flips",
            "reglue train sit --store STORE --out RUN",
            33.0,
        ),
        Paper(
            REPA,
            "REPA: representation alignment for generation",
            "2410.06940",
            "reglue prepare IMAGES STORE --encoder dinov2-b --layers 11 --features",
            "reglue train repa --store STORE --out RUN",
            24.4,
        ),
        Paper(
            REDI,
            "ReDi: boosting generative image modeling via joint image-feature synthesis",
            "2504.16064",
            "reglue prepare IMAGES STORE --encoder dinov2-b-reg --layers 11 --features; "
            "reglue compress STORE --kind pca --channels 8",
            "reglue train redi --store STORE --out RUN",
            21.4,
        ),
        Paper(
            REG,
            "REG: representation entanglement for generation",
            "2507.01467",
            "reglue prepare IMAGES STORE --encoder dinov2-b --layers 11 --features",
            "reglue train reg --store STORE --out RUN",
            15.2,
        ),
        Paper(
            REGLUE,
            "REGLUE: global and local semantics entangled with latents",
            "2512.16636",
            "reglue prepare IMAGES STORE --encoder dinov2-b-reg --features; reglue compress STORE",
            "reglue train reglue --store STORE --out RUN",
            12.9,
        ),
        Paper(
            MEANFLOW,
            "MeanFlow: mean flows for one-step generative modeling",
            "2505.13447",
            "reglue prepare IMAGES STORE --encoder none --flips",
            "reglue train meanflow --store STORE --out RUN",
            6.17,
            "B/2 | 1.2M, one evaluation | 2, learned",
        ),
    )
}

RECIPES = {name: paper.recipe for name, paper in PAPERS.items()}
