"""The commands in the documentation are run, as they stand but for sizes: a page that has gone stale fails."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from reglue import cli
from reglue.jobs.autoencode import Autoencode
from reglue.jobs.compress import Compress
from reglue.jobs.evaluate import Evaluate
from reglue.jobs.export_run import ExportRun, export_run
from reglue.jobs.import_run import ImportRun
from reglue.jobs.prepare import Prepare
from reglue.jobs.sample import Sample, sample
from reglue.jobs.train import Train
from reglue.papers import PAPERS
from reglue.recipe import SamplerName
from reglue.runs.record import RunRecord

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/methods").glob("[a-z]*.md"))


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `reglue` command in the page's code blocks, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line[line.index("reglue") + 1 :] for line in lines if line]


def smaller(options: Any, encoder: str, autoencoder: str) -> Any:
    """The same options at a size that takes seconds, with networks that need no hub."""
    if isinstance(options, Prepare):
        layers = None if options.layers is None else (4,)  # the last layer of five
        named = options.encoder if options.encoder == "none" else encoder
        folder = autoencoder if options.autoencoder == Prepare.autoencoder else options.autoencoder
        size = (options.size[0] // 16, options.size[1] // 16)
        return replace(
            options, resolution=size, encoder=named, autoencoder=folder, layers=layers, workers=0, device="cpu"
        )
    if isinstance(options, Autoencode):
        optimisation = replace(options.recipe.optimisation, steps=2, batch_size=4, precision="float32")
        alignment = replace(options.recipe.alignment, hidden=16)
        recipe = replace(options.recipe, optimisation=optimisation, alignment=alignment)
        changes = {"recipe": recipe, "source": autoencoder, "encoder": encoder, "resolution": 16}
        return replace(options, **changes, validation=0.2, workers=0, device="cpu")
    if isinstance(options, Compress):
        return replace(options, hidden=8, epochs=1, device="cpu")
    if isinstance(options, Train):
        recipe = options.recipe
        optimisation = replace(recipe.optimisation, steps=2, batch_size=4, precision="float32")
        alignment = replace(recipe.alignment, hidden=16)
        recipe = replace(recipe, model="2x32x2/2", optimisation=optimisation, alignment=alignment)
        return replace(options, recipe=recipe, preview_every=0, device="cpu")
    if isinstance(options, Sample):
        own = autoencoder if options.autoencoder else None
        return replace(options, count=min(options.count, 6), steps=2, autoencoder=own, device="cpu")
    if isinstance(options, Evaluate):
        return replace(options, feature_network="store", kernel_subsets=2, resamples=0, device="cpu")
    return options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_of_a_method(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_images: Path,
    tiny_encoder: str,
    tiny_autoencoder: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_images, tmp_path / "imagenet/train")
    done = []
    for arguments in commands(page):
        options = smaller(cli.parse(arguments), tiny_encoder, tiny_autoencoder)
        cli.job_of(options)(options)
        done.append(arguments[0])
    assert {"prepare", "train", "sample"} <= set(done)
    assert (tmp_path / "samples.npz").is_file()


def test_the_page_of_resolutions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_images: Path,
    tiny_encoder: str,
    tiny_autoencoder: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_images, tmp_path / "imagenet/train")
    for arguments in commands(ROOT / "docs/resolutions.md"):
        options = smaller(cli.parse(arguments), tiny_encoder, tiny_autoencoder)
        cli.job_of(options)(options)
    assert "positions: of 8×8 tokens, counted in 4×4" in capsys.readouterr().out
    assert RunRecord.read(tmp_path / "run-wide").resolution == (32, 48)
    assert {Image.open(file).size for file in (tmp_path / "wide").glob("*.png")} == {(48, 32)}


def test_the_page_about_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, tmp_path / "run")
    page = ROOT / "docs/sampling.md"
    for arguments in commands(page):
        options = cli.parse(arguments)
        out = sample(replace(options, count=2, steps=2, device="cpu"))
        assert len(list(out.glob("*.png"))) == 2
    assert all(f"`{name}`" in page.read_text() for name in get_args(SamplerName))


def test_the_readme(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_images: Path,
    tiny_encoder: str,
    tiny_autoencoder: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_images, tmp_path / "photos")
    (tmp_path / "photos/square").rename(tmp_path / "photos/spaniel")
    for arguments in commands(ROOT / "README.md"):
        options = smaller(cli.parse(arguments), tiny_encoder, tiny_autoencoder)
        if isinstance(options, ImportRun):
            run = replace(options, heads=2, autoencoder=tiny_autoencoder)
            export_run(ExportRun(tmp_path / "run", options.file))  # stands for the published file
            options = run
        cli.job_of(options)(options)
    assert (tmp_path / "report.json").is_file()
    assert (tmp_path / "weights.safetensors").is_file()

    (python,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    sent = {}

    def push(folder: Path, name: str, private: bool) -> None:
        sent[name] = (folder / "README.md").read_text()

    monkeypatch.setattr("reglue.runs.hub.push", push)
    exec(python)
    assert (tmp_path / "first.png").is_file()
    assert sent.keys() == {"owner/name"}
    found = json.loads((tmp_path / "report.json").read_text())["metrics"]["frechet_distance"]["value"]
    for text in (f"| {found:.6g} |", "samples.sampling.guidance.scale 2.8", "samples.seed 0", "versions.torch"):
        assert text in sent["owner/name"], text


def test_every_published_recipe_has_a_page_that_states_its_result() -> None:
    pages = {page.stem: page.read_text() for page in PAGES}
    assert pages.keys() >= PAPERS.keys()
    for name, paper in PAPERS.items():
        assert f"arxiv.org/abs/{paper.arxiv}" in pages[name]
        assert f"| B/2 | 400K | none | {paper.published_fid} |" in pages[name]


def test_inline_commands_name_options_that_exist() -> None:
    """`reglue …` in running text parses, with what a sentence leaves out put in place."""
    missing = {"train": ["--store", "store", "--out", "run"], "sample": ["run", "--out", "samples"]}
    for page in PAGES:
        for text in re.findall(r"`reglue ((?:train|sample) [^`]*)`", page.read_text()):
            arguments = shlex.split(text)
            needed = missing[arguments[0]]
            given = [word for word in needed if word not in arguments] if arguments[0] == "sample" else needed
            cli.parse([*arguments, *given])
