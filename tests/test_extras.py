"""Extras: what each brings, and the line that names one where its packages are missing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from helpers import run_reglue
from reglue import cli
from reglue.errors import UserError
from reglue.extras import EXTRAS, is_installed, need, remedy
from test_package import PROJECT

PACKAGE = PROJECT / "src" / "reglue"
DECLARED: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
ALIASES = {"PIL": "pillow", "yaml": "pyyaml"}
"""Modules that are called otherwise than their package."""
OTHERS = {"pillow_jxl", "starlette", "comfy", "comfy_api"}
"""A plug-in of Pillow's that is used where it is installed; what gradio's pages are made of; ComfyUI, which is there
wherever its nodes are imported."""
MISSING = f"""
import sys
for name in [*sys.modules]:
    if name.partition(".")[0] in {sorted(name for names in EXTRAS.values() for name in names)}:
        del sys.modules[name]
sys.modules |= dict.fromkeys({sorted(name for names in EXTRAS.values() for name in names)})
"""
"""A prelude after which none of the extras is installed."""
TRAIN, RUN = ("train", "sit", "--store", "s", "--out", "r"), ("starter", "--out", "o")
NEEDS = {
    "train": (TRAIN, "train needs matplotlib", "train"),
    "report": (("report", "starter"), "report needs matplotlib", "train"),
    "probe": (("probe", "s", "--out", "o"), "probe needs matplotlib", "train"),
    "autoencode": (("autoencode", "images", "o"), "autoencode needs matplotlib", "train"),
    "prototypes": (("prototypes", "s", "--masks", "m", "--out", "o"), "prototypes needs scipy", "train"),
    "synthesise": (("synthesise", *RUN, "--head", "h"), "synthesise needs scipy", "train"),
    "prepare": (("prepare", "a.parquet", "o"), "reading tables and data sets needs datasets", "train"),
    "evaluate": (("evaluate", "s"), "evaluate needs torch-fidelity", "evaluate"),
    "studio": (("studio",), "the studio needs gradio", "app"),
    "export": (("export", "starter", "--to", "onnx", "--out", "o"), "this needs onnx", "onnx"),
    "sample": (("sample", *RUN, "--sampler", "dopri5"), "the sampler dopri5 needs torchdiffeq", "ode"),
    "demo": (("demo",), "the demo needs mlxtend", "demo"),
}
"""Command → a line of it that needs an extra, what it then says, and the extra."""
WORK = {"compress", "reencode", "head", "perceive", "edit", "import", "info", "list", "verify"}
"""Commands that need none, whatever they are asked, but for images in tables and a feather."""


def package_of(requirement: str) -> str:
    """The name that a requirement begins with, as a module is spelt."""
    return re.split(r"[\[<>=]", requirement)[0].replace("-", "_")


def imported() -> set[str]:
    """The modules that the package imports from elsewhere, anywhere in its code."""
    names: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - {"reglue", "__future__"} - sys.stdlib_module_names


def test_every_import_is_of_the_base_or_of_an_extra() -> None:
    base = {package_of(requirement) for requirement in DECLARED["dependencies"]}
    optional = {name for names in EXTRAS.values() for name in names}
    assert {ALIASES.get(name, name) for name in imported()} <= base | optional | OTHERS
    assert base.isdisjoint(optional)


def test_the_table_is_that_of_the_project() -> None:
    extras = DECLARED["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        assert {*modules} <= {package_of(requirement) for requirement in extras[extra]}, extra
    assert extras["all"] == [f"reglue[{','.join(EXTRAS)}]"]
    assert NEEDS.keys() | WORK == cli.COMMANDS.keys()


@pytest.mark.parametrize("name", NEEDS)
def test_a_command_names_the_extra_that_it_lacks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, told, extra = NEEDS[name]
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").touch()
    result = run_reglue(*arguments, prelude=MISSING, check=False)
    assert result.returncode == 2
    assert result.stderr == f"reglue: {told}: run `pip install 'reglue[{extra}]'`\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_the_rest_works_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--steps=1", "--device=cpu", "--count")
    for arguments in (
        ("sample", *RUN, *small, "3"),
        ("edit", "starter", "o/000000.png", "--out", "edits", "--keep", "local", *small, "1"),
        ("prepare", "o", "store", "--resolution=32", "--autoencoder=starter", "--encoder=starter", "--features"),
        ("compress", "store", "--kind=pca", "--channels=2", "--device=cpu"),
        ("info", "store"),
        ("list",),
        ("verify", "store"),
    ):
        run_reglue(*arguments, prelude=MISSING)


@pytest.mark.network
def test_a_new_environment_with_the_base_alone(tmp_path: Path) -> None:
    """The wheel, built from the source archive as a stranger would, in a folder with nothing of the project."""
    uv, venv = Path(sys.executable).parent / "uv", tmp_path / "venv" / "bin"
    subprocess.run([uv, "build", "--out-dir", tmp_path / "built", PROJECT], check=True)
    (wheel,) = (tmp_path / "built").glob("*.whl")
    subprocess.run([uv, "venv", "--python", sys.executable, tmp_path / "venv"], check=True)
    subprocess.run([uv, "pip", "install", "--python", venv / "python", wheel], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(program: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [venv / program, *arguments]
        result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        return result

    there = "from reglue.extras import *; print([m for ms in EXTRAS.values() for m in ms if is_installed(m)])"
    assert run("python", "-c", there).stdout == "[]\n"
    assert "start here:" in run("reglue", "--help").stdout
    run("reglue", "sample", "starter", "--out", "clothes", "--count", "2", "--steps", "2")
    run("reglue", "edit", "starter", "clothes/000000.png", "--out", "edits", "--keep", "local", "--steps", "2")
    assert "images" in run("reglue", "info", "clothes").stdout
    assert {path.name for path in elsewhere.iterdir()} == {"clothes", "edits"}
    (elsewhere / "a.parquet").touch()
    for arguments, told, extra in NEEDS.values():
        refused = run("reglue", *arguments, code=2).stderr
        assert refused == f"reglue: {told}: run `pip install 'reglue[{extra}]'`\n"


def test_missing_packages_are_found_out_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match=r"^this needs scipy: run `pip install 'reglue\[train\]'`$"):
        need("this", "numpy", "scipy")
    assert remedy("torch_fidelity.metrics").startswith("torch-fidelity: run")
    assert remedy("numpy") == ""

    class Refusing:
        def find_spec(self, name: str, *_: object) -> None:
            raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(sys, "meta_path", [Refusing()])
    assert not is_installed("wandb_that_is_not_there")


def test_an_import_that_nothing_foresaw_is_a_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.end(ModuleNotFoundError("No module named 'scipy.cluster'", name="scipy.cluster"))
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "reglue: this needs scipy: run `pip install 'reglue[train]'`\n"
    with pytest.raises(ModuleNotFoundError):
        cli.end(ModuleNotFoundError("No module named 'other'", name="other"))
