"""How an autoencoder is trained: one value, as `reglue.config.Recipe` is for a denoiser.

ReaLS (arXiv 2502.00359) aligns the latents of a KL autoencoder with a frozen vision model. It does not publish its
weights of the loss, so the defaults here are ours. Every term is a mean over its own elements, so that weights mean the
same at every image size and number of channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from reglue.config import OptimiserConfig, Part
from reglue.errors import UserError, option, require


@dataclass(frozen=True)
class Architecture:
    """Sizes of an autoencoder that is trained from scratch: a diffusers AutoencoderKL."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each stage; every stage after the first halves the image, so four of them are f8."""
    latent_channels: int = 4
    """Channels of the latents."""
    layers_per_block: int = 2
    """Residual blocks per stage."""
    norm_groups: int = 32
    """Groups of the group normalisation; they must divide every width."""
    attention: bool = True
    """Attention in the middle, at the latents' size."""

    def __post_init__(self) -> None:
        prefix = "architecture."
        require(self, "latent_channels", "layers_per_block", "norm_groups", "widths", prefix=prefix, at_least=1)
        for width in self.widths:
            if width % self.norm_groups:
                raise UserError(
                    f"{option('architecture.widths')} {' '.join(map(str, self.widths))}: {width} is not a multiple of "
                    f"{option('architecture.norm_groups')} {self.norm_groups}; change one of the two"
                )
        if not self.widths:
            raise UserError(f"{option('architecture.widths')}: give at least one")

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class Perceptual(Part):
    """Reconstructions that look the same to a network, not only pixel by pixel."""

    prefix = "perceptual."
    weight: float = 0.1
    """Weight of this term; 0 leaves it out. With LPIPS, SD-VAE's weight is 1."""
    network: tuple[str, ...] = ("encoder",)
    """encoder: 1 − cosine of the vision encoder's features after each quarter of its blocks. Or LPIPS by its files:
    VGG16 as torchvision has it and the linear layers as the package lpips has them (vgg.pth), or one file with both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.network:
            raise UserError(f"{option('perceptual.network')}: give encoder, or the files of LPIPS")

    @property
    def by_encoder(self) -> bool:
        """Whether the vision encoder is the network."""
        return self.network == ("encoder",)


@dataclass(frozen=True)
class Kl(Part):
    """Kullback-Leibler divergence of the posterior from a standard normal distribution, in nats per latent number."""

    prefix = "kl."
    weight: float = 1e-6
    """Too little leaves a space that is hard to learn, too much blurs (ReaLS, Fig. 5). The unit is not the SD-VAE's,
    whose published 1e-6 is 2e-8 here."""


@dataclass(frozen=True)
class LatentAlignment(Part):
    """Latents from which a small network can tell what the vision encoder sees; the rest of ReaLS is an SD-VAE."""

    prefix = "alignment."
    weight: float = 0.5
    """Weight of 1 − cosine between the encoder's patch features and their prediction from each latent position."""
    class_weight: float = 0.5
    """Weight of 1 − cosine between the encoder's class token and its prediction from the pooled latents."""
    hidden: int = 1024
    """Hidden width of the alignment network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "class_weight", prefix=self.prefix, at_least=0)
        require(self, "hidden", prefix=self.prefix, at_least=1)

    @property
    def present(self) -> bool:
        """Whether there is an alignment network."""
        return super().present or self.class_weight > 0


@dataclass(frozen=True)
class Adversary(Part):
    """A patch discriminator (PatchGAN, hinge loss), as in VQGAN and the SD-VAE."""

    prefix = "adversary."
    weight: float = 0.0
    """Weight of this term, times the ratio of gradient norms at the decoder's last layer; 0 leaves it out. VQGAN and
    SD-VAE: 0.5. The ratio is that of the step before, where VQGAN takes the current one: 0 in the first step."""
    start: int = 50_001
    """First training step with the adversarial loss."""
    width: int = 64
    """Channels of the discriminator's first layer."""
    layers: int = 3
    """Layers of stride 2 in the discriminator; each doubles the channels, up to eight times the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "start", prefix=self.prefix, at_least=0)
        require(self, "width", "layers", prefix=self.prefix, at_least=1)


@dataclass(frozen=True)
class AutoencoderRecipe:
    """One way to train an autoencoder. The weight of the L1 reconstruction error is 1."""

    architecture: Architecture = field(default_factory=Architecture)
    perceptual: Perceptual = field(default_factory=Perceptual)
    kl: Kl = field(default_factory=Kl)
    alignment: LatentAlignment = field(default_factory=LatentAlignment)
    adversary: Adversary = field(default_factory=Adversary)
    optimisation: OptimiserConfig = OptimiserConfig(
        steps=100_000, batch_size=32, warmup=1000, betas=(0.5, 0.9), clip=1.0, ema=0.999, ema_warmup="yes"
    )
    flips: bool = True
    """Mirror half of the images at random; not for digits and letters."""

    def loss_weights(self, step: int) -> dict[str, float]:
        """The weight of each term of the loss at a step, under the names of the terms; absent parts have none.

        That of the adversary is only the factor given; the ratio of gradient norms comes on top of it.
        """
        weights = {"reconstruction": 1.0}
        weights |= {
            name: part.weight_at(step)
            for name, part in (("perceptual", self.perceptual), ("kl", self.kl))
            if part.present
        }
        if self.alignment.present:
            weights |= {"alignment": self.alignment.weight_at(step), "class_alignment": self.alignment.class_weight}
        if self.adversary_active(step):
            weights["adversary"] = self.adversary.weight_at(step)
        return weights

    def adversary_active(self, step: int) -> bool:
        """Whether the discriminator takes part in a step."""
        return self.adversary.present and step >= self.adversary.start


def check_size(image_size: tuple[int, int], layers: int) -> None:
    """Raises UserError for images (height, width) that are too small for a discriminator of so many layers."""
    for side in image_size:
        for _ in range(layers):
            side //= 2
        if side < 3:  # The last two convolutions take a pixel each, and one has to be left.
            raise UserError(
                f"{option('adversary.layers')} {layers}: images of {image_size[0]}×{image_size[1]} pixels are too "
                f"small for so many; choose fewer layers or a larger {option('resolution')}"
            )
