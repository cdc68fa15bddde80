"""The commands in the documentation are run, as they stand but for sizes: a page that has gone stale fails."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import tyro
from PIL import Image

import reglue
from reglue import cli
from reglue.commands.autoencode import Autoencode
from reglue.commands.compress import Compress
from reglue.commands.evaluate import Evaluate
from reglue.commands.export_run import ExportRun, export_run
from reglue.commands.import_run import ImportRun
from reglue.commands.perceive import Perceive
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.sample import Sample, sample
from reglue.commands.train import Train, train
from reglue.commands.train_head import TrainHead
from reglue.data.images import crop_to
from reglue.diffusion.samplers import SAMPLERS
from reglue.help import declared
from reglue.papers import PAPERS
from reglue.published.weights import PUBLISHED_DECODER
from reglue.reals.config import Perceptual
from reglue.run import RunRecord, find_run

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/methods").glob("[a-z]*.md"))


EVERY_PAGE = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
ALL_PAGES = [page for page in EVERY_PAGE if page.name not in ("log.md", "CHANGELOG.md")]
"""Those whose commands must work: the others are history."""
GUIDANCE_SCALE = "samples.sampling.guidance_scale 2.8"
IMAGENET = "On ImageNet with eight GPUs"
"""The section with the commands that reproduce a method."""
PARSED = "parsed"
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"


def blocks(text: str) -> list[tuple[str, str]]:
    """The code blocks: what each is marked as, and its content."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def section(page: Path, title: str) -> str:
    """The text beneath a heading, up to the next one."""
    (found,) = re.findall(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    return found


def commands(text: str) -> list[list[str]]:
    """The arguments of every `reglue` command in blocks marked `sh`, in order; other programs' are left out."""
    scripts = [content for mark, content in blocks(text) if mark == "sh"]
    lines = [
        shlex.split(line, comments=True) for script in scripts for line in script.replace("\\\n", " ").splitlines()
    ]
    starts = [
        (line, i + 1)
        for line in lines
        for i, word in enumerate(line)
        if word == "reglue" and line[:i][-1:] in ([], ["-m"])
    ]
    return [line[start:] for line, start in starts]


def scripts(text: str) -> list[list[str]]:
    """Every `python FOLDER/SCRIPT …` of ours, in blocks and in sentences, in words; those with a gap are left out."""
    found = re.findall(r"python ((?:benchmarks|studies|scripts)/[^`\n]*)", text.replace("\\\n", " "))
    return [shlex.split(words, comments=True) for words in found if "…" not in words]


def parsed_only(cli: Callable[..., Any], options: Any, **more: Any) -> Any:
    """`tyro.cli` of a script, which exits with PARSED: also in place of the function that it would call."""

    def called(*_: Any, **__: Any) -> NoReturn:
        sys.exit(PARSED)

    cli(wraps(options)(called) if inspect.isfunction(options) else options, **more)
    sys.exit(PARSED)


def smaller(options: Any, encoder: str, autoencoder: str) -> Any:
    """The same options at a size that takes seconds, with networks that need no hub."""
    if isinstance(options, Prepare):
        layers = None if options.layers is None else (4,)  # the last layer of five
        named = options.encoder if options.encoder == "none" else encoder
        folder = options.autoencoder if Path(options.autoencoder).exists() else autoencoder
        size = (options.size[0] // 16, options.size[1] // 16)
        return replace(
            options, resolution=size, encoder=named, autoencoder=folder, layers=layers, workers=0, device="cpu"
        )
    if isinstance(options, Autoencode):
        optimisation = replace(options.recipe.optimisation, steps=2, batch_size=4, precision="float32")
        alignment = replace(options.recipe.alignment, hidden=16)
        # LPIPS's files are not at hand, and a discriminator of three strides is too large for so few pixels.
        adversary = replace(options.recipe.adversary, start=1, layers=1)
        parts = {"alignment": alignment, "adversary": adversary, "perceptual": Perceptual()}
        recipe = replace(options.recipe, optimisation=optimisation, **parts)
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
    if isinstance(options, Sample) and not isinstance(options, Perceive):
        own = autoencoder if options.autoencoder else None
        return replace(options, count=min(options.count, 6), steps=2, autoencoder=own, device="cpu")
    if isinstance(options, Evaluate):
        published = options.reference is not None and options.reference.name == REFERENCE
        network = encoder if published else "store"
        return replace(options, feature_network=network, kernel_subsets=2, resamples=0, device="cpu")
    if isinstance(options, TrainHead):
        return replace(options, steps=4, device="cpu")
    if isinstance(options, Perceive):
        return replace(options, count=4, device="cpu")
    return options


def test_commands_are_found_among_others() -> None:
    script = "reglue a \\\n  b  # c\nsrun torchrun -m reglue d\npython reglue.py --arms sit reglue e\n"
    assert commands(f"```sh\n{script}```\n```\nreglue f\n```\n") == [["a", "b"], ["d"]]


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_marked_and_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, starter = page.read_text(), find_run("starter")
    monkeypatch.setattr("reglue.run.find_run", lambda run: starter)  # in place of the run that `train --from` names
    for mark, content in blocks(text):
        assert mark in ("sh", "python") or not re.search(r"\breglue\s", content), f"mark this block:\n{content}"
    for arguments in commands(text):
        cli.parse(arguments)


def test_scripts_are_found_in_blocks_and_sentences() -> None:
    sentence = "`python studies/a.py B` or `python studies/a.py … --c`, not `python x.py`"
    text = f"{sentence}\n```\npython scripts/d/e.py \\\n  f  # g\n```\n"
    assert scripts(text) == [["studies/a.py", "B"], ["scripts/d/e.py", "f"]]


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if scripts(page.read_text())], ids=lambda page: page.stem)
def test_every_command_of_a_script_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tyro, "cli", partial(parsed_only, tyro.cli))
    for script, *arguments in scripts(page.read_text()):
        monkeypatch.syspath_prepend((ROOT / script).parent)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit, match=PARSED):
            runpy.run_path(str(ROOT / script), run_name="__main__")


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
    pixels = [np.asarray(crop_to(Image.open(file), (16, 16))) for file in sorted(tiny_images.rglob("*.png"))]
    np.savez(REFERENCE, np.stack(pixels), mu=np.zeros(2048), sigma=np.eye(2048))
    done = []
    for arguments in commands(section(page, IMAGENET)):
        options = smaller(cli.parse(arguments), tiny_encoder, tiny_autoencoder)
        cli.execute(options)
        done.append(arguments[0])
    assert {"prepare", "train", "sample"} <= set(done)
    assert done[-1] == "evaluate"
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["reference"], report["reference_count"]) == (REFERENCE, 24)
    assert report["protocol"]["sampling"]["guidance_scale"] == published_scale(page)


def published_scale(page: Path) -> float:
    """Of guidance while sampling, in the figure that a method is compared by: what is learned needs none."""
    guidance = PAPERS[page.stem].setting.rpartition("| ")[2] if page.stem in PAPERS else "none"
    return 1.0 if guidance == "none" or guidance.endswith(", learned") else float(guidance)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_method_are_those_of_its_published_numbers(page: Path) -> None:
    asked = [cli.parse(arguments) for arguments in commands(section(page, IMAGENET))]
    drawn = {options.out: options for options in asked if isinstance(options, Sample)}
    assert drawn.keys() == {options.images for options in asked if isinstance(options, Evaluate)}
    assert all(options.reference == Path(REFERENCE) for options in asked if isinstance(options, Evaluate))
    own_autoencoder = page.stem in ("reals", "lightningdit", "sfd")
    assert {options.autoencoder for options in drawn.values()} == {None if own_autoencoder else PUBLISHED_DECODER}
    results = section(page, "Published results")
    assert (Path("samples-xl.npz") in drawn) == bool(re.search(r"\| XL/2 \| [^|]* \| \d|with guidance \d", results))
    compared = drawn[Path("samples.npz")]
    recipe = next(options.recipe for options in asked if isinstance(options, Train))
    sampling = recipe.sampling
    assert (compared.sampler or sampling.sampler, compared.steps or sampling.steps) == {
        "dit": ("ddpm", 250),
        "uvit": ("dpm-solver", 50),
        "lightningdit": ("euler", 249),
        "sfd": ("heun", 125),
        "meanflow": ("mean-velocity", 1),
    }.get(page.stem, ("euler-maruyama", 250))


def test_what_latents_show(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_images: Path,
    tiny_encoder: str,
    tiny_autoencoder: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/methods/reals.md"
    for name in ("photos", "imagenette/val", "imagenet/train"):
        shutil.copytree(tiny_images, tmp_path / name)
    for file in sorted(tiny_images.rglob("*.png")):
        mask = tmp_path / "masks" / file.relative_to(tiny_images)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(Image.open(file).convert("L")) > 127).astype(np.uint8)).save(mask)
    aligned = smaller(cli.parse(commands(section(page, IMAGENET))[0]), tiny_encoder, tiny_autoencoder)
    autoencoder = cli.execute(replace(aligned, out=tmp_path / "reals-study/autoencoders/aligned"))
    prepare(Prepare(Path("photos"), Path("aligned"), 16, str(autoencoder), tiny_encoder, workers=0, device="cpu"))
    tiny = ["--model=1x32x2/2", "--optimisation.steps=1", "--optimisation.batch-size=4", "--preview-every=0"]
    train(cli.parse(["train", "sit", "--store", "aligned", "--out", "sit-run", *tiny, "--device=cpu"]))
    for arguments in commands(section(page, "What latents show")):
        options = smaller(cli.parse(arguments), tiny_encoder, tiny_autoencoder)
        cli.execute(options)
    for out in ("seen", "seen-generated"):
        assert (tmp_path / out / "perception.json").is_file()


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
    for arguments in commands((ROOT / "docs/resolutions.md").read_text()):
        options = smaller(cli.parse(arguments), tiny_encoder, tiny_autoencoder)
        cli.execute(options)
    assert "positions: of 8×8 tokens, counted in 4×4" in capsys.readouterr().out
    assert RunRecord.read(tmp_path / "run-wide").resolution == (32, 48)
    assert {Image.open(file).size for file in (tmp_path / "wide").glob("*.png")} == {(48, 32)}


def test_the_page_about_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Path, tiny_store: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, tmp_path / "demo/runs/reglue")
    shutil.copytree(tiny_store, tmp_path / "demo/store")
    for arguments in commands((ROOT / "docs/few-steps.md").read_text()):
        options = cli.parse(arguments)
        if isinstance(options, Train):
            optimisation = replace(options.recipe.optimisation, steps=1, batch_size=4)
            cli.execute(replace(options, recipe=replace(options.recipe, optimisation=optimisation), device="cpu"))
        elif isinstance(options, Sample):
            cli.execute(replace(options, count=2, device="cpu"))
    assert json.loads((tmp_path / "samples/samples.json").read_text())["sampling"]["steps"] == 4


def test_the_page_about_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, tmp_path / "run")
    page = ROOT / "docs/sampling.md"
    for arguments in commands(page.read_text()):
        options = cli.parse(arguments)
        out = sample(replace(options, count=2, steps=2, device="cpu"))
        assert len(list(out.glob("*.png"))) == 2
    assert all(f"`{name}`" in page.read_text() for name in SAMPLERS)


@pytest.mark.parametrize("page", ["README.md", "docs/evening.md"])
def test_what_a_newcomer_trains_first_needs_no_network(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_images: Path
) -> None:
    """The commands as they are, networks included, but for the size of the images and the number of steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reglue.hub.hf_hub_download", None)
    shutil.copytree(tiny_images, tmp_path / "photos")
    for arguments in commands((ROOT / page).read_text()):
        options = cli.parse(arguments)
        if isinstance(options, Prepare):
            assert (options.encoder, options.autoencoder) == ("starter", "starter")
            options = replace(options, resolution=16, workers=0)
        elif isinstance(options, Train):
            hours = options.recipe.optimisation.steps * options.recipe.optimisation.batch_size / 71 / 3600
            assert hours < 2, "by a rate that a part of one core had (docs/evening.md)"
            optimisation = replace(options.recipe.optimisation, steps=3, batch_size=4, precision="float32")
            options = replace(options, recipe=replace(options.recipe, optimisation=optimisation), preview_every=0)
        elif isinstance(options, Sample):
            options = replace(options, count=3, steps=2)
        cli.execute(replace(options, device="cpu"))
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3
    assert RunRecord.read(tmp_path / "run").recipe.optimisation.ema_warmup == "yes"


def test_the_page_about_editing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save("right.png")
    for line in commands((ROOT / "docs/editing.md").read_text()):
        if "starter" in line:
            options = cli.parse(line)
            cli.function_of(type(options))(replace(options, steps=2, device="cpu"))
    shown = {Image.open(folder / "edits.png").height for folder in map(Path, ("variations", "half", "dressed", "flow"))}
    assert len(shown) == 2


def test_the_page_about_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for graphs, whose export takes half a minute: `tests/commands/test_graphs.py`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    page = (ROOT / "docs/portable.md").read_text()
    for title in ("diffusers", "ComfyUI"):
        for line in commands(section(ROOT / "docs/portable.md", title)):
            cli.execute(cli.parse(line))
    (drawn,) = [content for mark, content in blocks(page) if mark == "python" and "diffusers" in content]
    told: dict[str, Any] = {}
    exec(drawn, told)
    expected = reglue.load("starter", device="cpu").generate(["ankle boot", 3], steps=20, guidance_scale=2.0)
    assert all(
        np.array_equal(np.asarray(ours), np.asarray(theirs))
        for ours, theirs in zip(expected, told["images"], strict=True)
    )
    assert (tmp_path / "nodes/workflow.json").is_file()


def test_the_readme_fits_a_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for place, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / place if place else page
        assert target.exists(), f"{place} is not there"
        titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_wrap_at_120(page: Path) -> None:
    lines = [line for line in page.read_text().splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []


def test_the_guide(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_images: Path,
    tiny_encoder: str,
    tiny_autoencoder: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_images, tmp_path / "photos")
    (tmp_path / "photos/square").rename(tmp_path / "photos/spaniel")
    for arguments in commands((ROOT / "docs/guide.md").read_text()):
        options = smaller(cli.parse(arguments), tiny_encoder, tiny_autoencoder)
        if isinstance(options, ImportRun):
            run = replace(options, heads=2, autoencoder=tiny_autoencoder)
            export_run(ExportRun(tmp_path / "run", options.file))  # stands for the published file
            options = run
        cli.execute(options)
    assert (tmp_path / "report.json").is_file()
    assert (tmp_path / "other-store/manifest.json").is_file()
    assert (tmp_path / "weights.safetensors").is_file()

    sent = {}

    def push(folder: Path, name: str, private: bool) -> None:
        sent[name] = (folder / "README.md").read_text()

    monkeypatch.setattr("reglue.published.sharing.push", push)
    reglue.load("run").push_to_hub("owner/name")
    found = json.loads((tmp_path / "report.json").read_text())["metrics"]["frechet_distance"]["value"]
    for text in (f"| {found:.6g} |", GUIDANCE_SCALE, "samples.seed 0", "versions.torch"):
        assert text in sent["owner/name"], text


def test_the_page_about_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_images: Path, tiny_run: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_images, tmp_path / "photos")
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "run.json").write_text((run / "run.json").read_text().replace('"square"', '"spaniel"'))
    sent = []
    monkeypatch.setattr("reglue.published.sharing.push", lambda folder, name, private: sent.append(name))
    page = (ROOT / "docs/python.md").read_text()
    python = [content for mark, content in blocks(page) if mark == "python"]
    assert len(python) == 4
    for content in python:
        exec(content, {})
    assert (tmp_path / "first.png").is_file()
    assert (tmp_path / "shared/README.md").is_file()
    assert sent == ["owner/name"]
    assert len(list((tmp_path / "new-run/reports").glob("*.json"))) == 1
    cells = [cell.strip() for line in page.splitlines() if line.startswith("| `") for cell in line.split("|")[1:3]]
    assert [f"`{name}`" for name in reglue.__all__ if f"`{name}`" not in cells] == [], "every public name has its row"


def test_every_published_recipe_has_a_page_that_states_its_result() -> None:
    pages = {page.stem: page.read_text() for page in PAGES}
    assert pages.keys() >= PAPERS.keys()
    for name, paper in PAPERS.items():
        assert f"arxiv.org/abs/{paper.arxiv}" in pages[name]
        assert f"| {paper.setting} | {paper.published_fid} |" in pages[name]


@pytest.mark.parametrize(
    "page", [page for page in ALL_PAGES if page.name != "extending.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_in_sentences_name_options_that_exist(page: Path) -> None:
    """`reglue …` in running text parses, with what a sentence leaves out put in place.

    Names in `extending.md` exist once its examples have registered them, which another test does.
    """
    for text in re.findall(rf"`reglue ((?:{'|'.join(cli.COMMANDS)})\b[^`]*)`", page.read_text()):
        name, *words = shlex.split(text)
        if "--help" in words or "…" in words:
            continue
        recipe = [words.pop(0) if words and words[0][0] != "-" else "sit"] if name == "train" else []
        known = list(declared(cli.COMMANDS[name].load()))
        if words and any(words[-1] in option.flags and option.type is not bool for option in known):
            words.append("1")  # A sentence may name an option without a value.
        needed = [option for option in known if option.required and option.name != "name"]
        places = [option.name for option in needed if option.positional]
        given = len(list(takewhile(lambda word: not word.startswith("-"), words)))
        absent = [option.flags[0] for option in needed if not option.positional and option.flags[0] not in words]
        options = [word for flag in absent for word in (flag, "something")]
        cli.parse([name, *recipe, *words[:given], *places[given:], *words[given:], *options])
