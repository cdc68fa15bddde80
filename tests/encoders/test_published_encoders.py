"""Vision encoders as others publish them: Meta's checkpoints, transformers' folders, PyTorch's pickles, shards.

The networks are timm's, made small; their tensors are written by the names that Meta and transformers have for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from reglue.encoders import known as known_encoders
from reglue.encoders.known import DINO_V2, DINO_V3, KnownEncoder
from reglue.encoders.vision import VisionFeatures, load_encoder
from reglue.errors import UserError

Tensors = dict[str, Tensor]
SIZES: dict[str, Any] = {"embed_dim": 32, "depth": 4, "num_heads": 2}
KINDS = {
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", DINO_V2, 14, 0),
    "dinov2_with_registers": ("vit_small_patch14_reg4_dinov2.lvd142m", DINO_V2, 14, 4),
    "dinov3_vit": ("vit_small_patch16_dinov3.lvd1689m", DINO_V3, 16, 4),
}
"""By transformers' model type."""


@pytest.fixture(autouse=True)
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's networks are made as small as these."""
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **changes: create_model(*names, **{**SIZES, **changes}))
    table = {
        kind: KnownEncoder(architecture, family, SIZES["embed_dim"], SIZES["depth"], patch, registers)
        for kind, (architecture, family, patch, registers) in KINDS.items()
    }
    monkeypatch.setattr(known_encoders, "KNOWN_ENCODERS", table)
    monkeypatch.setattr("reglue.encoders.vision.KNOWN_ENCODERS", table)
    monkeypatch.setattr("reglue.encoders.vision.HEAD_WIDTH", 16)


def network_of(kind: str) -> Any:
    torch.manual_seed(0)
    network = timm.create_model(KINDS[kind][0], num_classes=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def expected(kind: str, folder: Path) -> VisionFeatures:
    """By timm's own names."""
    save_file(network_of(kind).state_dict(), folder / "reference.safetensors")
    return described(f"timm:{KINDS[kind][0]}@{folder / 'reference.safetensors'}")


def described(name: str | Path) -> VisionFeatures:
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder = load_encoder(str(name), (64, 96))
    found = encoder.describe(pixels)
    assert found.features.shape == (2, 4 * 32, 4, 6)
    return found


def as_published(kind: str) -> Tensors:
    """The tensors as Meta has them."""
    state = {key: value.clone() for key, value in network_of(kind).state_dict().items()}
    if kind == "dinov2_with_registers":  # timm adds the class token's position to the token.
        position = torch.randn(1, 1, 32)
        state["cls_token"] -= position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
        state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.randn(1, 32)
    if kind != "dinov3_vit":
        return state
    state["storage_tokens"] = state.pop("reg_token")
    state["rope_embed.periods"] = torch.randn(8)
    for block in range(4):
        state[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(96)
        state[f"blocks.{block}.attn.qkv.bias_mask"] = torch.full((96,), torch.nan)
        for part in "12":
            state[f"blocks.{block}.ls{part}.gamma"] = state.pop(f"blocks.{block}.gamma_{part}")
    return state


def as_transformers(kind: str) -> Tensors:
    """The tensors as transformers has them."""
    state = as_published(kind)
    third = kind == "dinov3_vit"
    found: Tensors = {}
    for key, value in state.items():
        if key.endswith(("bias_mask", "periods")):
            continue
        new = re.sub(r"^blocks\.", "layer." if third else "encoder.layer.", key)
        new = re.sub(r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1", new)
        new = re.sub(r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1", new)
        new = new.replace("storage_tokens", "embeddings.register_tokens")
        new = re.sub(r"^pos_embed$", "embeddings.position_embeddings", new)
        new = new.replace("patch_embed.proj", "embeddings.patch_embeddings" + ("" if third else ".projection"))
        new = new.replace("attn.proj", "attention.o_proj" if third else "attention.output.dense")
        if third:
            new = new.replace("mlp.fc1", "mlp.up_proj").replace("mlp.fc2", "mlp.down_proj")
        else:
            new = re.sub(r"^norm\.", "layernorm.", new)
        if "attn.qkv" not in new:
            found[new] = value.reshape(1, 1, 32) if key == "mask_token" and third else value
            continue
        for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
            if third and name == "key" and key.endswith("bias"):
                continue
            own = f"attention.{name[0]}_proj" if third else f"attention.attention.{name}"
            found[new.replace("attn.qkv", own)] = part.clone()
    return found


def write_transformers(folder: Path, kind: str, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(as_transformers(kind), folder / "model.safetensors", {"format": "pt"})
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": KINDS[kind][2]}
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **sizes, **config}))
    return folder


each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("wrapped", [None, "model", "teacher"])
def test_metas_checkpoints_are_read_and_recognised(kind: str, wrapped: str | None, tmp_path: Path) -> None:
    state: Any = as_published(kind)
    if wrapped == "teacher":
        state = {f"module.backbone.{key}": value for key, value in state.items()} | {"dino_head.last": torch.zeros(3)}
    torch.save({wrapped: state, "epoch": 3} if wrapped else state, tmp_path / "pretrain.pth")
    wanted = expected(kind, tmp_path)
    for name in (tmp_path / "pretrain.pth", f"timm:{KINDS[kind][0]}@{tmp_path / 'pretrain.pth'}"):
        torch.testing.assert_close(described(name), wanted)


@each_kind
def test_folders_of_transformers_are_read(kind: str, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "folder", kind)
    wanted = expected(kind, tmp_path)
    torch.testing.assert_close(described(folder), wanted)
    torch.testing.assert_close(described(folder / "model.safetensors"), wanted)
    assert load_encoder(str(folder), 64).spec.architecture == KINDS[kind][0]


@each_kind
def test_networks_of_transformers_may_have_other_heads_than_the_tables(kind: str, tmp_path: Path) -> None:
    """Which the shapes do not show."""
    folder = write_transformers(tmp_path / "folder", kind, num_attention_heads=4)
    found, wanted = described(folder), expected(kind, tmp_path)
    assert not torch.allclose(found.class_token, wanted.class_token)
    network: Any = load_encoder(str(folder), 64).network
    assert network.blocks[0].attn.num_heads == 4


def test_other_networks_of_transformers_are_named(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "folder", "dinov2", model_type="clip_vision_model")
    message = refusal(folder)
    assert "model_type 'clip_vision_model'" in message
    assert "dinov2, dinov2_with_registers, dinov3_vit can be read" in message


def test_biases_without_a_place_are_named(tmp_path: Path) -> None:
    state = as_published("dinov3_vit")
    state["blocks.2.attn.qkv.bias"] = torch.ones(96)
    torch.save(state, tmp_path / "biased.pth")
    message = refusal(tmp_path / "biased.pth")
    assert "give it as timm:vit_small_patch16_dinov3_qkvb.lvd1689m@FILE" in message
    load_encoder(f"timm:vit_small_patch16_dinov3_qkvb.lvd1689m@{tmp_path / 'biased.pth'}", 64)


# ---- in which files a folder may have its weights


def shards(folder: Path, state: Tensors, ending: str, variant: str = "") -> None:
    save, stem = (save_file, "model") if ending == "safetensors" else (torch.save, "pytorch_model")
    places = {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        file = f"{stem}-{number:05d}-of-00002{variant}.{ending}"
        save({name: state[name] for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.{ending}.index{variant}.json").write_text(json.dumps(content))


LAYOUTS: dict[str, Callable[[Path, Tensors], Any]] = {
    "model.safetensors": lambda folder, state: save_file(state, folder / "model.safetensors"),
    "model.fp16.safetensors": lambda folder, state: save_file(state, folder / "model.fp16.safetensors"),
    "pytorch_model.bin": lambda folder, state: torch.save(state, folder / "pytorch_model.bin"),
    "pytorch_model.fp16.bin": lambda folder, state: torch.save(state, folder / "pytorch_model.fp16.bin"),
    "model.pth": lambda folder, state: torch.save(state, folder / "model.pth"),
    "safetensors by the name of a pickle": lambda folder, state: save_file(state, folder / "pytorch_model.bin"),
    "shards": lambda folder, state: shards(folder, state, "safetensors"),
    "shards of a variant": lambda folder, state: shards(folder, state, "safetensors", ".fp16"),
    "shards of pickles": lambda folder, state: shards(folder, state, "bin"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_a_folder_may_be_in_other_files(layout: str, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "folder", "dinov2")
    (folder / "model.safetensors").unlink()
    (folder / "optimizer.bin").write_bytes(b"no weights")
    LAYOUTS[layout](folder, as_transformers("dinov2"))
    torch.testing.assert_close(described(folder), expected("dinov2", tmp_path))


def test_pickles_by_the_name_of_safetensors_are_named(tmp_path: Path) -> None:
    torch.save(as_published("dinov2"), tmp_path / "weights.safetensors")
    assert "weights.safetensors is PyTorch's and no safetensors; rename it to weights.pth" in refusal(
        tmp_path / "weights.safetensors"
    )


def test_full_precision_goes_before_half_and_safetensors_before_pickles(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "folder", "dinov2")
    for layout in list(LAYOUTS)[1:5]:
        LAYOUTS[layout](folder, {"other": torch.zeros(1)})
    torch.testing.assert_close(described(folder), expected("dinov2", tmp_path))


def test_shards_that_are_missing_or_elsewhere_are_named(tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "folder", "dinov2")
    (folder / "model.safetensors").unlink()
    shards(folder, as_transformers("dinov2"), "safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for places in ({"a": "../model.safetensors"}, {"a": 3}, {}, [], "text"):
        index.write_text(json.dumps({"weight_map": places}))
        assert "index.json is damaged (its weight_map names no files beside it)" in refusal(folder)
    index.write_text(json.dumps(content))
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing, of the 2 files" in refusal(folder)


# ---- what is refused


def refusal(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_encoder(str(name), 64)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700, message
    return message


@pytest.mark.parametrize(
    ("names", "kind"),
    [(as_published, "dinov3_vit"), (as_transformers, "dinov2_with_registers"), (as_transformers, "dinov3_vit")],
)
def test_any_tensor_may_be_missing_or_another(names: Callable[[str], Tensors], kind: str, tmp_path: Path) -> None:
    folder = write_transformers(tmp_path / "folder", kind)
    state = {name: tensor.contiguous() for name, tensor in names(kind).items()}
    file = tmp_path / "weights.safetensors" if names is as_published else folder / "model.safetensors"
    asked = f"{kind}@{file}" if names is as_published else folder
    for name in [name for name in state if not re.search(r"(blocks|layer)\.[123]\.|norm|mlp|gamma|lambda", name)]:
        for other in (None, torch.tensor(1.0), torch.zeros(2)):
            changed = {key: tensor for key, tensor in state.items() if key != name}
            save_file(changed if other is None else changed | {name: other}, file)
            try:  # Some are not needed.
                load_encoder(str(asked), 64)
            except UserError as error:
                message = str(error)
                assert "\n" not in message
                assert len(message) < 700
                assert str(tmp_path) in message, name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: tensor.to(dtype) for key, tensor in network_of("dinov2").state_dict().items()}
    state["blocks.1.mlp.fc1.weight"][3, 4] = value
    save_file(state, tmp_path / "weights.safetensors")
    message = refusal(tmp_path / "weights.safetensors")
    assert "weights.safetensors is damaged (1 of the 4096 numbers in blocks.1.mlp.fc1.weight are NaN" in message


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64, torch.uint8])
def test_numbers_without_use_are_refused(dtype: torch.dtype, ending: str, tmp_path: Path) -> None:
    state = network_of("dinov2").state_dict()
    name = "blocks.1.mlp.fc1.weight"
    state[name] = state[name].to(dtype)
    state[name][3, 4] = 1e300 if dtype.is_floating_point else torch.nan if dtype.is_complex else 3
    file = tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else torch.save)(state, file)
    reason = f"1 of the 4096 numbers in {name} are" if dtype.is_floating_point else f"the numbers in {name} are of the"
    assert f"{file} is damaged ({reason}" in refusal(file)


def test_large_numbers_are_finite(tmp_path: Path) -> None:
    """Though their sum is not."""
    state = network_of("dinov2").state_dict()
    state["blocks.1.mlp.fc1.bias"][:4] = torch.finfo(torch.float32).max
    save_file(state, tmp_path / "weights.safetensors")
    load_encoder(str(tmp_path / "weights.safetensors"), 64)


def wild_pickles() -> Iterator[tuple[str, Any]]:
    yield "a view of one number", {"cls_token": torch.zeros(1).expand(10**6, 10**6)}
    yield "sparse", {"cls_token": torch.eye(3).to_sparse()}
    yield "no tensors", {"epoch": 3}
    yield "a list", [torch.zeros(3)]
    yield "wrapped for ever", {"model": {"model": {"model": {}}}}


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in wild_pickles()])
def test_pickles_of_no_weights_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    assert "weights.pth" in refusal(tmp_path / "weights.pth")
    assert "weights.pth" in refusal(f"dinov2@{tmp_path / 'weights.pth'}")
