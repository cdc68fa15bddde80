"""What computes on a GPU takes nothing from the CPU, seen without a GPU: on fake CUDA tensors, which have no values.

PyTorch's fake tensors refuse what mixes devices, as a GPU would. Gradients need a real one; so do streams and autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reglue.commands.prepare import Prepare, encode_columns
from reglue.config import Recipe
from reglue.data.batches import TrainingData, denoiser_config
from reglue.data.store import Store
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import guided_velocity
from reglue.diffusion.modalities import LATENT, State
from reglue.diffusion.objective import loss_terms, weighted_sum
from reglue.diffusion.paths import LINEAR
from reglue.diffusion.samplers import SAMPLERS, integrate
from reglue.encoders.alignment import AlignmentSpec
from reglue.encoders.autoencoders import load_autoencoder
from reglue.encoders.compressors import load_compressor
from reglue.encoders.vision import load_encoder
from reglue.generation import to_pixels
from reglue.metrics.inception import Inception
from reglue.metrics.inception_network import InceptionNetwork
from reglue.metrics.perceptual import Lpips
from reglue.papers import RECIPES
from reglue.reals.adversary import PatchDiscriminator
from reglue.reals.trainable import AlignedAutoencoder
from reglue.sampling import Sampling
from reglue.training.precision import SamplingNetwork
from solving import at

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
_Network = TypeVar("_Network", bound=nn.Module)


def on_gpu(network: _Network) -> _Network:
    """A network whose parameters and buffers are fake ones on a GPU. What it holds besides stays where it is."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
            module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    return network


def tiny(name: str) -> Recipe:
    recipe = RECIPES[name]
    return replace(recipe, model="2x32x2/2", local=replace(recipe.local, compressor="conv-4", unit_variance=True))


def test_what_mixes_devices_is_refused_here() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"different devices|same device"):
        torch.add(torch.ones(2, device=CUDA), torch.ones(2))


@pytest.mark.parametrize("targets", ["cached", "decoded", "online"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step(name: str, targets: Literal["cached", "decoded", "online"], tiny_store: Path) -> None:
    recipe = tiny(name)
    if not recipe.alignment.present and targets != "cached":
        pytest.skip("it aligns with nothing")
    recipe = replace(recipe, alignment=replace(recipe.alignment, targets=targets))
    store = Store.open(tiny_store)
    data = TrainingData(store, recipe, denoiser_config(store, recipe), 0, CPU)
    drafts = [data.read(range(4))]
    model = Denoiser(data.config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        data.device = CUDA
        data.scales = {name: (shift.to(CUDA), scale.to(CUDA)) for name, (shift, scale) in data.scales.items()}
        for network in ("compressor", "encoder"):
            if hasattr(data.targets, network):
                on_gpu(getattr(data.targets, network))
        terms = loss_terms(on_gpu(model), LINEAR, data.finish(drafts.pop()))
        assert weighted_sum(terms, recipe.loss_weights(0)).device == CUDA


@pytest.mark.parametrize("sampler", ["euler", "heun", "adams-bashforth", "euler-maruyama"])
def test_guided_samples_and_their_pixels(sampler: str, tiny_store: Path) -> None:
    """Everything is guided, by labels, maps and a weaker model, inside an interval alone."""
    store, recipe = Store.open(tiny_store), tiny("reglue")
    config = denoiser_config(store, recipe)
    shapes, models = config.shapes(), [Denoiser(config), Denoiser(config)]
    autoencoder = load_autoencoder(store.manifest.autoencoder.name)
    scales: dict[str, Any] = {"local_scale": 1.5, "cls_scale": 1.2, "representation_scale": 1.1, "auto_scale": 1.5}
    how = Sampling(sampler, 5, guidance_scale=2.0, guidance_interval=(0.2, 0.8), guided_channels=2, **scales)

    def noise() -> Iterator[State]:
        while True:
            yield {name: torch.empty(4, *shape, dtype=torch.float64, device=CUDA) for name, shape in shapes.items()}

    with FakeTensorMode(allow_non_fake_inputs=True):
        strong, weak = (SamplingNetwork(on_gpu(model), "float32") for model in models)
        condition = {"class": torch.zeros(4, dtype=torch.int64, device=CUDA)}
        velocity = guided_velocity(strong, condition, config.modalities, how.guidance, weak)
        chosen = SAMPLERS[sampler]
        grid = at(chosen.grid(how.steps, 1.0, velocity.discontinuities), next(noise()))
        state = integrate(chosen.step, velocity, next(noise()), grid, noise=noise())
        assert {name: value.device for name, value in state.items()} == dict.fromkeys(shapes, CUDA)
        images = on_gpu(autoencoder).decode(config.modalities[0].denormalise(state[LATENT].float()))
        assert to_pixels(images, "round").device == CUDA


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_preparing(dtype: Literal["float16", "int8"], tiny_encoder: str, tiny_autoencoder: str) -> None:
    encoder, autoencoder = load_encoder(tiny_encoder, 16), load_autoencoder(tiny_autoencoder)
    options = Prepare(Path("photos"), Path("store"), 16, features=True, features_dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8, device=CUDA)
        columns = encode_columns(pixels, on_gpu(autoencoder), on_gpu(encoder), options)
    assert list(columns) == ["latent", "cls", "features"]
    assert {tensor.device for tensors in columns.values() for tensor in tensors.values()} == {CUDA}


@pytest.mark.parametrize("name", ["conv-4", "pca-4"])
def test_compressing(name: str, tiny_store: Path) -> None:
    compressor = load_compressor(tiny_store / "compressors" / name)
    channels = len(compressor.mean)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu(compressor)
        code = compressor.encode(torch.empty(4, channels, 4, 4, device=CUDA))
        assert compressor.decode(code, slice(-channels // 4, None)).device == CUDA


def test_an_autoencoder_that_is_aligned(tiny_encoder: str, tiny_autoencoder: str) -> None:
    network = AutoencoderKL.from_pretrained(tiny_autoencoder)
    spec = AlignmentSpec(latent_channels=3, hidden=8, width=16, grid=(4, 4))
    model = AlignedAutoencoder(network, spec)
    judges = PatchDiscriminator(8, 1), Lpips()
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, noise = torch.empty(2, 3, 32, 32, device=CUDA), torch.empty(2, 3, 16, 16, device=CUDA)
        made = on_gpu(model)(images, noise)
        discriminator, lpips = map(on_gpu, judges)
        assert discriminator(made.images).device == lpips(made.images, images).device == CUDA


def test_describing_images_for_metrics() -> None:
    inception = Inception(InceptionNetwork(), "random", "")
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu(inception.network)
        described = inception.describe(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        assert described.features.device == CUDA
