"""Runs saved, put on the hub and fetched from it: what travels, what the card says, and what happens offline."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image

import reglue
from helpers import TINY_RECIPE, mistake
from hub_cache import use_hub_cache
from reglue.cli import parse
from reglue.commands.autoencode import Autoencode, autoencode
from reglue.commands.export_run import ExportRun, export_run
from reglue.commands.sample import sample
from reglue.commands.train import train
from reglue.config import Alignment, LocalSemantics, OptimiserConfig
from reglue.encoders.alignment import load_alignment
from reglue.encoders.autoencoders import load_autoencoder
from reglue.encoders.compressors import load_compressor
from reglue.errors import UserError
from reglue.names import StoredPrecision
from reglue.published.sharing import read_reports, rounded, train_command
from reglue.reals.config import AutoencoderRecipe, LatentAlignment, Perceptual
from reglue.run import RunRecord, Start
from reglue.sampling import Sampling

FAST: dict[str, Any] = {"sampler": "euler", "steps": 2, "output": "tensor"}
SHARED = [
    "README.md",
    "autoencoder/config.json",
    "autoencoder/diffusion_pytorch_model.safetensors",
    "checkpoints/00000006/ema.safetensors",
    "checkpoints/00000006/progress.json",
    "compressors/local/compressor.json",
    "compressors/local/compressor.safetensors",
    "run.json",
]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What would be sent to the hub: the arguments, and a copy of the folder."""
    sent: dict[str, Any] = {}

    def create_repo(self: HfApi, repo_id: str, **options: Any) -> str:
        sent["created"] = (repo_id, options)
        return f"https://hub/{repo_id}"

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        sent["uploaded"] = (repo_id, options)
        sent["folder"] = shutil.copytree(folder_path, tmp_path / "uploaded")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return sent


def put_in_cache(folder: Path, cache: Path, name: str) -> None:
    """The hub's cache as it is after `name` was fetched."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0123456789" * 4
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def test_what_sampling_needs_is_sent_and_comes_back(
    tiny_run: Path, pushed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reglue.load(tiny_run, device="cpu")
    assert model.push_to_hub("owner/shapes", private=True) == "https://hub/owner/shapes"
    assert pushed["created"] == ("owner/shapes", {"private": True, "exist_ok": True})
    assert pushed["uploaded"][0] == "owner/shapes"
    assert 'reglue.load("owner/shapes")' in (pushed["folder"] / "README.md").read_text()
    assert files(pushed["folder"]) == SHARED
    for name in ("run.json", "README.md"):
        assert str(tiny_run.parents[1]) not in (pushed["folder"] / name).read_text(), "a path of this machine"

    put_in_cache(pushed["folder"], tmp_path / "cache", "owner/shapes")
    use_hub_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    fetched = reglue.load("owner/shapes", device="cpu")
    assert export_run(ExportRun(Path("owner/shapes"), tmp_path / "out.pt")).is_file()
    assert torch.equal(fetched.generate([0, 2], **FAST), model.generate([0, 2], **FAST))
    assert fetched.record == model.record
    assert fetched.step == 6
    # A folder of that name comes first.
    shutil.copytree(pushed["folder"], tmp_path / "owner" / "shapes")
    assert reglue.load("owner/shapes", device="cpu").folder == Path("owner/shapes")


def test_the_command_line_takes_names_on_the_hub(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_cache(reglue.load(tiny_run, device="cpu").save(tmp_path / "saved"), tmp_path / "cache", "owner/shapes")
    use_hub_cache(monkeypatch, tmp_path / "cache")
    sample(parse(["sample", "owner/shapes", "--out", str(tmp_path / "out"), "--count=2", "--steps=2"]))
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_a_saved_run_is_a_run_without_what_training_needs(tiny_run: Path, tiny_store: Path, tmp_path: Path) -> None:
    model = reglue.load(tiny_run, device="cpu")
    folder = model.save(tmp_path / "saved")
    assert files(folder) == SHARED
    again = reglue.load(folder, device="cpu")
    assert torch.equal(again.generate([1], **FAST), model.generate([1], **FAST))
    assert load_compressor(folder / "compressors" / "local").spec() == model.record.compressors["local"]
    # Saved once more, it is the same.
    assert files(again.save(tmp_path / "again")) == SHARED
    with pytest.raises(UserError, match="holds other files"):
        model.save(folder)
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        train(
            parse(
                [
                    "train", "reglue", "--store", str(tiny_store), "--out", str(folder), *TINY_RECIPE,
                    "--optimisation.steps=8",
                ]
            )
        )  # fmt: skip


def test_an_autoencoder_of_ours_travels_without_the_folders_of_this_machine(
    tiny_images: Path, tiny_run: Path, tiny_encoder: str, tmp_path: Path
) -> None:
    made = autoencode(
        Autoencode(
            tiny_images,
            tmp_path / "autoencoder",
            AutoencoderRecipe(
                perceptual=Perceptual(0.0),
                alignment=LatentAlignment(hidden=8),
                optimisation=OptimiserConfig(steps=1, batch_size=2),
            ),
            source=RunRecord.read(tiny_run).autoencoder.name,
            resolution=32,
            encoder=tiny_encoder,
            validation=tiny_images,
            workers=0,
            device="cpu",
        )
    )
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    record = RunRecord.read(run)
    replace(record, autoencoder=load_autoencoder(str(made)).spec).write(run)
    shared = reglue.load(run).save(tmp_path / "shared")
    assert load_alignment(shared / "autoencoder").spec.encoder["name"] in (tiny_encoder, Path(tiny_encoder).name)
    assert not [
        file
        for file in shared.rglob("*")
        if file.is_file() and str(tmp_path.parent.parent).encode() in file.read_bytes()
    ]
    expected = reglue.load(run).generate([0], seed=1, **FAST)
    assert torch.equal(reglue.load(shared).generate([0], seed=1, **FAST), expected)


@pytest.mark.parametrize(("precision", "size", "off", "pixels"), [("float16", 0.6, 5e-4, 2), ("float8", 0.4, 0.04, 12)])
def test_fewer_bits_make_a_smaller_file_and_hardly_change_the_images(
    tiny_run: Path, tmp_path: Path, precision: StoredPrecision, size: float, off: float, pixels: int
) -> None:
    model = reglue.load(tiny_run)
    whole, small = model.save(tmp_path / "whole"), tmp_path / "small"
    export_run(ExportRun(tiny_run, small, "reglue", precision))
    sizes = [(folder / "checkpoints/00000006/ema.safetensors").stat().st_size for folder in (whole, small)]
    assert sizes[1] < size * sizes[0]
    loaded = reglue.load(small)
    for (name, value), kept in zip(
        loaded.denoiser.state_dict().items(), model.denoiser.state_dict().values(), strict=True
    ):
        assert value.dtype == kept.dtype == torch.float32, name
        assert (value - kept).norm() <= off * kept.norm(), name
    images = [each.generate([0, 1], seed=1, **FAST).int() for each in (model, loaded)]
    assert (images[0] - images[1]).abs().max() <= pixels
    assert files(small) == files(model.save(tmp_path / "saved", precision=precision))


@pytest.mark.parametrize("value", [torch.full((4, 4), 600.0), torch.full((4, 4), 1e-3), torch.ones(4)])
def test_what_float8_cannot_hold_keeps_more_bits(value: torch.Tensor) -> None:
    stored = rounded(value, "float8")
    assert stored.dtype == torch.float16
    torch.testing.assert_close(stored.float(), value, rtol=1e-3, atol=0)


def test_a_compressor_that_the_run_lacks_comes_from_its_store(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "compressors")
    assert files(reglue.load(run, device="cpu").save(tmp_path / "saved")) == SHARED


@pytest.mark.parametrize("name", ["owner/gone", "runs/mine"])
def test_offline_is_prompt_and_says_what_to_do(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    line = mistake(capsys, monkeypatch, "sample", name, "--out", tmp_path / "out")
    assert time.perf_counter() - start < 10
    assert f"{name}: there is no such folder, and the Hugging Face hub gives no such model" in line
    assert "download the repository" in line


def test_what_is_no_name_is_never_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("reglue.run.snapshot_download", refuse)
    for name in ("run", tmp_path / "run", "./a/b", "../a", "a/b/c", "owner/", "/a"):
        with pytest.raises(UserError, match="is not a run"):
            reglue.load(name)


def test_a_refused_push_is_one_line(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: HfApi, repo_id: str, **options: Any) -> str:
        raise ValueError("401 Client Error\nmore")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    model = reglue.load(tiny_run, device="cpu")
    for name, message in (("owner/shapes", "401 Client Error more"), ("shapes", "give OWNER/NAME")):
        with pytest.raises(UserError, match=message) as caught:
            model.push_to_hub(name)
        assert "\n" not in str(caught.value)


REPORT = {
    "metrics": {"frechet_distance": 12.345, "of classes": {"precision": 0.5}, "note": "text"},
    "image_count": 50,
    "versions": {"torch": "2.9.1"},
    "encoder": "/home/someone/encoders/starter",
    "warnings": [],
    "protocol": {"sampling": {"sampler": "heun", "guidance_scale": 2.5}, "labels": list(range(50)), "seed": 3},
}


def test_the_card_says_what_the_model_is_and_how_its_numbers_were_made(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "reports").mkdir()
    (run / "reports" / "validation.json").write_text(json.dumps(REPORT))
    (run / "reports" / "unrelated.json").write_text("[1, 2]")
    (run / "reports" / "broken.json").write_text("{")
    (tmp_path / "named.json").write_text(json.dumps({"metrics": {"inception_score": 7}}))
    (run / "previews").mkdir()
    for step, colour in ((3, 10), (6, 20)):
        Image.new("RGB", (4, 4), (colour,) * 3).save(run / "previews" / f"{step:08d}.png")
    folder = reglue.load(run, device="cpu").save(tmp_path / "my-shapes", reports=[tmp_path / "named.json"])
    assert np.asarray(Image.open(folder / "samples.png")).max() == 20

    card = ModelCard.load(folder / "README.md")
    header = card.data.to_dict()
    assert (header["library_name"], "reglue" in header["tags"]) == ("reglue", True)
    metrics = [metric for result in header["model-index"][0]["results"] for metric in result["metrics"]]
    assert {metric["type"]: metric["value"] for metric in metrics} == {
        "frechet_distance": 12.345,
        "of classes.precision": 0.5,
        "inception_score": 7,
    }
    record = RunRecord.read(run)
    for text in (
        "# my-shapes",
        "![Samples](samples.png)",
        "2x32x2/2",
        "circle, square, stripes",
        "16×16 pixels of 3 classes",
        "after 6 training steps",
        "3×8×8",
        record.autoencoder.weights_sha256[:12],  # type: ignore[index]
        "conv of 64 features",
        "arxiv.org/abs/2512.16636",
        "| frechet_distance | 12.345 |",
        "samples.sampling.guidance_scale 2.5",
        "samples.seed 3",
        "image_count 50",
        "encoder starter",
        "versions.torch 2.9.1",
        "reglue train reglue --store store --out RUN --model 2x32x2/2",
    ):
        assert text in card.content, text
    for text in ("/home/someone", str(tmp_path), "unrelated", "broken", "[0, 1, 2, 3"):
        assert text not in card.content, text


def test_the_card_of_a_fine_tuned_run_says_what_it_began_with(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    start = Start(str(tmp_path / "elsewhere" / "first"), 400, "model", "0123456789abcdef" * 4)
    replace(RunRecord.read(run), start=start).write(run)
    folder = reglue.load(run, device="cpu").save(tmp_path / "shared")
    card = ModelCard.load(folder / "README.md").content
    assert "Begun with the trained weights of the run `first` at step 400 (SHA-256 0123456789abcdef…)" in card
    assert "--from first --from-step 400 --from-weights model" in card
    assert str(tmp_path) not in card + (folder / "run.json").read_text()


def test_a_model_is_not_shown_by_the_pictures_of_another_step(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.rmtree(run / "previews", ignore_errors=True)
    (run / "previews").mkdir()
    Image.new("RGB", (4, 4)).save(run / "previews" / "00000009.png")
    folder = reglue.load(run, device="cpu").save(tmp_path / "shared")
    assert not (folder / "samples.png").exists()
    assert "![Samples]" not in (folder / "README.md").read_text()


def test_the_card_shows_intervals_and_warnings_of_an_evaluation(tiny_run: Path, tmp_path: Path) -> None:
    report = {
        "metrics": {
            "frechet_distance": {"value": 20.5, "low": 19.25, "high": 21.75},
            "spatial_frechet_distance": None,
            "recall": {"value": 0.5, "low": None, "high": None},
        },
        "distance_name": "FD-DINOv2",
        "absent": {"sFID": "not defined"},
        "warnings": ["warning: 50 images are few, " + "very " * 30],
    }
    (tmp_path / "few.json").write_text(json.dumps(report))
    folder = reglue.load(tiny_run, device="cpu").save(tmp_path / "shared", reports=[tmp_path / "few.json"])
    card = ModelCard.load(folder / "README.md")
    results = card.data.to_dict()["model-index"][0]["results"]
    metrics = {metric["type"]: metric["value"] for result in results for metric in result["metrics"]}
    assert metrics == {"FD-DINOv2": 20.5, "recall": 0.5}
    for text in ("| FD-DINOv2 | 20.5 [19.25, 21.75] |", "| recall | 0.5 |", report["warnings"][0].strip()):
        assert text in card.content
    assert "absent" not in card.content


def test_a_named_report_must_be_one(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(UserError, match=r"none\.json is not a report"):
        read_reports(tiny_run, [tmp_path / "none.json"])
    with pytest.raises(UserError, match=r"gone\.json: no such report"):
        read_reports(tiny_run, [tmp_path / "gone.json"])
    assert read_reports(None) == []


@pytest.mark.parametrize("name", reglue.recipes)
def test_the_command_of_a_run_is_the_one_that_trained_it(name: str, tiny_run: Path) -> None:
    record = replace(RunRecord.read(tiny_run), store="STORE", seed=3)
    published = reglue.recipes[name]
    changed = replace(
        published,
        model="L/2",
        path="cosine",
        learn_sigma=not published.learn_sigma,
        local=LocalSemantics(0.5, ((10, 0.25), (20, 0.125)), compressor="pca-8", dropout=0.1, unit_variance=True),
        alignment=Alignment(0.1, after_block=3, targets="online"),
        sampling=Sampling("heun", 7, guidance_scale=1.5, local_scale=1.0, guidance_interval=(0.1, 0.9)),
        optimisation=replace(published.optimisation, betas=(0.8, 0.9), learning_rate=3e-5, ema_warmup="yes"),
    )
    # Steps and decay decide about the warm-up together: at each of these pairs otherwise.
    others = [
        replace(published, optimisation=replace(published.optimisation, steps=steps, ema=ema, ema_warmup=warmup))
        for steps, ema in [(5_000, 0.999), (5_000, 0.9999)]
        for warmup in ("yes", "no")
    ]
    for recipe in (published, changed, *others, *[record.recipe][: name == record.recipe.name]):
        command = train_command(replace(record, recipe=recipe))
        assert command is not None
        words = command.split()
        assert words[:2] == ["reglue", "train"]
        options = parse(words[1:])
        parsed = replace(options.recipe, optimisation=options.recipe.optimisation.settled())
        assert parsed == replace(recipe, optimisation=recipe.optimisation.settled())
        assert options.seed == 3
