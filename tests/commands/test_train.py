"""Training: the loop, its exactness under a kill, and its answers to mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import TINY_RECIPE, reglue_command, run_reglue
from reglue.cli import parse
from reglue.commands.demo import DEMO_RECIPE
from reglue.commands.train import train
from reglue.config import Recipe
from reglue.errors import UserError
from reglue.files import write_tensors
from reglue.papers import RECIPES
from reglue.reals.config import AutoencoderRecipe
from reglue.run import RunRecord
from reglue.training import checkpoints


def options(recipe: str, store: Path, out: Path, *more: str):
    return parse(["train", recipe, "--store", str(store), "--out", str(out), *TINY_RECIPE, *more])


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"{step:08d}"
    files = sorted(folder.glob("*.safetensors"))
    assert [file.stem for file in files] == ["ema", "model", "optimiser"]
    return {f"{file.stem}.{name}": value for file in files for name, value in load_file(file).items()}


def assert_same_bits(run: Path, other: Path, step: int) -> None:
    ours, theirs = tensors(run, step), tensors(other, step)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.trains
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns(recipe: str, tiny_store: Path, tmp_path: Path) -> None:
    more = ["--local.compressor=pca-4"] if recipe == "redi" else []
    if RECIPES[recipe].latent.unit_variance:
        # These images are noise: at one scale with ε, nothing of them can be learned in the middle of the path.
        more.append("--latent.no-unit-variance")
    run = train(options(recipe, tiny_store, tmp_path / "run", "--optimisation.steps=60", *more))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 61, 5))
    terms = {"latent"} | {
        name
        for name, methods in {
            "local": ("redi", "reglue", "sfd"),
            "cls": ("reg", "reglue"),
            "alignment": ("repa", "reg", "reglue", "sfd"),
        }.items()
        if recipe in methods
    }
    assert terms == lines[0].keys() & {"latent", "local", "cls", "alignment"}
    for term in terms:
        assert lines[-1][term] < lines[0][term], f"{term} does not fall"


def test_killed_and_resumed_training_gives_the_same_bits(tiny_store: Path, tmp_path: Path) -> None:
    extra = ["--optimisation.steps=20", "--checkpoint-every=10", "--keep=0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = ["--store", str(tiny_store), *TINY_RECIPE, *extra]
    run_reglue("train", "reglue", "--out", whole, *common)

    # A process that dies at step 10 or a little after, in the middle of a step.
    process = subprocess.Popen(
        reglue_command("train", "reglue", "--out", broken, *common),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (broken / "checkpoints" / "00000010" / "progress.json").is_file():
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "checkpoints" / "00000020").exists(), "it was killed too late to test anything"

    run_reglue("train", "reglue", "--out", broken, *common)
    assert_same_bits(whole, broken, 20)
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k != "images_per_second"}
            for line in file.read_text().splitlines()
        ]
        for file in (whole / "metrics.jsonl", broken / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]


def test_accumulated_parts_give_the_same_step_up_to_rounding(tiny_store: Path, tmp_path: Path) -> None:
    runs = [
        train(
            options(
                "reglue", tiny_store, tmp_path / f"parts{n}", "--optimisation.steps=3", f"--optimisation.accumulate={n}"
            )
        )
        for n in (1, 4)
    ]
    one, four = (tensors(run, 3) for run in runs)
    for name, value in one.items():
        if name.startswith("ema."):
            torch.testing.assert_close(value, four[name], rtol=1e-3, atol=1e-5)


@pytest.mark.trains
def test_online_targets_equal_cached_ones(tiny_store: Path, tmp_path: Path) -> None:
    cached = train(options("repa", tiny_store, tmp_path / "cached", "--optimisation.steps=5"))
    online = train(
        options("repa", tiny_store, tmp_path / "online", "--optimisation.steps=5", "--alignment.targets=online")
    )
    a, b = (json.loads((run / "metrics.jsonl").read_text()) for run in (cached, online))
    assert a["alignment"] == pytest.approx(b["alignment"], rel=1e-3)  # cached features are float16


def test_an_exploding_loss_is_named_and_keeps_the_last_checkpoint(tiny_store: Path, tmp_path: Path) -> None:
    common = ["train", "sit", "--store", tiny_store, "--out", tmp_path / "run", *TINY_RECIPE, "--optimisation.ema=0.5"]
    run_reglue(*common, "--optimisation.steps=5")
    # The weights are spoilt as a defective memory would: the next loss cannot be finite.
    weights = tmp_path / "run" / "checkpoints" / "00000005" / "model.safetensors"
    spoilt = load_file(weights)
    spoilt["velocity.bias"] = torch.full_like(spoilt["velocity.bias"], 1e30)
    write_tensors(weights, spoilt)
    result = run_reglue(*common, "--optimisation.steps=10", check=False)
    assert result.returncode == 2
    assert "the loss is not finite between steps 5 and 10 (" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000005"]


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("reglue", ["--local.compressor=conv-99"], "local.conv-99"),
        ("reglue", ["--model=2x32x2/3"], "patches of 3"),
        ("reglue", ["--optimisation.batch-size=7", "--optimisation.accumulate=2"], "does not divide"),
        ("sit", ["--device=cuda"], "device cuda: this machine has no NVIDIA GPU"),
        ("sit", ["--shards=2"], "shards 2 does not divide 1 processes"),
        ("repa", ["--alignment.after-block=5"], "only 2 blocks"),
    ],
)
def test_mistakes_are_named(recipe: str, more: list[str], message: str, tiny_store: Path, tmp_path: Path) -> None:
    if "--device=cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        train(options(recipe, tiny_store, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_sampler_that_cannot_draw_the_previews_is_refused_before_training(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    adaptive = ["--sampling.sampler=dopri5", "--optimisation.steps=1"]
    with pytest.raises(UserError, match="needs torchdiffeq"):
        train(options("sit", tiny_store, tmp_path / "run", *adaptive, "--preview-every=1"))
    assert not (tmp_path / "run").exists()
    train(options("sit", tiny_store, tmp_path / "run", *adaptive))  # which draws none


def test_a_run_of_other_settings_is_refused_by_name(tiny_run: Path, tiny_store: Path) -> None:
    before = (tiny_run / "run.json").read_bytes()
    with pytest.raises(UserError, match=r"other settings: latent\.weight 2\.0 \(was 1\.0\); choose"):
        train(options("reglue", tiny_store, tiny_run, "--optimisation.steps=6", "--latent.weight=2"))
    with pytest.raises(UserError, match=r"other settings: seed 1 \(was 0\); choose"):
        train(options("reglue", tiny_store, tiny_run, "--optimisation.steps=6", "--seed=1"))
    assert (tiny_run / "run.json").read_bytes() == before


def test_a_finished_run_can_be_prolonged(tiny_store: Path, tmp_path: Path) -> None:
    train(options("sit", tiny_store, tmp_path / "run", "--optimisation.steps=5"))
    train(options("sit", tiny_store, tmp_path / "run", "--optimisation.steps=10"))
    train(options("sit", tiny_store, tmp_path / "once", "--optimisation.steps=10"))
    assert_same_bits(tmp_path / "run", tmp_path / "once", 10)


def test_a_run_cannot_be_shortened(tiny_store: Path, tmp_path: Path) -> None:
    run = train(options("sit", tiny_store, tmp_path / "run", "--optimisation.steps=5"))
    with pytest.raises(UserError, match=r"has 5 steps already, more than optimisation\.steps 4; choose 5 or more"):
        train(options("sit", tiny_store, run, "--optimisation.steps=4"))
    assert RunRecord.read(run).recipe.optimisation.steps == 5


def test_a_run_whose_learning_rate_knows_its_end_cannot_be_prolonged(tiny_store: Path, tmp_path: Path) -> None:
    more = ["--optimisation.decay=cosine"]
    train(options("sit", tiny_store, tmp_path / "run", "--optimisation.steps=5", *more))
    with pytest.raises(UserError, match=r"optimisation\.steps 10 \(was 5\)"):
        train(options("sit", tiny_store, tmp_path / "run", "--optimisation.steps=10", *more))


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_checkpoint_is_named(tiny_run: Path, tiny_store: Path, tmp_path: Path, content: str) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "checkpoints" / "00000006" / "progress.json").write_text(content)
    with pytest.raises(UserError, match=r"progress\.json is damaged.*; delete its folder to go on from the one before"):
        train(options("reglue", tiny_store, run, "--optimisation.steps=7"))


def test_a_folder_with_other_files_is_left_alone(tiny_store: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files"):
        train(options("sit", tiny_store, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_does_after_the_step_with_a_checkpoint(
    number: signal.Signals, tiny_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["train", "sit", "--store", tiny_store, "--out", run, *TINY_RECIPE, "--optimisation.steps=100000"]
    process = subprocess.Popen(
        reglue_command(*arguments, "--log-every=1000000", "--checkpoint-every=1000000"),
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (run / "run.json").is_file():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    (step,) = checkpoints.steps(run)
    assert process.returncode == 128 + number  # whichever ended it
    assert "Traceback" not in text
    assert f"reglue: stopped after step {step}, with a checkpoint; the same command continues" in text


def test_what_is_compiled_may_change_and_precision_may_not(tiny_store: Path, tmp_path: Path) -> None:
    run = train(options("sit", tiny_store, tmp_path / "run", "--optimisation.steps=5"))
    train(options("sit", tiny_store, run, "--optimisation.steps=10", "--optimisation.compile=auto"))
    assert checkpoints.steps(run) == [5, 10]
    assert RunRecord.read(run).recipe.optimisation.compile == "auto"
    with pytest.raises(UserError, match=r"other settings: optimisation\.precision tf32 \(was float32\)"):
        train(options("sit", tiny_store, run, "--optimisation.precision=tf32"))


def test_recipes_leave_it_to_the_device_how_to_multiply_and_what_to_compile() -> None:
    recipes = [*RECIPES.values(), DEMO_RECIPE, Recipe("own"), AutoencoderRecipe()]
    assert {recipe.optimisation.precision for recipe in recipes} == {"auto"}
    assert {recipe.sampling.precision for recipe in recipes if isinstance(recipe, Recipe)} == {"auto"}
    assert {recipe.optimisation.compile for recipe in RECIPES.values()} == {"auto"}


def test_on_a_cpu_tf32_is_float32_to_the_bit(tiny_store: Path, tmp_path: Path) -> None:
    for precision in ("tf32", "float32"):
        train(
            options(
                "sit", tiny_store, tmp_path / precision, "--optimisation.steps=5",
                f"--optimisation.precision={precision}",
            )
        )  # fmt: skip
    assert_same_bits(tmp_path / "tf32", tmp_path / "float32", 5)


def test_a_run_keeps_how_its_average_began(tiny_store: Path, tmp_path: Path) -> None:
    run = train(options("sit", tiny_store, tmp_path / "run", "--optimisation.steps=2"))
    assert RunRecord.read(run).recipe.optimisation.ema_warmup == "yes"  # what `auto` came to, for so few steps
    train(options("sit", tiny_store, run, "--optimisation.steps=4"))
    with pytest.raises(UserError, match=r"other settings: optimisation\.ema_warmup no \(was yes\); choose"):
        train(options("sit", tiny_store, run, "--optimisation.steps=4", "--optimisation.ema-warmup=no"))

    # An average that has never warmed up goes on so, although the run has become short enough.
    plain = train(options("sit", tiny_store, tmp_path / "plain", "--optimisation.steps=2", "--optimisation.ema=0.001"))
    assert RunRecord.read(plain).recipe.optimisation.ema_warmup == "no"
    train(options("sit", tiny_store, plain, "--optimisation.steps=4", "--optimisation.ema=0.001"))
    assert RunRecord.read(plain).recipe.optimisation.ema_warmup == "no"


def test_a_part_that_comes_later_is_in_the_model_from_the_start(tiny_store: Path, tmp_path: Path) -> None:
    later = [argument for part in ("local", "class-token", "alignment") for argument in
             (f"--{part}.weight=0", f"--{part}.schedule", "2", "0.5")]  # fmt: skip
    run = train(options("reglue", tiny_store, tmp_path / "run", "--optimisation.steps=3", "--log-every=1", *later))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all({"latent", "local", "cls", "alignment"} <= line.keys() for line in lines)
    for line, weight in zip(lines, (0, 0, 0.5), strict=True):
        rest = line["local"] + line["cls"] + line["alignment"]
        assert line["loss"] == pytest.approx(line["latent"] + weight * rest, rel=1e-5)
