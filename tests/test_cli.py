"""The command line as a user meets it: help, mistakes, exit codes."""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from helpers import TINY_RECIPE, mistake, reglue_command, run_reglue
from reglue.cli import COMMANDS, FIRST, function_of, parse
from reglue.commands.sample import Sample
from reglue.commands.train import Train
from reglue.help import GROUPS, declared
from reglue.papers import RECIPES

FORMS = [[name] for name in COMMANDS if name != "train"] + [["train", recipe] for recipe in RECIPES]
"""Every command, and every recipe of `train`."""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line prints when it is asked about itself."""
    with pytest.raises(SystemExit) as exit_:
        parse(list(arguments))
    assert exit_.value.code in (None, 0)
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_in_the_order_of_the_work(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, *arguments)
    listed = re.findall(r"^  (\w+)  +\w", text, flags=re.MULTILINE)
    assert listed == list(COMMANDS)
    assert listed[:5] == ["prepare", "compress", "train", "sample", "evaluate"]
    for line in FIRST:
        assert text.index(f"  reglue {line}") < text.index("  prepare")
        parse(shlex.split(line))


SLOW = {"torch", "timm", "torchvision", "diffusers", "datasets", "transformers", "matplotlib", "torch_fidelity"}
"""Packages that take a good part of a second to import, or seconds."""


def loaded(program: str, *arguments: str) -> set[str]:
    """The modules in memory after a program has run in a process of its own."""
    program = f"import sys, atexit; atexit.register(lambda: print(*sys.modules)); {program}"
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    return {*result.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize("form", [*FORMS, ["train"], [], ["trian"]], ids=" ".join)
def test_help_and_mistakes_do_not_wait_for_torch(form: list[str]) -> None:
    main = "from reglue.cli import main; main()"
    for argument in ("--help", "--no-such-option") if form else ("--help", "--version"):
        modules = loaded(main, *form, argument)
        assert "reglue.cli" in modules
        assert modules.isdisjoint(SLOW), argument


def test_a_command_starts_with_torch_alone() -> None:
    modules = loaded("from reglue.cli import *; [function_of(command.load()) for command in COMMANDS.values()]")
    assert {function_of(command.load()).__module__ for command in COMMANDS.values()} <= modules
    assert modules & (SLOW | {"torch.distributed.checkpoint", "torch._dynamo"}) == {"torch"}


def test_names_that_are_known_without_torch_are_those_of_the_parts() -> None:
    program = "from importlib import import_module; from reglue.diffusion.specs import OWN_PARTS"
    program += "\nfor place, names in OWN_PARTS.items():\n module, table = place.split('.')"
    program += "\n assert tuple(getattr(import_module(f'reglue.diffusion.{module}'), table)) == names, place"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"reglue {version('reglue')}\n"


def test_a_mistyped_name_brings_the_closest_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "unknown command smaple; did you mean sample?" in mistake(capsys, monkeypatch, "smaple", "run", "--help")
    assert "unknown recipe regle; did you mean reglue?" in mistake(capsys, monkeypatch, "train", "regle", "--out", "r")
    for arguments in (["train", "x"], ["train"], ["train", "--store"]):
        assert f"choose from {', '.join(RECIPES)}" in mistake(capsys, monkeypatch, *arguments)


def test_completions_know_the_options_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--tyro-print-completion", "bash")
    assert all(option in text for option in ("--shard-size", "--optimisation.clip", "--guidance-interval"))


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_the_help_of_a_command(
    form: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = printed(capsys, *form, "--help")
    assert text.startswith(f"usage: reglue {' '.join(form)} ")
    assert "None}" not in text
    assert "default: None" not in text
    assert max(map(len, text.splitlines())) <= 100

    *_, example = text.splitlines()
    assert type(parse(shlex.split(example)[1:])) is COMMANDS[form[0]].load()
    assert shlex.split(example)[: len(form) + 1] == ["reglue", *form]

    titles = re.findall(r"^(\w+):$", text, flags=re.MULTILINE)
    assert titles == [*(title for title in GROUPS if title in titles), "example"]
    listed = re.split(r"^\w+:$", text, flags=re.MULTILINE)
    options = list(declared(COMMANDS[form[0]].load()))
    for option in options:
        place = listed[1 + titles.index(option.title(form[0]))]
        assert re.search(rf"^  {re.escape(option.flags[0])}[ ,\n]", place, flags=re.MULTILINE), option.name
        assert option.explanation, option.name
    flags = re.findall(r"^  (--[^\s,]+)", text, flags=re.MULTILINE)
    assert flags == [
        option.flags[0]
        for title in GROUPS
        for option in options
        if option.title(form[0]) == title and not option.positional
    ]


def test_the_help_of_train_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "train", "--help")
    assert re.findall(r"^  (\w+)  +\w", text, flags=re.MULTILINE)[: len(RECIPES)] == list(RECIPES)
    assert parse(shlex.split(re.findall(r"^  reglue (.*)$", text, flags=re.MULTILINE)[-1])).recipe == RECIPES["reglue"]


def test_defaults_are_those_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    sit, reglue = (" ".join(printed(capsys, "train", name, "--help").split()) for name in ("sit", "reglue"))
    weight = "--class-token.weight FLOAT Weight of this term in the loss; 0, without a schedule that raises it, "
    weight += "leaves the part out of the model. (default: "
    assert f"{weight}0.0)" in sit
    assert f"{weight}0.03)" in reglue


def test_values_of_options_are_named_by_what_they_take() -> None:
    options = {option.name: option for option in declared(Sample)}
    assert [options[name].metavar for name in ("steps", "out", "guidance-interval", "rounding", "guided-channels")] == [
        "INT",
        "PATH",
        "FLOAT FLOAT",
        "{truncate,round}",
        "INT | all",
    ]
    of_sit = {option.name: option for option in declared(Train, Train(RECIPES["sit"], Path("s"), Path("r")))}
    assert of_sit["latent.schedule"].metavar == "INT FLOAT ..."
    assert of_sit["deterministic"].flags == ("--deterministic", "--no-deterministic")
    assert of_sit["latent.unit-variance"].flags == ("--latent.unit-variance",)


@pytest.mark.parametrize(
    ("command", "names"),
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
def test_the_usage_line_names_what_comes_first(command: str, names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, command, "--help").startswith(f"usage: reglue {command} {names} ")


def test_every_command_has_its_function() -> None:
    for name, command in COMMANDS.items():
        assert function_of(command.load()).__name__ in (name, f"{name}_run", f"{name}_runs", f"train_{name}")


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
    assert recipe.local.present  # By its schedule, whatever the weight.
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
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # which would be cut off at the limit too
        capture_output=True, text=True, check=False, preexec_fn=no_file_over_20_kilobytes,
    )  # fmt: skip
    assert result.returncode == 2
    assert "cannot write checkpoint" in result.stderr
    assert "Traceback" not in result.stderr
    after = {file: file.read_bytes() for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file()}
    assert after == before
