"""The study at toy size: every command for real, continuing, what it refuses, and what its reports say."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models.resnet import Bottleneck, ResNet

import study
from reglue import cli
from reglue.data.manifest import Source
from reglue.data.store import Store
from reglue.errors import UserError
from report import reached, saved
from study import QUESTIONS, Arm, Options, Study, arms_of, divided, merged, said

TINY = (
    "--train=--model 1x32x2/2 --optimisation.batch-size 4 --optimisation.precision float32 --alignment.hidden 16 "
    "--optimisation.compile no",
    "--compress=--hidden 8 --epochs 1",
    "--sample=--count 8 --steps 2",
    "--evaluate=--resamples 10 --kernel-subsets 2",
    *("--device", "cpu", "--milestones", "1", "2", "--arms", "sit", "reglue"),
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier as `scripts/convert_classifier.py` writes it."""
    file = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    torch.manual_seed(0)
    state = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3).state_dict()
    described = {"blocks": [1, 1, 1, 1], "classes": ["a"] * 3, "mean": [0.5] * 3, "std": [0.5] * 3, "size": 32}
    save_file({k: v for k, v in state.items() if "batches" not in k}, file, {"judge": json.dumps(described)})
    return str(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str) -> Path:
    """A folder with the stores of a study: twelve training images and as many held-out ones."""
    work = tmp_path_factory.mktemp("data") / "study"
    prepare = f"--resolution 16 --autoencoder {tiny_autoencoder} --encoder {tiny_encoder} --workers 0"
    options = Options(("convergence",), work, tiny_images, 0.5, prepare=prepare, device="cpu")
    assert [len(store) for store in Study(options).given] == [12, 12]
    return work


def spread(words: study.Words) -> list[str]:
    return [word for name, values in words.items() for word in (name, *values)]


def run(data: Path, work: Path, *arguments: str, question: str = "convergence") -> list[dict[str, Any]]:
    """Answer a question and return the lines of its results."""
    stores = ("--images", str(data / "stores" / "given"), "--held-out", str(data / "stores" / "held-out"))
    study.main([question, "--work", str(work), *stores, "--seeds", "1", *TINY, *arguments])
    return lines_of(work)


def lines_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]


def figures_of(work: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    timed = ("drawing", "training")
    return {(x["arm"], x["step"], x["by"]): x["figures"] for x in lines_of(work) if x["by"] not in timed}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path, judge: str) -> Path:
    work = tmp_path_factory.mktemp("finished") / "study"
    run(data, work, "--judge", judge)
    return work


def test_every_arm_has_every_figure_at_every_milestone(finished: Path) -> None:
    figures = figures_of(finished)
    arms = [*((f"{a}-seed-0", s) for s in (1, 2) for a in ("sit", "reglue")), ("reconstructed-seed-0", 0)]
    assert list(figures) == [(*arm, by) for arm in arms for by in ("encoder", "copies", "judge")]
    for (_, _, by), found in figures.items():
        if by == "encoder":
            assert found["frechet_distance"]["value"] > 0
            assert (found["images"], found["held_out_images"]) == (8, 12)
            assert {"kernel_distance", "precision", "recall"} <= found.keys()
        assert by != "judge" or 0 <= found["accuracy"]["low"] <= found["accuracy"]["value"] <= 1
    for line in lines_of(finished):
        assert {"machine", "versions", "commit", "date"} <= line.keys()
    drawn = sorted(file.name for file in (finished / "samples" / "sit-seed-0").iterdir())
    assert drawn == ["step-1", "step-1.closest.png", "step-2", "step-2.closest.png"]


def test_the_report(finished: Path) -> None:
    text = (finished / "convergence.md").read_text()
    figures = figures_of(finished)
    row = next(line for line in text.splitlines() if line.startswith("| reglue, seed 0 |"))
    heads = next(line for line in text.splitlines() if line.startswith("| arm |")).split(" | ")
    cells = dict(zip(heads, row.split(" | "), strict=True))
    expected = figures["reglue-seed-0", 2, "encoder"]["frechet_distance"]["value"]
    assert cells["Fréchet distance, 2 steps"].startswith(f"{expected:.1f} [")
    assert "[" in cells["class accuracy, 2 steps"]
    assert "[" not in cells["recall"]
    assert int(cells["weights"].replace(",", "")) > 10_000
    assert float(cells["seconds per step"]) > 0
    assert {"copied, 2 steps", "precision"} <= cells.keys()
    assert "| reconstructed, seed 0 |" in text
    assert "Steps to SiT's Fréchet distance" in text
    assert "of real held-out images" in text
    line = lines_of(finished)[0]
    for part in (f"machine: {line['machine']}", f"torch {torch.__version__.partition('+')[0]}", line["date"][:10]):
        assert part in text
    assert Image.open(finished / "convergence-samples.png").height == 2 * 16 + 2
    for name in ("convergence.png", "convergence-over-time.png"):
        assert Image.open(finished / name).width > 500


def test_the_same_command_again_does_nothing(
    finished: Path, data: Path, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Path(shutil.copytree(finished, tmp_path / "elsewhere"))
    shutil.rmtree(work / "runs")  # What has its figures does not need them.
    before = (work / "results.jsonl").read_bytes()
    monkeypatch.setattr(study, "reglue", None)
    run(data, work, "--judge", judge)
    assert (work / "results.jsonl").read_bytes() == before


def test_an_interrupted_study_continues_to_the_same_figures(
    finished: Path, data: Path, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, trainings = study.reglue, 0

    def interrupted(*arguments: Any, **options: Any) -> None:
        nonlocal trainings
        real(*arguments, **options)
        trainings += arguments[0] == "train"
        if trainings == 2:  # It is not noted what was trained.
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "reglue", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, "--judge", judge, "--arms", "reglue")
    begun = figures_of(tmp_path)
    assert begun
    run(data, tmp_path, "--judge", judge, "--arms", "reglue")
    expected = {key: value for key, value in figures_of(finished).items() if not key[0].startswith("sit")}
    after = figures_of(tmp_path)
    assert after.keys() == expected.keys()
    assert [line["step"] for line in lines_of(tmp_path) if line["by"] == "training"] == [1, 2]
    for key, figures in after.items():
        for name, figure in figures.items():
            values = [x["value"] if isinstance(x, dict) else x for x in (figure, expected[key][name])]
            assert values[0] == pytest.approx(values[1], rel=1e-4), (key, name)


def test_a_prolonged_study_keeps_its_figures(finished: Path, data: Path, judge: str, tmp_path: Path) -> None:
    work = Path(shutil.copytree(finished, tmp_path / "study"))
    before = figures_of(work)
    run(data, work, "--judge", judge, "--milestones", "1", "2", "4", "--arms", "sit")
    after = figures_of(work)
    assert {key: after[key] for key in before} == before
    assert [key[2] for key in after.keys() - before.keys() if key[:2] == ("sit-seed-0", 4)]
    assert len(after) == len(before) + 3


def test_figures_made_otherwise_are_refused(
    finished: Path, data: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Path(shutil.copytree(finished, tmp_path / "study"))
    other = tmp_path / "other.safetensors"
    state = load_file(judge)
    described = {"blocks": [1] * 4, "mean": [0.5] * 3, "std": [0.5] * 3, "size": 32}
    save_file({k: v + 0.01 for k, v in state.items()}, other, {"judge": json.dumps(described)})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/results.jsonl").write_text("{\n{}\n")
    cases = {
        "sit-seed-0 at step 1 was measured with other options (steps 2, steps 3)": (
            *(work, "--judge", judge, "--sample=--count 8 --steps 3"),
        ),
        "with another network (judge)": (work, "--judge", str(other)),
        "no file of scripts/convert_classifier.py": (work, "--judge", "missing.safetensors"),
        "adm is not known to this study; choose of sit": (work, "--arms", "adm"),
        "--seeds 0 counts trainings of one arm; choose 1 or more": (work, "--seeds", "0"),
        "damaged/results.jsonl": (tmp_path / "damaged",),
    }
    before = (work / "results.jsonl").read_bytes()
    for message, (folder, *arguments) in cases.items():
        with pytest.raises(SystemExit, match="2"):
            run(data, folder, *arguments)
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert (work / "results.jsonl").read_bytes() == before


def test_seconds_of_two_machines_are_not_compared(finished: Path, data: Path, judge: str, tmp_path: Path) -> None:
    work = Path(shutil.copytree(finished, tmp_path / "study"))
    lines = lines_of(work)
    assert "× in time" in (work / "convergence.md").read_text()
    next(line for line in lines if line["by"] == "training")["machine"] = "another"
    (work / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(data, work, "--judge", judge)
    text = (work / "convergence.md").read_text()
    assert "| seconds" not in text
    assert "× in time" not in text
    assert not (work / "convergence-over-time.png").exists()
    assert (work / "convergence.png").exists()


def test_a_study_continues_on_another_machine_without_the_images(
    finished: Path, data: Path, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Path(shutil.copytree(finished, tmp_path / "study"))

    def gone(source: Source) -> None:
        raise UserError(f"{source.path} is gone")

    monkeypatch.setattr(Source, "open", gone)
    lines = run(data, work, "--judge", judge, "--milestones", "1", "2", "3", "--arms", "sit")
    assert [line["by"] for line in lines if line["step"] == 3] == ["training", "drawing", "encoder", "copies", "judge"]
    training = next(line for line in lines if (line["by"], line["step"]) == ("training", 3))
    assert training["figures"]["steps"] == 1
    assert training["seconds"] > 0


def test_samples_are_judged_by_their_own_labels(finished: Path, data: Path, judge: str, tmp_path: Path) -> None:
    stores = (data / "stores" / "given", data / "stores" / "held-out")
    one = Study(Options(("convergence",), finished, *stores, judge=judge, device="cpu"))
    source = Store.open(stores[0]).manifest.source.open()
    for i in range(8):
        pixels = torch.as_tensor(source.load(i, (16, 16))).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i:06d}.png")
    (tmp_path / "samples.json").write_text(json.dumps({"labels": list(source.labels)}))
    assert one.by_judge(tmp_path, 8)["accuracy"]["value"] == 1  # They are what its last layer was fitted to.
    (tmp_path / "samples.json").write_text(json.dumps({"labels": [(label + 1) % 3 for label in source.labels]}))
    assert one.by_judge(tmp_path, 8)["accuracy"]["value"] == 0


def test_fid_is_against_statistics_of_all_held_out_images(data: Path, tmp_path: Path) -> None:
    stores = (data / "stores" / "given", data / "stores" / "held-out")
    one = Study(Options(("convergence",), tmp_path, *stores, device="cpu"))
    one.networks["inception"] = one.network("encoder")
    asked = []
    one.evaluated = lambda *arguments: asked.append(arguments) or {}  # type: ignore[method-assign]
    for _ in range(2):
        one.by_inception(tmp_path / "samples", 8)
    known = Store.open(stores[1]).read("cls", torch.arange(12))["cls"].double().numpy()
    statistics = np.load(asked[1][1])
    assert np.allclose(statistics["mu"], known.mean(0), atol=1e-4)
    assert np.allclose(statistics["sigma"], np.cov(known.T), atol=1e-4)


@pytest.mark.slow
def test_fid(finished: Path, data: Path, tmp_path: Path, random_inception: Path) -> None:
    work = Path(shutil.copytree(finished, tmp_path / "study"))
    run(data, work, "--milestones", "2", "--arms", "sit", "--inception", str(random_inception))
    figures = figures_of(work)["sit-seed-0", 2, "inception"]
    assert figures["frechet_distance"]["low"] is not None
    assert "| FID, 2 steps |" in (work / "convergence.md").read_text()


def test_questions_of_sampling_take_any_run(tmp_path: Path, tiny_run: Path, tiny_store: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    arguments = ("--run", str(run), "--held-out", str(tiny_store), "--arms", "heun-5-shift-1", "euler-10-shift-1")
    study.main(["samplers", "--work", str(tmp_path), *TINY, *arguments])
    figures = figures_of(tmp_path)
    assert list(figures) == [(f"{name}-shift-1-seed-0", 2, "encoder") for name in ("euler-10", "heun-5")]
    protocol = json.loads((tmp_path / "samples/heun-5-shift-1-seed-0/step-2/samples.json").read_text())
    assert (protocol["sampling"]["sampler"], protocol["sampling"]["steps"]) == ("heun", 5)
    assert "| heun-5-shift-1, seed 0 |" in (tmp_path / "samplers.md").read_text()


def test_every_option_of_every_arm_exists() -> None:
    options = Options((), Path("work"))
    arms = [arm for question in QUESTIONS for arm in arms_of(options, question) if arm.train]
    given: dict[str, set[str]] = {}
    for arm in arms:
        given.setdefault(arm.title, set()).add(said(arm))
    assert {title for title, options in given.items() if len(options) > 1} == set()  # an arm is one thing everywhere
    for train in {arm.train for arm in arms}:
        recipe, _, words = train.partition(" ")
        cli.parse(["train", recipe, "--store", "s", "--out", "o", *spread(merged(words))])
    words = merged(*(arm.sample for arm in arms))
    cli.parse(["sample", "run", "--out", "o", *spread(words)])
    cli.parse(["prepare", "i", "o", *spread(merged(study.PREPARE))])


def test_the_two_ends_come_first_and_their_other_seeds_next() -> None:
    options = tyro.cli(Options, args=["convergence", "--work", "w", "--train=--model B/2"])
    arms = arms_of(options, "convergence")
    assert [arm.title.replace("-seed-", " ") for arm in arms] == [
        *("reconstructed 0", "sit 0", "reglue 0", "sit 1", "reglue 1", "repa 0", "redi 0", "reg 0")
    ]
    assert merged(arms[-1].train)["--model"] == ["B/2"]
    assert Arm("guided", "reglue", run="reglue").run_title == "reglue-seed-0"
    observed: list[tuple[str, int]] = []
    one = Study(replace(options, device="cpu"))
    one.observe = lambda arm, step, lacks: observed.append((arm.title, step))  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "write_report", lambda *arguments: None)
        one.answer("convergence", [arm for arm in arms if arm.name in ("reconstructed", "sit", "reglue", "reg")])
    assert observed[:3] == [("sit-seed-0", 1000), ("reglue-seed-0", 1000), ("sit-seed-0", 2000)]
    assert observed[10] == ("sit-seed-1", 1000)
    assert observed[-2:] == [("reg-seed-0", 20_000), ("reconstructed-seed-0", 0)]


def test_of_options_given_twice_the_last_counts() -> None:
    assert merged("recipe --a 1 2 --flag", "--b=3 --a 4") == {"--flag": [], "--b": ["3"], "--a": ["4"]}


@pytest.mark.parametrize("as_tar", [False, True])
def test_images_are_divided_by_class(as_tar: bool, tiny_images: Path, tmp_path: Path) -> None:
    images = tiny_images
    if as_tar:
        images = tmp_path / "images.tar"
        with tarfile.open(images, "w") as archive:
            archive.add(tiny_images, "some/shapes")
    sides = divided(images, 0.25, tmp_path / "out")
    names = [{file.relative_to(side) for file in side.rglob("*.png")} for side in sides]
    assert [len(side) for side in names] == [18, 6]
    assert names[0] | names[1] == {file.relative_to(tiny_images) for file in tiny_images.rglob("*.png")}
    assert sorted(path.parent.name for path in names[1]) == sorted(2 * ["circle", "square", "stripes"])


def test_the_steps_that_a_curve_needs() -> None:
    steps, curve = np.array([100, 400, 1600]), np.array([50.0, 30.0, 35.0])
    assert reached(steps, curve, 40) == pytest.approx(200)  # half of the way between, over the logarithm
    assert reached(steps, curve, 30) == pytest.approx(400)
    assert reached(steps, curve, 60) == pytest.approx(100)
    assert reached(steps, curve, 20) == float("inf")
    assert reached(steps[:0], curve[:0], 20) == float("inf")


def test_what_is_saved_is_told_with_intervals() -> None:
    arms = [Arm("sit", "sit"), Arm("sit", "sit", seed=1), Arm("reglue", "reglue")]
    known: dict[tuple[str, int, str], dict[str, Any]] = {}
    for arm, shift in zip(arms, (1.0, -1.0, 0.0), strict=True):
        for step, value in ((100, 80.0), (200, 60.0), (400, 40.0)):
            value += shift
            if arm.name == "reglue":
                value -= 20
            figures = {"frechet_distance": {"value": value, "low": value - 2, "high": value + 2}}
            known[arm.title, step, "inception"] = {"figures": figures}
            dearer = 1.25 if arm.name == "reglue" else 1
            known[arm.title, step, "training"] = {"figures": {"steps": 100}, "seconds": 100 * dearer, "machine": "this"}
    text = "\n".join(saved("FID", arms, known))
    assert "| 60.0 (SiT: 200) | 40.0 (SiT: 400) |" in text
    row = next(line for line in text.splitlines() if line.startswith("| reglue |"))
    found = re.findall(r"(\d+): (\S+)× \[(\S+), (\S+)\], (\S+)× in time", row)
    assert [cell[:2] + cell[4:] for cell in found] == [("100", "2.00", "1.60"), ("200", "2.00", "1.60")]
    _, low, high = map(float, found[1][1:4])
    # One figure of REGLUE's is known to 2, SiT's mean of two seeds to 1.4, and a distance of 20 is a factor of two.
    assert low == pytest.approx(2 ** (1 - 2.45 / 20), rel=0.02)
    assert high == pytest.approx(2 ** (1 + 2.45 / 20), rel=0.02)
    known = {key: line for key, line in known.items() if key[0] != "reglue-seed-0" or key[1] == 100}
    text = "\n".join(saved("FID", arms, known))
    assert "| 100: 2.00×" in text
    assert "> 100: < 4.00×" in text
    assert not list(saved("FID", arms[:2], known))
