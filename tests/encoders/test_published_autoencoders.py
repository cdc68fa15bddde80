"""Autoencoders as others publish them: half precision, shards, pickles, pipelines, latent diffusion's checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from reglue.encoders.autoencoders import load_autoencoder
from reglue.encoders.renaming import as_diffusers
from reglue.errors import UserError

Tensors = dict[str, Tensor]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def network_of(latent_channels: int = 4, attention: bool = False, **config: Any) -> AutoencoderKL:
    """With the 32 groups that all of latent diffusion have."""
    torch.manual_seed(0)
    first, last = "DownEncoderBlock2D", "AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D"
    sizes: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "down_block_types": (first, last),
        "up_block_types": (last.replace("Down", "Up").replace("Encoder", "Decoder"), "UpDecoderBlock2D"),
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "scaling_factor": 0.18215,
    }
    network = AutoencoderKL(**(sizes | config))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network.eval()


def as_latent_diffusion(network: AutoencoderKL) -> Tensors:
    """The tensors by latent diffusion's names."""
    last = len(network.config["block_out_channels"]) - 1
    found: Tensors = {}
    for key, value in network.state_dict().items():
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
        new = re.sub(r"down_blocks\.(\d)\.attentions", r"down.\1.attn", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)", lambda stage: f"up.{last - int(stage[1])}", new)
        new = new.replace("resnets", "block").replace("attentions", "attn").replace("upsamplers.0", "upsample")
        new = new.replace("mid_block.block.0", "mid.block_1").replace("mid_block.block.1", "mid.block_2")
        new = new.replace("mid_block.attn.0", "mid.attn_1")
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if ".attn" in new:
            new = new.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])", r"\1", new)
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[new] = value.clone()
    assert "decoder.up.0.block.1.conv1.weight" in found
    assert "encoder.mid.attn_1.q.weight" in found
    return found


def decoded(name: str | Path) -> Tensor:
    autoencoder = load_autoencoder(str(name))
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = autoencoder.encode(images).mean
    return torch.cat([autoencoder.decode(raw).flatten(), autoencoder.spec.normalise(raw).flatten()])


def expected(network: AutoencoderKL, folder: Path) -> Tensor:
    network.save_pretrained(folder / "expected")
    return decoded(folder / "expected")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network_of().save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


# ---- folders of diffusers


def half(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / WEIGHTS.replace(".safe", ".fp16.safe"))


def shards(folder: Path) -> None:
    network_of().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    (folder / WEIGHTS).unlink()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


LAYOUTS: dict[str, Callable[[Path], None]] = {
    ".fp16.safetensors": half,
    "shards": shards,
    ".bin": pickled,
    "double precision": lambda folder: save_file(
        {name: one.double() for name, one in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_a_folder_may_be_in_other_files(layout: str, folder: Path) -> None:
    before = decoded(folder)
    LAYOUTS[layout](folder)
    assert torch.equal(decoded(folder), before)


@pytest.mark.parametrize("given", ["", "vae", "vae/config.json", f"vae/{WEIGHTS}"])
def test_a_pipelines_root_stands_for_its_autoencoder(given: str, folder: Path, tmp_path: Path) -> None:
    before = decoded(folder)
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    folder.rename(tmp_path / "pipeline" / "vae")
    assert torch.equal(decoded(tmp_path / "pipeline" / given), before)
    assert load_autoencoder(str(tmp_path / "pipeline" / given)).spec.name == str(tmp_path / "pipeline" / "vae")


# ---- latent diffusion's files


def test_latent_diffusions_names_become_those_that_diffusers_makes_of_them() -> None:
    state = as_latent_diffusion(network := network_of())
    own, theirs = as_diffusers(state, Path("vae.ckpt")), convert_ldm_vae_checkpoint(state, network.config)
    assert own.keys() == theirs.keys() == network.state_dict().keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, theirs[name].reshape(tensor.shape)), name


UNET = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(3), "model_ema.decay": torch.tensor(0.9)}
SD = {"cond_stage_model.transformer.weight": torch.zeros(3)}
SDXL = {"conditioner.embedders.0.transformer.weight": torch.zeros(3)}
SD3 = {"model.diffusion_model.joint_blocks.0.weight": torch.zeros(3)}
FLUX = {"model.diffusion_model.double_blocks.0.weight": torch.zeros(3)}


@pytest.mark.parametrize(
    ("around", "prefix", "channels", "scale"),
    [
        (UNET | SD, "first_stage_model.", 4, (0.18215, 0.0)),
        (UNET | SDXL, "first_stage_model.", 4, (0.13025, 0.0)),
        (SD3, "first_stage_model.", 16, (1.5305, 0.0609)),
        (FLUX, "vae.", 16, (0.3611, 0.1159)),
        (UNET | {"scale_factor": torch.tensor(0.25)}, "first_stage_model.", 3, (0.25, 0.0)),
    ],
)
@pytest.mark.parametrize("pickled", [True, False])
def test_an_autoencoder_is_found_in_the_checkpoint_of_a_whole_model(
    around: Tensors, prefix: str, channels: int, scale: tuple[float, float], pickled: bool, tmp_path: Path
) -> None:
    bare = {"use_quant_conv": channels != 16, "use_post_quant_conv": channels != 16}
    network = network_of(channels, scaling_factor=scale[0], shift_factor=scale[1], **bare)
    state = {prefix + name: one for name, one in as_latent_diffusion(network).items()} | around
    file = tmp_path / f"model.{'ckpt' if pickled else 'safetensors'}"
    if pickled:
        torch.save({"state_dict": state, "global_step": 3}, file)
    else:
        save_file(state, file)
    torch.testing.assert_close(decoded(file), expected(network, tmp_path), rtol=0, atol=1e-6)
    spec = load_autoencoder(str(file)).spec
    assert (spec.name, spec.kind, spec.downsampling) == (str(file), "AutoencoderKL", 2)


@pytest.mark.parametrize("attention", [True, False])
def test_an_autoencoder_by_itself_is_told_apart_by_a_short_name(attention: bool, tmp_path: Path) -> None:
    network = network_of(attention=attention, scaling_factor=0.13025)
    state = as_latent_diffusion(network) | {"loss.discriminator.weight": torch.zeros(3)}
    file = tmp_path / "vae.safetensors"
    save_file(state, file)
    assert f"give it as sd-vae-ft-mse@{file} or sdxl-vae@{file}" in refusal(file)
    torch.testing.assert_close(decoded(f"sdxl-vae@{file}"), expected(network, tmp_path), rtol=0, atol=1e-6)
    assert load_autoencoder(load_autoencoder(f"sdxl-vae@{file}").spec.name).spec.scale == (0.13025,) * 4
    assert "there is no file nowhere" in refusal("sdxl-vae@nowhere")


def test_another_latent_space_is_described_by_a_file_beside(tmp_path: Path) -> None:
    file = tmp_path / "vae.ckpt"
    torch.save({"state_dict": as_latent_diffusion(network_of(5))}, file)
    assert 'does not say how its latents are scaled: put mean_std.json beside it, {"mean": 0' in refusal(file)
    (tmp_path / "mean_std.json").write_text('{"mean": 0.5, "std": 2}')
    spec = load_autoencoder(str(file)).spec
    assert (spec.shift, spec.scale) == ((0.5,) * 5, (0.5,) * 5)


def test_other_autoencoders_of_latent_diffusion_are_named(tmp_path: Path) -> None:
    file, state = tmp_path / "model.ckpt", as_latent_diffusion(network_of())
    for more, said in (
        ({"quantize.embedding.weight": torch.zeros(9, 4)}, "it is a VQ autoencoder"),
        ({"bn.running_mean": torch.zeros(4)}, "it is the autoencoder of FLUX.2"),
        ({"encoder.conv_out.weight": torch.zeros(4, 64, 3, 3)}, "its encoder gives 4 channels for 4 of the latents"),
    ):
        torch.save(state | more, file)
        assert said in refusal(file)
    torch.save({"model.diffusion_model.weight": torch.zeros(3)}, file)
    assert "it has no tensors of a KL autoencoder of images" in refusal(file)
    del state["decoder.mid.block_1.conv1.bias"]
    torch.save(state, file)
    assert "missing keys decoder.mid_block.resnets.0.conv1.bias" in refusal(f"sd-vae-ft-mse@{file}")


def refusal(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_autoencoder(str(name))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700, message
    return message


def test_any_tensor_may_be_missing_or_another(tmp_path: Path) -> None:
    state = as_latent_diffusion(network_of(attention=True))
    file = tmp_path / "vae.safetensors"
    for name in [name for name in state if re.search(r"conv_(in|out)\.weight|mid\.attn_1\.q|down.0.block.0.c", name)]:
        for other in (None, torch.tensor(1.0), torch.zeros(0, 4, 3, 0)):
            changed = {key: tensor for key, tensor in state.items() if key != name}
            save_file(changed if other is None else changed | {name: other}, file)
            assert str(file) in refusal(f"sd-vae-ft-mse@{file}"), name


def test_numbers_that_are_not_finite_are_refused(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["decoder.conv_in.bias"][3] = torch.nan
    save_file(state, folder / WEIGHTS)
    assert f"{WEIGHTS} is damaged (1 of the 64 numbers in decoder.conv_in.bias are NaN or infinite)" in refusal(folder)


@pytest.mark.parametrize("value", [0, -1.0, 1e300, "text", None, [1.0]])
@pytest.mark.parametrize("key", ["scaling_factor", "shift_factor"])
def test_scales_that_are_none_are_refused(key: str, value: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    if key == "shift_factor" and value in (0, -1.0, None):
        load_autoencoder(str(folder))
    else:
        assert "config.json describes no AutoencoderKL" in refusal(folder)
