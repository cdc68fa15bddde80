"""Heads on disk, and the linear heads that DINOv2's authors published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.encoders.vision import VisionFeatures
from reglue.errors import UserError
from reglue.perception.heads import Head, HeadSpec, load_head

WIDTH = 384
"""Of DINOv2-S, the narrowest network with published heads."""


def published_segmentation(classes: int, channels: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "decode_head.conv_seg.weight": torch.randn(classes, channels, 1, 1),
        "decode_head.conv_seg.bias": torch.randn(classes),
        "decode_head.bn.weight": torch.randn(channels),
        "decode_head.bn.bias": torch.randn(channels),
        "decode_head.bn.running_mean": torch.randn(channels),
        "decode_head.bn.running_var": torch.rand(channels) + 0.1,
        "decode_head.bn.num_batches_tracked": torch.tensor(7),
    }


def published_depth(channels: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(256, 2 * channels, 1, 1) / channels**0.5
    return {"decode_head.conv_depth.weight": weight, "decode_head.conv_depth.bias": torch.randn(256)}


@pytest.mark.parametrize("as_safetensors", [False, True])
@pytest.mark.parametrize(("classes", "layers"), [(21, (11,)), (150, (8, 9, 10, 11))])
def test_a_published_segmentation_head_is_its_batch_norm_and_convolution(
    classes: int, layers: tuple[int, ...], as_safetensors: bool, tmp_path: Path
) -> None:
    channels = WIDTH * len(layers)
    tensors = published_segmentation(classes, channels)
    file = tmp_path / f"dinov2_vits14_head.{'safetensors' if as_safetensors else 'pth'}"
    if as_safetensors:
        save_file(tensors, file)
    else:
        torch.save({"meta": {"epoch": 1}, "state_dict": tensors}, file)
    head = load_head(file)
    assert (head.spec.task, head.spec.width, head.spec.layers, head.spec.final_norm) == (
        "segmentation", WIDTH, layers, True,
    )  # fmt: skip
    assert head.spec.architecture == "vit_small_patch14_dinov2.lvd142m"
    assert (len(head.spec.class_names), head.spec.class_names[-1]) == (classes, {21: "tvmonitor", 150: "149"}[classes])
    norm, convolution = nn.BatchNorm2d(channels), nn.Conv2d(channels, classes, 1)
    own = {name.removeprefix("decode_head."): value for name, value in tensors.items()}
    norm.load_state_dict({name[3:]: value for name, value in own.items() if name.startswith("bn.")})
    convolution.load_state_dict({name[9:]: value for name, value in own.items() if name.startswith("conv_seg.")})
    features = torch.randn(2, channels, 3, 4)
    expected = F.interpolate(convolution(norm.eval()(features)), (12, 16), mode="bilinear")
    seen = VisionFeatures(torch.empty(2, 0), features)
    assert torch.allclose(head(seen, layers, (12, 16)), expected, atol=1e-3)
    # Of more layers than it reads, it finds its own.
    more = VisionFeatures(torch.empty(2, 0), torch.cat([torch.randn(2, WIDTH, 3, 4), features], dim=1))
    assert torch.equal(head.predict(more, (0, *layers), (12, 16)), head.predict(seen, layers, (12, 16)))


@pytest.mark.parametrize(("name", "farthest"), [("nyu", 10.0), ("kitti", 80.0)])
@pytest.mark.parametrize("layers", [(11,), (2, 5, 8, 11)])
def test_a_published_depth_head_is_a_mean_over_bins(
    name: str, farthest: float, layers: tuple[int, ...], tmp_path: Path
) -> None:
    file, tensors = tmp_path / f"dinov2_vits14_{name}_linear_head.pth", published_depth(WIDTH * len(layers))
    torch.save({"state_dict": tensors}, file)
    head = load_head(file)
    assert (head.spec.layers, head.spec.final_norm, head.spec.class_token) == (layers, False, True)
    assert head.spec.depth_range == (0.001, farthest)
    tokens, features = torch.randn(2, WIDTH * len(layers)), torch.randn(2, WIDTH * len(layers), 2, 3)
    # In the order of the layers: features, then the class token at every position.
    parts: list[Tensor] = []
    for of_layer, token in zip(features.split(WIDTH, 1), tokens.split(WIDTH, 1), strict=True):
        parts += [of_layer, token[..., None, None].expand_as(of_layer)]
    large = F.interpolate(torch.cat(parts, 1), scale_factor=4, mode="bilinear")
    weight, bias = tensors.values()
    scores = F.conv2d(large, weight, bias).relu() + 0.1
    share = scores / scores.sum(1, keepdim=True)
    depth = (share * torch.linspace(0.001, farthest, 256)[:, None, None]).sum(1, keepdim=True)
    told = head(VisionFeatures(torch.empty(2, 0), features, tokens), layers, (20, 30))
    assert torch.allclose(told, F.interpolate(depth, (20, 30), mode="bilinear"), atol=1e-3)
    assert 0 < told.min() < told.max() < farthest


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(3)}, "holds no linear head of DINOv2"),
        (published_segmentation(21, 100), "holds no linear head of DINOv2"),
        ({k: v for k, v in published_segmentation(21, WIDTH).items() if "running" not in k}, "batch norm"),
    ],
)
def test_other_files_are_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "file.pth")
    with pytest.raises(UserError, match=message):
        load_head(tmp_path / "file.pth")


DAMAGE: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "NaN": lambda head: head["decode_head.conv_seg.weight"][0, 0].fill_(torch.nan),
    "infinity": lambda head: head["decode_head.bn.bias"][0].fill_(torch.inf),
    "a negative variance": lambda head: head["decode_head.bn.running_var"].fill_(-1),
    "a view of one number": lambda head: head.update({"decode_head.bn.bias": torch.zeros(1).expand(10**7, 10**6)}),
    "a scalar": lambda head: head.update({"decode_head.conv_seg.weight": torch.tensor(1.0)}),
    "another bias": lambda head: head.update({"decode_head.conv_seg.bias": torch.zeros(2)}),
    "no class": lambda head: head.update({"decode_head.conv_seg.weight": torch.zeros(0, 384, 1, 1)}),
    "no class at all": lambda head: head.update(
        {"decode_head.conv_seg.weight": torch.zeros(0, 384, 1, 1), "decode_head.conv_seg.bias": torch.zeros(0)}
    ),
    "complex": lambda head: head.update(
        {"decode_head.conv_seg.weight": head["decode_head.conv_seg.weight"] * torch.tensor(1j)}
    ),
    "beyond float32": lambda head: head.update({"decode_head.bn.bias": head["decode_head.bn.bias"].double() + 1e300}),
    "no norm": lambda head: head.pop("decode_head.bn.running_var"),
    "sparse": lambda head: head.update({"decode_head.bn.bias": torch.eye(3).to_sparse()}),
    "nothing": lambda head: head.clear(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_a_published_head_is_one_line(damage: str, tmp_path: Path) -> None:
    head = published_segmentation(21, 384)
    file = tmp_path / "dinov2_vits14_voc2012_linear_head.pth"
    torch.save(head, file)
    load_head(file)
    DAMAGE[damage](head)
    torch.save(head, file)
    with pytest.raises(UserError) as caught:
        load_head(file)
    assert file.name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    for cut in (0, 100, len(file.read_bytes()) // 2):
        (tmp_path / "cut.pth").write_bytes(file.read_bytes()[:cut])
        with pytest.raises(UserError, match=r"cut\.pth"):
            load_head(tmp_path / "cut.pth")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"trap\.pth: holds more than data"):
        load_head(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


SPEC = HeadSpec("segmentation", "vit", 8, (3,), 2, class_names=("a", "b"), hidden=4, encoder="somewhere")


def test_a_head_comes_back_from_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = Head(SPEC, torch.randn(8), torch.rand(8) + 0.5)
    head.save(tmp_path)
    again = load_head(tmp_path)
    assert again.spec == head.spec
    seen = VisionFeatures(torch.empty(1, 0), torch.randn(1, 8, 4, 4))
    assert torch.equal(again(seen, (3,), (8, 8)), head(seen, (3,), (8, 8)))


def test_a_damaged_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such head"):
        load_head(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no head\.json"):
        load_head(tmp_path)
    Head(SPEC).save(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"head\.safetensors is damaged"):
        load_head(tmp_path)
    (tmp_path / "head.json").write_text("{}")
    with pytest.raises(UserError, match=r"head\.json is damaged"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        *({"layers": layers} for layers in ([], [-1], [10**18], [3, 3], [4, 3])),
        *({name: number} for name in ("width", "outputs") for number in (0, -1, 10**18)),
        {"hidden": -1},
        {"hidden": 10**18},
        *({"class_names": names} for names in (["a"], ["a", "b", "c"])),
        *({"depth_range": depths} for depths in ([1, 0], [0], [0, 1, 2])),
    ],
    ids=repr,
)
def test_a_head_that_cannot_be_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    Head(SPEC).save(tmp_path)
    file = tmp_path / "head.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=r"head\.(json is damaged|safetensors does not fit)") as caught:
        load_head(tmp_path)
    assert "\n" not in str(caught.value)
