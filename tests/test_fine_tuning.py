"""Fine-tuning: a run that starts with the weights of another one, at another resolution and with other classes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reglue
from helpers import TINY_RECIPE, mistake
from reglue.cli import parse
from reglue.commands.compress import Compress, compress
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.train import Train, train
from reglue.data.store import Store
from reglue.diffusion.embeddings import position_embedding
from reglue.errors import UserError
from reglue.files import write_tensors
from reglue.fine_tuning import LABELS, rows_of_labels
from reglue.run import RunRecord, find_run
from reglue.training import checkpoints


@pytest.fixture(scope="module")
def oblong_store(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_images: Path,
    tiny_encoder: str,
    tiny_autoencoder: str,
    tiny_run: Path,
) -> Path:
    """Images of 16×24 pixels, two known classes and a new one, with codes by the tiny run's compressor."""
    images = Path(shutil.copytree(tiny_images, tmp_path_factory.mktemp("oblong") / "images"))
    (images / "square").rename(images / "zebra")
    folder = images.parent / "store"
    prepare(Prepare(images, folder, (16, 24), tiny_autoencoder, tiny_encoder, features=True, workers=0, device="cpu"))
    compress(Compress(folder, fitted=tiny_run / "compressors" / "local", device="cpu"))
    return folder


def options(recipe: str, store: Path, out: Path, *more: str | Path):
    tiny = [*TINY_RECIPE, "--optimisation.steps=2", "--checkpoint-every=1", "--keep=0"]
    return parse(["train", recipe, "--store", str(store), "--out", str(out), *tiny, *map(str, more)])


def weights(run: Path, step: int, file: str = checkpoints.EMA) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.find(run, step) / file)


def test_another_resolution_and_other_classes(
    tiny_run: Path, oblong_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(options("reglue", oblong_store, tmp_path / "run", "--from", tiny_run))

    source, start = weights(tiny_run, 6), weights(run, 0)
    for name in source.keys() - {LABELS}:
        assert torch.equal(start[name], source[name]), name
    circle, stripes, zebra, null = start[LABELS]
    assert torch.equal(torch.stack([circle, stripes, null]), source[LABELS][[0, 2, 3]])
    assert not any(torch.equal(zebra, row) for row in source[LABELS])
    assert weights(run, 0, checkpoints.MODEL).keys() == start.keys()
    assert not torch.equal(weights(run, 1)["patches.weight"], start["patches.weight"])

    record = RunRecord.read(run)
    assert record.start is not None
    assert (record.start.run, record.start.step, record.start.weights) == (str(tiny_run), 6, "ema")
    assert len(record.start.sha256) == 64
    assert record.denoiser.token_grid == (4, 6)
    assert record.recipe.position_grid == record.denoiser.position_grid == (4, 4)
    printed = capsys.readouterr().out
    taken = "backbone, conditions.class, patches, projector, time_embedding, token_velocities.cls, tokens.cls, velocity"
    assert f"taken: {taken}\n" in printed
    assert "classes: 2 of 3 are known, and the null label" in printed
    assert "positions: of 4×6 tokens, counted in 4×4" in printed
    assert "another than there" not in printed

    (image,) = reglue.load(run, device="cpu").generate("zebra", steps=2)
    assert image.size == (24, 16)


def test_it_continues_without_the_run_it_started_from(tiny_run: Path, tiny_store: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_run, tmp_path / "source"))
    whole = train(options("reglue", tiny_store, tmp_path / "whole", "--from", source))
    broken = train(options("reglue", tiny_store, tmp_path / "broken", "--from", source))
    for step in (1, 2):
        shutil.rmtree(checkpoints.find(broken, step))
    shutil.rmtree(source)
    train(options("reglue", tiny_store, broken))
    for file in (checkpoints.EMA, checkpoints.MODEL, checkpoints.OPTIMISER):
        ours, theirs = weights(whole, 2, file), weights(broken, 2, file)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    assert RunRecord.read(broken).start == RunRecord.read(whole).start


def test_a_run_that_died_before_it_took_the_weights_needs_the_same_ones(
    tiny_run: Path, tiny_store: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_run, tmp_path / "source"))
    run = train(options("reglue", tiny_store, tmp_path / "run", "--from", source))
    after = weights(run, 2)
    shutil.rmtree(run / "checkpoints")
    train(options("reglue", tiny_store, run))
    assert all(torch.equal(after[name], value) for name, value in weights(run, 2).items())

    shutil.rmtree(run / "checkpoints")
    file = checkpoints.find(source) / checkpoints.EMA
    write_tensors(file, {name: value + 1 for name, value in load_file(file).items()})
    with pytest.raises(UserError, match="has changed"):
        train(options("reglue", tiny_store, run))


def test_parts_come_and_go_and_any_weights_of_any_step_serve(
    tiny_run: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = ["--class-token.weight=0", "--alignment.weight=0"]
    plain = train(options("reglue", tiny_store, tmp_path / "plain", "--from", tiny_run, "--from-weights=model", *alone))
    assert "left out: projector, token_velocities.cls, tokens.cls" in capsys.readouterr().out
    source = weights(tiny_run, 6, checkpoints.MODEL)
    assert torch.equal(weights(plain, 0)["patches.weight"], source["patches.weight"])

    train(options("reglue", tiny_store, tmp_path / "whole", "--from", plain, "--from-step=1"))
    assert "new, with random weights: projector, token_velocities.cls, tokens.cls" in capsys.readouterr().out
    assert torch.equal(weights(tmp_path / "whole", 0)["patches.weight"], weights(plain, 1)["patches.weight"])


def test_what_means_something_else_is_said(
    tiny_run: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(options("reglue", tiny_store, tmp_path / "run", "--from", tiny_run, "--local.compressor=pca-4"))
    assert "to be learned again: compressor" in capsys.readouterr().out


def test_another_scale_is_another_meaning(
    tiny_run: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(options("reglue", tiny_store, tmp_path / "run", "--from", tiny_run, "--latent.unit-variance"))
    assert "to be learned again: scale of latent\n" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["--from-step=1", "--from-weights=model"])
def test_a_run_that_began_with_others_is_not_continued(
    other: str, tiny_run: Path, tiny_store: Path, tmp_path: Path
) -> None:
    train(options("reglue", tiny_store, tmp_path / "run", "--from", tiny_run, "--optimisation.steps=1"))
    train(options("reglue", tiny_store, tmp_path / "run", "--from", tiny_run, "--from-step=6"))
    with pytest.raises(UserError, match="started with the ema weights of step 6 of"):
        train(options("reglue", tiny_store, tmp_path / "run", "--from", tiny_run, other))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--model=2x48x2/2"],
            r"^start .*backbone\.blocks\.0\.attention\.out\.bias is 32 there and 48 here, .* and \d+ more; "
            "choose the model of that run",
        ),
        (["--model=3x32x2/2"], r"backbone\.blocks\.2\.attention\.out\.bias is missing there and 32 here"),
        (["--local.weight=0"], r"patches\.weight is 32×7×2×2 there and 32×3×2×2 here"),
        (["--from-step=3"], "no checkpoint of step 3; it has 6"),
    ],
)
def test_what_does_not_fit_is_named(
    tiny_run: Path, tiny_store: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(options("reglue", tiny_store, tmp_path / "run", "--from", tiny_run, *more))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_start(tiny_run: Path, tiny_store: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(tiny_run, tmp_path / "own"))
    with pytest.raises(UserError, match="started with random weights, not from"):
        train(options("reglue", tiny_store, own, "--from", tiny_run, "--optimisation.steps=6"))


def test_weights_that_are_not_there(tiny_run: Path, tiny_store: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    source = Path(shutil.copytree(tiny_run, tmp_path / "source"))
    (checkpoints.find(source) / checkpoints.MODEL).unlink()
    arguments = ["--store", tiny_store, "--out", tmp_path / "run", *TINY_RECIPE, "--from", source]
    said = mistake(capsys, monkeypatch, "train", "reglue", *arguments, "--from-weights=model")
    assert "has no model.safetensors; choose --from-weights ema" in said


def test_options_about_another_run_need_one(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--store", tiny_store, "--out", tmp_path / "run", *TINY_RECIPE]
    for option in ("--from-step=5", "--from-weights=model"):
        assert "give --from too" in mistake(capsys, monkeypatch, "train", "reglue", *arguments, option)
    assert not (tmp_path / "run").exists()


def test_a_run_is_known_from_any_folder(
    tiny_store: Path, tiny_run: Path, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are kept whole, however they were given."""
    monkeypatch.chdir(tmp_path)
    for name, place in (("store", tiny_store), ("run", tiny_run), ("images", tiny_images)):
        Path(name).symlink_to(place)
    options = [*TINY_RECIPE, "--optimisation.steps=1", "--from", "run"]
    new = train(parse(["train", "reglue", "--store", "store", "--out", "new", *options]))
    record = RunRecord.read(new)
    assert record.store == str(tmp_path / "store")
    assert record.start
    assert record.start.run == str(tiny_run)
    prepare(Prepare(Path("images"), Path("prepared"), 16, "starter", "none", workers=0, device="cpu"))
    assert Store.open("prepared").manifest.source.path == str(tmp_path / "images")


@pytest.mark.trains
def test_the_model_of_the_package_is_a_start_too(tiny_images: Path, tmp_path: Path) -> None:
    place = find_run("starter")
    store = tmp_path / "store"
    prepare(
        Prepare(tiny_images, store, 32, str(place / "autoencoder"), "starter", features=True, workers=0, device="cpu")
    )
    compress(Compress(store, fitted=place / "compressors" / "local", device="cpu"))
    recipe = RunRecord.read(place).recipe
    recipe = replace(recipe, optimisation=replace(recipe.optimisation, steps=1, batch_size=4, compile="no"))
    run = train(Train(recipe, store, tmp_path / "run", start=Path("starter"), preview_every=0, device="cpu"))
    start = RunRecord.read(run).start
    assert start
    assert (start.run, start.step) == ("starter", checkpoints.steps(place)[-1])
    name = "backbone.blocks.0.attention.qkv.weight"
    theirs, ours = (load_file(checkpoints.find(each) / checkpoints.EMA)[name].float() for each in (place, run))
    assert (theirs - ours).abs().max() < 0.1 * theirs.std()


def test_rows_of_labels() -> None:
    assert rows_of_labels(("ape", "bee"), ("bee", "cat")) == {0: 1, 2: 2}
    assert rows_of_labels(2, ("bee", "cat")) == {0: 0, 1: 1, 2: 2}, "as many without names, in the same order"
    assert rows_of_labels(("bee", "cat"), 2) == {0: 0, 1: 1, 2: 2}
    assert rows_of_labels(("0", "1"), ("bee", "cat")) == {2: 2}, "numbers may be names as well"
    assert rows_of_labels(3, ("1", "bee")) == {0: 1, 2: 3}
    assert rows_of_labels((), ("ape",)) == {1: 0}
    assert rows_of_labels(("ape",), ()) == {0: 1}


def test_positions_in_between() -> None:
    coarse, fine = position_embedding((2, 3), 8), position_embedding((4, 9), 8, counted_in=(2, 3))
    grid = fine.unflatten(1, (4, 9))
    torch.testing.assert_close(grid[:, ::2, ::3], coarse.unflatten(1, (2, 3)))
    assert torch.equal(position_embedding((5, 3), 8, 1), position_embedding((5, 3), 8, 1, counted_in=(5, 3)))
    assert position_embedding((5, 3), 8, 1).shape == (1, 16, 8)
