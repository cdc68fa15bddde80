"""The command line as a user meets it: help, mistakes, exit codes."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import TINY_RECIPE, mistake, reglue_command, run_reglue
from reglue.cli import COMMANDS, job_of, parse
from reglue.commands.sample import Sample
from reglue.commands.train import Train
from reglue.papers import RECIPES

JOBS = (
    "prepare",
    "reencode",
    "compress",
    "autoencode",
    "sample",
    "evaluate",
    "probe",
    "head",
    "perceive",
    "import",
    "export",
    "verify",
    "demo",
)
"""All but train, which has a subcommand per recipe."""


def test_help_lists_every_job() -> None:
    text = run_reglue("--help").stdout
    for job in (*JOBS, "train"):
        assert f"• {job}" in text


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys; from reglue.cli import parse; sys.argv = ['reglue']\ntry: parse(['--help'])\n"
    program += "except SystemExit: print([m for m in ('torch', 'timm', 'datasets') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_completions_know_the_options_of_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--tyro-print-completion", "bash"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--shard-size", "--optimisation.clip", "--guidance-interval"))


@pytest.mark.parametrize("job", JOBS)
def test_every_option_is_explained(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse([job, "--help"])
    assert exit_.value.code == 0
    assert f"usage: reglue {job}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("job", "names"),
    [
        ("prepare", "IMAGES OUT"),
        ("compress", "STORE"),
        ("reencode", "STORE OUT"),
        ("autoencode", "IMAGES OUT"),
        ("sample", "RUN"),
        ("evaluate", "IMAGES"),
        ("probe", "STORE"),
        ("import", "FILE"),
        ("export", "RUN"),
        ("verify", "FOLDER"),
    ],
)
def test_the_usage_line_names_what_comes_first(job: str, names: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([job, "--help"])
    assert f"] {names}" in capsys.readouterr().out.splitlines()[0]


def test_an_unknown_recipe_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["train", "regle", "--store", "s", "--out", "r"])
    assert exit_.value.code == 2
    assert ", ".join(RECIPES) in " ".join(capsys.readouterr().err.split())


def test_every_command_has_the_function_of_its_job() -> None:
    for name, command in COMMANDS.items():
        job = job_of(object.__new__(command.load()))
        assert job.__name__ in (name, f"{name}_run", f"train_{name}")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_without_changes_is_the_published_one(name: str) -> None:
    options = parse(["train", name, "--store", "s", "--out", "r"])
    assert options == Train(RECIPES[name], Path("s"), Path("r"))


def test_every_field_of_a_recipe_can_be_overridden() -> None:
    options = parse(
        [
            "train",
            "reglue",
            "--store",
            "s",
            "--out",
            "r",
            "--model",
            "L/2",
            "--path",
            "cosine",
            "--latent.weight",
            "2",
            "--local.weight",
            "0",
            "--local.schedule",
            "250",
            "0.5",
            "500",
            "0.25",
            "--class-token.weight",
            "0.1",
            "--alignment.after-block",
            "3",
            "--alignment.targets",
            "online",
            "--optimisation.batch-size",
            "64",
            "--optimisation.betas",
            "0.9",
            "0.95",
            "--sampling.steps",
            "10",
            "--sampling.guidance-scale",
            "1.5",
        ]
    )
    recipe = options.recipe
    assert (recipe.model, recipe.path, recipe.latent.weight) == ("L/2", "cosine", 2.0)
    assert not recipe.local.present
    assert recipe.local.schedule == ((250, 0.5), (500, 0.25))
    assert (recipe.class_token.weight, recipe.alignment.after_block, recipe.alignment.targets) == (0.1, 3, "online")
    assert (recipe.optimisation.batch_size, recipe.optimisation.betas) == (64, (0.9, 0.95))
    assert (recipe.sampling.steps, recipe.sampling.guidance_scale) == (10, 1.5)


def test_sample_takes_its_run_first() -> None:
    assert parse(["sample", "run", "--out", "o", "--classes", "3", "tench"]) == Sample(
        Path("run"), Path("o"), classes=("3", "tench")
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "no-such-folder", "store"],
        ["compress", "no-such-store"],
        ["autoencode", "no-such-folder", "autoencoder", "--encoder", "starter"],
        ["train", "sit", "--store", "no-such-store", "--out", "run"],
        ["probe", "no-such-store", "--out", "probe"],
        ["head", "no-such-store", "--out", "head"],
        ["perceive", "no-such-run", "--out", "seen", "--head", "no-such-head"],
        ["sample", "no-such-run", "--out", "samples"],
        ["evaluate", "no-such-folder", "--reference", "neither"],
        ["import", "no-such-file.pt", "--out", "run"],
        ["export", "no-such-run", "--out", "out.pt"],
        ["verify", "no-such-store"],
    ],
)
def test_what_is_missing_is_named_in_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no-such" in mistake(capsys, monkeypatch, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_checkpoints_that_exist(tiny_store: Path, tmp_path: Path) -> None:
    common = ["train", "sit", "--store", tiny_store, "--out", tmp_path / "run", *TINY_RECIPE]
    run_reglue(*common, "--optimisation.steps=5")
    before = {file: file.read_bytes() for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file()}

    def no_file_over_20_kilobytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = subprocess.run(
        reglue_command(*common, "--optimisation.steps=10"),
        capture_output=True, text=True, check=False, preexec_fn=no_file_over_20_kilobytes,
    )  # fmt: skip
    assert result.returncode == 2
    assert "cannot write checkpoint" in result.stderr
    assert "Traceback" not in result.stderr
    after = {file: file.read_bytes() for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file()}
    assert after == before
