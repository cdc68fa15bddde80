"""The study of convergence at toy size: its files, resuming, adding arms, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from safetensors.torch import load_file

import convergence
from compare import compare
from convergence import Convergence, arms_of
from costs import STEP, Cost, packed
from counting import H200_PRODUCTS, training_flops
from pack import Pack, pack
from plan import lines_of, proposed_steps
from reglue.commands.prepare import Prepare, prepare
from reglue.data.store import Store
from reglue.papers import RECIPES
from reglue.run import RunRecord
from study import steps_between_checkpoints, trials_of
from unpack import unpack

TINY = (
    *("--model", "1x32x2/2", "--steps", "4", "--checkpoints", "2", "--batch-size", "4", "--warmup", "0"),
    *("--alignment-hidden", "16", "--precision", "float32", "--count", "8", "--sampling-steps", "2"),
    *("--resamples", "10", "--redi-compressor", "pca-4", "--reglue-compressor", "conv-4", "--device", "cpu"),
    *("--seeds", "1"),
)


def run(store: Path, images: Path, out: Path, *arguments: str) -> dict:
    convergence.main([str(store), "--reference", str(images), "--out", str(out), *TINY, *arguments])
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, tiny_images: Path) -> Path:
    out = tmp_path_factory.mktemp("study") / "study"
    run(tiny_store, tiny_images, out, "--arms", "sit", "reglue")
    return out


def test_every_arm_has_every_figure_at_every_checkpoint(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert list(results["arms"]) == ["sit-seed-0", "reglue-seed-0"]
    for trial in results["arms"].values():
        assert list(trial["steps"]) == ["2", "4"]
        for figures in (*trial["steps"].values(), trial["guided"]):
            assert figures["encoder"]["frechet_distance"]["value"] > 0
            assert figures["encoder"]["images"] == 8
            # The held-out images of this test are the training images.
            assert figures["encoder"]["nearest_training_image_of_held_out"] == 0
            assert figures["encoder"]["nearest_training_image"] > 0
            assert {"kernel_distance", "precision", "recall"} <= figures["encoder"].keys()
        assert 0 < trial["steps"]["2"]["training_seconds"] < trial["steps"]["4"]["training_seconds"]
    assert results["arms"]["sit-seed-0"]["parameters"] < results["arms"]["reglue-seed-0"]["parameters"]
    assert {"table.md", "quality-by-steps.png", "quality-by-time.png"} <= {file.name for file in finished.iterdir()}
    grids = [file.name for file in sorted((finished / "grids").iterdir())]
    assert grids == ["guided-00000004.png", "step-00000002.png", "step-00000004.png"]
    assert "| 4, guided | reglue, seed 0 |" in (finished / "table.md").read_text()


def test_a_killed_study_continues_elsewhere_to_the_same_figures(
    finished: Path, tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    began, continued = tmp_path / "began", tmp_path / "continued"
    script = str(Path(convergence.__file__))
    options = [str(tiny_store), "--reference", str(tiny_images), "--out", str(began), *TINY, "--arms", "reglue"]
    process = subprocess.Popen([sys.executable, script, *options], stderr=subprocess.DEVNULL)
    drawn = began / "reglue-seed-0" / "step-00000002"
    while process.poll() is None and not list(drawn.glob("*.png")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (began / "reglue-seed-0" / "guided-00000004.encoder.json").exists()  # It was not done.
    shutil.move(began, continued)
    after = run(tiny_store, tiny_images, continued, "--arms", "reglue")["arms"]["reglue-seed-0"]
    before = json.loads((finished / "results.json").read_text())["arms"]["reglue-seed-0"]
    for step in ("2", "4"):
        for name in ("frechet_distance", "kernel_distance", "precision"):
            figures = [trial["steps"][step]["encoder"][name]["value"] for trial in (before, after)]
            assert figures[1] == pytest.approx(figures[0], rel=1e-4)  # Batches may differ.


def test_samples_are_measured_again_when_their_checkpoint_is_gone(
    finished: Path, tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "study"))
    shutil.rmtree(out / "sit-seed-0" / "run" / "checkpoints" / "00000002")
    (out / "sit-seed-0" / "step-00000002.encoder.json").unlink()
    after = run(tiny_store, tiny_images, out, "--arms", "sit")["arms"]
    before = json.loads((finished / "results.json").read_text())["arms"]
    for arms in (before, after):  # but for the time
        del arms["sit-seed-0"]["steps"]["2"]["encoder"]["circumstances"]
    assert after == before  # REGLUE's stay, too.


def test_a_prolonged_study_keeps_its_figures_and_draws_guided_samples_anew(
    finished: Path, tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "study"))
    before = json.loads((out / "results.json").read_text())["arms"]["sit-seed-0"]
    after = run(tiny_store, tiny_images, out, "--arms", "sit", "--steps", "8", "--checkpoints", "3")["arms"][
        "sit-seed-0"
    ]
    assert list(after["steps"]) == ["2", "4", "8"]
    assert {step: after["steps"][step] for step in ("2", "4")} == before["steps"]
    assert after["guided_step"] == 8
    assert after["guided"] != before["guided"]


def test_another_study_in_the_same_folder_is_refused(finished: Path, tiny_store: Path, tiny_images: Path) -> None:
    with pytest.raises(SystemExit, match="another --sampling-steps"):
        run(tiny_store, tiny_images, finished, "--arms", "sit", "--sampling-steps", "3")
    with pytest.raises(SystemExit, match="another --reference"):
        run(tiny_store, tiny_images / "circle", finished, "--arms", "sit")


def test_redis_components_may_have_one_scale(tiny_store: Path, tiny_images: Path) -> None:
    given = [str(tiny_store), "--reference", str(tiny_images), "--out", "study", "--arms", "redi", "redi-unit-variance"]
    published, scaled = arms_of(tyro.cli(Convergence, args=given))
    assert not published.recipe.local.unit_variance
    assert scaled.recipe == replace(
        published.recipe, name="redi-unit-variance", local=replace(published.recipe.local, unit_variance=True)
    )


def test_unknown_arms_are_refused(tmp_path: Path, tiny_store: Path, tiny_images: Path) -> None:
    with pytest.raises(SystemExit, match="--arms dit: choose of sit"):
        run(tiny_store, tiny_images, tmp_path, "--arms", "dit")
    with pytest.raises(SystemExit, match="--repeated-arms reg is none of the arms"):
        run(tiny_store, tiny_images, tmp_path, "--arms", "sit", "--repeated-arms", "reg")


def test_compare_sets_studies_side_by_side(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "results.json", tmp_path / "results.json")
    compare((finished, tmp_path), tmp_path / "compared")
    table = (tmp_path / "compared" / "table.md").read_text()
    assert f"| {finished.name} | 2 | sit, seed 0 |" in table
    assert f"| {tmp_path.name} | 2 | sit, seed 0 |" in table


def test_a_plan_times_the_arms_and_leaves_nothing_else(
    tmp_path: Path, tiny_store: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    arguments = ["--arms", "sit", "redi", "--plan", "--minutes", "0.5"]
    convergence.main([str(tiny_store), "--reference", str(tiny_images), "--out", str(out), *TINY, *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ["sit-seed-0", "redi-seed-0"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["study-plan.json", "study-plan.md"]
    assert (tmp_path / "study-plan.md").read_text().splitlines() == lines
    written = json.loads((tmp_path / "study-plan.json").read_text())
    sit = written["arms"][0]
    assert sit["training"] == pytest.approx(4 * 4 / sit["images_per_second"])
    assert all(sit[part] >= 0 for part in ("starting", "drawing", "measuring"))


def test_a_plan_is_counted_without_the_gpu_that_it_is_for(
    tmp_path: Path, tiny_store: Path, tiny_images: Path, random_inception: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held-out"
    pack(Pack(tiny_store, held_out, ("latent", "cls")))
    arguments = [str(tiny_store), "--reference", str(held_out), "--out", str(tmp_path / "study"), *TINY]
    arguments += ["--arms", "sit", "reglue", "--inception", str(random_inception), "--precision", "bfloat16"]
    arguments += ["--plan", "--counted-on", "h200", "--minutes", "30"]

    def counted(*more: str) -> dict[str, Any]:
        convergence.main([*arguments, *more])
        return json.loads((tmp_path / "study-plan.json").read_text())

    # So small a model is as fast as a host can start its kernels.
    assert [arm["images_per_second"] for arm in counted()["arms"]] == [4 / STEP, 4 / STEP]
    large = ("--model", "B/2", "--batch-size", "4096", "--alignment-hidden", "2048")
    written = counted(*large)
    sit, reglue = written["arms"]
    config = RunRecord.of(Store.open(tiny_store), RECIPES["sit"], 0).denoiser
    operations = training_flops(replace(config, learn_sigma=False))
    assert sit["images_per_second"] == pytest.approx(0.25 * H200_PRODUCTS / operations)
    assert sit["images_per_second"] > reglue["images_per_second"]  # It has a class token and a projector.
    twice = counted(*large, "--assumed-share", "0.5")["arms"][0]
    assert twice["images_per_second"] == pytest.approx(2 * sit["images_per_second"])
    assert twice["measuring"] < sit["measuring"]  # Frozen networks are counted too.
    assert written["steps_within_minutes"] % 2 == 0
    columns, names = Store.open(tiny_store).manifest.columns, ("label", "latent", "cls", "features", "local.conv-4")
    stored, kept_elsewhere, network = written["to_bring"]
    assert stored["files"] == len(names)
    assert set(names) <= set(columns)
    assert kept_elsewhere["files"] == 3
    assert network["megabytes"] == random_inception.stat().st_size / 1e6
    assert "Counted, not timed: 25% of 790 TFLOP/s" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no codes pca-3-last; make them"):
        counted("--arms", "redi", "--redi-compressor", "pca-3-last")


def test_the_size_of_what_is_brought_is_that_of_the_packed_store(tmp_path: Path, tiny_store: Path) -> None:
    names = ["features", "label", "latent"]
    store = pack(Pack(tiny_store, tmp_path / "packed", tuple(names), last_layer=True))
    files = list((tmp_path / "packed").glob("*.safetensors"))
    parcel = packed(Store.open(tiny_store), names)
    assert parcel.files == len(files)
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert parcel.megabytes == pytest.approx(sum(tensor.nbytes for tensor in tensors) / 1e6)
    assert len(store) > 0


def test_the_proposed_steps_take_the_minutes(tiny_store: Path) -> None:
    def options(**changes: Any) -> convergence.Convergence:
        given = {"store": tiny_store, "reference": tiny_store, "out": tiny_store, "checkpoints": 3, "guidance": 1.0}
        return convergence.Convergence(**{**given, "batch_size": 10, "arms": ("sit",), "seeds": 1, **changes})

    cost = Cost(
        images_per_second=100.0, start_seconds=2.0, drawing_seconds=3.0, measuring_seconds=1.0, inception_seconds=9
    )
    arms = convergence.arms_of(options())

    def seconds(steps: int) -> float:
        changed = options(steps=steps)
        return 20 + sum(line.total for line in lines_of(changed, arms, {"sit": cost}))

    asked = options(steps=1000, minutes=5.0)
    steps = proposed_steps(asked, list(lines_of(asked, arms, {"sit": cost})), {"conv-16": 20.0})
    # 300 seconds less 20 of the compressor, less three times 2 + 3 + 1, less 9 of the Inception.
    assert steps == 2528
    assert seconds(steps) <= 300 < seconds(steps + 4)
    short = options(steps=1000, minutes=0.5)
    assert proposed_steps(short, list(lines_of(short, arms, {"sit": cost})), {"conv-16": 20.0}) == 0


def phases(out: Path) -> list[str]:
    return [json.loads(line)["phase"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_finished_study_without_its_runs_is_not_trained_again(
    finished: Path, tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    out = tmp_path / "study"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("run", "*.png", "samples.json", "log.jsonl"))
    before = json.loads((finished / "results.json").read_text())["arms"]
    assert run(tiny_store, tiny_images, out, "--arms", "sit", "reglue")["arms"] == before
    assert not (out / "log.jsonl").exists()
    # What is new is trained: the longer run from its beginning, whose earlier figures stay.
    after = run(tiny_store, tiny_images, out, "--arms", "sit", "--steps", "8", "--checkpoints", "3")["arms"]
    assert phases(out).count("train") == 1
    assert {step: after["sit-seed-0"]["steps"][step] for step in ("2", "4")} == before["sit-seed-0"]["steps"]
    assert after["sit-seed-0"]["steps"]["8"]["training_seconds"] > 0


def test_seconds_of_an_earlier_version_come_from_its_results(
    finished: Path, tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    out = tmp_path / "study"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("run", "*.training.json"))
    before = json.loads((finished / "results.json").read_text())["arms"]
    assert run(tiny_store, tiny_images, out, "--arms", "sit", "reglue")["arms"] == before


@pytest.mark.parametrize(
    ("option", "message"),
    [("--inception", "the Inception's weights missing"), ("--judge", "--judge missing"), ("--autoencoder", "missing")],
)
def test_a_network_that_is_missing_is_found_before_any_step(
    option: str, message: str, tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    out = tmp_path / "study"
    with pytest.raises(SystemExit, match=message):
        run(tiny_store, tiny_images, out, "--arms", "sit", option, "missing.safetensors")
    assert not out.exists()  # So that the right name is no other study.


def test_real_images_stay_where_their_features_were_taken(
    tmp_path: Path,
    tiny_store: Path,
    tiny_images: Path,
    tiny_encoder: str,
    tiny_autoencoder: str,
    random_inception: Path,
) -> None:
    images, known = Path(shutil.copytree(tiny_images, tmp_path / "images")), tmp_path / "known"
    made = {"autoencoder": tiny_autoencoder, "encoder": tiny_encoder, "workers": 0, "device": "cpu"}
    held_out = tmp_path / "held-out"
    prepare(Prepare(images, held_out, 16, **made))
    more = ["--arms", "sit", "--inception", str(random_inception), "--guidance", "1", "--count", "6"]
    options = [*TINY, *more, "--checkpoints", "1"]
    convergence.main(
        [str(tiny_store), "--reference", str(held_out), "--out", str(known), *options, "--references-only"]
    )
    assert [file.name for file in known.iterdir()] == ["references"]
    packed = tmp_path / "packed"
    columns = ("latent", "cls")
    pack(Pack(held_out, packed, columns, references=known / "references", networks=(random_inception,)))
    unpack(packed)
    shutil.rmtree(images)
    network = packed / "networks" / random_inception.name
    out = tmp_path / "study"
    options[options.index(str(random_inception))] = str(network)
    convergence.main([str(tiny_store), "--reference", str(packed), "--out", str(out), *options])
    results = json.loads((out / "results.json").read_text())
    assert results["arms"]["sit-seed-0"]["steps"]["4"]["inception"]["held_out_images"] == 24
    assert results["controls"]  # Reconstructed from latents.


def test_redi_learns_the_last_layer_and_its_codes_are_made(tmp_path: Path, tiny_store: Path, tiny_images: Path) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    assert convergence.Convergence.redi_compressor == "pca-8-last"
    more = ("--arms", "redi", "--redi-compressor", "pca-3-last", "--checkpoints", "1", "--guidance", "1")
    run(store, tiny_images, tmp_path / "study", *more)
    assert Store.open(store).manifest.compressors["pca-3-last"].layers == (4,)
    with pytest.raises(SystemExit, match="no codes mine, and the name does not tell how they are made"):
        run(store, tiny_images, tmp_path / "other", "--arms", "redi", "--redi-compressor", "mine")


def test_both_ends_are_trained_twice_unless_told_otherwise(tiny_store: Path) -> None:
    options = convergence.Convergence(store=tiny_store, reference=tiny_store, out=Path("study"))
    names = [trial.folder.name for trial in trials_of(options, convergence.arms_of(options))]
    assert [name for name in names if name.endswith("seed-1")] == ["sit-seed-1", "reglue-seed-1"]
    some = replace(options, arms=("sit", "repa"))
    names = [trial.folder.name for trial in trials_of(some, convergence.arms_of(some))]
    assert names == ["sit-seed-0", "sit-seed-1", "repa-seed-0"]


def test_checkpoints_are_minutes_apart(finished: Path, tiny_store: Path, tmp_path: Path) -> None:
    options = convergence.Convergence(store=tiny_store, reference=tiny_store, out=tmp_path, batch_size=4, arms=("sit",))
    (trial, _) = trials_of(options, convergence.arms_of(options))
    assert steps_between_checkpoints(options, trial) == 500
    other = tmp_path / "reglue-seed-0" / "run"  # Another arm tells about how fast this machine is.
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_text('{"step": 5, "images_per_second": 10.0}\n')
    assert steps_between_checkpoints(options, trial) == 750
    trial.run.mkdir(parents=True)
    (trial.run / "metrics.jsonl").write_text('{"step": 5, "images_per_second": 20.0}\n')
    assert steps_between_checkpoints(options, trial) == 1500
