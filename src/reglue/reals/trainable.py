"""An autoencoder while it is trained: a diffusers AutoencoderKL and all that learns beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from reglue.encoders.alignment import AlignmentNetwork, AlignmentSpec, LatentSemantics
from reglue.encoders.autoencoders import Autoencoder, DiffusersAutoencoder
from reglue.errors import UserError, option
from reglue.reals.adversary import PatchDiscriminator
from reglue.reals.config import Adversary, Architecture

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


class Reconstruction(NamedTuple):
    """What an autoencoder makes of images. All of it in float32."""

    images: Tensor
    """(B, 3, H, W), about [−1, 1]; not clamped."""
    latents: Tensor
    """(B, C, h, w), raw, drawn from the posterior."""
    mean: Tensor
    """(B, C, h, w), of the posterior."""
    log_variance: Tensor
    """(B, C, h, w), of the posterior."""
    semantics: LatentSemantics | None
    """What the alignment network reads in `latents`; None without one."""

    def kl(self) -> Tensor:
        """The divergence (B,) of the posterior from a standard normal distribution, in nats per latent number."""
        per_number = (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance) / 2
        return per_number.mean((1, 2, 3))


class AlignedAutoencoder(nn.Module):
    """A KL autoencoder with its alignment network: what is averaged, measured and kept."""

    def __init__(self, network: AutoencoderKL, alignment: AlignmentSpec | None):
        super().__init__()
        self.network = network.requires_grad_(True).train()
        self.alignment = AlignmentNetwork(alignment) if alignment else None

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Encode images (B, 3, H, W) in [−1, 1], draw latents by normal noise (B, C, h, w), and decode them."""
        posterior = cast(Any, self.network.encode(images)).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (log_variance / 2).exp() * noise
        decoded = cast(Any, self.network.decode(cast(Any, latents))).sample.float()
        return Reconstruction(decoded, latents, mean, log_variance, self.alignment(latents) if self.alignment else None)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution, at which gradients are compared."""
        return cast(nn.Parameter, self.network.decoder.conv_out.weight)


class Trained(nn.Module):
    """Everything that learns: the autoencoder and, if there is one, its adversary."""

    adversary_weight: Tensor

    def __init__(self, autoencoder: AlignedAutoencoder, adversary: Adversary):
        super().__init__()
        self.autoencoder = autoencoder
        self.discriminator = PatchDiscriminator(adversary.width, adversary.layers) if adversary.present else None
        # The ratio of gradient norms, known of the step before; a buffer, so that checkpoints keep it.
        self.register_buffer("adversary_weight", torch.zeros(()))


def new_network(architecture: Architecture, image_size: tuple[int, int]) -> AutoencoderKL:
    """A freshly initialised AutoencoderKL, from PyTorch's global random state."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # slow to import

    stages = len(architecture.widths)
    sizes: dict[str, Any] = {
        "block_out_channels": architecture.widths,
        "down_block_types": ("DownEncoderBlock2D",) * stages,
        "up_block_types": ("UpDecoderBlock2D",) * stages,
        "layers_per_block": architecture.layers_per_block,
        "latent_channels": architecture.latent_channels,
        "norm_num_groups": architecture.norm_groups,
        "mid_block_add_attention": architecture.attention,
        "sample_size": max(image_size),
    }
    return AutoencoderKL(**sizes)


def network_of(autoencoder: Autoencoder) -> AutoencoderKL:
    """The network of a loaded autoencoder, to be trained further. Raises UserError if it is no AutoencoderKL."""
    spec = autoencoder.spec
    if not isinstance(autoencoder, DiffusersAutoencoder) or spec.kind != "AutoencoderKL":
        raise UserError(
            f"{option('source', 'from')} {spec.name} is an {spec.kind}; give an "
            "AutoencoderKL, the only kind that is trained here"
        )
    return autoencoder.network
