"""Compressors: structure, principal components against NumPy, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reglue.encoders.compressors import (
    Compressor,
    ConvCompressor,
    MlpCompressor,
    PcaCompressor,
    Posterior,
    conv_compressor_from_published,
    load_compressor,
    resize,
)
from reglue.errors import UserError

CHANNELS = 6
KINDS = ["conv", "conv-kl", "mlp", "pca"]


def features(count: int = 20) -> Tensor:
    """Correlated, of differing scale, and far from zero: what a careless covariance gets wrong."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, CHANNELS, 3, 4, generator=generator)
    mixed = torch.einsum("dc,bchw->bdhw", torch.randn(CHANNELS, CHANNELS, generator=generator), noise)
    return 100 + mixed * torch.linspace(0.1, 3, CHANNELS)[:, None, None]


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    flat = values.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1, correction=0)


def fit_pca(channels: int, values: Tensor | None = None) -> PcaCompressor:
    values = features() if values is None else values
    return PcaCompressor.fit(values.split(7), *statistics(values), channels)


def make(kind: str) -> Compressor:
    torch.manual_seed(0)
    if kind == "pca":
        return fit_pca(2)
    architecture = MlpCompressor if kind == "mlp" else ConvCompressor
    return architecture(CHANNELS, 5, 2, *statistics(features()), variational=kind == "conv-kl").eval()


def test_components_are_those_of_a_singular_value_decomposition():
    standardised = fit_pca(3).standardise(features()).transpose(0, 1).flatten(1).double().numpy()
    _, values, components = np.linalg.svd((standardised - standardised.mean(1, keepdims=True)).T, full_matrices=False)
    fitted = fit_pca(3)
    overlap = fitted.components.double().numpy() @ components[:3].T
    np.testing.assert_allclose(np.abs(overlap), np.eye(3), atol=1e-4)
    codes = fitted.encode(features()).double()
    np.testing.assert_allclose(
        codes.var((0, 2, 3), correction=0).sqrt(), values[:3] / np.sqrt(codes[:, 0].numel()), rtol=1e-4
    )
    assert codes.mean((0, 2, 3)).abs().max() < 1e-4


def test_the_sign_of_a_component_is_settled():
    components = fit_pca(4).components
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(fit_pca(4, features()[torch.randperm(20)]).components, components, atol=1e-5, rtol=0)


def test_all_components_restore_the_features():
    compressor = fit_pca(CHANNELS)
    torch.testing.assert_close(compressor.decode(compressor.encode(features())), features(), atol=1e-3, rtol=0)


def test_more_components_than_channels_are_refused():
    with pytest.raises(UserError, match=r"^channels 7: choose at most 6"):
        fit_pca(CHANNELS + 1)


def test_the_published_size_has_the_published_number_of_parameters():
    def count(module: torch.nn.Module) -> float:
        return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1)

    with torch.device("meta"):
        encoder, decoder = (ConvCompressor(3072, 256, 16).get_submodule(part) for part in ("encoder", "decoder"))
    assert (count(encoder), count(encoder) + count(decoder)) == (8.3, 16.6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_shapes_of_any_grid_and_half_precision_features(kind: str):
    compressor = make(kind)
    for grid in ((1, 1), (3, 4), (5, 2)):
        code = compressor.encode(torch.randn(2, CHANNELS, *grid).half())
        assert (code.shape, code.dtype) == ((2, 2, *grid), torch.float32)
        assert compressor.decode(code).shape == (2, CHANNELS, *grid)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path):
    compressor = make(kind)
    spec = compressor.save(tmp_path / "new" / "folder")
    loaded = load_compressor(tmp_path / "new" / "folder")
    assert torch.equal(loaded.encode(features()), compressor.encode(features()))
    assert torch.equal(loaded.decode(loaded.encode(features())), compressor.decode(compressor.encode(features())))
    assert loaded.spec() == spec
    assert (spec.kind, spec.channels_in, spec.channels) == (kind.removesuffix("-kl"), CHANNELS, 2)
    assert spec.variational == kind.endswith("-kl")
    assert not loaded.training


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "compressor.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "compressor.json").write_text("{}"),
        lambda folder: (folder / "compressor.json").write_text("no json"),
        lambda folder: (folder / "compressor.json").unlink(),
        lambda folder: (
            make("pca").save(folder / "other")
            and (folder / "other/compressor.safetensors").replace(folder / "compressor.safetensors")
        ),
        lambda folder: (
            ConvCompressor(CHANNELS, 5, 2).save(folder / "other")
            and (folder / "other/compressor.safetensors").replace(folder / "compressor.safetensors")
        ),
    ],
)
def test_a_damaged_compressor_is_refused(harm, tmp_path: Path):
    make("conv").save(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match="reglue compress") as caught:
        load_compressor(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_other_weights_are_no_published_compressor():
    with pytest.raises(UserError, match="not a published REGLUE compressor"):
        conv_compressor_from_published({"blocks.0.weight": torch.zeros(1)}, torch.zeros(6), torch.ones(6))


def published(**changed: Tensor) -> dict[str, Tensor]:
    """The weights of a compressor under their published names, some of them as others are."""
    weights = {**make("conv").state_dict(), **changed}
    return {
        name.replace("coder.", "coder.model."): value
        for name, value in weights.items()
        if name.startswith(("encoder", "decoder"))
    }


FIRST, LAST = "encoder.0.weight", "encoder.2.weight"
MEAN, STD = torch.zeros(CHANNELS), torch.ones(CHANNELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_published_compressor_is_as_it_was(dtype: torch.dtype):
    weights = {name: value.to(dtype) if value.ndim else value for name, value in published().items()}
    compressor = conv_compressor_from_published(weights, MEAN, STD)
    assert compressor.encode(features()).shape == (20, 2, 3, 4)
    for name, value in compressor.state_dict().items():
        assert value.device.type == "cpu"
        assert value.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        if name.startswith("encoder"):
            assert torch.equal(value, weights[name.replace("encoder.", "encoder.model.")].to(value.dtype))


@pytest.mark.parametrize(
    ("weights", "mean", "std"),
    [
        *((published(), torch.zeros(size), torch.ones(size))
          for size in [(CHANNELS - 1,), (1,), (), (0,), (CHANNELS, 1)]),
        (published(), MEAN, torch.ones(1)),
        *(
            (published(**{name: torch.zeros(size)}), MEAN, STD)
            for name in (FIRST, LAST, "encoder.1.bn1.weight", "decoder.2.bias")
            for size in [(), (9,), (5, CHANNELS), (5, CHANNELS, 3), (5, CHANNELS, 1, 1), (3_000_000, CHANNELS, 0, 0),
                         (3_000_000, 3_000_000, 0, 0), (0, CHANNELS, 3, 3), (2**40, CHANNELS, 0, 3)]
        ),
        (published(**{FIRST: torch.zeros(3_000_000, 0, 0, 0)}), torch.zeros(0), torch.ones(0)),
        ({name: value[:0] if value.ndim else value for name, value in published().items()}, MEAN, STD),
        ({**published(), "encoder.model.3.weight": torch.zeros(1)}, MEAN, STD),
    ],
)  # fmt: skip
def test_other_shapes_are_no_published_compressor(weights: dict[str, Tensor], mean: Tensor, std: Tensor):
    with pytest.raises(UserError, match="not a published REGLUE compressor") as caught:
        conv_compressor_from_published(weights, mean, std)
    assert "\n" not in str(caught.value)


def test_the_spec_is_plain_data(tmp_path: Path):
    make("conv").save(tmp_path)
    assert json.loads((tmp_path / "compressor.json").read_text())["hidden"] == 5


def test_divergence_is_that_of_normal_distributions():
    mean, log_variance = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(Posterior(mean, log_variance).divergence(), expected)
    drawn = Posterior(mean, log_variance).draw(torch.ones_like(mean))
    torch.testing.assert_close(drawn, mean + normal.stddev)


@torch.no_grad()
def test_a_perceptron_sees_one_position_at_a_time():
    compressor, other = make("mlp"), features()
    other[:, :, 0, 0] += 1
    changed = (compressor.encode(features()) != compressor.encode(other)).any(1)
    assert changed[:, 0, 0].all()
    assert changed.sum() == len(other)


def test_resize_keeps_a_constant_and_interpolates_between_cell_centres():
    assert torch.equal(resize(torch.full((1, 2, 3, 4), 7.0), (6, 8)), torch.full((1, 2, 6, 8), 7.0))
    ramp = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    assert resize(ramp, (1, 4)).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
