"""Editing images with a run: what is held, what is refused, and where it goes."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import reglue
from helpers import OF_ANY_RUN, TINY_RECIPE, draw_masks, mistake, run_reglue
from processes import run_ranks
from reglue.cli import parse
from reglue.commands.edit import edit
from reglue.commands.prototypes import prototypes
from reglue.commands.train_head import train_head
from reglue.commands.verify import Verify, verify
from reglue.diffusion.controls import Control, Unlikeness
from reglue.diffusion.modalities import HIDDEN, State, Times
from reglue.diffusion.samplers import SAMPLERS
from reglue.editing.folder import read_record
from reglue.editing.options import Editing
from reglue.editing.painting import load_prototypes
from reglue.editing.subjects import refuse_lacking
from reglue.errors import UserError

STEPS = ["--steps=3", "--device=cpu"]


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> reglue.ImageModel:
    return reglue.load(tiny_run, device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Path:
    """Images to edit, masks and paintings."""
    folder = tmp_path_factory.mktemp("pictures")
    shutil.copy(tiny_images / "circle" / "000.png", folder / "a.png")
    shutil.copy(tiny_images / "square" / "001.png", folder / "b.png")
    Image.open(folder / "a.png").resize((50, 30)).save(folder / "wide.png")
    Image.open(folder / "a.png").convert("L").save(folder / "grey.png")

    def mask(name: str, size: tuple[int, int], box: tuple[int, int, int, int] | None) -> None:
        picture = Image.new("L", size)
        if box:
            picture.paste(255, box)
        picture.save(folder / name)

    mask("mask.png", (20, 20), (10, 0, 20, 20))
    mask("wide-mask.png", (50, 30), (25, 0, 50, 30))
    mask("full.png", (20, 20), (0, 0, 20, 20))
    mask("empty.png", (20, 20), None)
    mask("margin.png", (50, 30), (0, 0, 6, 30))
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no image")
    painting = np.full((20, 20), 255, np.uint8)
    painting[:10], painting[10:, :10] = 0, 1
    Image.fromarray(painting).save(folder / "painting.png")
    Image.fromarray(painting).resize((50, 30), Image.Resampling.NEAREST).save(folder / "wide-painting.png")
    depth = np.where(painting == 255, 0, 2 + 4 * painting).astype(np.uint8)  # 2 and 6, and 0, which is free
    Image.fromarray(depth).save(folder / "depth.png")
    Image.fromarray(depth).resize((50, 30), Image.Resampling.NEAREST).save(folder / "wide-depth.png")
    Image.fromarray(np.full((20, 20), 7, np.uint8)).save(folder / "unknown.png")
    Image.fromarray(np.full((20, 20), 200, np.uint8)).save(folder / "far.png")
    Image.fromarray(np.full((20, 20), 255, np.uint8)).save(folder / "free.png")
    Image.fromarray(np.zeros((20, 60), np.uint8)).save(folder / "long.png")
    return folder


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, tiny_images: Path) -> Path:
    """Prototypes of what is left and what is right in the images."""
    folder = tmp_path_factory.mktemp("looks")
    masks, out = draw_masks(folder / "masks", tiny_images), folder / "out"
    line = ["prototypes", str(tiny_store), "--masks", str(masks), "--out", str(out), "--column=local.conv-4"]
    made = prototypes(parse([*line, "--looks=2"]))
    assert torch.equal(load_prototypes(out).codes, made.codes)
    assert prototypes(parse([*line, "--looks=2"])).spec == made.spec
    with pytest.raises(UserError, match="holds other files"):
        prototypes(parse(line))
    return out


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, tiny_images: Path) -> Path:
    """A head that sees what is left and what is right."""
    folder = tmp_path_factory.mktemp("head")
    masks = draw_masks(folder / "masks", tiny_images)
    line = ["head", str(tiny_store), "--masks", str(masks), "--out", str(folder / "out"), "--layers=all", "--steps=2"]
    train_head(parse([*line, "--device=cpu"]))
    return folder / "out"


@pytest.fixture(scope="module")
def depth_head(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, tiny_images: Path) -> Path:
    """A head that sees brightness as depth, 2 where it is dark and 6 where it is light."""
    folder = tmp_path_factory.mktemp("depth")
    for file in tiny_images.rglob("*.png"):
        place = folder / "depths" / file.relative_to(tiny_images).with_suffix(".npy")
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, 2 + 4 * np.asarray(Image.open(file).convert("L"), np.float32) / 255)
    line = ["head", str(tiny_store), "--depth", str(folder / "depths"), "--out", str(folder / "out"), "--layers=all"]
    train_head(parse([*line, "--device=cpu"]))
    return folder / "out"


def same(pictures: list[Image.Image], others: list[Image.Image], within: int = 1) -> bool:
    return all(
        np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= within
        for a, b in zip(pictures, others, strict=True)
    )


def test_a_state_is_what_training_reads(model: reglue.ImageModel, tiny_store: Path, tiny_images: Path) -> None:
    """But for the precision in which the store keeps it: float16 for latents' moments and features."""
    store = reglue.Store.open(tiny_store)
    rows = torch.tensor([0])
    (name,) = store.names(rows)
    state = model.encode(tiny_images / name)
    assert list(state) == ["latent", "local", "cls"]
    for modality in model.record.denoiser.modalities:
        stored = store.read(modality.column, rows)
        raw = stored["mean" if modality.name == "latent" else modality.name].float()
        expected = modality.normalise(raw)
        if modality.kind == "map" and raw.shape[2:] != model.record.denoiser.grid:
            expected = torch.nn.functional.interpolate(expected, model.record.denoiser.grid, mode="bilinear")
        torch.testing.assert_close(state[modality.name], expected, rtol=1e-2, atol=1e-2)


def test_everything_kept_and_no_strength_give_the_decoded_image(model: reglue.ImageModel, pictures: Path) -> None:
    image = Image.open(pictures / "a.png").resize((16, 16))
    decoded = [Image.fromarray(one) for one in model.decode(model.encode(image), "truncate")]
    for sampler in OF_ANY_RUN:
        kept = model.edit(image, keep=("latent", "local", "cls"), sampler=sampler, steps=3)
        assert same(kept, decoded, 0), sampler
        assert same(model.edit(image, strength=0.0, sampler=sampler, steps=3), decoded, 0), sampler


@pytest.mark.parametrize("sampler", OF_ANY_RUN)
@pytest.mark.parametrize(
    "changes",
    [
        {"keep": ("local",), "until": 0.4},
        {"mask": "wide-mask.png", "resample": 1, "cls_from": "b.png"},
        {"strength": 0.7, "keep": ("cls",)},
        {"flow_edit": True, "source_class": "square", "mask": "wide-mask.png"},
        {"paint": "wide-painting.png", "head": "HEAD", "mask": "wide-mask.png", "until": {"local": 0.3}},
        {"by": "loss", "mask": "wide-mask.png", "keep": ("local", "cls"), "until": {"cls": 0.5}},
        {"paint": "wide-painting.png", "prototypes": "LOOKS", "strength": 0.8},
        {"paint": "wide-depth.png", "head": "DEPTH", "mask": "wide-mask.png"},
        {"keep": ("features",), "until": {"features": 0.3}, "mask": "wide-mask.png"},
        {"features_from": "b.png", "box": (0, 0, 10, 10), "local_from": "b.png"},
    ],
    ids=str,
)
def test_edits_do_not_depend_on_their_batch(
    sampler: str,
    changes: dict[str, Any],
    model: reglue.ImageModel,
    pictures: Path,
    head: Path,
    depth_head: Path,
    looks: Path,
) -> None:
    given = {k: pictures / v if str(v).endswith(".png") else v for k, v in changes.items()}
    made = {"HEAD": head, "DEPTH": depth_head, "LOOKS": looks}
    given |= {k: made[v] for k, v in changes.items() if isinstance(v, str) and v in made}
    if "flow_edit" in changes and SAMPLERS[sampler].stochastic:
        with pytest.raises(UserError, match=f"flow_edit has no place for the noise of {sampler}; choose sampler"):
            model.edit(pictures / "wide.png", **given, sampler=sampler, classes=0)
        return
    options: dict[str, Any] = {"count": 3, "classes": [0, 2], "sampler": sampler, "steps": 3, "guidance_scale": 1.5}
    options |= {"relative_tolerance": 0.1, "absolute_tolerance": 0.1}
    together = model.edit(pictures / "wide.png", **given, **options)
    assert same(together, model.edit(pictures / "wide.png", **given, **options, batch_size=1))
    if "flow_edit" not in changes:  # The few steps of this model's training have hardly told classes apart.
        assert not same(together[:1], together[2:])
        assert not same(together, model.edit(pictures / "wide.png", **given, **options, seed=1))
    assert {one.size for one in together} == {(50, 30)}


def test_outside_a_mask_the_image_is_its_own(model: reglue.ImageModel, pictures: Path) -> None:
    image = np.asarray(Image.open(pictures / "wide.png"))
    for feather in (0, 5):
        for result in model.edit(pictures / "wide.png", mask=pictures / "wide-mask.png", feather=feather, count=2):
            pixels = np.asarray(result)
            assert np.array_equal(pixels[:, : 25 - feather], image[:, : 25 - feather])
            assert not np.array_equal(pixels[:, 25:], image[:, 25:])
            assert not np.array_equal(pixels[:, 20:25], image[:, 20:25]) or not feather


def test_pictures_are_taken_as_their_files_are(model: reglue.ImageModel, pictures: Path, tmp_path: Path) -> None:
    """Turned upright, with their transparency over white, 16 bits scaled: what `prepare` makes of files."""
    image, turned = Image.open(pictures / "wide.png").convert("RGB"), Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=turned)
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    clear.save(tmp_path / "clear.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("turned.png", "clear.png", "deep.png"):
        of_file, of_picture = model.encode(tmp_path / name), model.encode(Image.open(tmp_path / name))
        assert all(torch.equal(of_file[part], of_picture[part]) for part in of_file), name
    assert model.edit(Image.open(tmp_path / "turned.png"), strength=0.1, steps=2)[0].size == (30, 50)


def test_transparency_stays_where_nothing_is_drawn(model: reglue.ImageModel, pictures: Path) -> None:
    image = Image.open(pictures / "wide.png").convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    mask = Image.new("RGBA", image.size, (255, 255, 255, 0))  # Nothing is painted but the right half.
    mask.paste((255, 255, 255, 255), (25, 0, 50, 30))
    pixels = np.asarray(model.edit(image, mask=mask, steps=2)[0])
    assert np.array_equal(pixels[:, :25], np.asarray(image)[:, :25])
    seen = slice(25, 38)  # The model sees the middle square.
    assert (pixels[:, seen, 3] == 255).all()
    assert not np.array_equal(pixels[:, seen, :3], np.asarray(image)[:, seen, :3])


def test_a_mask_holds_the_latents_that_it_leaves(
    model: reglue.ImageModel, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = states_of(model, monkeypatch)
    model.edit(pictures / "a.png", mask=pictures / "mask.png", keep=("local",), steps=3)
    model.edit(pictures / "a.png", mask=pictures / "mask.png", local_from=pictures / "b.png", steps=3)
    own, other = model.encode(pictures / "a.png"), model.encode(pictures / "b.png")
    for state, inside in zip(seen, (own, other), strict=True):
        assert torch.equal(state["latent"][..., :4].float(), own["latent"][..., :4])
        assert not torch.equal(state["latent"][..., 4:].float(), own["latent"][..., 4:])
        assert torch.equal(state["local"][..., :4].float(), own["local"][..., :4])
        assert torch.equal(state["local"][..., 4:].float(), inside["local"][..., 4:])


def test_parts_come_from_other_images(
    model: reglue.ImageModel, pictures: Path, looks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = states_of(model, monkeypatch)
    a, b = pictures / "a.png", pictures / "b.png"
    model.edit(a, local_from=b, keep=("cls",), steps=2)
    model.edit(a, cls_from=b, steps=2)
    model.edit(a, paste=b, box=(0, 0, 10, 10), at=(10, 5), mirror=True, steps=2)
    model.edit(a, paste=b, box=(0, 0, 10, 10), at=(0, 0), scale=0.5, steps=2)
    model.edit(a, paint=pictures / "painting.png", prototypes=looks, steps=2)
    own, other = model.encode(a), model.encode(b)
    swapped, tokens, pasted, smaller, painted = ({n: v.float() for n, v in state.items()} for state in seen)
    assert torch.equal(swapped["local"], other["local"])
    assert torch.equal(swapped["cls"], own["cls"])
    assert torch.equal(tokens["cls"], other["cls"])
    assert torch.equal(pasted["local"][..., 2:6, 4:], other["local"][..., :4, :4].flip(-1))
    assert torch.equal(pasted["local"][..., 6:, :], own["local"][..., 6:, :])
    assert torch.equal(pasted["local"][..., :4], own["local"][..., :4])
    mean = other["local"][..., :4, :4].unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean((-1, -3))
    torch.testing.assert_close(smaller["local"][..., :2, :2], mean)
    modality = model.record.denoiser.modality("local")
    assert modality is not None
    first, second = modality.normalise(load_prototypes(looks).codes[:, 0]).unbind()
    torch.testing.assert_close(painted["local"][0, :, :4], first[:, None, None].expand(-1, 4, 8))
    torch.testing.assert_close(painted["local"][0, :, 4:, :4], second[:, None, None].expand(-1, 4, 4))


def test_looks_are_painted_in_turn(
    model: reglue.ImageModel, pictures: Path, looks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = states_of(model, monkeypatch)
    model.edit(pictures / "a.png", paint=pictures / "painting.png", prototypes=looks, steps=2, count=3)
    modality, codes = model.record.denoiser.modality("local"), load_prototypes(looks).codes
    assert modality is not None
    for i, painted in enumerate(seen[0]["local"].float()):
        expected = modality.normalise(codes[:1, i % codes.shape[1]])[0]
        torch.testing.assert_close(painted[:, :4], expected[:, None, None].expand(-1, 4, 8))
    assert not torch.equal(codes[0, 0], codes[0, 1])


def test_a_head_sees_more_of_what_is_painted(
    model: reglue.ImageModel, pictures: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a loss holds some of what a clamp does; the few steps of this model's training have not taught it more."""
    seen = states_of(model, monkeypatch)
    a, painting = pictures / "a.png", np.asarray(Image.open(pictures / "painting.png"))
    for scale in (1e-6, 10.0):
        model.edit(a, paint=Image.fromarray(painting), head=head, loss_scale=scale, steps=10, count=2)
        model.edit(a, keep=("local",), by="loss", loss_scale=scale, steps=10, count=2)
    subject = model.subject(a, Editing(paint=pictures / "painting.png", head=head))
    loss = model._painted([subject, subject])
    free, kept_free, led, kept = seen
    assert bool((loss(led)["local"] < loss(free)["local"]).all())
    own = model.encode(a)["local"]
    assert (kept["local"] - own).square().mean() < (kept_free["local"] - own).square().mean()


def test_painted_depths_are_followed(
    model: reglue.ImageModel, pictures: Path, depth_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = states_of(model, monkeypatch)
    a, depth = pictures / "a.png", pictures / "depth.png"
    for scale in (1e-6, 10.0):
        model.edit(a, paint=depth, head=depth_head, loss_scale=scale, steps=10, count=2)
    model.edit(a, paint=Image.fromarray(np.asarray(Image.open(depth)).astype(np.float32)), head=depth_head, steps=10)
    subject = model.subject(a, Editing(paint=depth, head=depth_head))
    assert subject.labels is not None
    assert sorted({*np.nan_to_num(subject.labels).ravel().tolist()}) == [0, 2, 6]
    loss = model._painted([subject, subject])
    free, led, given = drawn
    assert bool((loss(led)["local"] < loss(free)["local"]).all())
    torch.testing.assert_close(given["local"][0], led["local"][0])


def test_hidden_tokens_are_led_to_features(
    model: reglue.ImageModel, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of noisy states on the way, those that are led look more like the features, where they are to."""
    a, b = pictures / "a.png", pictures / "b.png"
    ways: dict[str, dict[str, Any]] = {
        "whole": {}, "part": {"box": (0, 0, 10, 10)}, "inside": {"mask": pictures / "mask.png"}
    }  # fmt: skip
    for way, changes in ways.items():
        editing = Editing(features_from=b, **changes)
        target, chosen = model.subject(a, editing).target or pytest.fail("no target")
        assert chosen.shape == target.shape[:2] == (1, 17), way
        assert chosen.sum() == {"whole": 17, "part": 16, "inside": 8}[way]
        losses = Unlikeness(model.denoiser.projector, target.expand(2, -1, -1), chosen)

        def loss(scale: float, losses: Unlikeness = losses, editing: Editing = editing) -> torch.Tensor:
            seen: list[torch.Tensor] = []

            class Watch(Control):
                differentiates = True

                def velocity(self, velocity: State, state: State, times: Times) -> State:
                    assert self.hidden is not None
                    seen.append(losses({HIDDEN: self.hidden})["latent"].detach())
                    return velocity

            named: dict[str, Any] = {part.name: getattr(editing, part.name) for part in fields(Editing)}
            named["loss_scale"] = scale
            model.edit(a, **named, sampler="euler", steps=8, count=2, controls=[Watch()])
            return torch.stack(seen).mean(0)

        assert bool((loss(100.0) < loss(1e-6)).all()), way
    free, led = (model.edit(a, keep="features", loss_scale=scale, steps=4)[0] for scale in (1e-6, 10.0))
    assert not same([free], [led])


def states_of(model: reglue.ImageModel, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The states that will be decoded."""
    seen: list[dict[str, torch.Tensor]] = []
    original = model.decode
    monkeypatch.setattr(model, "decode", lambda state, *others: seen.append(state) or original(state, *others))
    return seen


def test_each_modality_is_let_go_at_its_own_time(
    model: reglue.ImageModel, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = states_of(model, monkeypatch)
    untils: list[Any] = [0.35, {"local": 0.35, "cls": 0.35}, {"local": 0.35}, {"cls": 0.35}]
    for until in untils:
        model.edit(pictures / "a.png", keep=("local", "cls"), until=until, steps=10, sampler="euler")
    own = model.encode(pictures / "a.png")
    held = [{name for name in ("local", "cls") if torch.equal(state[name].float(), own[name])} for state in seen]
    assert held == [set(), set(), {"cls"}, {"local"}]
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in own)


def test_between_two_images(model: reglue.ImageModel, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pictures / "a.png", pictures / "b.png"
    seen = states_of(model, monkeypatch)
    frames = model.interpolate(a, b, steps=5, sampler="heun")
    assert same(frames, model.interpolate(a, b, steps=5, sampler="heun", batch_size=3))
    assert same(frames[::-1], model.interpolate(b, a, steps=5, sampler="heun"))
    ends = [model.encode(image)["local"][0].double() for image in (a, b)]
    torch.testing.assert_close(seen[0]["local"][2], (ends[0] + ends[1]) / 2)
    torch.testing.assert_close(seen[0]["local"][[0, 4]], torch.stack(ends))
    with pytest.raises(UserError, match="this model learns latent, local, cls"):
        model.interpolate(a, b, what=("depth",))


def test_maps_can_be_seen(model: reglue.ImageModel, pictures: Path) -> None:
    state = model.encode(pictures / "a.png")
    assert model.see(pictures / "a.png").size == (16, 16)
    assert same([model.see(state)], [model.see(pictures / "a.png")], 0)
    assert model.see({name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in state.items()}).width > 32


def test_strengths_are_scales_of_modalities(model: reglue.ImageModel) -> None:
    own = model.default_sampling.guidance_scale
    assert model.strengths(local=1.5, cls=0.5, latent=1.0) == {
        **{"guidance_scale": 1.0, "local_scale": 1.5, "cls_scale": 0.5, "other_scales": {}}
    }
    assert model.strengths(local=1.5)["guidance_scale"] == own
    model.generate(0, steps=1, **model.strengths(latent=2.0))
    with pytest.raises(UserError, match="strength of depth: this model learns"):
        model.strengths(depth=2.0)


def test_mistakes_in_python(model: reglue.ImageModel, pictures: Path) -> None:
    a = pictures / "a.png"
    for told, call in {
        "an image is a file or one of Pillow's, not a ndarray": lambda: model.encode(np.zeros((4, 4, 3))),  # type: ignore[reportArgumentType]
        "classes names no class; name one, or leave it out": lambda: model.edit(a, keep="local", classes=[]),
        "box 0 0 9: give 4 numbers": lambda: model.edit(a, paste=a, box=(0, 0, 9), at=(0, 0)),
        "until 2: choose at least 0 and less than 1": lambda: model.interpolate(a, a, until=2),
        "until latent: it is not held": lambda: model.interpolate(a, a, what="local", until={"latent": 0.5}),
    }.items():
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value).startswith(told)
        assert "\n" not in str(raised.value)


def test_an_unknown_option_is_a_type_error(model: reglue.ImageModel, pictures: Path) -> None:
    with pytest.raises(TypeError, match=r"edit\(\) takes no kep; it takes .*keep"):
        model.edit(pictures / "a.png", kep=("local",))


def line(run: Path, out: Path, *more: str | Path) -> list[str]:
    return ["edit", str(run), *map(str, more), "--out", str(out), *STEPS]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix == ".png"}


def test_the_command_continues_adds_and_is_verified(
    tiny_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, images = tmp_path / "out", [pictures / "a.png", pictures / "wide.png"]
    edit(parse(line(tiny_run, out, *images, "--keep", "local", "--count=2")))
    first = content(out)
    assert [*first] == ["000000-000.png", "000000-001.png", "000001-000.png", "000001-001.png", "edits.png"]
    assert Image.open(out / "000001-000.png").size == (50, 30)
    verify(Verify(out))
    (out / "000001-000.png").unlink()
    (out / "edits.png").unlink()
    edit(parse(line(tiny_run, out, *images, "--keep", "local", "--count=2")))
    capsys.readouterr()
    edit(parse(line(tiny_run, out, *images, "--keep", "local", "--count=2")))
    assert "complete already: 4 edits" in capsys.readouterr().out
    assert content(out) == first
    edit(parse(line(tiny_run, out, *images, "--keep", "local", "--count=3")))
    record = read_record(out)
    assert (record.count, len(record.pictures)) == (3, 6)
    assert content(out)["000000-001.png"] == first["000000-001.png"]
    edit(parse(line(tiny_run, out, *images, "--keep", "local", "--count=1")))
    assert read_record(out) == record
    verify(Verify(out))
    for other in (["--keep", "cls"], ["--keep", "local", "--seed=1"], ["--keep", "local", "--classes", "circle"]):
        with pytest.raises(UserError, match="holds edits of another protocol"):
            edit(parse(line(tiny_run, out, *images, *other)))
    with pytest.raises(UserError, match=r"another protocol \(images\)"):
        edit(parse(line(tiny_run, out, images[1], "--keep", "local")))
    (out / "000000-000.png").write_bytes((out / "000000-001.png").read_bytes())
    with pytest.raises(UserError, match=r"000000-000\.png is damaged"):
        verify(Verify(out))


def test_two_processes_draw_the_edits_of_one(tiny_run: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = [
        pictures / "a.png",
        pictures / "b.png",
        "--mask",
        pictures / "mask.png",
        "--count=3",
        "--labels=random",
    ]
    arguments += ["--classes", "circle", "square", "--sampler=euler-maruyama"]
    run_reglue(*line(tiny_run, tmp_path / "one", *arguments, "--batch-size=1"))
    run_ranks(2, *line(tiny_run, tmp_path / "two", *arguments, "--batch-size=1"))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    files = [json.loads((tmp_path / name / "edits.json").read_text()) for name in ("one", "two")]
    assert files[0] == files[1]


def test_what_a_python_call_draws_is_what_the_command_draws(
    model: reglue.ImageModel, tiny_run: Path, pictures: Path, tmp_path: Path
) -> None:
    edit(parse(line(tiny_run, tmp_path / "out", pictures / "wide.png", "--strength=0.5", "--classes", "1", "2")))
    drawn: list[Image.Image] = [Image.open(tmp_path / "out" / f"000000-{i:03d}.png") for i in range(4)]
    assert same(drawn, model.edit(pictures / "wide.png", strength=0.5, classes=[1, 2], count=4, steps=3))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "nothing of the image would be left; choose what stays, by one of --keep, --mask"),
        (("--keep", "depth"), "--keep depth: this model does not learn depth, only latent, local, cls"),
        (("--keep", "latent", "--strength=0.5"), "--keep latent holds every pixel, and --strength draws them anew"),
        (("--keep", "latent", "--mask", "mask.png"), "--keep latent holds every pixel, and --mask draws them anew"),
        (("--keep", "local", "--local-from", "b.png"), "--keep local takes the image's own, and --local-from another"),
        (("--keep", "local", "--feather=3"), "--feather belongs to --mask; give it too"),
        (("--strength=0.5", "--until=0.5"), "--until 0.5: nothing is held that could be let go"),
        (("--strength=1.5"), "--strength 1.5: choose at least 0 and at most 1"),
        (("--mask", "wide-mask.png"), "×30 pixels, and "),
        (("--mask", "empty.png"), "empty.png is all black; paint white what is to change"),
        (("--mask", "full.png"), "full.png is all white; leave it out"),
        (("--mask", "no.png"), "no.png cannot be read (not a file, or a broken link)"),
        (("--mask", "torn.png"), "torn.png cannot be read ("),
        (("--local-from", "notes.txt"), "notes.txt cannot be read (cannot identify image file"),
        (("--paste", "b.png"), "--paste needs --box; give it too"),
        (("--box=1 2 3 4", "--keep=local"), "--box belongs to --paste"),
        (("--paste", "b.png", "--box", "5 5 5 9", "--at", "1 1"), "--box 5 5 5 9: choose left < right"),
        (("--paste", "b.png", "--box", "5 5 25 9", "--at", "1 1"), "--box 5 5 25 9: the piece lies outside of what"),
        (("--paste", "b.png", "--box", "0 0 10 10", "--at", "15 1"), "--at 15 1: the piece lies outside of what"),
        (("--paint", "painting.png"), "--paint belongs to --prototypes; give it too"),
        (("--paint=x", "--prototypes", "LOOKS", "--head", "HEAD"), "--prototypes and --head both say what is painted"),
        (("--paint", "unknown.png", "--head", "HEAD"), "has label 7, of which there is no class in the head; paint"),
        (("--paint", "painting.png", "--head", "."), "has no head.json: give a folder that `reglue head` made"),
        (("--keep", "local", "--head", "HEAD"), "--head belongs to --paint; give it too"),
        (("--keep", "local", "--loss-scale=2"), "--loss-scale belongs to --head, --features-from and --by loss; leave"),
        (("--keep=features", "--features-from", "b.png"), "--keep features takes the image's own, and --features-from"),
        (("--features-from", "b.png", "--box", "0 0 25 9"), "--box 0 0 25 9: the piece lies outside of what"),
        (("--features-from", "b.png", "--until", "local", "0.5"), "--until local: it is not held; what is, is"),
        (("--paint", "a.png", "--head", "DEPTH"), "a.png holds no depth map; save it as a greyscale PNG"),
        (("--paint", "far.png", "--head", "DEPTH"), "has depths from 200 to 200, and the head predicts 2."),
        (("--paint", "empty.png", "--head", "DEPTH"), "has no depth, only 0, which is free; paint something"),
        (("--keep", "local", "--by", "force"), "--by force: give clamp or loss"),
        (("--strength=0.5", "--by", "loss"), "--by loss: nothing is held that could be approached; leave it out"),
        (("--keep", "local", "--until", "cls", "0.3"), "--until cls: it is not held; what is, is local"),
        (("--keep", "local", "--until", "local", "1.3"), "--until local 1.3: choose at least 0 and less than 1"),
        (("--keep", "local", "--until", "local"), "--until local: give a number or pairs of a name and a number"),
        (("--flow-edit", "--by", "loss"), "--flow-edit has its own way from the image; leave --by out"),
        (("--paint", "unknown.png", "--prototypes", "LOOKS"), "has label 7, of which there is no prototype; paint"),
        (("--paint", "free.png", "--prototypes", "LOOKS"), "has no label but 255, which is free; paint something"),
        (("--paint", "long.png", "--prototypes", "LOOKS"), "paint the whole image, in its proportions"),
        (("--paint", "a.png", "--prototypes", "LOOKS"), "holds colours (mode RGB), not class numbers"),
        (("--paint", "painting.png", "--prototypes", "."), "has no prototypes.json: give a folder"),
        (("--keep", "local", "--classes", "triangle"), "class triangle: choose 0 to 2 or a name"),
        (("--keep", "local", "--encoder", "starter"), "encoder starter"),
        (("--flow-edit",), "--flow-edit changes the class; name one with --classes"),
        (("--flow-edit", "--keep", "local"), "--flow-edit has its own way from the image; leave --keep out"),
        (("--keep", "local", "--source-class", "circle"), "--source-class belongs to --flow-edit"),
        (("--flow-edit", "--classes", "circle", "--sampler", "heun", "--source-class", "x"), "class x: choose 0 to 2"),
        (("--keep", "local", "--weaker-run", "no"), "no"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_mistakes_are_one_line_before_any_network_runs(
    arguments: tuple[str, ...],
    told: str,
    tiny_run: Path,
    pictures: Path,
    looks: Path,
    head: Path,
    depth_head: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a network ran")

    monkeypatch.setattr("reglue.editing.encoding.ImageEncoder.encode", never)
    monkeypatch.setattr("reglue.diffusion.denoiser.Denoiser.forward", never)
    words = [part for word in ([arguments] if isinstance(arguments, str) else arguments) for part in word.split()]
    made = {"LOOKS": str(looks), "HEAD": str(head), "DEPTH": str(depth_head)}
    places = [made[w] if w in made else str(pictures / w) if (pictures / w).exists() or w == "no.png" else w
              for w in words]  # fmt: skip
    out = tmp_path / "out"
    assert told in mistake(capsys, monkeypatch, *line(tiny_run, out, pictures / "a.png", *places))
    assert not out.exists()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("image", "told"),
    [("no.png", "no.png cannot be read (not a file"), ("torn.png", "torn.png cannot be read ("), ("", "no image")],
)
def test_images_that_cannot_be_read(image: str, told: str, tiny_run: Path, pictures: Path, tmp_path: Path) -> None:
    images = [pictures / "a.png", pictures / image] if image else []
    with pytest.raises(UserError) as raised:
        edit(reglue.Edit(tiny_run, tmp_path / "out", images=images, keep=("local",), device="cpu"))
    assert told in str(raised.value)


def test_a_mask_beside_what_the_model_sees(model: reglue.ImageModel, pictures: Path) -> None:
    with pytest.raises(UserError, match=r"its white lies outside of the part of .*wide\.png that the model sees"):
        model.edit(pictures / "wide.png", mask=pictures / "margin.png")


@pytest.fixture(scope="module")
def sit_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    run = tmp_path_factory.mktemp("sit") / "run"
    options = [one for one in TINY_RECIPE if not one.startswith(("--local", "--alignment"))]
    reglue.train(
        parse(["train", "sit", "--store", str(tiny_store), "--out", str(run), *options, "--optimisation.steps=2"])
    )
    return run


def test_a_run_without_semantics_edits_with_what_it_has(sit_run: Path, pictures: Path) -> None:
    model = reglue.load(sit_run, device="cpu")
    assert list(model.encode(pictures / "a.png")) == ["latent"]
    (result,) = model.edit(pictures / "wide.png", mask=pictures / "wide-mask.png", strength=0.8, classes=1, steps=3)
    assert result.size == (50, 30)
    changes: dict[str, Any]
    for name in ("features", ("features",)):
        with pytest.raises(UserError, match="keep features: this model was not aligned with a vision encoder"):
            model.edit(pictures / "a.png", keep=name)
    for changes in ({"keep": ("local",)}, {"cls_from": pictures / "b.png"}, {"local_from": pictures / "b.png"}):
        with pytest.raises(UserError, match=r"this model does not learn (local|cls), only latent"):
            model.edit(pictures / "a.png", **changes)
    with pytest.raises(UserError, match="no local map to see"):
        model.see(pictures / "a.png")


def test_a_run_with_alignment_alone_is_led_to_features(
    tiny_store: Path, tiny_encoder: str, pictures: Path, tmp_path: Path
) -> None:
    """Its encoder is loaded for that alone, and its projector is in what is passed on."""
    options = [one for one in TINY_RECIPE if not one.startswith("--local")]
    run = ["--store", str(tiny_store), "--out", str(tmp_path / "run"), "--optimisation.steps=2"]
    reglue.train(parse(["train", "repa", *run, *options]))
    reglue.load(tmp_path / "run", device="cpu").save(tmp_path / "saved")
    model = reglue.load(tmp_path / "saved", device="cpu", encoder=tiny_encoder)
    model.edit(pictures / "a.png", strength=0.5, steps=2)
    assert model.image_encoder().encoder is None
    free, led = (model.edit(pictures / "a.png", keep="features", loss_scale=w, steps=4) for w in (1e-6, 100.0))
    assert not same(free, led)
    record = replace(model.record, encoder=replace(model.record.encoder, layers=(0,)))  # type: ignore[type-var]
    with pytest.raises(UserError, match=r"keep features: this run reads layers \[0\] of its encoder, not the last one"):
        refuse_lacking(Editing(keep=("features",)), record)


def test_a_compressor_that_is_gone_is_named(tiny_run: Path, tmp_path: Path, pictures: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "store": str(tmp_path / "gone")}))
    shutil.rmtree(run / "compressors")
    with pytest.raises(UserError, match="the compressor of local is neither in the run's folder nor in its store"):
        reglue.load(run, device="cpu").encode(pictures / "a.png")


def test_every_option_of_editing_is_one_of_the_command() -> None:
    assert {part.name for part in fields(Editing)} < {part.name for part in fields(reglue.Edit)}


@pytest.mark.trains
def test_the_encoder_sees_in_an_edit_what_was_held() -> None:
    """On the small model of the package: the map that it sees in an edit is nearly the one that was asked for."""
    model = reglue.load("starter", device="cpu")
    images = model.generate(["T-shirt", "ankle boot", "bag", "trousers"], steps=20)

    def likeness(**changes: Any) -> float:
        edits = [model.edit(image, steps=20, seed=3, **changes)[0] for image in images]
        pairs = [
            (model.encode(edit)["local"], model.encode(image)["local"])
            for edit, image in zip(edits, images, strict=True)
        ]
        return float(np.mean([torch.cosine_similarity(a.flatten(1), b.flatten(1)).item() for a, b in pairs]))

    held, resampled, early, free = (
        likeness(**changes)
        for changes in (
            {"keep": ("local",)},
            {"keep": ("local",), "resample": 1},
            {"keep": ("local",), "until": 0.7},
            {"strength": 1.0},
        )
    )
    assert resampled > 0.9
    assert held > 0.85
    assert held > early > free + 0.1
