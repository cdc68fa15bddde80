"""The Inception network of 2015 that FID is defined by, without TensorFlow: torch-fidelity's port of it.

Images go in at their own size. As in ADM's evaluator (arXiv 2105.05233), the network itself stretches them to 299×299,
by the bilinear rule of TensorFlow 1 without antialias.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reglue.encoders.weights import is_pickled, read_shapes, read_weights
from reglue.errors import UserError
from reglue.extras import need
from reglue.files import file_sha256, refuse_not_finite
from reglue.metrics.features import Description, FeatureNetwork
from reglue.names import INCEPTION

if TYPE_CHECKING:
    from reglue.metrics.inception_network import InceptionNetwork

SPATIAL_CHANNELS = 7
"""Of the 192 of the first branch of the block that TensorFlow calls mixed_6: what ADM takes for sFID."""
SPATIAL_SIDE = 17
"""Height and width of that map."""
WIDTH = 2048
FIRST_TENSOR = "Conv2d_1a_3x3.conv.weight"
"""The name of a tensor that other networks do not have."""
LOGITS = ("fc.weight", "fc.bias")
PATIENCE = 10.0
"""Seconds that a silent server is waited for."""


class Inception(FeatureNetwork):
    """Pool features (2048), spatial features (2023) and unbiased logits (1008) of images of any size."""

    distance_name = "FID"
    features_name = "pool features"
    width = WIDTH
    spatial_width = SPATIAL_SIDE * SPATIAL_SIDE * SPATIAL_CHANNELS
    input_rule = "bilinear to 299×299 as in TensorFlow 1, without antialias"

    def __init__(self, network: InceptionNetwork, name: str, sha256: str, without_logits: str = ""):
        self.network, self.name, self.sha256, self.without_logits = network, name, sha256, without_logits
        # TensorFlow's mixed, mixed_1, … mixed_10 are 5b, 5c, 5d, 6a, … 7c here; its mixed_6/conv is the first branch,
        # after its batch norm and ReLU.
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        # Height, width, channel: TensorFlow's order, and so that of the `mu_s` in ADM's files.
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.inference_mode()
    def describe(self, pixels: Tensor) -> Description:
        """Describe uint8 images (B, 3, H, W) of any size."""
        features, logits = self.network(pixels.to(self.network.fc.weight.device))
        return Description(features, self._spatial, None if self.without_logits else logits)


def load_inception(
    file: Path | None = None, device: str | torch.device = "cpu", otherwise: str = "a file of weights"
) -> Inception:
    """The network with the weights of a file, or with torch-fidelity's own from torch.hub's cache or the internet.

    A file is safetensors, or torch-fidelity's .pth, in both cases with torch-fidelity's names. It may lack the last
    layer (`fc`): then there are no logits. Raises UserError for a file that is damaged or of another network, and if
    the weights cannot be downloaded: `otherwise` is how else to give them.
    """
    need("the Inception network", "torch_fidelity")
    from reglue.metrics.inception_network import URL_INCEPTION_V3, InceptionNetwork  # slow to import

    weights = file or _downloaded(URL_INCEPTION_V3, otherwise)
    state = read_weights([weights])
    refuse_not_finite(state, weights)
    without_logits = "" if all(name in state for name in LOGITS) else f"{weights.name} holds no layer of class scores"
    with torch.random.fork_rng(devices=[]):
        network = InceptionNetwork()
    if without_logits:
        state |= {name: torch.zeros_like(network.get_parameter(name)) for name in LOGITS}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{weights} does not fit torch-fidelity's Inception network ({reason}); give its .pth, or safetensors with "
            "its names (scripts/convert_inception.py makes one of a TorchScript file)"
        ) from error
    # Convolutions are faster with the channels last: 1.45 times on a core of an EPYC CPU, and GPUs prefer it too.
    # Features change by rounding, 6e-6 of them at most.
    network = network.to(device).to(memory_format=torch.channels_last)
    return Inception(network, str(file.resolve()) if file else INCEPTION, file_sha256(weights), without_logits)


def is_inception(file: Path) -> bool:
    """Whether a file holds the Inception's weights, by a tensor's name. One of PyTorch's that cannot be read is taken
    for them, so that `load_inception` says what is wrong with it."""
    try:
        return FIRST_TENSOR in read_shapes([file])
    except UserError:
        return is_pickled(file)


def _downloaded(address: str, otherwise: str) -> Path:
    """torch-fidelity's file in torch.hub's cache, fetched if it is not there. Raises UserError if it cannot be."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    if file.is_file():
        return file
    checksum = file.stem.rpartition("-")[2]  # torch.hub's rule: the name ends with the start of the SHA-256.
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _impatient():
            torch.hub.download_url_to_file(address, str(file), hash_prefix=checksum)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the Inception network of FID cannot be downloaded ({' '.join(str(error).split())}): fetch "
            f"{address} on another machine and put it at {file}, or give it as {otherwise}"
        ) from error
    return file


@contextmanager
def _impatient() -> Iterator[None]:
    """Connections made in the block give up after `PATIENCE`; torch.hub itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
