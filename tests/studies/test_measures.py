"""What studies measure: copies, classes by a judge, controls, and that figures of several networks never mix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_convergence import run
from torchvision.models.resnet import Bottleneck, ResNet

from convergence import Convergence
from judge import load_judge
from measures import Measures, difference_of, share_of
from reglue.commands.prepare import Prepare, prepare
from reglue.errors import UserError

COLOURS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (220, 30, 30)}
SIDE = 16


def paint(folder: Path, names: list[str], first: int = 0) -> Path:
    """Images of one colour each, with a little noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    for index, name in enumerate(names, first):
        pixels = np.array(COLOURS[name]) + rng.integers(-15, 16, (SIDE, SIDE, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:06d}.png")
    return folder


@pytest.fixture(scope="module")
def coloured_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images whose class is their colour."""
    folder = tmp_path_factory.mktemp("coloured")
    for name in COLOURS:
        paint(folder / name, [name] * 4, first=len(name))
    return folder


@pytest.fixture(scope="module")
def coloured_store(
    tmp_path_factory: pytest.TempPathFactory, coloured_images: Path, tiny_encoder: str, tiny_autoencoder: str
) -> Path:
    out = tmp_path_factory.mktemp("coloured-store") / "store"
    networks = (tiny_autoencoder, tiny_encoder)
    prepare(Prepare(coloured_images, out, SIDE, *networks, features=True, workers=0, device="cpu"))
    return out


@pytest.fixture(scope="module")
def colour_judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier as `scripts/convert_classifier.py` writes it, whose last layer tells colours apart."""
    file = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    classes = ["red", "nothing", "green", "blue"]  # Not in the order of the store's labels.
    torch.manual_seed(0)
    network = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=len(classes))
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("batches_tracked")}
    described = {"blocks": [1, 1, 1, 1], "classes": classes, "mean": [0.5] * 3, "std": [0.5] * 3, "size": 32}
    save_file(state, file, {"judge": json.dumps(described)})
    untrained = load_judge(str(file), torch.device("cpu"))
    untrained.network.fc = torch.nn.Identity()  # type: ignore[reportAttributeAccessIssue]
    solid = torch.tensor([COLOURS[name] for name in classes if name in COLOURS], dtype=torch.uint8)
    means = untrained.scores(solid[:, :, None, None].expand(-1, -1, 32, 32))
    # The nearest mean: |x − m|² is smallest where x·m − |m|²/2 is largest.
    known = [classes.index(name) for name in classes if name in COLOURS]
    state["fc.weight"] = torch.zeros(len(classes), means.shape[1])
    state["fc.bias"] = torch.full((len(classes),), -1e9)
    state["fc.weight"][known], state["fc.bias"][known] = means, -means.square().sum(1) / 2
    save_file(state, file, {"judge": json.dumps(described)})
    return str(file)


def measures_of(store: Path, reference: Path, out: Path, **options: Any) -> Measures:
    return Measures(Convergence(store=store, reference=reference, out=out, device="cpu", resamples=50, **options))


def test_the_judge_sees_samples_with_their_own_labels(
    tmp_path: Path, coloured_store: Path, coloured_images: Path, colour_judge: str
) -> None:
    names = ["red", "blue", "green", "green", "blue", "blue"]
    samples = paint(tmp_path / "samples", names)
    measures = measures_of(coloured_store, coloured_images, tmp_path / "out", judge=colour_judge)
    labels = [list(COLOURS).index(name) for name in names]
    (samples / "samples.json").write_text(json.dumps({"labels": labels}))
    figures = measures.of("judge", samples)
    assert figures["top1"]["value"] == figures["top1_among_own"]["value"] == 1
    assert figures["top1"]["low"] == pytest.approx(0.6097, abs=1e-4)  # Wilson's, of 6 in 6
    assert figures["real"]["top1"]["value"] == 1
    assert figures["real"]["images"] == 12
    (samples / "samples.json").write_text(json.dumps({"labels": labels[::-1]}))
    expected = np.mean([one == other for one, other in zip(labels, labels[::-1], strict=True)])
    assert measures.of("judge", samples)["top1"]["value"] == expected < 1


def test_intervals_of_shares_are_wilsons() -> None:
    # 361 of 400, by the formula.
    p, z, n = 0.9025, 1.959964, 400
    middle, half = (p + z**2 / (2 * n)), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    found = share_of(p, n)
    assert found["low"] == pytest.approx((middle - half) / (1 + z**2 / n), abs=1e-6)
    assert found["high"] == pytest.approx((middle + half) / (1 + z**2 / n), abs=1e-6)


def test_differences_of_shares_have_a_width_where_nothing_was_found() -> None:
    none = difference_of(0.0, 0.0, 400)
    assert none["value"] == 0
    assert none["high"] == -none["low"] == pytest.approx(share_of(0.0, 400)["high"])
    found = difference_of(56 / 70, 42 / 70, 70)  # as Newcombe's first example, there of 48 in 80
    assert found["low"] == pytest.approx(0.0481, abs=5e-5)
    assert found["high"] == pytest.approx(0.3401, abs=5e-5)


def blobs(folder: Path, count: int, seed: int, noise: float = 0.0, contrast: float = 1.0) -> Path:
    """Random patterns of 4×4 colours; `noise` of 255 is added to the same ones, `contrast` takes them to grey."""
    folder.mkdir(parents=True)
    for index in range(count):
        coarse = np.random.default_rng((seed, index)).uniform(-1, 1, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
        added = np.random.default_rng((seed, index, 1)).normal(0, noise, (SIDE, SIDE, 3))
        pixels = 127.5 * (1 + contrast * coarse) + 255 * added
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:06d}.png")
    return folder


@pytest.fixture(scope="module")
def patterns(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: str, tiny_autoencoder: str) -> tuple[Path, Path]:
    """A store of 300 patterns, and a folder of 100 others."""
    folder = tmp_path_factory.mktemp("patterns")
    blobs(folder / "training", 300, seed=0)
    store = folder / "store"
    prepare(Prepare(folder / "training", store, SIDE, tiny_autoencoder, tiny_encoder, workers=0, device="cpu"))
    return store, blobs(folder / "held-out", 100, seed=1)


@pytest.fixture(scope="module")
def copying(patterns: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Figures of copies of training images and of held-out ones, of new images, and of images without features."""
    folder = tmp_path_factory.mktemp("copying")
    measures = measures_of(*patterns, folder / "out", count=40)
    samples = {
        "copies": blobs(folder / "copies", 40, seed=0, noise=0.01),
        "held-out": blobs(folder / "held-out", 40, seed=1, noise=0.01),
        "new": blobs(folder / "new", 40, seed=2),
        "grey": blobs(folder / "grey", 40, seed=2, contrast=0.0),
        "nearly grey": blobs(folder / "nearly", 40, seed=2, contrast=0.1),
    }
    return {name: measures.of("encoder", path) for name, path in samples.items()}


def test_copies_are_told_from_new_images_and_from_images_without_features(copying: dict[str, dict[str, Any]]) -> None:
    copied = {name: figures["copied"] for name, figures in copying.items()}
    assert copied["copies"]["value"] > 0.9
    assert copied["copies"]["low"] > 0.8
    for name in ("new", "grey", "nearly grey"):
        assert abs(copied[name]["value"]) < 0.1, name
    assert copied["held-out"]["value"] < -0.9  # Held-out images are not learned by heart.


def test_nearest_images_are_counted_once(copying: dict[str, dict[str, Any]]) -> None:
    assert copying["copies"]["distinct_nearest_training_images"] == 40
    assert copying["grey"]["distinct_nearest_training_images"] == 1


def test_recall_has_no_interval(copying: dict[str, dict[str, Any]]) -> None:
    assert copying["new"]["recall"]["low"] is None
    assert copying["new"]["precision"]["low"] is not None


@pytest.mark.parametrize("as_store", [True, False])
def test_controls_are_reconstructions_compared_with_other_images(
    as_store: bool, patterns: tuple[Path, Path], tmp_path: Path, tiny_autoencoder: str, tiny_encoder: str
) -> None:
    store, reference = patterns
    if as_store:
        prepare(Prepare(reference, tmp_path / "store", SIDE, tiny_autoencoder, tiny_encoder, workers=0, device="cpu"))
        reference = tmp_path / "store"
    measures = measures_of(store, reference, tmp_path / "out", count=30)
    controls = measures.controls(store)
    assert [controls[name]["images"] for name in ("training", "held-out")] == [30, 30]
    assert [controls[name]["held_out_images"] for name in ("training", "held-out")] == [100, 70]
    written = next((tmp_path / "out" / "references").glob("controls-*.json"))
    assert json.loads(written.read_text()) == controls
    written.write_text("{}")
    assert measures.controls(store) == {}  # Not measured again.


def test_held_out_images_reconstruct_alike_from_latents_and_from_pixels(
    patterns: tuple[Path, Path], tmp_path: Path, tiny_autoencoder: str, tiny_encoder: str
) -> None:
    store, reference = patterns
    prepare(Prepare(reference, tmp_path / "store", SIDE, tiny_autoencoder, tiny_encoder, workers=0, device="cpu"))
    found = [measures_of(store, path, tmp_path / path.name).controls(store) for path in (reference, tmp_path / "store")]
    distances = [controls["held-out"]["frechet_distance"]["value"] for controls in found]
    assert distances[0] == pytest.approx(distances[1], rel=1e-3)


def test_the_closest_pairs_show_the_training_images(patterns: tuple[Path, Path], tmp_path: Path) -> None:
    samples = blobs(tmp_path / "copies", 20, seed=0, noise=0.01)
    measures = measures_of(*patterns, tmp_path / "out")
    measures.draw_closest(samples, tmp_path / "closest.png")
    picture = np.asarray(Image.open(tmp_path / "closest.png"))
    assert picture.shape == (2 * SIDE + 2, 10 * SIDE + 9 * 2, 3)
    above = torch.from_numpy(picture[:SIDE, :SIDE].copy()).int()
    drawn = [torch.from_numpy(np.asarray(Image.open(file)).copy()).int() for file in sorted(samples.glob("*.png"))]
    place = next(index for index, image in enumerate(drawn) if torch.equal(image, above))
    below = measures._decoded(measures.store, torch.tensor([place]))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(picture[SIDE + 2 :, :SIDE], below)  # Copy i is of training image i.


def another_encoder(folder: Path, encoder: str) -> str:
    """A vision encoder with other weights."""
    shutil.copytree(encoder, folder)
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in state.items()}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory,
    coloured_store: Path,
    coloured_images: Path,
    colour_judge: str,
) -> Path:
    """A study with a judge, of two seeds and compiled blocks."""
    out = tmp_path_factory.mktemp("measured") / "study"
    of_module = torch.nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda module, **_: of_module(module, backend="aot_eager"))
        arguments = ("--arms", "sit", "repa", "--seeds", "2", "--repeated-arms", "sit", "--compile", "blocks")
        run(coloured_store, coloured_images, out, *arguments, "--judge", colour_judge, "--guidance", "1")
    return out


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_classes_are_judged_for_every_seed(measured: Path) -> None:
    results = results_of(measured)
    assert sorted(results["arms"]) == ["repa-seed-0", "sit-seed-0", "sit-seed-1"]
    for name, trial in results["arms"].items():
        last = trial["steps"]["4"]
        labels = json.loads((measured / name / "step-00000004" / "samples.json").read_text())["labels"]
        assert last["judge"]["images"] == len(labels) == 8
        assert last["judge"]["real"]["top1_among_own"]["value"] == 1
        assert (measured / name / "step-00000004.closest.png").is_file()
    one, other = (results["arms"][f"sit-seed-{seed}"]["steps"]["4"]["encoder"] for seed in (0, 1))
    assert one["frechet_distance"] != other["frechet_distance"]


@pytest.mark.slow
def test_fid_can_be_measured_later(
    measured: Path, tmp_path: Path, coloured_store: Path, coloured_images: Path, random_inception: Path
) -> None:
    out = Path(shutil.copytree(measured, tmp_path / "study"))
    arguments = ("--arms", "repa", "--guidance", "1", "--inception", str(random_inception))
    steps = run(coloured_store, coloured_images, out, *arguments)["arms"]["repa-seed-0"]["steps"]
    assert "inception" not in steps["2"]
    assert steps["4"]["inception"]["frechet_distance"]["value"] > 0
    assert steps["4"]["inception"]["inception_score"]["value"] >= 1
    assert "| FID | KID (Inception) |" in (out / "table.md").read_text()


def test_the_table_has_controls_means_and_circumstances(measured: Path) -> None:
    table = (measured / "table.md").read_text()
    assert "| training images, reconstructed |" in table
    assert "| other held-out images, reconstructed |" in table
    arms = results_of(measured)["arms"]
    values = [arms[f"sit-seed-{s}"]["steps"]["4"]["encoder"]["frechet_distance"]["value"] for s in (0, 1)]
    row = next(line for line in table.splitlines() if line.startswith("| 4 | sit, mean of 2 seeds |"))
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    assert f"| {sum(values) / 2:.1f}{'' if low == high else f' ({low}–{high})'} |" in row
    assert "repa, mean" not in table
    made = arms["sit-seed-0"]["steps"]["4"]["encoder"]["circumstances"]
    line = next(line for line in table.splitlines() if "trained on" in line)
    assert all(part in line for part in (made["machine"], f"timm {timm.__version__}", made["date"][:10]))
    assert "1 % is innocent" not in table


def test_seconds_of_two_machines_are_not_added(
    measured: Path, tmp_path: Path, coloured_store: Path, coloured_images: Path
) -> None:
    out = Path(shutil.copytree(measured, tmp_path / "study"))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    here = lines[0]["machine"]
    first = next(line for line in lines if line["phase"] == "train" and line["arm"] == "repa-seed-0")
    first["machine"] = "another"
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for noted in (out / "repa-seed-0").glob("*.training.json"):
        noted.unlink()  # What was noted beside the samples would come before the log.
    figures = run(coloured_store, coloured_images, out, "--arms", "repa", "--guidance", "1")["arms"]["repa-seed-0"]
    seconds = figures["steps"]["4"]["training_seconds_by_machine"]
    assert list(seconds) == ["another", here]
    assert sum(seconds.values()) == pytest.approx(figures["steps"]["4"]["training_seconds"])
    row = next(line for line in (out / "table.md").read_text().splitlines() if line.startswith("| 4 | repa, seed 0 |"))
    assert f"| {seconds['another']:.0f} + {seconds[here]:.0f} |" in row


def test_figures_of_two_networks_do_not_mix(
    measured: Path, tmp_path: Path, coloured_store: Path, coloured_images: Path, tiny_encoder: str, colour_judge: str
) -> None:
    out = Path(shutil.copytree(measured, tmp_path / "study"))
    arguments = ("--arms", "reg", "--guidance", "1")
    other = another_encoder(tmp_path / Path(tiny_encoder).name, tiny_encoder)
    with pytest.raises(SystemExit, match=r"--encoder is another network than .*step-00000002\.encoder\.json is by"):
        run(coloured_store, coloured_images, out, *arguments, "--encoder", other)
    copy = tmp_path / Path(colour_judge).name
    metadata = {"blocks": [1] * 4, "classes": [*COLOURS], "mean": [0.5] * 3, "std": [0.5] * 3, "size": 32}
    state = load_file(colour_judge)
    state |= {name: state[name][:3].clone() for name in ("fc.weight", "fc.bias")}
    save_file(state, copy, {"judge": json.dumps(metadata)})
    measures = measures_of(coloured_store, coloured_images, out, judge=str(copy))
    with pytest.raises(UserError, match="--judge is another network"):
        measures.of("judge", out / "sit-seed-0" / "step-00000002")


def test_a_grid_has_the_arms_of_earlier_commands(
    measured: Path, tmp_path: Path, coloured_store: Path, coloured_images: Path
) -> None:
    out = Path(shutil.copytree(measured, tmp_path / "study"))
    before = np.asarray(Image.open(out / "grids" / "step-00000004.png"))
    run(coloured_store, coloured_images, out, "--arms", "repa", "--guidance", "1")
    assert np.array_equal(np.asarray(Image.open(out / "grids" / "step-00000004.png")), before)
    assert before.shape[0] == 14 + 3 * (SIDE + 2) - 2
    shutil.rmtree(out / "sit-seed-1" / "step-00000004")  # left behind
    run(coloured_store, coloured_images, out, "--arms", "repa", "--guidance", "1")
    assert Image.open(out / "grids" / "step-00000004.png").height == 14 + 2 * (SIDE + 2) - 2
