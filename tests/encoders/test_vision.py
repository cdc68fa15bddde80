import json
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import cattrs
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

from hub_cache import put_into_hub_cache, use_hub_cache
from reglue.encoders import known as known_encoders
from reglue.encoders.vision import EncoderSpec, InputRule, encoder_names, load_encoder
from reglue.errors import UserError

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
    plain = replace(known_encoders.PLAIN, recognisable=True)
    row = known_encoders.KnownEncoder("vit_tiny_patch16_224", plain, width=192, depth=12, patch_size=16)
    monkeypatch.setitem(known_encoders.KNOWN_ENCODERS, "tiny", row)
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


@pytest.mark.parametrize("name", known_encoders.KNOWN_ENCODERS)
def test_table_names_the_shapes_of_its_architectures(name: str) -> None:
    known = known_encoders.KNOWN_ENCODERS[name]
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in timm.create_model(known.architecture).state_dict().items()}
    width, *_, patch_size = shapes["patch_embed.proj.weight"]
    depth = len([key for key in shapes if key.endswith(".norm1.weight")])
    registers = shapes["reg_token"][1] if "reg_token" in shapes else 0
    assert (width, depth, patch_size, registers) == (known.width, known.depth, known.patch_size, known.registers)
    assert shapes.keys() & known_encoders.DISTINCTIVE_TENSORS == known.family.tensors
    pretrained_cfg = timm.get_pretrained_cfg(known.architecture)
    assert pretrained_cfg is not None
    # Weights come as `model.safetensors` of this repository, which is what timm itself asks for first.
    assert pretrained_cfg.hf_hub_id == f"timm/{known.architecture.replace('_quickgelu', '')}"
    assert pretrained_cfg.hf_hub_filename is None
    assert pretrained_cfg.interpolation == "bicubic"


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Expected(NamedTuple):
    """What a short name must do, written down independently of the table."""

    name: str
    image_size: int
    """At which the network sees images of the size that it was trained at: no position is resampled."""
    input_size: int
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    steps: tuple[str, str]
    prefix_tokens: int
    registers: int = 0
    pooling: str = "class token or mean"


FAMILIES = [
    Expected("dinov2-b", 592, 518, IMAGENET, ("normalise", "resize"), prefix_tokens=1),
    Expected("dinov2-b-reg", 592, 518, IMAGENET, ("normalise", "resize"), prefix_tokens=5, registers=4),
    Expected("dinov3-b", 256, 256, IMAGENET, ("normalise", "resize"), prefix_tokens=5, registers=4),
    Expected("mae-b", 224, 224, IMAGENET, ("normalise", "resize"), prefix_tokens=1),
    Expected("clip-b", 224, 224, OPENAI, ("resize", "normalise"), prefix_tokens=1),
    Expected("clip-l", 256, 224, OPENAI, ("resize", "normalise"), prefix_tokens=1),
    Expected("siglip2-b", 256, 256, HALVES, ("resize", "normalise"), prefix_tokens=0, pooling="attention"),
    Expected("pe-b", 224, 224, HALVES, ("resize", "normalise"), prefix_tokens=1),
    Expected("pe-l", 384, 336, HALVES, ("resize", "normalise"), prefix_tokens=1),
    Expected("pe-g", 512, 448, HALVES, ("resize", "normalise"), prefix_tokens=0, pooling="attention"),
]
each_family = pytest.mark.parametrize("expected", FAMILIES, ids=lambda expected: expected.name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], nn.Module]:
    """Puts the network of a short name, made small, into a hub cache, and returns it. All of timm's are then small."""
    create_model = timm.create_model

    def create_small(*arguments: Any, **changes: Any) -> nn.Module:
        return create_model(*arguments, **{"embed_dim": 32, "depth": 5, "num_heads": 2, **changes})

    def put(name: str) -> nn.Module:
        known = known_encoders.KNOWN_ENCODERS[name]
        torch.manual_seed(0)
        network = create_small(known.architecture)
        with torch.no_grad():
            for parameter in network.parameters():  # As initialised, layer scales and positions hardly show.
                parameter.add_(0.3 * torch.randn_like(parameter))
        weights = tmp_path / "model.safetensors"
        save_file(network.state_dict(), weights)
        pretrained_cfg = timm.get_pretrained_cfg(known.architecture)
        assert pretrained_cfg is not None
        put_into_hub_cache(tmp_path / "cache", str(pretrained_cfg.hf_hub_id), {weights.name: weights})
        return network.eval()

    monkeypatch.setattr(timm, "create_model", create_small)
    use_hub_cache(monkeypatch, tmp_path / "cache")
    return put


def prepared(pixels: torch.Tensor, expected: Expected, steps: tuple[str, ...], size: tuple[int, int]) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in expected.statistics)
    images = pixels / 255
    for step in steps:
        if step == "normalise":
            images = (images - mean) / std
        elif images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic")
    return images


@each_family
@torch.no_grad()
def test_family_says_what_timm_says(hub: Callable[[str], Any], expected: Expected) -> None:
    network = hub(expected.name)
    encoder = load_encoder(expected.name, expected.image_size, layers=[2, 4])
    spec = encoder.spec
    assert spec.input_size == (expected.input_size, expected.input_size)
    assert spec.grid == (expected.image_size // 16, expected.image_size // 16)
    assert (spec.image_mean, spec.image_std) == expected.statistics
    assert (spec.interpolation, spec.antialias, spec.final_norm) == ("bicubic", False, True)
    assert (spec.steps, spec.pooling) == (expected.steps, expected.pooling)
    assert (spec.prefix_tokens, spec.registers) == (expected.prefix_tokens, expected.registers)

    pixels = random_pixels(expected.image_size, expected.image_size, count=1)
    images = prepared(pixels, expected, expected.steps, spec.input_size)
    assert torch.equal(encoder.preprocess(pixels), images)
    if spec.input_size != spec.image_size:
        other = prepared(pixels, expected, expected.steps[::-1], spec.input_size)
        assert not torch.equal(encoder.preprocess(pixels), other), "the order makes no difference here"

    described = encoder.describe(pixels)
    tokens = network.forward_features(images)
    patches = tokens[:, expected.prefix_tokens :].mT.unflatten(2, spec.grid)
    torch.testing.assert_close(described.features[:, 32:], patches)
    assert not torch.allclose(described.features[:, :32], patches, atol=0.1)
    pooled = tokens[:, 0] if expected.prefix_tokens else network.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(described.class_token, pooled)


@each_family
@pytest.mark.parametrize("image_size", [(64, 64), (32, 96), (512, 512)], ids=str)
@torch.no_grad()
def test_family_works_at_other_sizes(
    hub: Callable[[str], Any], expected: Expected, image_size: tuple[int, int], tmp_path: Path
) -> None:
    hub(expected.name)
    encoder = load_encoder(expected.name, image_size, layers=[4])
    spec = encoder.spec
    assert spec.grid == (image_size[0] // 16, image_size[1] // 16)
    assert spec.input_size == (spec.grid[0] * spec.patch_size, spec.grid[1] * spec.patch_size)
    pixels = random_pixels(*image_size, count=1)
    described = encoder.describe(pixels)
    assert described.features.shape == (1, 32, *spec.grid)

    own = {"file": str(tmp_path / "model.safetensors")}
    network: Any = timm.create_model(
        spec.architecture, pretrained=True, pretrained_cfg_overlay=own, img_size=spec.input_size
    )
    tokens = network.eval().forward_features(encoder.preprocess(pixels))
    torch.testing.assert_close(described.features.flatten(2).mT, tokens[:, expected.prefix_tokens :])


def test_final_norm_may_be_left_out(hub: Callable[[str], Any]) -> None:
    network = hub("dinov2-b")
    encoder = load_encoder("dinov2-b", 64, layers=[1, 4], final_norm=False)
    normed = load_encoder("dinov2-b", 64, layers=[1, 4])
    assert encoder.spec.final_norm is False
    assert encoder.spec != normed.spec
    pixels = random_pixels(64, 64)
    bare, described = encoder.describe(pixels), normed.describe(pixels)
    for layer, expected in zip(bare.features.split(32, 1), described.features.split(32, 1), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(network.norm(layer.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), expected)
        assert not torch.allclose(layer, expected, atol=0.1)
    assert torch.equal(bare.class_token, described.class_token)


@each_family
def test_file_in_which_a_tensor_is_missing_is_refused(
    hub: Callable[[str], nn.Module], expected: Expected, tmp_path: Path
) -> None:
    # Files with a classifier, as CLIP's and PE's, would leave the missing tensor at random values if timm had its way.
    state = hub(expected.name).state_dict()
    del state["blocks.3.mlp.fc2.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    message = refusal(f"{expected.name}@{tmp_path / 'cut.safetensors'}", 64)
    assert "cut.safetensors does not fit the network" in message
    assert "blocks.3.mlp.fc2.weight" in message


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


def test_missing_network_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub_cache(monkeypatch, tmp_path)
    message = refusal("dinov2-b-reg")
    assert "model.safetensors of timm/vit_base_patch14_reg4_dinov2.lvd142m" in message
    assert "dinov2-b-reg@FILE" in message
    assert "timm/vit_base_patch16_siglip_384.v2_webli" in refusal("timm:vit_base_patch16_siglip_384.v2_webli")


@pytest.mark.parametrize("name", known_encoders.KNOWN_ENCODERS)
def test_file_is_recognised_unless_others_look_like_it(name: str, tmp_path: Path) -> None:
    """Weights of nothing but the right shapes: zeros, of which one value is stored."""
    known = known_encoders.KNOWN_ENCODERS[name]
    sizes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (known.width, 3, known.patch_size, known.patch_size)
    }
    if known.registers:
        sizes["reg_token"] = (1, known.registers, 1)
    shapes = {
        **sizes,
        **{f"blocks.{i}.norm1.weight": (1,) for i in range(known.depth)},
        **dict.fromkeys(known.family.tensors, (1,)),
    }
    save_file({key: torch.zeros(shape, dtype=torch.uint8) for key, shape in shapes.items()}, tmp_path / "file")
    if name.startswith(("mae", "dino-", "clip")):
        with pytest.raises(UserError, match=f"more than one network: say which, as .*{name}@{tmp_path}/file") as caught:
            known_encoders.recognise(tmp_path / "file")
        assert ("mae-b@" in str(caught.value)) == (name in ("mae-b", "dino-b"))
    else:
        assert known_encoders.recognise(tmp_path / "file") == name


def test_unfitting_files_are_refused_by_name(folder: Path, tmp_path: Path, tiny_dinov2: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not weights")
    save_file({"weight": torch.zeros(3)}, tmp_path / "alien.safetensors")
    assert "text.safetensors is damaged" in refusal(tmp_path / "text.safetensors")
    assert "0 blocks" in refusal(tmp_path / "alien.safetensors")
    assert "does not fit the network" in refusal(f"dinov2-s@{tiny_dinov2}")
    assert "there is no file" in refusal(f"tiny@{tmp_path}/nowhere")
    (folder / "config.json").write_text("{")
    assert "config.json is damaged" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        *({"architecture": name} for name in ("hf-hub:evil/x", "hf_hub:evil/x", "local-dir:/other", "x", "", 3, None)),
        *(
            {"model_args": SMALL | {name: value}}
            for name in ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained",
                         "pretrained_strict", "pretrained_filter_fn", "scriptable", "model_name", "device", "dtype")
            for value in ("/other/weights.pth", {"file": "/other/weights.pth"})
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_folder_is_all_that_timm_reads(
    changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "small", **changes)
    monkeypatch.setattr(timm.models, "load_checkpoint", lambda *_: pytest.fail("it read another file"))
    monkeypatch.setattr("timm.models._registry.model_entrypoint", lambda *_: pytest.fail("it was to be built"))
    message = refusal(tmp_path / "small")
    assert f"{tmp_path / 'small' / 'config.json'}: " in message
    assert "timm has no architecture" in message or "which is nothing of a network; take it out" in message


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


@pytest.mark.trains
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
