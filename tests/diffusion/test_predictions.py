"""What networks predict, and modalities with times of their own: the published networks where times are equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reglue.diffusion.chains import DDPM, STABLE_DIFFUSION
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.embeddings import SPAN
from reglue.diffusion.modalities import Modality
from reglue.diffusion.paths import PATHS, Path
from reglue.diffusion.predictions import PREDICTIONS, NoisePrediction

MODALITIES = (Modality("latent", "map", 3), Modality("local", "map", 2), Modality("cls", "token", 5))
CONFIG = DenoiserConfig(
    modalities=MODALITIES, grid=(4, 6), conditions={"class": 3}, depth=2, width=16, heads=2, learn_sigma=True
)
LABELS = {"class": torch.tensor([0, 2])}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state(config: DenoiserConfig = CONFIG) -> dict[str, Tensor]:
    return {name: normal(2, *shape, seed=len(name)) for name, shape in config.shapes().items()}


def awake(config: DenoiserConfig) -> Denoiser:
    denoiser = Denoiser(config)
    with torch.no_grad():
        for number, (name, weight) in enumerate(denoiser.named_parameters()):
            if not name.startswith("time_offsets"):
                weight.copy_(normal(*weight.shape, seed=number) / 5)
    return denoiser


@pytest.mark.parametrize("chain", [DDPM, STABLE_DIFFUSION])
@pytest.mark.parametrize("path", PATHS.values())
def test_a_step_of_a_chain_is_a_time_of_a_path(chain: object, path: Path) -> None:
    prediction = next(p for p in PREDICTIONS.values() if isinstance(p, NoisePrediction) and p.chain is chain)
    chain = prediction.chain
    n = torch.tensor([0, 1, 500, 998, 999])
    t = prediction.training_time((n.double() + 0.5) / chain.steps, path)
    data, noise = normal(5, 7, seed=1, dtype=torch.float64), normal(5, 7, seed=2, dtype=torch.float64)
    noisy, velocity = path.interpolate({"latent": data}, {"latent": noise}, t)

    scaled, times = prediction.network_input(noisy, {"latent": t}, path)
    cumprod = torch.from_numpy(chain.alphas_cumprod)[n].unsqueeze(1)
    torch.testing.assert_close(scaled["latent"], cumprod.sqrt() * data + (1 - cumprod).sqrt() * noise)
    torch.testing.assert_close(times["latent"], n.double() + chain.first, rtol=0, atol=1e-6)
    torch.testing.assert_close(prediction.to_velocity({"latent": noise}, noisy, {"latent": t}, path), velocity)
    assert prediction.latest(path) == pytest.approx(t[-1].item())

    # The loss is that of the noise: a wrong prediction of it counts by its square.
    wrong = prediction.to_velocity({"latent": noise + 0.1}, noisy, {"latent": t}, path)["latent"]
    weight = prediction.weight(t, path)
    assert weight is not None
    torch.testing.assert_close(weight * (wrong - velocity["latent"])[:, 0] ** 2, torch.full((5,), 0.01).double())


@pytest.mark.parametrize("path", PATHS.values())
def test_predicted_data_is_a_velocity(path: Path) -> None:
    t = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
    data, noise = normal(3, 4, seed=1, dtype=torch.float64), normal(3, 4, seed=2, dtype=torch.float64)
    noisy, velocity = path.interpolate({"latent": data}, {"latent": noise}, t)
    found = PREDICTIONS["data"].to_velocity({"latent": data}, noisy, {"latent": t}, path)
    torch.testing.assert_close(found, velocity)
    at_data = PREDICTIONS["data"].to_velocity({"latent": data}, {"latent": data}, {"latent": 0 * t}, path)
    assert at_data["latent"].isfinite().all()


def test_equal_times_are_the_published_network_and_others_are_not() -> None:
    time = torch.tensor([0.3, 0.8])
    published = awake(CONFIG)
    apart = awake(replace(CONFIG, times="shared", span=True))
    apart.load_state_dict(published.state_dict(), strict=False)
    with torch.no_grad():
        one = published(state(), time, LABELS)
        spans = apart(state(), {**dict.fromkeys(CONFIG.shapes(), time), SPAN: torch.tensor([0.1, 0.3])}, LABELS)
        assert all(torch.equal(one.velocity[name], v) for name, v in spans.velocity.items())
        apart.time_offsets.get_parameter(f"{SPAN}.2.weight").fill_(0.1)
        spans = apart(state(), {**dict.fromkeys(CONFIG.shapes(), time), SPAN: torch.tensor([0.1, 0.3])}, LABELS)
    assert not torch.equal(one.velocity["latent"], spans.velocity["latent"])


def test_the_second_half_is_a_variance_where_noise_is_predicted() -> None:
    time = torch.tensor([0.3, 0.8])
    unused, learned = awake(CONFIG), awake(replace(CONFIG, prediction="noise"))
    with torch.no_grad():
        assert unused(state(), time, LABELS).variance is None
        variance = learned(state(), time, LABELS).variance
    assert variance is not None
    assert {name: tuple(v.shape) for name, v in variance.items()} == {"latent": (2, 3, 4, 6), "local": (2, 2, 4, 6)}
