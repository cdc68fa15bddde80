import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, cast

import cattrs
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_asym_kl import AsymmetricAutoencoderKL
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.autoencoders.vq_model import VQModel
from safetensors.torch import load_file, save_file
from torch import nn

from hub_cache import put_into_hub_cache, use_hub_cache
from reglue.encoders import autoencoders
from reglue.encoders.autoencoders import (
    DIFFUSERS_KINDS,
    AutoencoderSpec,
    Moments,
    autoencoder_names,
    load_autoencoder,
)
from reglue.encoders.taef2 import taef2_decoder, taef2_encoder
from reglue.errors import UserError


def random_images(*size: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def write_kl(folder: Path, seed: int = 0, **config: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [4, 8],
        "norm_num_groups": 2,
        "latent_channels": 3,
    }
    network = AutoencoderKL(**(sizes | config))
    network.save_pretrained(folder)
    return network.eval()


STAGES: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
}


def write_asymmetric(folder: Path, **config: Any) -> AsymmetricAutoencoderKL:
    """With a decoder wider than its encoder, as the published ones."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"down_block_out_channels": [4, 8], "up_block_out_channels": [8, 16], "latent_channels": 3}
    network = AsymmetricAutoencoderKL(**(STAGES | sizes | config))
    network.save_pretrained(folder)
    return network.eval()


def write_vq(folder: Path, **config: Any) -> VQModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": [4, 8], "latent_channels": 3, "num_vq_embeddings": 16}
    network = VQModel(**(STAGES | sizes | config))
    network.save_pretrained(folder)
    return network.eval()


def write_flux2(folder: Path, **config: Any) -> Any:
    """With statistics as training leaves them."""
    flux2 = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_flux2")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": [4, 8], "latent_channels": 3}
    network = flux2.AutoencoderKLFlux2(**(STAGES | sizes | config))
    network.bn.running_mean.normal_()
    network.bn.running_var.uniform_(0.1, 4)
    network.save_pretrained(folder)
    return network.eval()


def write_tiny(folder: Path, latent_channels: int = 5, **config: Any) -> AutoencoderTiny:
    torch.manual_seed(0)
    widths, blocks = (8, 8, 8), (1, 1, 1)
    network = AutoencoderTiny(
        **config,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        latent_channels=latent_channels,
    )
    network.save_pretrained(folder)
    return network.eval()


def write_dc(folder: Path, **config: Any) -> AutoencoderDC:
    """DC-AE of three stages, the last with attention as in the published ones."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "latent_channels": 6,
        "attention_head_dim": 4,
        "encoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
        "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
        "encoder_block_out_channels": [12, 12, 24],
        "decoder_block_out_channels": [12, 12, 24],
        "encoder_layers_per_block": [1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1],
        "encoder_qkv_multiscales": [[], [], [5]],
        "decoder_qkv_multiscales": [[], [], [5]],
        "scaling_factor": 0.4,
    }
    network = AutoencoderDC(**(sizes | config))
    network.save_pretrained(folder)
    return network.eval()


def write_taef2(folder: Path, width: int = 4, latent_channels: int = 6) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    encoder, decoder = taef2_encoder(width, latent_channels), taef2_decoder(width, latent_channels)
    folder.mkdir(exist_ok=True)
    save_file(encoder.state_dict(), folder / "taef2_encoder.safetensors")
    save_file(decoder.state_dict(), folder / "taef2_decoder.safetensors")
    return encoder, decoder


def test_kl_autoencoder_gives_the_moments_and_images_of_diffusers(tmp_path: Path) -> None:
    network = write_kl(tmp_path, scaling_factor=0.5, shift_factor=0.25)
    autoencoder = load_autoencoder(str(tmp_path))
    images = random_images(16, 24)
    moments = autoencoder.encode(images)
    with torch.no_grad():
        (posterior,) = network.encode(images, return_dict=False)
        torch.testing.assert_close(moments.mean, posterior.mean)
        torch.testing.assert_close(moments.std, posterior.std)
        (decoded,) = network.decode(cast(Any, posterior.mean), return_dict=False)
    torch.testing.assert_close(autoencoder.decode(moments.mean), decoded.clamp(-1, 1))

    spec = autoencoder.spec
    assert (spec.kind, spec.latent_channels, spec.downsampling) == ("AutoencoderKL", 3, 2)
    assert (spec.shift, spec.scale) == ((0.25,) * 3, (0.5,) * 3)
    assert spec.latent_size((16, 24)) == tuple(moments.mean.shape[-2:]) == (8, 12)


def test_normalisation_may_differ_per_channel(tmp_path: Path) -> None:
    write_kl(tmp_path, scaling_factor=1.0, latents_mean=[1.0, 2.0, 3.0], latents_std=[0.5, 1.0, 2.0])
    spec = load_autoencoder(str(tmp_path)).spec
    raw = torch.tensor([1.5, 3.0, 5.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(spec.normalise(raw), torch.ones(2, 3, 4, 4))
    torch.testing.assert_close(spec.denormalise(spec.normalise(raw)), raw.contiguous())


def test_tiny_autoencoder_is_deterministic(tmp_path: Path) -> None:
    network = write_tiny(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path))
    images = random_images(16, 32)
    moments = autoencoder.encode(images)
    assert moments.std is None
    with torch.no_grad():
        torch.testing.assert_close(moments.mean, network.encode(images, return_dict=False)[0])
        (decoded,) = network.decode(moments.mean, return_dict=False)
    torch.testing.assert_close(autoencoder.decode(moments.mean), decoded.clamp(-1, 1))
    assert (autoencoder.spec.latent_channels, autoencoder.spec.downsampling) == (5, 4)


def test_tiny_autoencoder_changes_to_pixels_from_zero_to_one(tmp_path: Path) -> None:
    # TAESD was made for [0, 1]; what it is given and gives here lies in [−1, 1].
    network = write_tiny(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path))
    images = random_images(16, 16)
    with torch.no_grad():
        torch.testing.assert_close(autoencoder.encode(images).mean, network.encoder.layers((images + 1) / 2))
        latents = 4 * torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
        decoded = 2 * network.decoder.layers(3 * torch.tanh(latents / 3)) - 1
    torch.testing.assert_close(autoencoder.decode(latents), decoded.clamp(-1, 1))
    assert (autoencoder.spec.shift, autoencoder.spec.scale) == ((0.0,) * 5, (1.0,) * 5)


RAE = {
    "encoder_type": "dinov2",
    "encoder_hidden_size": 64,
    "encoder_patch_size": 14,
    "encoder_num_hidden_layers": 1,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
    "patch_size": 8,
    "encoder_input_size": 42,
}


def test_a_representation_autoencoder_is_a_latent_space_like_others(tmp_path: Path) -> None:
    """RAE: features of a vision encoder as latents. Its network is of transformers, which few need."""
    pytest.importorskip("transformers")
    from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE

    torch.manual_seed(0)
    network = AutoencoderRAE(**RAE, latents_mean=torch.randn(64, 3, 3), latents_std=torch.rand(64, 3, 3) + 0.5).eval()
    network.save_pretrained(tmp_path)
    autoencoder, images = load_autoencoder(str(tmp_path)), random_images(24, 24)
    spec = autoencoder.spec
    assert (spec.kind, spec.latent_channels, spec.downsampling, spec.shift) == ("AutoencoderRAE", 64, 8, (0.0,) * 64)
    moments = autoencoder.encode(images)
    assert moments.std is None
    with torch.no_grad():
        torch.testing.assert_close(moments.mean, network.encode((images + 1) / 2, return_dict=False)[0])
        (decoded,) = network.decode(moments.mean, return_dict=False)
    torch.testing.assert_close(autoencoder.decode(moments.mean), (2 * decoded.clamp(-1, 1) - 1).clamp(-1, 1))
    with pytest.raises(UserError, match="images of 24×24 pixels, not 16×16: choose resolution 24"):
        autoencoder.encode(random_images(16, 16))


def test_a_representation_autoencoder_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderRAE", **RAE}))
    save_file({"decoder.decoder_norm.weight": torch.ones(16)}, tmp_path / "diffusion_pytorch_model.safetensors")
    monkeypatch.setattr(autoencoders, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="AutoencoderRAE needs transformers: run `pip install transformers`"):
        load_autoencoder(str(tmp_path))


# The published ones have no block before their first halving.
@pytest.mark.parametrize("layers", [[1, 1, 1], [0, 1, 1]])
def test_dc_autoencoder_is_deterministic(tmp_path: Path, layers: list[int]) -> None:
    network = write_dc(tmp_path, encoder_layers_per_block=layers, decoder_layers_per_block=layers)
    autoencoder = load_autoencoder(str(tmp_path))
    images = random_images(16, 24)
    moments = autoencoder.encode(images)
    assert moments.std is None
    with torch.no_grad():
        torch.testing.assert_close(moments.mean, network.encode(images, return_dict=False)[0])
        (decoded,) = network.decode(moments.mean, return_dict=False)
    torch.testing.assert_close(autoencoder.decode(moments.mean), decoded.clamp(-1, 1))
    spec = autoencoder.spec
    assert (spec.kind, spec.latent_channels, spec.scale) == ("AutoencoderDC", 6, (0.4,) * 6)
    assert spec.downsampling == network.spatial_compression_ratio
    assert spec.latent_size((16, 24)) == tuple(moments.mean.shape[-2:])


def test_asymmetric_autoencoder_gives_the_moments_and_images_of_diffusers(tmp_path: Path) -> None:
    network = write_asymmetric(tmp_path, scaling_factor=0.5)
    autoencoder = load_autoencoder(str(tmp_path))
    images = random_images(16, 24)
    moments = autoencoder.encode(images)
    with torch.no_grad():
        (posterior,) = network.encode(images, return_dict=False)
        (decoded,) = network.decode(cast(Any, posterior.mean), return_dict=False)
    assert moments.std is not None
    torch.testing.assert_close(moments.mean, posterior.mean)
    torch.testing.assert_close(moments.std, posterior.std)
    torch.testing.assert_close(autoencoder.decode(moments.mean), decoded.clamp(-1, 1))
    spec = autoencoder.spec
    assert (spec.kind, spec.latent_channels, spec.downsampling) == ("AsymmetricAutoencoderKL", 3, 2)
    assert (spec.shift, spec.scale) == ((0.0,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("vq_embed_dim", [None, 5])
def test_vq_latents_are_those_before_quantisation(tmp_path: Path, vq_embed_dim: int | None) -> None:
    network = write_vq(tmp_path, scaling_factor=0.6, vq_embed_dim=vq_embed_dim)
    autoencoder = load_autoencoder(str(tmp_path))
    images = random_images(16, 24)
    moments = autoencoder.encode(images)
    channels = vq_embed_dim or 3
    with torch.no_grad():
        latents = network.quant_conv(network.encoder(images))
        nearest = torch.cdist(latents.movedim(1, -1).reshape(-1, channels), network.quantize.embedding.weight).argmin(1)
        quantised = network.quantize.embedding(nearest).reshape(2, 8, 12, channels).movedim(-1, 1)
        decoded = network.decoder(network.post_quant_conv(quantised))
    assert moments.std is None
    torch.testing.assert_close(moments.mean, latents)
    torch.testing.assert_close(autoencoder.decode(latents), decoded.clamp(-1, 1))
    spec = autoencoder.spec
    assert (spec.kind, spec.latent_channels, spec.downsampling) == ("VQModel", channels, 2)
    assert (spec.shift, spec.scale) == ((0.0,) * channels, (0.6,) * channels)


def patchified(latents: torch.Tensor) -> torch.Tensor:
    """Patches of 2×2 as channels, those of one channel side by side: what FLUX.2's transformer is given."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, 4 * channels, height // 2, width // 2)


def test_flux2_latents_are_those_of_its_transformer(tmp_path: Path) -> None:
    network = write_flux2(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path))
    images = random_images(16, 24)
    moments = autoencoder.encode(images)
    with torch.no_grad():
        (posterior,) = network.encode(images, return_dict=False)
        (decoded,) = network.decode(posterior.mean, return_dict=False)
    assert moments.std is not None
    torch.testing.assert_close(moments.std, patchified(posterior.std))
    spec = autoencoder.spec
    normalised = spec.normalise(moments.mean)
    torch.testing.assert_close(normalised, network.bn(patchified(posterior.mean)))
    torch.testing.assert_close(autoencoder.decode(spec.denormalise(normalised)), decoded.clamp(-1, 1))
    assert (spec.kind, spec.latent_channels, spec.downsampling) == ("AutoencoderKLFlux2", 12, 4)
    assert spec.latent_size((16, 24)) == tuple(moments.mean.shape[-2:]) == (4, 6)


def test_a_class_that_the_installed_diffusers_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_kl(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.autoencoder_kl", None)
    assert "the installed diffusers has no AutoencoderKL; `pip install -U diffusers`" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("write", "config"),
    [
        (write_kl, {"in_channels": 1, "out_channels": 1}),
        (write_asymmetric, {"in_channels": 1, "out_channels": 1}),
        (write_vq, {"in_channels": 1, "out_channels": 1}),
        (write_flux2, {"in_channels": 1, "out_channels": 1}),
        (write_dc, {"in_channels": 1}),
        (write_tiny, {"in_channels": 1, "out_channels": 1}),
    ],
)
def test_other_images_than_rgb_are_refused(tmp_path: Path, write: Callable[..., Any], config: dict[str, int]) -> None:
    write(tmp_path, **config)
    assert "takes images of 1 channel and gives 1; give one of RGB images" in refusal(tmp_path)


def test_an_asymmetric_autoencoder_that_changes_the_size_is_refused(tmp_path: Path) -> None:
    write_asymmetric(tmp_path, up_block_types=["UpDecoderBlock2D"] * 3, up_block_out_channels=[4, 8, 8])
    assert "2 stages down and 3 up" in refusal(tmp_path)


def test_sixteen_channels_without_quantisation_convolutions(tmp_path: Path) -> None:
    """As in SD3 and FLUX."""
    bare = {"use_quant_conv": False, "use_post_quant_conv": False}
    network = write_kl(tmp_path, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **bare)
    assert network.quant_conv is None
    autoencoder = load_autoencoder(str(tmp_path))
    images = random_images(16, 16)
    with torch.no_grad():
        (posterior,) = network.encode(images, return_dict=False)
    moments = autoencoder.encode(images)
    torch.testing.assert_close(moments.mean, posterior.mean)
    torch.testing.assert_close(autoencoder.spec.normalise(moments.mean), (posterior.mean - 0.1159) * 0.3611)


def test_attention_may_have_the_names_of_the_published_sd_vae(tmp_path: Path) -> None:
    write_kl(tmp_path)
    before = load_autoencoder(str(tmp_path)).encode(random_images(16, 16)).mean
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    for new, old in renamed.items():
        state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    assert "encoder.mid_block.attentions.0.query.weight" in state
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert torch.equal(load_autoencoder(str(tmp_path)).encode(random_images(16, 16)).mean, before)


@pytest.mark.parametrize(
    ("mean_std", "mean", "std"),
    [
        ({"mean": 0.5, "std": 2}, (0.5,) * 3, (2.0,) * 3),
        ({"mean": [1, 2, 3.5], "std": [0.5, 1, 4]}, (1.0, 2.0, 3.5), (0.5, 1.0, 4.0)),
        ({"mean": 0, "std": [0.5, 1, 4]}, (0.0,) * 3, (0.5, 1.0, 4.0)),
    ],
)
def test_normalisation_may_be_a_file_of_the_folder(
    tmp_path: Path, mean_std: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    write_kl(tmp_path, scaling_factor=0.7, shift_factor=0.1)
    without = load_autoencoder(str(tmp_path)).spec
    (tmp_path / "mean_std.json").write_text(json.dumps(mean_std))
    spec = load_autoencoder(str(tmp_path)).spec
    assert spec != without
    raw = torch.randn(2, 3, 4, 4)
    expected = (raw - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(spec.normalise(raw), expected)
    torch.testing.assert_close(spec.denormalise(expected), raw)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        '{"mean": 0}',
        '{"mean": 0, "std": 0}',
        '{"mean": 0, "std": [1, 1, -1]}',
        '{"mean": NaN, "std": 1}',
        '{"mean": [1, 2], "std": 1}',
        '{"mean": "0", "std": 1}',
        '{"mean": null, "std": 1}',
        '{"mean": [[0], [1]], "std": 1}',
    ],
)
def test_another_mean_std_is_refused(tmp_path: Path, content: str) -> None:
    write_kl(tmp_path)
    (tmp_path / "mean_std.json").write_text(content)
    message = refusal(tmp_path)
    assert message.startswith((f"{tmp_path}/mean_std.json must say ", f"{tmp_path}/mean_std.json is damaged ("))
    assert message.endswith("fix it, or take it away to use config.json")


def test_moments_draw() -> None:
    mean, noise = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    torch.testing.assert_close(Moments(mean, noise * 3).draw(noise), noise * 3)
    torch.testing.assert_close(Moments(mean, None).draw(noise), mean)


@pytest.mark.parametrize("path", [".", "taef2_encoder.safetensors", "taef2_decoder.safetensors"])
def test_taef2_loads_by_folder_or_either_file(tmp_path: Path, path: str) -> None:
    encoder, decoder = write_taef2(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path / path))
    images = random_images(16, 32)
    moments = autoencoder.encode(images)
    with torch.no_grad():
        torch.testing.assert_close(moments.mean, encoder((images + 1) / 2))
        torch.testing.assert_close(autoencoder.decode(moments.mean), (2 * decoder(moments.mean) - 1).clamp(-1, 1))
    assert moments.std is None
    spec = autoencoder.spec
    assert (spec.kind, spec.latent_channels, spec.downsampling) == ("TAEF2", 6, 8)
    assert (spec.shift, spec.scale) == ((0.0,) * 6, (1.0,) * 6)
    assert spec == load_autoencoder(str(tmp_path)).spec


def test_taef2_has_the_published_keys() -> None:
    # A module whose index shifted would still run: the keys are what ties it to the published weights.
    pools = ["pool.0.weight", "pool.1.weight", "pool.1.bias", "pool.3.weight"]
    convolutions = [f"conv.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]

    def keys(plain: list[int], bare: list[int], blocks: list[int], pooled: list[int]) -> set[str]:
        return (
            {f"{i}.{kind}" for i in plain for kind in ("weight", "bias")}
            | {f"{i}.weight" for i in bare}
            | {f"{i}.{key}" for i in blocks + pooled for key in convolutions}
            | {f"{i}.{key}" for i in pooled for key in pools}
        )

    encoder, decoder = taef2_encoder(64, 32), taef2_decoder(64, 32)
    assert set(encoder.state_dict()) == keys([0, 14], [2, 6, 10], [1, 3, 4, 5, 7, 8, 9], [11, 12, 13])
    assert set(decoder.state_dict()) == keys([1, 19], [7, 12, 17], [8, 9, 10, 13, 14, 15, 18], [3, 4, 5])
    assert encoder.state_dict()["11.pool.0.weight"].shape == (256, 64, 1, 1)
    assert decoder(100 * torch.ones(1, 32, 1, 1)).shape == (1, 3, 8, 8)


def test_spec_is_plain_data_and_tells_latent_spaces_apart(tmp_path: Path) -> None:
    write_kl(tmp_path / "a")
    write_kl(tmp_path / "same")
    write_kl(tmp_path / "b", seed=1)
    spec = load_autoencoder(str(tmp_path / "a")).spec
    converter = cattrs.Converter(forbid_extra_keys=True)
    assert converter.structure(json.loads(json.dumps(asdict(spec))), AutoencoderSpec) == spec
    assert load_autoencoder(str(tmp_path / "same")).spec == spec
    assert load_autoencoder(str(tmp_path / "b")).spec != spec


@pytest.mark.parametrize("write", [write_kl, write_asymmetric, write_flux2, write_vq, write_tiny, write_dc])
def test_autoencoder_is_frozen_and_in_float32(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    write(tmp_path).half().save_pretrained(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path)).train()
    assert not autoencoder.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in autoencoder.parameters())


def refusal(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_autoencoder(str(name))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_name_lists_the_valid_ones() -> None:
    message = refusal("sd-vae-ft-nonsense")
    assert all(name in message for name in autoencoder_names())
    assert "neither a file nor a folder" in refusal("./nowhere/here")


def test_missing_network_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub_cache(monkeypatch, tmp_path)
    message = refusal("sd-vae-ft-mse")
    assert "config.json and diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-mse" in message
    assert "terms" not in message
    for gated in ("sd3-vae", "flux-vae"):
        assert "accept its terms" in refusal(gated)


@pytest.mark.parametrize(
    ("name", "repository", "folder", "kind"),
    [
        ("sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema", "", "AutoencoderKL"),
        ("sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse", "", "AutoencoderKL"),
        ("sdxl-vae", "stabilityai/sdxl-vae", "", "AutoencoderKL"),
        ("sd3-vae", "stabilityai/stable-diffusion-3-medium-diffusers", "vae/", "AutoencoderKL"),
        ("flux-vae", "black-forest-labs/FLUX.1-schnell", "vae/", "AutoencoderKL"),
        ("dc-ae-f32c32", "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", "", "AutoencoderDC"),
        ("dc-ae-f64c128", "mit-han-lab/dc-ae-f64c128-in-1.0-diffusers", "", "AutoencoderDC"),
        ("taesd", "madebyollin/taesd", "", "AutoencoderTiny"),
        ("taesdxl", "madebyollin/taesdxl", "", "AutoencoderTiny"),
        ("taesd3", "madebyollin/taesd3", "", "AutoencoderTiny"),
        ("taef1", "madebyollin/taef1", "", "AutoencoderTiny"),
        ("owner/model", "owner/model", "", "AutoencoderTiny"),
        ("owner/model/some/vae", "owner/model", "some/vae/", "AutoencoderKL"),
    ],
)
def test_hub_name_is_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, repository: str, folder: str, kind: str
) -> None:
    {"AutoencoderKL": write_kl, "AutoencoderDC": write_dc, "AutoencoderTiny": write_tiny}[kind](tmp_path / "network")
    use_hub_cache(monkeypatch, tmp_path / "cache")
    files = {folder + file.name: file for file in (tmp_path / "network").iterdir()}
    assert len(files) == 2
    put_into_hub_cache(tmp_path / "cache", repository, files)
    with pytest.warns(UserWarning, match=r"mean_std\.json is not known here"):
        spec = load_autoencoder(name).spec
    assert (spec.name, spec.kind) == (name, kind)
    assert spec == load_autoencoder(str(tmp_path / "network")).spec


def test_unfitting_folders_are_refused_by_name(tmp_path: Path) -> None:
    assert "config.json is missing" in refusal(tmp_path)
    write_kl(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"latent_channels": 7}))
    assert "does not fit the network" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    message = refusal(tmp_path)
    assert "says UNet2DModel" in message
    assert f"choose a folder of one of {', '.join(DIFFUSERS_KINDS)}" in message
    (tmp_path / "config.json").write_text("{}")
    assert "lacks _class_name, the autoencoder's class; add it if you know it" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json is damaged (it is not an object)" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in refusal(tmp_path)


def test_truncated_and_missing_weights_are_refused(tmp_path: Path) -> None:
    write_kl(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    incomplete = load_file(weights)
    del incomplete["quant_conv.bias"]
    save_file(incomplete, weights)
    assert "quant_conv.bias" in refusal(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-50])
    assert "diffusion_pytorch_model.safetensors is damaged" in refusal(tmp_path)
    weights.unlink()
    assert "is missing" in refusal(tmp_path)


def test_half_of_taef2_is_refused(tmp_path: Path) -> None:
    write_taef2(tmp_path)
    (tmp_path / "taef2_decoder.safetensors").unlink()
    assert "taef2_decoder.safetensors is missing" in refusal(tmp_path / "taef2_encoder.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "taef2_decoder.safetensors")
    assert "taef2_decoder.safetensors does not hold the decoder of TAEF2" in refusal(tmp_path)
    write_taef2(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "taef2_encoder.safetensors")
    assert "taef2_encoder.safetensors does not fit" in refusal(tmp_path)


def test_the_decoder_of_taef2_draws_alone(tmp_path: Path) -> None:
    write_taef2(tmp_path)
    whole = load_autoencoder(str(tmp_path))
    (tmp_path / "taef2_encoder.safetensors").unlink()
    alone = load_autoencoder(str(tmp_path))
    latents = torch.randn(2, 6, 2, 3)
    assert torch.equal(alone.decode(latents), whole.decode(latents))
    assert alone.spec != whole.spec
    with pytest.raises(UserError, match=r"is a decoder alone .* put taef2_encoder.safetensors beside it"):
        alone.encode(random_images(16, 32))


@pytest.mark.parametrize(("write", "multiple"), [(write_kl, 2), (write_tiny, 4), (write_dc, 4), (write_taef2, 8)])
def test_image_size_must_fit(tmp_path: Path, write: Callable[[Path], object], multiple: int) -> None:
    write(tmp_path)
    spec = load_autoencoder(str(tmp_path)).spec
    assert spec.latent_size((4 * multiple, 3 * multiple)) == (4, 3)
    with pytest.raises(UserError, match=f"autoencoder {tmp_path}: choose multiples of {multiple} pixels"):
        spec.latent_size((4 * multiple, 3 * multiple + 1))


def drawn_digit(size: int) -> torch.Tensor:
    """A white ring on black with soft edges, as a handwritten zero: (1, 3, size, size) in [−1, 1]."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    radius = ((row - size / 2) ** 2 + 2 * (column - size / 2) ** 2).sqrt()
    white = torch.sigmoid(size / 16 - (radius - size / 3).abs()) * 2 - 1
    return white.expand(1, 3, size, size)


@pytest.mark.trains
def test_starter_autoencoder_reconstructs_a_digit() -> None:
    autoencoder = load_autoencoder("starter")
    digit = drawn_digit(32)
    moments = autoencoder.encode(digit)
    assert moments.std is not None
    error = ((autoencoder.decode(moments.mean) - digit) / 2).square().mean()
    assert -10 * error.log10() > 25
    normalised = autoencoder.spec.normalise(moments.mean)
    assert 0.3 < normalised.std() < 3


def test_starter_autoencoder_is_small() -> None:
    folder = resources.files("reglue.starter") / "autoencoder"
    assert all(len(file.read_bytes()) < 5e6 for file in folder.iterdir())
