import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import cattrs
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

from reglue.errors import UserError
from reglue.semantics import encoders
from reglue.semantics.encoders import EncoderSpec, InputRule, encoder_names, load_encoder

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 2}


def random_pixels(*size: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def write_folder(folder: Path, seed: int = 0, **config: object) -> VisionTransformer:
    """A small vision transformer in timm's local layout."""
    torch.manual_seed(seed)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL)
    assert isinstance(network, VisionTransformer)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    layout = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": SMALL,
        "pretrained_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
    }
    (folder / "config.json").write_text(json.dumps(layout | config))
    return network.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "small")
    return tmp_path / "small"


def test_features_are_the_chosen_blocks_after_the_final_norm(tmp_path: Path) -> None:
    # One patch per 16 image pixels: 64 pixels give 4×4 patches of 8, the size at which this network was made.
    network = write_folder(tmp_path / "small")
    encoder = load_encoder(str(tmp_path / "small"), 64, layers=[3, 1])
    pixels = random_pixels(64, 64)
    described = encoder.describe(pixels)

    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    tokens = F.interpolate((pixels / 255 - mean) / std, (32, 32), mode="bicubic", align_corners=False)
    with torch.no_grad():
        tokens = network._pos_embed(network.patch_embed(tokens))
        outputs = []
        for block in network.blocks:
            tokens = block(tokens)
            outputs.append(network.norm(tokens))
    expected = torch.cat([outputs[i][:, 1:].mT.unflatten(2, (4, 4)) for i in (1, 3)], dim=1)
    torch.testing.assert_close(described.features, expected)
    torch.testing.assert_close(described.class_token, outputs[-1][:, 0])
    assert encoder.spec.layers == (1, 3)
    assert encoder.spec.feature_channels == 48


def test_default_layers_are_the_last_four_and_images_may_be_oblong(folder: Path) -> None:
    encoder = load_encoder(str(folder), (32, 96))
    assert encoder.spec.layers == (1, 2, 3, 4)
    assert encoder.spec.grid == (2, 6)
    assert encoder.spec.input_size == (16, 48)
    described = encoder.describe(random_pixels(32, 96))
    assert described.features.shape == (2, 4 * 24, 2, 6)
    assert described.class_token.shape == (2, 24)


def test_position_embedding_is_resampled_by_timm(folder: Path) -> None:
    encoder = load_encoder(str(folder), 96)
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, img_size=48)
    torch.testing.assert_close(encoder.network.pos_embed, reference.pos_embed)


def test_encoder_is_frozen_and_stays_in_eval_mode(folder: Path) -> None:
    encoder = load_encoder(str(folder), 64)
    nn.ModuleList([encoder]).train()
    assert not encoder.network.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.describe(random_pixels(64, 64)).features.requires_grad


@pytest.mark.parametrize("pixels", [random_pixels(32, 32), random_pixels(64, 64).float()])
def test_pixels_of_another_size_or_kind_are_refused(folder: Path, pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8 images of"):
        load_encoder(str(folder), 64).describe(pixels)


def test_spec_is_plain_data_and_tells_encoders_apart(folder: Path, tmp_path: Path) -> None:
    spec = load_encoder(str(folder), 64).spec
    converter = cattrs.Converter(forbid_extra_keys=True)
    assert converter.structure(json.loads(json.dumps(asdict(spec))), EncoderSpec) == spec

    write_folder(tmp_path / "copy")
    write_folder(tmp_path / "other", seed=1)
    assert load_encoder(str(tmp_path / "copy"), 64).spec == spec
    assert load_encoder(str(tmp_path / "other"), 64).spec != spec
    assert load_encoder(str(folder), 96).spec != spec
    assert load_encoder(str(folder), 64, layers=[4]).spec != spec


def test_name_in_spec_does_not_depend_on_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    spec = load_encoder("small", 64).spec
    monkeypatch.chdir("/")
    assert load_encoder(spec.name, 64).spec == spec


def test_half_precision_weights_are_used_in_float32(folder: Path) -> None:
    network = write_folder(folder)
    save_file({key: value.half() for key, value in network.state_dict().items()}, folder / "model.safetensors")
    assert load_encoder(str(folder), 64).describe(random_pixels(64, 64)).features.dtype == torch.float32


@pytest.fixture
def tiny_dinov2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file of weights whose shapes are those of a short name in the table, kept small for the test."""
    row = encoders.KnownEncoder("vit_tiny_patch16_224", width=192, depth=12, patch_size=16, registers=0)
    monkeypatch.setitem(encoders.KNOWN_ENCODERS, "tiny", row)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_weights_file_is_recognised_by_its_shapes(tiny_dinov2: Path) -> None:
    spec = load_encoder(str(tiny_dinov2), 32).spec
    assert (spec.architecture, spec.width, spec.depth, spec.grid) == ("vit_tiny_patch16_224", 192, 12, (2, 2))
    assert load_encoder(f"timm:vit_tiny_patch16_224@{tiny_dinov2}", 32).spec == spec


def test_dinov2_sees_fourteen_pixels_per_sixteen(tmp_path: Path) -> None:
    assert InputRule().sizes((256, 128), 14, "dinov2") == ((16, 8), (224, 112))
    assert InputRule(8, 64).sizes((28, 28), 8, "starter") == ((8, 8), (64, 64))
    assert InputRule(8, 64).sizes((32, 64), 8, "starter") == ((8, 16), (64, 128))
    assert InputRule(8, 64).sizes((128, 128), 8, "starter") == ((16, 16), (128, 128))


def test_table_names_the_shapes_of_its_architectures() -> None:
    for known in encoders.KNOWN_ENCODERS.values():
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in timm.create_model(known.architecture).state_dict().items()}
        width, *_, patch_size = shapes["patch_embed.proj.weight"]
        depth = len([key for key in shapes if key.endswith(".norm1.weight")])
        found = (width, depth, patch_size, shapes["reg_token"][1] if "reg_token" in shapes else 0)
        assert found == (known.width, known.depth, known.patch_size, known.registers)


def test_network_without_class_token_gives_the_mean_of_its_patches(tmp_path: Path) -> None:
    arguments = {**SMALL, "class_token": False, "global_pool": ""}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": arguments}))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    described = load_encoder(str(tmp_path), 64, layers=[4]).describe(random_pixels(64, 64))
    torch.testing.assert_close(described.class_token, described.features.mean(dim=(2, 3)))


def refusal(name: str | Path, image_size: int = 64, layers: list[int] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_encoder(str(name), image_size, layers)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_name_lists_the_valid_ones() -> None:
    message = refusal("dinov9")
    assert all(name in message for name in encoder_names())
    assert "no model 'nonsense'" in refusal("timm:nonsense")


def test_missing_network_says_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr(encoders, "hf_hub_download", offline)
    message = refusal("dinov2-b-reg")
    assert "model.safetensors of timm/vit_base_patch14_reg4_dinov2.lvd142m" in message
    assert "dinov2-b-reg@FILE" in message


def test_unfitting_files_are_refused_by_name(folder: Path, tmp_path: Path, tiny_dinov2: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not weights")
    save_file({"weight": torch.zeros(3)}, tmp_path / "alien.safetensors")
    assert "text.safetensors is not a safetensors file" in refusal(tmp_path / "text.safetensors")
    assert "0 blocks" in refusal(tmp_path / "alien.safetensors")
    assert "does not fit the network" in refusal(f"dinov2-s@{tiny_dinov2}")
    assert "there is no file" in refusal(f"tiny@{tmp_path}/nowhere")
    (folder / "config.json").write_text("{")
    assert "config.json is not in timm's layout" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refusal(folder)


def test_network_without_patch_tokens_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    assert "not a vision transformer" in refusal(folder)


@pytest.mark.parametrize("size", [40, 8])
def test_image_size_must_fit_the_patches(folder: Path, size: int) -> None:
    assert "multiples of 16 pixels" in refusal(folder, size)


@pytest.mark.parametrize("layers", [[5], [-1], []])
def test_layers_must_exist(folder: Path, layers: list[int]) -> None:
    assert "blocks 0 to 4" in refusal(folder, 64, layers)


@pytest.mark.parametrize(("image_size", "grid"), [(28, 8), (32, 8), (64, 8), (128, 16)])
def test_starter_describes_images_of_at_least_64_pixels(image_size: int, grid: int) -> None:
    encoder = load_encoder("starter", image_size)
    described = encoder.describe(random_pixels(image_size, image_size))
    assert encoder.spec.grid == described.features.shape[-2:] == (grid, grid)
    assert described.features.shape[1] == 4 * encoder.spec.width == encoder.spec.feature_channels
    assert encoder.spec.name == "starter"


def test_starter_tells_a_bar_from_a_box() -> None:
    bar, box = torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    for shift in range(3):
        bar[shift, :, 4:28, 13 + shift : 17 + shift] = 255
        box[shift, :, 6:26, 6 + shift : 26 + shift] = 255
        box[shift, :, 10:22, 10 + shift : 22 + shift] = 0
    tokens = load_encoder("starter", 32).describe(torch.cat([bar, box])).class_token
    nearest_other = (torch.cdist(tokens, tokens) + torch.diag(torch.full((6,), torch.inf))).argmin(dim=1)
    assert (nearest_other < 3).tolist() == [True] * 3 + [False] * 3


def test_starter_is_small() -> None:
    folder = resources.files("reglue.starter") / "encoder"
    assert all(len(file.read_bytes()) < 5e6 for file in folder.iterdir())
