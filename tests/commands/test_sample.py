"""Sampling: image i is a function of (seed, i), and mistakes are named."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import reglue
import reglue.commands.sample
import reglue.samples
from helpers import CLASSES, TINY_RECIPE, mistake, run_reglue
from processes import Reglue, run_ranks
from reglue import generation
from reglue.cli import parse
from reglue.commands.sample import Sample, sample
from reglue.commands.train import train
from reglue.diffusion.controls import Progress
from reglue.diffusion.denoiser import DenoiserConfig
from reglue.errors import UserError
from reglue.files import write_tensors
from reglue.metrics.image_sets import open_image_set
from reglue.names import Weights
from reglue.pipeline import load
from reglue.run import RunRecord, Start
from reglue.samples import plan, sealed
from reglue.sampling import Sampling
from reglue.training import checkpoints


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]).astype(int)


def recorded_noise(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Every noise that a sampler is given from now on."""
    given: list[dict[str, torch.Tensor]] = []
    original = generation.drawn_ahead

    @contextmanager
    def recorded(*arguments: Any) -> Iterator[Iterator[dict[str, torch.Tensor]]]:
        with original(*arguments) as states:
            yield (given.append(state) or state for state in states)

    monkeypatch.setattr(generation, "drawn_ahead", recorded)
    return given


def test_noise_and_labels_are_the_same_bits_whatever_the_batch(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = recorded_noise(monkeypatch)
    by_size = {}
    for size in (1, 3, 64):
        drawn.clear()
        sample(Sample(tiny_run, tmp_path / str(size), count=7, batch_size=size, labels="random", device="cpu"))
        draws = 4  # the start and the three noisy steps of four
        batches = [drawn[i : i + draws] for i in range(0, len(drawn), draws)]
        by_size[size] = {
            (step, name): torch.cat([batch[step][name] for batch in batches])
            for step in range(draws)
            for name in ("latent", "local", "cls")
        }
    for size in (3, 64):
        assert by_size[1].keys() == by_size[size].keys()
        for key, noise in by_size[1].items():
            assert torch.equal(noise, by_size[size][key]), (size, key)
        assert abs(pixels(tmp_path / "1") - pixels(tmp_path / str(size))).max() <= 1
    protocols = [json.loads((tmp_path / str(size) / "samples.json").read_text()) for size in (1, 3, 64)]
    assert protocols[0]["labels"] == protocols[1]["labels"] == protocols[2]["labels"]
    assert len(set(protocols[0]["labels"])) > 1


def test_two_processes_draw_the_images_of_one(tiny_run: Path, tmp_path: Path) -> None:
    sample(Sample(tiny_run, tmp_path / "one", count=6, device="cpu"))
    run_ranks(2, "sample", tiny_run, "--out", tmp_path / "two", "--count=6", "--device=cpu")
    assert abs(pixels(tmp_path / "one") - pixels(tmp_path / "two")).max() <= 1
    files = [(tmp_path / name / "samples.json").read_text() for name in ("one", "two")]
    assert files[0] == files[1]
    assert (tmp_path / "two" / "samples.html").read_text() == (tmp_path / "one" / "samples.html").read_text()
    table = (tmp_path / "two" / "samples.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["file_name", *(f"{i:06d}.png" for i in range(6))]


def test_what_is_missing_is_drawn_again(tiny_run: Path, tmp_path: Path) -> None:
    out = sample(Sample(tiny_run, tmp_path / "out", count=4, device="cpu"))
    before = {file.name: file.read_bytes() for file in out.glob("*.png")}
    times = {name: (out / name).stat().st_mtime_ns for name in before}
    (out / "000002.png").unlink()
    sample(Sample(tiny_run, out, count=6, device="cpu"))
    after = {file.name: file.read_bytes() for file in out.glob("*.png")}
    assert sorted(after) == [f"{i:06d}.png" for i in range(6)]
    assert {name: after[name] for name in before} == before
    assert (out / "000001.png").stat().st_mtime_ns == times["000001.png"]


def test_a_smaller_count_leaves_the_labels_of_all_images(tiny_run: Path, tmp_path: Path) -> None:
    out = sample(Sample(tiny_run, tmp_path / "out", count=5, device="cpu"))
    before = (out / "samples.json").read_text()
    sample(Sample(tiny_run, out, count=2, device="cpu"))
    assert (out / "samples.json").read_text() == before
    assert len(json.loads(before)["labels"]) == len(list(out.glob("*.png"))) == 5
    sample(Sample(tiny_run, out, count=6, device="cpu"))
    assert json.loads((out / "samples.json").read_text())["labels"] == [0, 1, 2, 0, 1, 2]


def test_killed_while_writing_and_drawn_to_the_end(tiny_run: Path, tmp_path: Path) -> None:
    expected = sample(Sample(tiny_run, tmp_path / "expected", count=40, batch_size=4, device="cpu"))
    out = tmp_path / "out"
    command = ("sample", tiny_run, "--out", out, "--count=40", "--batch-size=4", "--device=cpu")
    process = Reglue(*command)
    while not list(out.glob("*.png")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    before = pixels(out)  # what is there is whole
    assert len(before) < 40
    run_reglue(*command)
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in expected.iterdir())
    assert abs(pixels(out) - pixels(expected)).max() <= 1


def test_pictures_in_the_background_are_those_in_the_foreground(tiny_run: Path, tmp_path: Path) -> None:
    out = sample(Sample(tiny_run, tmp_path / "out", count=5, batch_size=2, steps=2, device="cpu"))
    model = load(tiny_run, device="cpu")
    direct = model.generate([0, 1, 2, 0, 1], batch_size=2, steps=2, output="tensor").permute(0, 2, 3, 1)
    assert np.array_equal(pixels(out), direct.numpy())


def test_a_full_disk_stops_the_job_with_its_message(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Image.Image.save

    def save(self: Image.Image, file: Path, **options: Any) -> None:
        if file.name.startswith("000003"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(UserError, match=r"000003\.png: No space left on device"):
        sample(Sample(tiny_run, tmp_path / "out", count=40, batch_size=2, steps=1, device="cpu"))
    drawn = {file.name for file in (tmp_path / "out").glob("*.png*")}
    assert drawn <= {f"{i:06d}.png" for i in range(40)} - {"000003.png"}
    assert len(drawn) < 20, "it went on"
    monkeypatch.setattr(Image.Image, "save", original)
    count = 1 + max(int(name[:6]) for name in drawn | {"000005.png"})
    assert (
        len(pixels(sample(Sample(tiny_run, tmp_path / "out", count=6, batch_size=2, steps=1, device="cpu")))) == count
    )


def test_the_protocol_says_which_precisions_and_weights_were_used(tiny_run: Path, tmp_path: Path) -> None:
    def protocol(name: str, **changes: Any) -> dict[str, Any]:
        out = sample(Sample(tiny_run, tmp_path / name, count=1, steps=1, device="cpu", **changes))
        return json.loads((out / "samples.json").read_text())

    plain = protocol("plain")
    assert (plain["sampling"]["state_precision"], plain["sampling"]["precision"]) == ("float64", "float32")
    fast = protocol("fast", sampler="adams-bashforth", precision="bfloat16")["sampling"]
    assert (fast["state_precision"], fast["precision"]) == ("float32", "bfloat16")
    used = hashlib.sha256((tiny_run / "checkpoints" / "00000006" / "ema.safetensors").read_bytes()).hexdigest()
    assert (plain["weights_sha256"], plain["weaker_weights_sha256"]) == (used, None)
    assert protocol("guided", weaker_run=tiny_run)["weaker_weights_sha256"] == used


def unscaled(config: DenoiserConfig) -> DenoiserConfig:
    latents, *others = config.modalities
    return replace(config, modalities=(replace(latents, normalisation=None), *others))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda record: replace(record, class_names=("circle", "stripes", "square")), "classes"),
        (lambda record: replace(record, class_names=("0", "1", "2")), "classes"),
        (lambda record: replace(record, recipe=replace(record.recipe, path="cosine")), "path"),
        (lambda record: replace(record, denoiser=unscaled(record.denoiser)), "scale of latent"),
    ],
)
def test_a_weaker_run_speaks_of_the_same_in_the_same_terms(
    change: Any, what: str, tiny_run: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_run, tmp_path / "other"))
    change(RunRecord.read(other)).write(other)
    with pytest.raises(UserError, match=f"was trained with another {what} than"):
        plan(Sample(tiny_run, tmp_path / "out", weaker_run=other, device="cpu"), load(tiny_run, device="cpu"))


def test_what_was_never_trained_does_not_guide(tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    record = RunRecord.read(folder)
    recipe = replace(record.recipe, optimisation=replace(record.recipe.optimisation, label_dropout=0.0))
    replace(record, recipe=recipe).write(folder)
    model = load(folder, device="cpu")
    assert model.default_sampling.guidance_scale == 1
    for name, says in (
        ("guidance_scale", "has no branch without labels \\(trained with optimisation.label_dropout 0"),
        ("cls_scale", "has no branch without labels"),
        ("representation_scale", "has no branch without its map \\(trained with local.dropout 0"),
    ):
        with pytest.raises(UserError, match=says):
            model.generate(0, sampling=model.default_sampling.changed(**{name: 2.0}))
    # A run that began as another one may have learned it there.
    start = Start("elsewhere", 5, "ema", "")
    replace(record, recipe=recipe, start=start).write(folder)
    load(folder, device="cpu").generate(0, steps=1, guidance_scale=2.0, representation_scale=2.0)


def test_where_all_names_are_numbers_text_is_a_name(tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    replace(RunRecord.read(folder), class_names=("1", "10", "2")).write(folder)
    model = load(folder, device="cpu")
    assert [model.label(name) for name in ("1", "10", "2", 0, 2)] == [0, 1, 2, 0, 2]
    with pytest.raises(UserError, match=r"class 0: choose a name \(1, 10, 2\)"):
        model.label("0")


def test_complete_samples_stay_those_of_the_versions_that_drew_them(tiny_run: Path, tmp_path: Path) -> None:
    options = Sample(tiny_run, tmp_path / "out", count=2, steps=1, device="cpu")
    sample(options)
    file = tmp_path / "out" / "samples.json"
    older = json.loads(file.read_text())
    older["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(sealed({key: value for key, value in older.items() if key != "sha256"})))
    sample(options)
    assert json.loads(file.read_text())["versions"]["torch"] == "1.0"
    with pytest.raises(UserError, match=r"another protocol \(versions\)"):
        sample(replace(options, count=3))


@pytest.mark.parametrize(
    "change",
    [
        lambda record: replace(record, class_names=("0", "1", "2"), origin="published.pt"),
        lambda record: replace(record, autoencoder=replace(record.autoencoder, weights_sha256=None)),
    ],
)
def test_a_weaker_run_may_be_imported(change: Any, tiny_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_run, tmp_path / "other"))
    change(RunRecord.read(other)).write(other)
    assert plan(Sample(tiny_run, tmp_path / "out", weaker_run=other, device="cpu"), load(tiny_run, device="cpu")).weaker


def test_other_weights_are_another_protocol(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    out = sample(Sample(run, tmp_path / "out", count=1, steps=1, device="cpu"))
    file = run / "checkpoints" / "00000006" / "ema.safetensors"
    write_tensors(file, {name: value + 0.1 for name, value in load_file(file).items()})
    with pytest.raises(UserError, match=r"another protocol \(weights_sha256\)"):
        sample(Sample(run, out, count=2, steps=1, device="cpu"))


def test_a_run_that_has_moved_draws_more_of_the_same(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, "run")
    options = Sample(Path("run"), Path("out"), count=2, steps=1, weaker_run=Path("run"), device="cpu")
    out = sample(options)
    before = json.loads((out / "samples.json").read_text())
    assert before["run"] == before["weaker_run"] == str(tmp_path / "run"), "found from elsewhere too"
    Path("run").rename("moved")
    sample(replace(options, run=Path("moved"), count=1, weaker_run=tmp_path / "moved"))
    after = json.loads((out / "samples.json").read_text())
    assert (after["run"], after["weaker_run"]) == (str(tmp_path / "moved"),) * 2
    places = dict.fromkeys(("run", "weaker_run", "sha256"))
    assert after | places == before | places
    with pytest.raises(UserError, match=r"another protocol .*weaker_weights_sha256"):
        sample(replace(options, run=Path("moved"), weaker_run=None))


def test_dopri5_without_its_library(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(UserError, match=r"pip install 'reglue\[ode\]'"):
        sample(Sample(tiny_run, tmp_path / "out", count=1, sampler="dopri5", device="cpu"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sampler", "steps", "made"), [("euler", 5, 5), ("heun", 5, 9), ("euler-maruyama", 5, 5), ("adams-bashforth", 5, 5)]
)
def test_evaluations_are_as_many_as_announced(tiny_run: Path, sampler: str, steps: int, made: int) -> None:
    model, counted = load(tiny_run, device="cpu"), []
    sampling = Sampling(sampler, steps, guidance_scale=2.0, guidance_interval=(0.1, 0.8))
    model.draw([0, 1], model.condition([0, 1]), 0, sampling, controls=[Progress(lambda: counted.append(1))])
    assert len(counted) == made == generation.evaluations(sampling)
    assert generation.evaluations(sampling, count=7, batch_size=3) == 3 * made
    assert generation.evaluations(Sampling("dopri5"), count=7, batch_size=3) is None


def test_other_settings_are_refused_where_images_are(tiny_run: Path, tmp_path: Path) -> None:
    out = sample(Sample(tiny_run, tmp_path / "out", count=2, device="cpu"))
    with pytest.raises(UserError, match=r"another protocol .*seed"):
        sample(Sample(tiny_run, out, count=2, seed=1, device="cpu"))
    assert len(list(out.glob("*.png"))) == 2


def test_npz_holds_the_same_images(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reglue.samples, "PACKED_AT_ONCE", 2)
    folder = sample(Sample(tiny_run, tmp_path / "png", count=5, device="cpu"))
    packed = np.load(sample(Sample(tiny_run, tmp_path / "images.npz", count=5, device="cpu")), allow_pickle=False)
    assert np.array_equal(packed["arr_0"], pixels(folder))
    assert packed["arr_0"].dtype == np.uint8
    assert packed["labels"].tolist() == [0, 1, 2, 0, 1]
    assert json.loads(str(packed["protocol"])) == json.loads((folder / "samples.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npz", "png"]


def test_endings_of_archives_may_be_capitals(tiny_run: Path, tmp_path: Path) -> None:
    out = sample(Sample(tiny_run, tmp_path / "images.NPZ", count=2, steps=1, device="cpu"))
    assert len(np.load(out)["arr_0"]) == 2
    measured = open_image_set(out).images
    assert measured
    assert len(measured) == 2


def test_a_strange_file_among_the_pictures_of_an_archive_stays(tiny_run: Path, tmp_path: Path) -> None:
    options = Sample(tiny_run, tmp_path / "images.npz", count=2, steps=1, device="cpu")
    parts = sample(replace(options, out=tmp_path / "images.parts"))
    (parts / ".DS_Store").touch()
    for _ in range(2):
        assert len(np.load(sample(options))["arr_0"]) == 2
        assert [path.name for path in parts.iterdir()] == [".DS_Store"]


def test_a_finished_archive_is_not_drawn_again(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Sample(tiny_run, tmp_path / "images.npz", count=3, steps=1, device="cpu")
    out = sample(options)
    before = out.read_bytes()
    sample(replace(options, out=tmp_path / "images.parts"))  # As if killed before they were removed.
    with monkeypatch.context() as patched:
        patched.setattr(reglue.samples.Drawing, "draw", lambda *_: pytest.fail("drawn again"))
        capsys.readouterr()
        sample(options)
        assert "images.npz is complete already: 3 images" in capsys.readouterr().out
        for changes, message in (
            ({"seed": 1}, r"images\.npz holds samples of another protocol \(seed\); choose another place"),
            ({"count": 4}, r"images\.npz holds 3 images, not 4, .*choose another file"),
            ({"count": 2}, r"images\.npz holds 3 images, not 2"),
        ):
            with pytest.raises(UserError, match=message):
                sample(replace(options, **changes))
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, r"the protocol cannot be read: .*images\.npz is damaged \(File is not a zip file\)"),
        ({"arr_0": np.zeros((3, 16, 16, 3), np.uint8)}, "does not say how its images were drawn; choose another file"),
        ({"protocol": np.array('{"labels": []}')}, "does not say how its images were drawn"),
        ({"protocol": np.array("[]")}, r"images\.npz is damaged \(its protocol: it is not an object\)"),
        ({"protocol": np.array('{"labels": 5, "sampling": "x"}')}, "holds no protocol of samples"),
        ({"protocol": np.array([{}], dtype=object)}, "the protocol cannot be read"),
    ],
)
def test_a_file_that_is_no_archive_of_ours_is_not_overwritten(
    tiny_run: Path, tmp_path: Path, arrays: dict[str, np.ndarray] | None, message: str
) -> None:
    out = tmp_path / "images.npz"
    out.write_text("precious") if arrays is None else np.savez(out, allow_pickle=True, **arrays)
    before = out.read_bytes()
    with pytest.raises(UserError, match=message) as raised:
        sample(Sample(tiny_run, out, count=3, steps=1, device="cpu"))
    assert "\n" not in str(raised.value)
    assert out.read_bytes() == before


def test_an_archive_takes_the_memory_of_a_few_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, side = 60, 256
    files = [tmp_path / f"{i:06d}.png" for i in range(count)]
    for i, file in enumerate(files):
        Image.new("RGB", (side, side), (i, 0, 0)).save(file)
    monkeypatch.setattr(reglue.samples, "PACKED_AT_ONCE", 2)
    tracemalloc.start()
    reglue.samples.write_archive(tmp_path / "all.npz", files, list(range(count)), {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count / 3 * side * side * 3
    assert np.load(tmp_path / "all.npz")["arr_0"][:, 9, 9, 0].tolist() == list(range(count))


def test_an_archive_that_cannot_be_written_leaves_the_pictures(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np.lib.format, "write_array", full)
        with pytest.raises(UserError, match=r"images\.npz: No space left on device"):
            sample(Sample(tiny_run, tmp_path / "images.npz", count=3, steps=1, device="cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["images.parts"]
    assert len(pixels(tmp_path / "images.parts")) == 3
    packed = np.load(sample(Sample(tiny_run, tmp_path / "images.npz", count=3, steps=1, device="cpu")))
    assert len(packed["arr_0"]) == 3


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler-maruyama", "adams-bashforth", "dopri5"])
def test_every_sampler_and_guidance_draws_images(
    tiny_run: Path, dropping_run: Path, tmp_path: Path, sampler: str
) -> None:
    out = sample(
        Sample(
            dropping_run, tmp_path / "out", count=3, sampler=sampler,  # type: ignore[arg-type]
            guidance_scale=2.0, local_scale=1.5, cls_scale=1.0,
            guidance_interval=(0.1, 0.8), representation_scale=1.2, weaker_run=tiny_run, steps=3, device="cpu",
        )
    )  # fmt: skip
    images = pixels(out)
    assert images.shape == (3, 16, 16, 3)
    assert images.std() > 0
    protocol = json.loads((out / "samples.json").read_text())
    assert protocol["sampling"]["sampler"] == sampler
    assert protocol["sampling"]["guidance_interval"] == [0.1, 0.8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "3"], "class 3: choose 0 to 2 or a name"),
        (["--classes", "-1"], "class -1: choose 0 to 2"),
        (["--classes", "triangle"], "class triangle"),
        (["--step", "7"], "no checkpoint of step 7; it has 6"),
        (["--count", "0"], "--count"),
        (["--guidance-interval", "0.9", "0.1"], "guidance-interval 0.9 0.1: choose 0 ≤ lowest"),
        (["--autoencoder", "no-such-autoencoder"], "no-such-autoencoder"),
        (["--time-shift", "0"], "time-shift 0.0: choose more than 0"),
        (["--relative-tolerance", "-1"], "relative-tolerance -1.0"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    tiny_run: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert message in mistake(capsys, monkeypatch, "sample", tiny_run, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def sit_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """A run of two steps without local map and class token, though its recipe would guide them, previews too."""
    run = tmp_path_factory.mktemp("sit") / "run"
    previews = ["--preview-every=2", "--preview-count=1", "--preview-steps=1", "--sampling.cls-scale=2"]
    guided = ["--sampling.representation-scale=1.5", "--sampling.local-scale=2"]
    train = ["train", "sit", "--store", str(tiny_store), "--out", str(run), *TINY_RECIPE, *previews, *guided]
    reglue.train(parse([*train, "--optimisation.steps=2", "--sampling.guidance-scale=1"]))
    return run


def test_a_recipe_guides_nothing_that_its_model_lacks(sit_run: Path) -> None:
    assert (sit_run / "previews" / "00000002.png").is_file()
    sampling = load(sit_run, device="cpu").default_sampling
    scales = (sampling.guidance_scale, sampling.local_scale, sampling.cls_scale, sampling.representation_scale)
    assert set(scales) == {1.0}


@pytest.mark.parametrize(
    ("option", "lacking"),
    [("--representation-scale", "local map"), ("--local-scale", "local map"), ("--cls-scale", "class token")],
)
def test_guidance_of_what_a_model_lacks_is_refused(
    sit_run: Path,
    tmp_path: Path,
    option: str,
    lacking: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("sample", sit_run, "--out", tmp_path / "out", "--count=1", "--device=cpu", option)
    told = mistake(capsys, monkeypatch, *arguments, "1.5")
    assert f"{option.removeprefix('--')} 1.5: this model has no {lacking}" in told
    assert not (tmp_path / "out").exists()
    assert len(pixels(sample(parse([*map(str, arguments), "1", "--steps=1"])))) == 1, "1 is no guidance"


@pytest.mark.parametrize(("asked", "guided"), [(None, 3), ("all", "all"), ("1", 1)])
def test_guided_channels_are_chosen_when_sampling(
    sit_run: Path, tmp_path: Path, asked: str | None, guided: int | str
) -> None:
    chosen = ["--guided-channels", asked] if asked else []
    common = ["sample", str(sit_run), "--out", str(tmp_path / "out"), "--count=1", "--device=cpu", "--sampler=euler"]
    options = parse([*common, "--steps=1", "--guidance-scale=2", *chosen])
    protocol = json.loads((sample(options) / "samples.json").read_text())
    assert protocol["sampling"]["guided_channels"] == guided

    model = load(sit_run, device="cpu")
    for number, weights in enumerate(model.denoiser.parameters()):  # After two steps, labels hardly matter yet.
        weights.copy_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(number)) / 10)
    drawing = plan(options, model)
    latents = [
        replace(drawing, sampling=sampling).draw([0], lambda: None)["latent"]
        for sampling in (drawing.sampling, drawing.sampling.changed(guidance_scale=1.0))
    ]
    moved = (latents[0] - latents[1]).abs().amax(dim=(0, 2, 3)) > 1e-3
    assert moved.tolist() == [guided == "all" or channel < int(guided) for channel in range(3)]


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"sampling": {}, "labels": 3}'])
def test_a_damaged_protocol_is_named(tiny_run: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(UserError, match=r"samples\.json is damaged.*; choose another folder, or") as raised:
        sample(Sample(tiny_run, tmp_path, count=1, steps=1, device="cpu"))
    assert len(str(raised.value).splitlines()) == 1
    assert (tmp_path / "samples.json").read_text() == content


def test_a_run_without_checkpoint_is_named(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match="is not a run"):
        load(run, device="cpu")
    (run / "run.json").write_bytes((tiny_run / "run.json").read_bytes())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(run, device="cpu")
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json is damaged"):
        load(run, device="cpu")


def test_a_damaged_checkpoint_is_named(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    file = run / "checkpoints" / "00000006" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"ema\.safetensors is damaged"):
        load(run, device="cpu")


def test_python_interface(tiny_run: Path) -> None:
    model = load(tiny_run, device="cpu")
    fast = Sampling("euler", 2, guidance_scale=1.5)
    images = model.generate([CLASSES[1], 2], seed=3, sampling=fast)
    assert [image.size for image in images] == [(16, 16)] * 2
    again = model.generate(["square", "stripes", 0], seed=3, sampling=fast, batch_size=1)
    assert abs(np.asarray(images[1], int) - np.asarray(again[1], int)).max() <= 1


@pytest.fixture(scope="module")
def young_run(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """Six steps with an average that does not warm up: nearly all of it is the initial weights."""
    run = tmp_path_factory.mktemp("young") / "run"
    options = ["--store", str(tiny_store), "--out", str(run), *TINY_RECIPE, "--optimisation.steps=6"]
    train(parse(["train", "sit", *options, "--optimisation.ema-warmup=no"]))
    return run


def test_either_weights_draw(young_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    protocols: dict[str, Any] = {}
    files: dict[Weights, str] = {"ema": checkpoints.EMA, "model": checkpoints.MODEL}
    for weights, file in files.items():
        out = tmp_path / weights
        capsys.readouterr()
        sample(Sample(young_run, out, count=2, steps=2, weights=weights, device="cpu"))
        protocols[weights] = json.loads((out / "samples.json").read_text())
        assert protocols[weights]["weights"] == weights
        held = checkpoints.find(young_run) / file
        assert protocols[weights]["weights_sha256"] == hashlib.sha256(held.read_bytes()).hexdigest()
        warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        says = (
            "warning: 100% of the averaged weights of step 6 are those that the run began with, and images show it; "
            "weights model takes the trained ones"
        )
        assert warned == ([says] if weights == "ema" else [])
        denoiser = load(young_run, weights=weights, device="cpu").denoiser.state_dict()
        assert all(torch.equal(denoiser[name], value) for name, value in load_file(held).items())
    with pytest.raises(UserError, match=r"another protocol \(weights, weights_sha256\)"):
        sample(Sample(young_run, tmp_path / "ema", count=2, steps=2, weights="model", device="cpu"))


def test_a_young_average_warns_in_python_too_and_an_old_one_does_not(young_run: Path, tiny_run: Path) -> None:
    with pytest.warns(UserWarning, match="100% of the averaged weights of step 6"):
        load(young_run, device="cpu").generate(0, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(young_run, weights="model", device="cpu").generate(0, steps=1)
        load(tiny_run, device="cpu").generate(0, steps=1)  # It warmed up by itself.


def test_averaged_weights_alone_are_shared_and_kept(young_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights model: averaged weights are shared; load the run with ema"):
        load(young_run, weights="model", device="cpu").save(tmp_path / "shared")
    shared = load(young_run, device="cpu").save(tmp_path / "shared")
    with pytest.raises(UserError, match=r"has no model\.safetensors; choose weights ema"):
        load(shared, weights="model", device="cpu")
    assert "train it for longer" in str(load(shared, device="cpu").warning())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_are_no_images(tiny_run: Path, tmp_path: Path, value: float) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    file = checkpoints.find(run) / "ema.safetensors"
    weights = load_file(file)
    weights[next(name for name in weights if name.endswith("bias"))][0] = value
    write_tensors(file, weights)
    with pytest.raises(UserError, match=r"NaN or infinite") as raised:
        sample(Sample(run, tmp_path / "out", count=2, steps=1, device="cpu"))
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_decoder_of_nan_is_named(tiny_run: Path, tiny_autoencoder: str, tmp_path: Path) -> None:
    """Its weights are finite, and what it makes with them is not."""
    folder = Path(shutil.copytree(tiny_autoencoder, tmp_path / "autoencoder"))
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.weight"][:] = torch.finfo(torch.float32).max
    write_tensors(file, weights)
    with pytest.raises(UserError, match=r"decodes latents to NaN or infinite values; fetch it again"):
        sample(Sample(tiny_run, tmp_path / "out", count=2, steps=1, autoencoder=str(folder), device="cpu"))
