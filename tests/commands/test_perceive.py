"""Heads and what they see in latents: trained, applied on every path, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from helpers import TINY_RECIPE, mistake
from reglue.cli import parse
from reglue.commands import perceive as module
from reglue.commands.autoencode import autoencode
from reglue.commands.compress import Compress, compress
from reglue.commands.perceive import Perceive, Perception, perceive
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.sample import Sample, sample
from reglue.commands.train import train
from reglue.commands.train_head import HeadRecord, TrainHead, train_head
from reglue.data.images import ImageFolder
from reglue.encoders.alignment import (
    AlignmentNetwork,
    AlignmentSpec,
    at_usual_length,
    load_alignment,
    save_alignment,
)
from reglue.encoders.autoencoders import Autoencoder, AutoencoderSpec, Moments
from reglue.encoders.vision import load_encoder
from reglue.files import read_json
from reglue.perception.heads import Head, HeadSpec, load_head
from reglue.training import precision

PATCH, SIDE = 4, 16
"""Image pixels along a side of the tiny encoder's patches, and of its images."""


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_encoder: str) -> Path:
    """An autoencoder of three steps with an alignment network."""
    return autoencode(
        parse(aligned_options(tiny_images, tmp_path_factory.mktemp("aligned") / "autoencoder", tiny_encoder))
    )


def aligned_options(images: Path, out: Path, encoder: str) -> list[str]:
    return [
        *("autoencode", str(images), str(out), "--encoder", encoder, "--resolution=16", "--device=cpu"),
        *("--architecture.widths", "4", "8", "--architecture.norm-groups=2", "--architecture.layers-per-block=1"),
        *("--architecture.latent-channels=3", "--architecture.no-attention", "--perceptual.network", "encoder"),
        *("--alignment.hidden=16", "--adversary.weight=0", "--optimisation.steps=3", "--optimisation.batch-size=4"),
        *("--validation=0.25", "--workers=0", "--log-every=3"),
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_encoder: str, aligned: Path) -> Path:
    """A store in the space of that autoencoder."""
    folder = tmp_path_factory.mktemp("store") / "store"
    prepare(Prepare(tiny_images, folder, SIDE, str(aligned), tiny_encoder, features=True, workers=0, device="cpu"))
    compress(Compress(folder, "conv", channels=4, hidden=8, epochs=1, device="cpu"))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(parse(["train", "reglue", "--store", str(store), "--out", str(folder), *TINY_RECIPE,
                 "--optimisation.steps=3"]))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Path:
    """`masks` of what is brighter than grey, and `depths` of brightness, of the tiny images."""
    folder = tmp_path_factory.mktemp("annotated")
    for name in ImageFolder.open(tiny_images).names:
        grey = np.asarray(Image.open(tiny_images / name).convert("L"))
        for kind, values in (("masks", (grey > 127).astype(np.uint8)), ("depths", grey.astype(np.uint16) * 100 + 1)):
            path = (folder / kind / name).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
    return folder


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, store: Path, annotated: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("heads")
    kinds: dict[str, dict[str, Any]] = {
        "foreground": {"masks": annotated / "masks", "class_names": ("dark", "bright"), "steps": 20},
        "classes": {},
        "depth": {"depth": annotated / "depths"},
        "deep": {"depth": annotated / "depths", "layers": "all"},
    }
    for name, options in kinds.items():
        train_head(TrainHead(store, folder / name, device="cpu", **options))
    return {name: folder / name for name in kinds}


def test_a_run_is_perceived_from_its_latents_and_its_local_map(
    run: Path, heads: dict[str, Path], tmp_path: Path
) -> None:
    paths = tuple(heads.values())
    report = perceive(Perceive(run, tmp_path / "seen", count=5, head=paths, batch_size=2, device="cpu"))
    views = {(one.head, one.view) for one in report.agreement}
    # The alignment network speaks for the last layer alone.
    assert views == {(name, "local") for name in heads} | {(name, "alignment") for name in heads if name != "deep"}
    written = read_json(tmp_path / "seen" / "perception.json", Perception, "")
    assert (written.agreement, written.heads, written.images) == (report.agreement, report.heads, 5)
    assert written.protocol["labels"] == [0, 1, 2, 0, 1]
    for one in report.agreement:
        depth = one.head in ("depth", "deep")
        assert set(one.figures) == ({"correlation", "relative_error"} if depth else {"mean_iou", "pixel_accuracy"})
    for name, view in [*views, ("deep", "encoder"), ("classes", "encoder")]:
        maps = sorted((tmp_path / "seen" / "maps" / name / view).glob("*.png"))
        assert [file.name for file in maps] == [f"{i:06d}.png" for i in range(5)]
        with Image.open(maps[0]) as image:
            assert image.size == (SIDE, SIDE)
            assert image.mode == ("P" if name in ("classes", "foreground") else "I;16")
    with Image.open(tmp_path / "seen" / "picture.png") as picture:
        assert min(picture.size) > 300
    # The images are those of `reglue sample`.
    sample(Sample(run, tmp_path / "drawn", count=5, device="cpu"))
    for i in range(5):
        drawn, kept = (np.asarray(Image.open(tmp_path / place / f"{i:06d}.png")).astype(int)
                       for place in ("drawn", "seen/images"))  # fmt: skip
        assert abs(drawn - kept).max() <= 1


def test_the_batch_size_changes_nothing(aligned: Path, heads: dict[str, Path], tiny_images: Path, tmp_path: Path):
    reports = [
        perceive(
            Perceive(
                aligned,
                tmp_path / str(size),
                count=6,
                batch_size=size,
                device="cpu",
                images=tiny_images,
                head=(heads["foreground"], heads["depth"]),
            )
        )
        for size in (1, 4)
    ]
    assert reports[0].protocol == reports[1].protocol
    assert len(set(reports[0].protocol["names"])) == 6
    for one, other in zip(reports[0].agreement, reports[1].agreement, strict=True):
        assert (one.head, one.view) == (other.head, other.view)
        for name, figure in one.figures.items():
            assert figure.value == pytest.approx(other.figures[name].value, abs=1e-2)
            assert figure.unrelated == pytest.approx(other.figures[name].unrelated, abs=1e-2)


class Blocks(Autoencoder):
    """Latents are the means of 2×2 pixels: exact for images of such blocks."""

    spec = AutoencoderSpec("blocks", "blocks", None, 3, 2, (0.0,) * 3, (1.0,) * 3)

    def encode(self, images: Tensor) -> Moments:
        return Moments(F.avg_pool2d(images, 2), None)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=2.0, mode="nearest")


def draw_blocks(folder: Path, count: int) -> tuple[Path, Path, list[np.ndarray]]:
    """Images whose patches are bright or dark at random, with masks of the bright ones."""
    rng = np.random.default_rng(0)
    truths = []
    for i in range(count):
        bright = rng.integers(0, 2, (SIDE // PATCH,) * 2).astype(np.uint8).repeat(PATCH, 0).repeat(PATCH, 1)
        truths.append(bright)
        shade = np.where(bright, 200, 50)[..., None] + rng.integers(-20, 20, 3)
        for kind, values in (("images", shade.astype(np.uint8)), ("masks", bright)):
            (folder / kind / "class").mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / kind / "class" / f"{i:03d}.png")
    return folder / "images", folder / "masks", truths


def fit_alignment(images: Path, encoder_name: str, folder: Path) -> None:
    """An alignment network that has learned, by cosines, the encoder's features of these images from their latents."""
    encoder = load_encoder(encoder_name, SIDE, layers=[4])
    loaded = ImageFolder.open(images)
    pixels = torch.stack(
        [pixels for i in range(len(loaded)) if isinstance(pixels := loaded.load(i, (SIDE, SIDE)), Tensor)]
    )
    latents, target = Blocks().encode(pixels / 127.5 - 1).mean, encoder.describe(pixels).features
    torch.manual_seed(0)
    described = {**json.loads(json.dumps(replace(encoder.spec).__dict__)), "layers": [1, 4]}
    length = target.square().sum(1).mean().sqrt().item()
    network = AlignmentNetwork(AlignmentSpec(3, 64, encoder.spec.width, encoder.spec.grid, described, length, length))
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        (-F.cosine_similarity(network(latents).patches, target).mean()).backward()
        optimiser.step()
    folder.mkdir()
    save_alignment(network, folder / "alignment.safetensors")


@pytest.mark.trains
def test_a_head_is_right_on_both_paths(
    tiny_encoder: str, tiny_autoencoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, masks, truths = draw_blocks(tmp_path, 40)
    prepare(Prepare(images, tmp_path / "store", SIDE, tiny_autoencoder, tiny_encoder, features=True, workers=0,
                    device="cpu"))  # fmt: skip
    train_head(TrainHead(tmp_path / "store", tmp_path / "bright", masks=masks, steps=150, learning_rate=2e-2,
                         device="cpu"))  # fmt: skip
    record = read_json(tmp_path / "bright" / "training.json", HeadRecord, "")
    assert (record.scores["mean_iou"].value or 0) > 0.8
    fit_alignment(images, tiny_encoder, tmp_path / "aligned")
    monkeypatch.setattr(module, "load_autoencoder", lambda name, device: Blocks())
    report = perceive(Perceive(tmp_path / "aligned", tmp_path / "seen", count=40, images=images, device="cpu",
                               head=(tmp_path / "bright",)))  # fmt: skip
    by_view = {one.view: one.figures["mean_iou"] for one in report.agreement}
    assert (by_view["original"].value, by_view["alignment"].standard_error is None) == (1.0, False)
    assert (by_view["alignment"].value or 0) > 0.85 > (by_view["alignment"].unrelated or 1)
    for view in ("alignment", "encoder"):
        maps = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "seen/maps/bright" / view).glob("*.png"))]
        names = report.protocol["names"]
        right = np.mean([one == truths[int(Path(name).stem)] for one, name in zip(maps, names, strict=True)])
        assert right > 0.85, view


def test_a_class_head_is_the_pooled_classifier_at_every_patch(store: Path, heads: dict[str, Path]) -> None:
    head = load_head(heads["classes"])
    assert head.spec.class_names == ("circle", "square", "stripes")
    record = read_json(heads["classes"] / "training.json", HeadRecord, "")
    assert set(record.scores) == {"accuracy"}
    # Linear: the mean of the patches' scores is the score of their mean, which the classifier was fitted to.
    features = torch.randn(2, head.spec.width, 4, 4)
    scores = head.layers((features - head.mean[:, None, None]) / head.std[:, None, None])
    pooled = head.layers((features.mean((2, 3), keepdim=True) - head.mean[:, None, None]) / head.std[:, None, None])
    assert torch.allclose(scores.mean((2, 3), keepdim=True), pooled, atol=1e-5)


@pytest.mark.trains
def test_a_depth_head_tells_the_depth_it_was_shown(tiny_encoder: str, tiny_autoencoder: str, tmp_path: Path) -> None:
    images, masks, _ = draw_blocks(tmp_path, 40)
    for file in masks.rglob("*.png"):
        depth = np.asarray(Image.open(file)) * 4.0 + 2.0
        depth[:, 0] = 0  # unknown
        (tmp_path / "depths" / "class").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "depths" / "class" / f"{file.stem}.npy", depth)
    prepare(Prepare(images, tmp_path / "store", SIDE, tiny_autoencoder, tiny_encoder, features=True, workers=0,
                    device="cpu"))  # fmt: skip
    head = train_head(TrainHead(tmp_path / "store", tmp_path / "head", depth=tmp_path / "depths", device="cpu"))
    assert head.spec.depth_range == (2.0, 6.0)
    scores = read_json(tmp_path / "head" / "training.json", HeadRecord, "").scores
    assert (scores["correlation"].value or 0) > 0.75
    assert (scores["relative_error"].value or 1) < 0.5


@pytest.mark.trains
def test_a_published_depth_head_reads_latents_that_were_aligned_before_the_final_norm(
    tiny_images: Path, tiny_encoder: str, tmp_path: Path
) -> None:
    """Such heads read features and class token before the norm; alignment gives both at the encoder's own length."""
    folder = autoencode(replace(parse(aligned_options(tiny_images, tmp_path / "autoencoder", tiny_encoder)),
                                final_norm=False))  # fmt: skip
    encoder = load_encoder(tiny_encoder, SIDE, layers=[4], final_norm=False)
    alignment = load_alignment(folder)
    pixels = torch.stack([ImageFolder.open(tiny_images).load(i, (SIDE, SIDE)) for i in range(24)])  # type: ignore[arg-type]
    seen = encoder.describe(pixels)
    assert seen.class_tokens is not None
    assert not torch.allclose(seen.class_tokens, seen.class_token, atol=0.1)
    for known, features in (
        (alignment.spec.patch_length, seen.features),
        (alignment.spec.class_token_length, seen.class_tokens),
    ):
        usual = features.square().sum(1).mean().sqrt().item()
        assert known == pytest.approx(usual, rel=0.2)  # of other images: those held out
    described = at_usual_length(alignment(torch.randn(2, 3, 8, 8)), alignment.spec)
    assert described.patches.norm(dim=1).mean().item() == pytest.approx(alignment.spec.patch_length)

    architecture, width = encoder.spec.architecture, encoder.spec.width
    spec = HeadSpec(
        "depth", architecture, width, (4,), 16, final_norm=False, class_token=True, depth_range=(0.001, 10.0)
    )
    torch.manual_seed(0)
    (tmp_path / "depth").mkdir()
    Head(spec).save(tmp_path / "depth")
    report = perceive(Perceive(folder, tmp_path / "seen", count=6, images=tiny_images, head=(tmp_path / "depth",),
                               device="cpu"))  # fmt: skip
    assert {one.view for one in report.agreement} == {"alignment", "original"}
    assert all("correlation" in one.figures for one in report.agreement)


def edited(head: Path, to: Path, **changes: Any) -> Path:
    """The same head with another spec, and weights that fit that."""
    original = load_head(head)
    to.mkdir()
    Head(replace(original.spec, **changes)).save(to)
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_sha256": "0" * 64}, "the head was made for the encoder"),
        ({"width": 8}, "features of width 8, and the alignment network"),
        (
            {"final_norm": False},
            "`reglue prepare --no-final-norm` and `reglue autoencode --no-final-norm` take the others",
        ),
        ({"layers": (0, 1)}, "layers [0, 1]"),
    ],
)
def test_a_head_of_something_else_is_refused(
    aligned: Path, heads: dict[str, Path], tiny_images: Path, tmp_path: Path, changes: dict[str, Any], message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    other = edited(heads["foreground"], tmp_path / "other", **changes)
    arguments = ("perceive", aligned, "--out", tmp_path / "seen", "--images", tiny_images, "--head", other)
    said = mistake(capsys, monkeypatch, *arguments, "--device=cpu")
    assert message in said
    assert "--head other" in said
    assert not (tmp_path / "seen").exists()


def test_what_cannot_be_perceived_is_said(
    tiny_run: Path, run: Path, aligned: Path, heads: dict[str, Path], tmp_path: Path, tiny_images: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    common = ("--out", tmp_path / "seen", "--device=cpu", "--head", heads["foreground"])
    said = mistake(capsys, monkeypatch, "perceive", tiny_run, *common, "--from", "alignment")
    assert "its autoencoder has no alignment network" in said
    said = mistake(capsys, monkeypatch, "perceive", aligned, *common, "--from", "local", "--images", tiny_images)
    assert "it learns no local map" in said
    assert "draws no images" in mistake(capsys, monkeypatch, "perceive", aligned, *common)
    said = mistake(capsys, monkeypatch, "perceive", run, *common, heads["foreground"])
    assert "another head of the name foreground" in said
    said = mistake(capsys, monkeypatch, "perceive", run, *common, "--encoder", "starter")
    assert "encoder starter is not the one" in said
    assert not (tmp_path / "seen").exists()


@pytest.mark.parametrize(
    "given",
    [["--step", "3"], ["--weaker-run", "nowhere"], ["--classes", "nope"], ["--sampler", "dopri5"], ["--compile"],
     ["--cls-scale", "2"]],
)  # fmt: skip
def test_options_of_drawing_are_refused_where_images_are_encoded(
    given: list[str], tiny_images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    common = ("perceive", tmp_path, "--out", tmp_path / "seen", "--head", tmp_path, "--images", tiny_images)
    said = mistake(capsys, monkeypatch, *common, *given)
    assert f"{given[0]} is about drawing, and with --images nothing is drawn" in said


def test_an_autoencoder_by_itself_takes_no_other(
    aligned: Path, heads: dict[str, Path], tiny_images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    common = ("perceive", aligned, "--out", tmp_path / "seen", "--head", heads["foreground"], "--images", tiny_images)
    said = mistake(capsys, monkeypatch, *common, "--device=cpu", "--autoencoder", "starter")
    assert "--autoencoder replaces that of a run" in said


def test_the_network_is_compiled_for_one_shape(
    run: Path, heads: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    def compiled(function: Callable[..., dict[str, Tensor]], _: torch.device) -> Callable[..., dict[str, Tensor]]:
        def recorded(state: dict[str, Tensor], time: Tensor, condition: dict[str, Tensor]) -> dict[str, Tensor]:
            shapes.append(tuple(condition["class"].shape))
            return function(state, time, condition)

        return recorded

    monkeypatch.setattr(precision, "compiled_for_shapes", compiled)
    options = Perceive(run, tmp_path / "seen", count=3, head=(heads["foreground"],), batch_size=2, device="cpu")
    perceive(replace(options, compile=True, steps=2, guidance_scale=1.0))
    assert set(shapes) == {(2,)}, "the last batch is filled up"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--masks", "masks", "--depth", "depths"], "--masks and --depth"),
        (["--hidden", "4"], "--hidden and --class-names belong to --masks"),
        (["--masks", "nowhere"], "nowhere: no such folder"),
        (["--depth", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_with_heads_are_named(
    store: Path, tmp_path: Path, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert message in mistake(capsys, monkeypatch, "head", store, "--out", tmp_path / "head", *arguments)
    assert not (tmp_path / "head").exists()


def test_an_alignment_network_that_does_not_say_whose_features_it_gives(
    aligned: Path, heads: dict[str, Path], tiny_images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    network = load_alignment(aligned)
    network.spec = replace(network.spec, encoder={})
    (tmp_path / "nameless").mkdir()
    save_alignment(network, tmp_path / "nameless" / "alignment.safetensors")
    said = mistake(
        capsys, monkeypatch, "perceive", tmp_path / "nameless", "--out", tmp_path / "seen", "--device=cpu",
        "--images", tiny_images, "--head", heads["foreground"],
    )  # fmt: skip
    assert "does not say whose features" in said


@pytest.mark.trains
def test_a_local_map_of_the_last_layer_is_read_as_that_layer(
    store: Path, heads: dict[str, Path], tiny_images: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(store, tmp_path / "store"))
    compress(Compress(copied, "pca", layers="last", channels=16, device="cpu"))
    run, head = tmp_path / "run", (heads["foreground"],)
    recipe = [part for part in TINY_RECIPE if "compressor" not in part]
    train(parse(["train", "redi", "--store", str(copied), "--out", str(run), *recipe,
                 "--local.compressor=pca-16-last", "--optimisation.steps=1"]))  # fmt: skip
    options = Perceive(run, tmp_path / "seen", head=head, images=tiny_images, count=4, sources=("local",), device="cpu")
    perceive(options)
    # All components of the last layer are that layer, so that the head sees what it sees in the encoder's features.
    maps = [
        np.stack(
            [np.asarray(Image.open(file)) for file in sorted((tmp_path / "seen/maps/foreground" / view).iterdir())]
        )
        for view in ("local", "original")
    ]
    assert (maps[0] == maps[1]).mean() > 0.85
