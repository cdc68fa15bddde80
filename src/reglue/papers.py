"""The published recipes. Each is one value, with the command that trains it and the result that its paper reports.

Results: ImageNet 256×256, 50,000 samples, FID of the ADM evaluator; B/2 after 400,000 steps without guidance, unless
the method was published otherwise. Training B/2 takes about a day on eight A100s.
"""

from __future__ import annotations

from dataclasses import dataclass

from reglue.config import Alignment, Blocks, ClassToken, Cosine, Latent, LocalSemantics, Optimisation, Recipe
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
"""Of DiT's code, SiT's and ReDi's."""
CLIPPED = Optimisation(clip=1.0, compile="auto")

SIT = Recipe(
    name="sit",
    learn_sigma=True,
    optimisation=PLAIN,
    sampling=Sampling("heun", 125, diffusion="sigma", guidance_scale=1.5, guided_channels=3, rounding="round"),
)
DIT = Recipe(
    name="dit",
    prediction="noise",
    learn_sigma=True,
    optimisation=PLAIN,
    sampling=Sampling("ddpm", 250, guidance_scale=1.5, guided_channels=3, rounding="round"),
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
UVIT = Recipe(
    name="uvit",
    backbone="uvit",
    prediction="noise-sd",
    optimisation=Optimisation(
        steps=500_000,
        batch_size=1024,
        learning_rate=2e-4,
        warmup=5000,
        betas=(0.99, 0.99),
        weight_decay=0.03,
        compile="auto",
    ),
    sampling=Sampling("dpm-solver", 50, guidance_scale=1.4, rounding="round"),
)
LIGHTNINGDIT = Recipe(
    name="lightningdit",
    model="B/1",
    backbone="lightning",
    latent=Latent(unit_variance=True),
    cosine=Cosine(1.0),
    optimisation=Optimisation(
        steps=80_000,
        batch_size=1024,
        learning_rate=2e-4,
        betas=(0.9, 0.95),
        time_distribution="logit-normal",
        compile="auto",
    ),
    sampling=Sampling(
        "euler",
        249,
        time_shift=1 / 0.3,
        guidance_scale=10.0,
        guidance_interval=(0.0, 0.89),
        guided_channels=3,
        rounding="round",
    ),
)
SFD = Recipe(
    name="sfd",
    model="B/1",
    backbone="lightning",
    blocks=Blocks(qk_norm=True),
    times="lead",
    one_mean=True,
    latent=Latent(unit_variance=True),
    local=LocalSemantics(2.0, compressor="conv-16", unit_variance=True),
    alignment=Alignment(1.0, after_block=2),
    cosine=Cosine(1.0),
    optimisation=Optimisation(steps=400_000, time_distribution="logit-normal", clean_loss=True, compile="auto"),
    sampling=Sampling("heun", 125, auto_scale=1.6, rounding="round"),
)

PAPERS = {
    paper.recipe.name: paper
    for paper in (
        Paper(
            DIT,
            "DiT: scalable diffusion models with transformers",
            "2212.09748",
            "reglue prepare IMAGES STORE --encoder none --flips",
            "reglue train dit --store STORE --out RUN",
            43.5,
        ),
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
            UVIT,
            "U-ViT: all are worth words, a ViT backbone for diffusion models",
            "2209.12152",
            "reglue prepare IMAGES STORE --encoder none --flips",
            "reglue train uvit --store STORE --out RUN",
            2.29,
            "H/2 | 500K | 1.4",
        ),
        Paper(
            LIGHTNINGDIT,
            "LightningDiT: reconstruction vs. generation in latent diffusion models",
            "2501.01423",
            "reglue prepare IMAGES STORE --encoder none --flips --autoencoder VA-VAE",
            "reglue train lightningdit --store STORE --out RUN",
            5.14,
            "XL/1 | 80K | none",
        ),
        Paper(
            SFD,
            "SFD: semantics lead the way, semantic-first diffusion",
            "2512.04926",
            "reglue prepare IMAGES STORE --encoder dinov2-b-reg --features --flips --autoencoder SD-VAE-F16D32; "
            "reglue compress STORE",
            "reglue train sfd --store STORE --out RUN",
            3.43,
            "XL/1 | 400K | none",
        ),
    )
}

RECIPES = {name: paper.recipe for name, paper in PAPERS.items()}
