"""Published checkpoints in and out, through the commands and their run folders."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import FAMILIES, Golden, assert_close
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import TINY_RECIPE, mistake
from reglue import generation
from reglue.cli import parse
from reglue.commands.export_run import ExportRun, export_run, refuse_own_parts
from reglue.commands.import_run import ImportRun, import_run
from reglue.commands.sample import Sample, sample
from reglue.commands.train import train
from reglue.config import ClassToken
from reglue.diffusion.embeddings import position_embedding
from reglue.diffusion.modalities import LATENT
from reglue.encoders.compressors import load_compressor
from reglue.errors import UserError
from reglue.files import SEAL
from reglue.names import Weights
from reglue.papers import RECIPES
from reglue.pipeline import ImageModel, load
from reglue.published.containers import read_official
from reglue.published.sharing import model_card
from reglue.published.weights import export_official, import_official
from reglue.run import RunRecord, decoder
from reglue.training.checkpoints import read_weights

KINDS: tuple[Weights, ...] = ("ema", "model")


def write(method: str, file: Path, change: Any = None) -> Golden:
    """The golden weights as their authors would have published them."""
    golden = Golden(method)
    weights = dict(golden.published)
    if change:
        change(weights)
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        other = {name: value + 1 for name, value in weights.items()}
        about = argparse.Namespace(encoder_depth=golden.about.get("encoder_depth"), path_type="linear")
        torch.save({"model": other, "ema": weights, "opt": {"state": {}}, "args": about, "steps": 1234}, file)
    return golden


HEADS = 4
PUBLISHED = "sd-vae-ft-mse"
SAMPLED = {
    "sit": ("ode_euler_cfg", {"sampler": "euler", "guidance_scale": 1.5}),
    "repa": ("sde_cfg", {"guidance_scale": 2.3, "guidance_interval": (0.0, 0.85)}),
    "redi": ("ode_euler_vae_cfg", {"sampler": "euler"}),
    "reg": ("sde_cfg", {"guidance_interval": (0.0, 0.85)}),
    "reglue": ("sde_cfg", {"guidance_scale": 2.3, "guidance_interval": (0.0, 0.85)}),
    "lightningdit": ("euler_shift_cfg_interval", {"guidance_scale": 6.7, "guidance_interval": (0.0, 0.875)}),
    "uvit": ("dpm_solver_cfg", {}),
}


def as_state(x: Tensor, cls: Tensor | None) -> dict[str, Tensor]:
    state = {LATENT: x[:, :4]}
    if x.shape[1] > 4:
        state["local"] = x[:, 4:]
    return state if cls is None else {**state, "cls": cls}


@pytest.mark.parametrize("method", FAMILIES)
def test_an_imported_run_samples_what_the_published_sampler_gives(
    method: str, autoencoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = write(method, tmp_path / "0001234.pt")
    run = import_run(ImportRun(tmp_path / "0001234.pt", tmp_path / "run", autoencoder=autoencoder, heads=HEADS))
    case, options = SAMPLED[method]
    draws = [as_state(golden["sample.x_init"], golden.get("sample.cls_init"))]
    if f"sample.{case}.noise" in golden:
        noise = golden[f"sample.{case}.noise"]
        tokens = golden.get(f"sample.{case}.noise_cls")
        draws += [as_state(noise[i], None if tokens is None else tokens[i]) for i in range(len(noise))]
    given = [{name: x.double().contiguous() for name, x in draw.items()} for draw in draws]
    monkeypatch.setattr(generation, "drawn_ahead", lambda *_: nullcontext(iter(given)))
    states: list[dict[str, Tensor]] = []
    original = ImageModel.pixels

    def watched(self: Any, state: dict[str, Tensor], *others: Any) -> Tensor:
        states.append(state)
        return original(self, state, *others)

    monkeypatch.setattr(ImageModel, "pixels", watched)
    labels = tuple(str(label) for label in golden["input.y"].tolist())
    sample(
        Sample(run, tmp_path / "samples", count=3, classes=labels, steps=6, device="cpu", **options)  # type: ignore[arg-type]
    )
    expected = as_state(golden[f"sample.{case}.out"], None)
    for name, value in expected.items():
        assert_close(states[0][name], value)
    model = load(run, device="cpu")
    assert model.step == 1234
    raw = expected[LATENT].float() / 0.18215
    shown = 255 * (model.autoencoder.decode(raw) + 1) / 2
    files = sorted((tmp_path / "samples").glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)
    assert abs(pixels - shown.permute(0, 2, 3, 1).round().numpy().astype(int)).max() <= 1
    assert json.loads((tmp_path / "samples" / "samples.json").read_text())["step"] == 1234


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("method", FAMILIES)
def test_what_is_imported_is_exported_again(method: str, ending: str, tmp_path: Path) -> None:
    golden = write(method, tmp_path / f"0001234{ending}")
    # The papers' autoencoder is not at hand, and neither job needs it.
    run = import_run(ImportRun(tmp_path / f"0001234{ending}", tmp_path / "run", autoencoder=PUBLISHED, heads=HEADS))
    out = export_run(ExportRun(run, tmp_path / f"out{ending}"))
    again = read_official(out)
    assert again.weights.keys() == golden.published.keys()
    for name, value in golden.published.items():
        assert_close(again.weights[name], value)
    assert again.step == 1234
    if ending != ".safetensors":
        assert torch.load(out, weights_only=True).keys() == {"model", "ema", "args", "steps"}


@pytest.mark.parametrize(("metadata", "step"), [("42", 42), ("-1", 7), ("²", 7), ("9" * 5000, 7), (None, 7)])
def test_the_step_of_a_safetensors_file(metadata: str | None, step: int, tmp_path: Path) -> None:
    weights = {name: value.contiguous() for name, value in Golden("sit").published.items()}
    save_file(weights, tmp_path / "0000007.safetensors", {"step": metadata} if metadata else None)
    run = import_run(ImportRun(tmp_path / "0000007.safetensors", tmp_path / "run", heads=HEADS))
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"{step:08d}"]


@pytest.mark.parametrize("method", FAMILIES)
def test_the_record_says_what_was_found(method: str, tmp_path: Path) -> None:
    about = write(method, tmp_path / "in.pt").about
    options = ImportRun(tmp_path / "in.pt", tmp_path / "run", autoencoder=PUBLISHED, heads=HEADS)
    record = RunRecord.read(import_run(options))
    recipe = record.recipe
    assert recipe.optimisation.precision == recipe.sampling.precision == "float32"  # As the published codes sample.
    assert (recipe.name, recipe.model) == (method, f"{about['depth']}x48x4/{about['patch_size']}")
    assert record.resolution == (64, 64)
    assert record.class_names == tuple(map(str, range(1000)))
    assert record.origin == "in.pt"
    assert (record.store, record.store_hash, record.seed) == (None, None, None)
    assert (record.autoencoder.name, record.autoencoder.weights_sha256) == ("sd-vae-ft-mse", None)
    assert (record.decoder, record.autoencoder_assumed) == (None, False)
    assert recipe.alignment.present == (record.denoiser.alignment_width > 0) == (method in ("repa", "reg", "reglue"))
    assert record.denoiser.alignment_depth == (2 if recipe.alignment.present else 0)
    assert recipe.local.compressor == {"redi": "pca-6", "reglue": "conv-6"}.get(method, "conv-16")
    # What the recipe describes is what was found: the same model is built from either.
    found = record.denoiser
    parts = tuple(
        replace(part.as_modality(found.shapes()[part.modality][0]), column="", normalisation=modality.normalisation)
        for part, modality in zip(recipe.learned_parts, found.modalities, strict=True)
    )
    assert recipe.denoiser_config(parts, found.grid, {"class": 1000}, found.alignment_width) == found


def compressor_files(folder: Path) -> tuple[Path, Path, Golden]:
    golden = Golden("reglue")
    weights = {k.removeprefix("compressor."): v for k, v in golden.tensors.items() if k.startswith("compressor.")}
    torch.save(weights, folder / "compressor.pth")
    statistics = {name: golden[f"compressor_io.{name}"].numpy() for name in ("mean", "std")}
    np.savez(folder / "statistics.npz", **statistics)  # type: ignore[reportArgumentType]
    return folder / "compressor.pth", folder / "statistics.npz", golden


def test_reglues_compressor_goes_into_the_run(tmp_path: Path) -> None:
    compressor, statistics, golden = compressor_files(tmp_path)
    write("reglue", tmp_path / "in.pt")
    run = import_run(
        ImportRun(tmp_path / "in.pt", tmp_path / "run", compressor, statistics, autoencoder=PUBLISHED, heads=HEADS)
    )
    ours = load_compressor(run / "compressors" / "local")
    assert ours.spec() == RunRecord.read(run).compressors["local"]
    with torch.no_grad():
        assert_close(ours.encode(golden["compressor_io.features"]), golden["compressor_io.code"])


def test_redis_components_go_into_the_run(tmp_path: Path) -> None:
    from sklearn.decomposition import PCA

    features = np.random.default_rng(0).standard_normal((100, 20))
    content = {"pca_model": PCA(9).fit(features), "mean": np.zeros(20, "f4"), "std": np.ones(20, "f4")}
    torch.save(content, tmp_path / "pca.pt")
    write("redi", tmp_path / "in.pt")
    options = ImportRun(tmp_path / "in.pt", tmp_path / "run", tmp_path / "pca.pt", autoencoder=PUBLISHED, heads=HEADS)
    run = import_run(options)
    spec = load_compressor(run / "compressors" / "local").spec()
    assert (spec.kind, spec.channels_in, spec.channels) == ("pca", 20, 6)


def test_the_published_autoencoder_is_compared_only_once_it_is_seen(autoencoder: str, tmp_path: Path) -> None:
    write("sit", tmp_path / "in.pt")
    cpu = torch.device("cpu")
    record = RunRecord.read(import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run", heads=HEADS)))
    with pytest.raises(UserError, match=r"sd-vae-ft-ema .*cannot be fetched"):
        load(tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="has 2 pixels of a latent along a side, the run has 8"):
        decoder(record, cpu, autoencoder)
    fitting = replace(record, autoencoder=replace(record.autoencoder, downsampling=2))
    assert decoder(fitting, cpu, autoencoder).spec.latent_channels == 4
    local = RunRecord.read(
        import_run(ImportRun(tmp_path / "in.pt", tmp_path / "local", autoencoder=autoencoder, heads=HEADS))
    )
    assert decoder(local, cpu).spec == local.autoencoder
    # The same name with other weights.
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(autoencoder).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    record = RunRecord.read(
        import_run(ImportRun(tmp_path / "in.pt", tmp_path / "moved", autoencoder=str(other), heads=HEADS))
    )
    weights = {k: v + 1 for k, v in load_file(other / "diffusion_pytorch_model.safetensors").items()}
    save_file(weights, other / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="not the one that the run was trained with"):
        decoder(record, cpu)


def test_an_autoencoder_that_nobody_named_is_said_to_be_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("repa", tmp_path / "in.pt")
    named = import_run(ImportRun(tmp_path / "in.pt", tmp_path / "named", autoencoder=PUBLISHED, heads=HEADS))
    assert "assuming" not in capsys.readouterr().out
    assumed = import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run", heads=HEADS))
    assert "assuming sd-vae-ft-mse, decoded by sd-vae-ft-ema" in capsys.readouterr().out
    records = [RunRecord.read(run) for run in (named, assumed)]
    assert [record.autoencoder_assumed for record in records] == [False, True]
    assert [record.decoder for record in records] == [None, "sd-vae-ft-ema"]
    shown = ["assumed: the published file does not say" in model_card(r, "run", 0, 1, [], False) for r in records]
    assert shown == [False, True]
    older = json.loads((assumed / "run.json").read_text())
    del older["autoencoder_assumed"]
    (assumed / "run.json").write_text(json.dumps(older))
    assert not RunRecord.read(assumed).autoencoder_assumed


def in_channels(channels: int, rows: int) -> Any:
    def change(weights: dict[str, Tensor]) -> None:
        weights["x_embedder.proj.weight"] = torch.zeros(48, channels, 2, 2)
        weights["final_layer.linear.weight"] = torch.zeros(rows, 48)
        weights["final_layer.linear.bias"] = torch.zeros(rows)

    return change


@pytest.mark.parametrize(
    ("method", "channels", "rows", "message"),
    [
        ("sit", 16, 128, "has 16 input channels and no local map"),
        ("repa", 3, 12, "has 3 input channels, fewer than the 4"),
        ("repa", 16, 64, "has 16 channels, but published redi models have 12"),
        ("reg", 32, 128, "has 32 channels, but published reglue models have 20"),
    ],
)
def test_other_channels_than_the_published_ones_need_an_autoencoder(
    method: str, channels: int, rows: int, message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write(method, tmp_path / "in.pt", in_channels(channels, rows))
    line = mistake(capsys, monkeypatch, "import", tmp_path / "in.pt", "--out", tmp_path / "run", "--heads=4")
    assert message in line
    assert "with --autoencoder" in line
    assert not (tmp_path / "run").exists()


def with_grid(rows: int, columns: int) -> Any:
    def change(weights: dict[str, Tensor]) -> None:
        width = weights["pos_embed"].shape[2]
        weights["pos_embed"] = position_embedding((rows, columns), width)

    return change


@pytest.mark.parametrize("grid", [(32, 32), (3, 5), (8, 2), (2, 8), (1, 7)])
def test_fixed_positions_tell_the_grid(grid: tuple[int, int], tmp_path: Path) -> None:
    write("sit", tmp_path / "in.pt", with_grid(*grid))
    run = import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run", heads=HEADS))
    record = RunRecord.read(run)
    assert record.denoiser.grid == (2 * grid[0], 2 * grid[1])
    assert record.resolution == (16 * grid[0], 16 * grid[1])
    assert not record.denoiser.learned_positions


def test_learned_positions_are_kept(autoencoder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    learned = torch.randn(1, 16, 48)
    write("repa", tmp_path / "in.pt", lambda weights: weights.update(pos_embed=learned))
    run = import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run", autoencoder=autoencoder, heads=HEADS))
    model = load(run, device="cpu")
    assert torch.equal(model.denoiser.positions, learned)
    assert model.generate(3, steps=2)[0].size == (16, 16)
    assert torch.equal(read_official(export_run(ExportRun(run, tmp_path / "out.pt"))).weights["pos_embed"], learned)

    write("repa", tmp_path / "wide.pt", lambda weights: weights.update(pos_embed=learned[:, :8]))
    with pytest.raises(UserError, match="resolution HEIGHT WIDTH"):
        import_run(ImportRun(tmp_path / "wide.pt", tmp_path / "wide", heads=HEADS))
    wide = import_run(ImportRun(tmp_path / "wide.pt", tmp_path / "wide", heads=HEADS, resolution=(32, 64)))
    assert RunRecord.read(wide).denoiser.grid == (4, 8)


def test_half_precision_and_other_patches_and_no_classes(autoencoder: str, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].repeat(1, 1, 2, 2)
        weights["y_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"][-1:]
        for name in ("weight", "bias"):
            head = weights[f"final_layer.linear.{name}"]
            weights[f"final_layer.linear.{name}"] = head.repeat(4, *[1] * (head.ndim - 1))
        for name in weights:
            weights[name] = weights[name].half()

    write("sit", tmp_path / "in.safetensors", change)
    run = import_run(ImportRun(tmp_path / "in.safetensors", tmp_path / "run", autoencoder=autoencoder, heads=HEADS))
    model = load(run, device="cpu")
    assert model.record.recipe.model == "3x48x4/4"
    assert model.record.class_names == ()
    assert not model.record.denoiser.learned_positions
    images = model.generate(count=2, steps=2, output="tensor")
    assert images.shape == (2, 3, 32, 32)


def test_class_names_from_a_file(tmp_path: Path) -> None:
    write("repa", tmp_path / "in.pt")
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(1000)) + "\n")
    options = ImportRun(tmp_path / "in.pt", tmp_path / "run", class_names=tmp_path / "names.txt", heads=HEADS)
    assert RunRecord.read(import_run(options)).class_names[207] == "class 207"
    (tmp_path / "names.txt").write_text("class 0\n\n" + "\n".join(f"class {i}" for i in range(1, 1000)))
    with pytest.raises(UserError, match=r"names\.txt, line 2 is blank"):
        import_run(replace(options, out=tmp_path / "other"))


def test_the_path_that_a_model_was_trained_on(tmp_path: Path) -> None:
    golden = Golden("repa")
    for name, expected in (("linear", "linear"), ("cosine", "cosine"), ("GVP", "cosine")):
        content = {"ema": golden.published, "args": argparse.Namespace(path_type=name, prediction="v")}
        torch.save(content, tmp_path / "in.pt")
        run = import_run(ImportRun(tmp_path / "in.pt", tmp_path / name, heads=HEADS))
        assert RunRecord.read(run).recipe.path == expected
    for about, message in (({"path_type": "VP"}, "path VP"), ({"prediction": "noise"}, "predicts noise")):
        torch.save({"ema": golden.published, "args": argparse.Namespace(**about)}, tmp_path / "in.pt")
        with pytest.raises(UserError, match=message):
            import_run(ImportRun(tmp_path / "in.pt", tmp_path / "refused", heads=HEADS))


@pytest.mark.parametrize(
    ("about", "share"), [({}, 0.2), ({"dino_drop_prob": None}, 0.0), ({"dino_drop_prob": 0.1}, 0.1)]
)
def test_redi_can_be_guided_by_its_map_if_it_was_trained_for_it(
    about: dict[str, Any], share: float, tmp_path: Path
) -> None:
    content = {"ema": Golden("redi").published, "args": argparse.Namespace(**about)}
    torch.save(content, tmp_path / "in.pt")
    record = RunRecord.read(
        import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run", heads=HEADS, autoencoder=PUBLISHED))
    )
    assert record.recipe.local.dropout == share
    assert [modality.dropout for modality in record.denoiser.modalities] == [0, share]


def test_either_weights_are_exported(tiny_store: Path, tmp_path: Path) -> None:
    arguments = ["--store", str(tiny_store), "--out", str(tmp_path / "run"), *TINY_RECIPE, "--optimisation.steps=2"]
    run = train(parse(["train", "sit", *arguments]))
    files = {name: export_run(ExportRun(run, tmp_path / f"{name}.safetensors", weights=name)) for name in KINDS}
    written = {name: load_file(file) for name, file in files.items()}
    both = torch.load(export_run(ExportRun(run, tmp_path / "both.pt")), weights_only=True)
    for name in KINDS:
        assert all(torch.equal(written[name][key], value) for key, value in both[name].items())
    assert not torch.equal(written["ema"]["x_embedder.proj.weight"], written["model"]["x_embedder.proj.weight"])
    with pytest.raises(UserError, match=r"--weights model is for \.safetensors files, since others hold both"):
        ExportRun(run, tmp_path / "model.pt", weights="model")


def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, tiny_encoder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor, statistics, _ = compressor_files(tmp_path)
    for method in ("sit", "reglue"):
        write(method, tmp_path / f"{method}.pt")
    write("sit", tmp_path / "odd.pt", lambda w: w.update({"final_layer.linear.weight": torch.zeros(17, 48)}))
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    sit, reglue, run = tmp_path / "sit.pt", tmp_path / "reglue.pt", tmp_path / "run"
    heads, as_published = "--heads=4", ["--autoencoder", PUBLISHED]
    for message, arguments in {
        "no such file": [tmp_path / "gone.pt", "--out", run],
        "expected a state dict": [statistics, "--out", run],
        "odd.pt: final_layer.linear has 17 rows; expected 16": [tmp_path / "odd.pt", "--out", run, heads],
        "sit.pt: width 48 is none of": [sit, "--out", run],
        "width of 48 must be divisible": [sit, "--out", run, "--heads=5"],
        "holds other files": [sit, "--out", tmp_path / "full", heads],
        "a sit model has no local map": [sit, "--out", run, heads, "--compressor", compressor],
        "give their file with --statistics": [reglue, "--out", run, heads, *as_published, "--compressor", compressor],
        "give it too": [reglue, "--out", run, heads, *as_published, "--statistics", statistics],
        "expected {mean, std}, found": [
            reglue, "--out", run, heads, *as_published, "--compressor", reglue, "--statistics", reglue
        ],
        "not a published REGLUE compressor": [
            reglue, "--out", run, heads, *as_published, "--compressor", reglue, "--statistics", statistics
        ],
        "has 2 names, but the model has 1000": [sit, "--out", run, heads, "--class-names", tmp_path / "names.txt"],
        "--resolution asks for 2×8": [sit, "--out", run, heads, "--resolution", "32", "128"],
        "--resolution asks for 5×5": [sit, "--out", run, heads, "--resolution", "80"],
        "is 16 wide, but the model's class token is 20 wide": [
            reglue, "--out", run, heads, *as_published, "--encoder", tiny_encoder
        ],
        "unknown autoencoder": [sit, "--out", run, heads, "--autoencoder", "no-such-autoencoder"],
    }.items():  # fmt: skip
        line = mistake(capsys, monkeypatch, "import", *arguments)
        assert message in line, line
    assert sorted(tmp_path.rglob("*")) == before


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def test_a_malicious_checkpoint_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"ema": Golden("sit").published, "args": argparse.Namespace(hidden=[Malicious(tmp_path / "canary")])}
    torch.save(content, tmp_path / "in.pt")
    line = mistake(capsys, monkeypatch, "import", tmp_path / "in.pt", "--out", tmp_path / "run", "--heads=4")
    assert "asks for posix.system" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt"]


@pytest.mark.parametrize("method", FAMILIES)
def test_our_own_runs_are_exported(method: str, tiny_store: Path, tiny_autoencoder: str, tmp_path: Path) -> None:
    options = ["--store", str(tiny_store), "--out", str(tmp_path / "run"), *TINY_RECIPE, "--optimisation.steps=2"]
    run = train(parse(["train", method, *options]))
    out = export_run(ExportRun(run, tmp_path / "out.pt"))
    container = torch.load(out, weights_only=True)
    assert container["steps"] == 2
    for name, ours in (("ema", "ema.safetensors"), ("model", "model.safetensors")):
        again = import_official(container[name], heads=2, latent_channels=3, alignment_depth=1)
        assert again.family == method
        for key, value in read_weights(run / "checkpoints" / "00000002" / ours).items():
            torch.testing.assert_close(again.weights[key], value, rtol=1e-5, atol=1e-6)
    other = export_run(ExportRun(run, tmp_path / "out.safetensors"))
    back = [
        import_run(ImportRun(out, tmp_path / "back", autoencoder=tiny_autoencoder, heads=2)),
        # What import asks for is in the file.
        import_run(ImportRun(out, tmp_path / "pt")),
        import_run(ImportRun(other, tmp_path / "safetensors")),
    ]
    settings = {"sampler": "euler", "steps": 3, "output": "tensor"}
    images = [load(folder, device="cpu").generate([0, "square"], **settings) for folder in (run, *back)]  # type: ignore[arg-type]
    if method == "lightningdit":
        del images[1]  # With another autoencoder named, the file's statistics of the latents do not hold.
    assert all((images[0].int() - each.int()).abs().max() <= 1 for each in images[1:])
    record = RunRecord.read(run)
    for folder in back[1:]:
        read = RunRecord.read(folder)
        if not read.denoiser.alignment_width:  # Of a projector that is not there nothing is known.
            read = replace(read, denoiser=replace(read.denoiser, alignment_hidden=record.denoiser.alignment_hidden))
        for part in ("recipe", "denoiser", "class_names", "resolution", "autoencoder", "decoder"):
            assert getattr(read, part) == getattr(record, part), part
        assert (read.store, read.store_hash, read.seed, read.origin is None) == (None, None, None, False)
    assert str(record.store) not in other.read_bytes().decode("latin1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(denoiser=record["denoiser"] | {"depth": 7}), "says depth 7, its weights 2"),
        (lambda record: record["denoiser"]["conditions"].update({"class": 5}), "says classes 5, its weights 3"),
        (lambda record: record.update(format="2"), "record of the run is damaged"),
        (lambda record: record["recipe"].update(backbone="mine"), "names a part that is not here: backbone mine"),
        (lambda record: record.pop("recipe"), "record of the run is damaged"),
    ],
)
def test_a_record_of_something_else_is_refused(change: Any, message: str, tiny_run: Path, tmp_path: Path) -> None:
    out = export_run(ExportRun(tiny_run, tmp_path / "out.safetensors"))
    with safe_open(out, "pt") as opened:
        metadata = {name: text for name, text in opened.metadata().items() if name != SEAL}
    record = json.loads(metadata["reglue"])
    change(record)
    save_file(load_file(out), out, {**metadata, "reglue": json.dumps(record)})
    with pytest.raises(UserError, match=rf"^{out}: .*{message}"):
        import_run(ImportRun(out, tmp_path / "run"))


def test_a_model_without_a_null_label_draws_classes_alone(
    autoencoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = dict(Golden("sit").published)
    weights["y_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"][:10].clone()
    torch.save({"ema": weights, "args": argparse.Namespace(num_classes=10, model="SiT-B/2")}, tmp_path / "in.pt")
    run = import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run", autoencoder=autoencoder, heads=HEADS))
    for options in (["--guidance-scale=2"], ["--guided-channels=2", "--guidance-scale=1.1"]):
        line = mistake(capsys, monkeypatch, "sample", run, "--out", tmp_path / "out", "--device=cpu", *options)
        assert "this model has no branch without labels" in line
    model = load(run, device="cpu")
    assert model.default_sampling.guidance_scale == 1
    assert len(model.generate([0, 9], steps=2)) == 2
    with pytest.raises(UserError, match=r"no branch without labels .*name a class, 0 to 9"):
        model.generate(count=2, steps=2)
    with pytest.raises(UserError, match="class 10: choose 0 to 9"):
        model.generate(10)


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_imports_add_noise_as_their_code_does(path: str, method: str, autoencoder: str, tmp_path: Path) -> None:
    """SiT and ReDi 2σ_t, the others 2t."""
    arguments = argparse.Namespace(path_type=path, model="SiT-B/2")
    torch.save({"ema": Golden(method).published, "args": arguments}, tmp_path / "in.pt")
    run = import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run", autoencoder=autoencoder, heads=HEADS))
    model = load(run, device="cpu")
    sampling = model.default_sampling.changed(sampler="euler-maruyama", steps=3, guidance_scale=1.0)
    sampled = {
        diffusion: model.draw([0], model.condition([1]), 0, sampling.changed(diffusion=diffusion))[LATENT]
        for diffusion in ("time", "sigma")
    }
    assert torch.equal(sampled["time"], sampled["sigma"]) == (path == "linear")
    own = "sigma" if method in ("sit", "redi") else "time"
    assert torch.equal(model.draw([0], model.condition([1]), 0, sampling)[LATENT], sampled[own])


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_what_weights_do_not_tell_is_exported_too(
    ending: str, tiny_store: Path, tiny_autoencoder: str, tmp_path: Path
) -> None:
    options = ["--model=3x32x2/2", "--alignment.after-block=2", "--path=cosine", "--optimisation.steps=1"]
    run = train(
        parse(["train", "repa", "--store", str(tiny_store), "--out", str(tmp_path / "run"), *TINY_RECIPE, *options])
    )
    out = export_run(ExportRun(run, tmp_path / f"out{ending}"))
    back = RunRecord.read(import_run(ImportRun(out, tmp_path / "back", autoencoder=tiny_autoencoder, heads=2)))
    assert back.recipe.path == "cosine"
    assert back.denoiser.alignment_depth == 2


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("sit", ["--local.weight=1"], "learn-sigma (SiT) and a local map"),
        ("sit", ["--class-token.weight=0.1"], "learn-sigma (SiT) and a class token"),
        ("sit", ["--alignment.weight=0.5"], "learn-sigma (SiT) and alignment"),
        ("reglue", ["--alignment.weight=0"], "a class token and without alignment (--alignment.weight 0)"),
        ("reg", ["--alignment.weight=0"], "a class token and without alignment (--alignment.weight 0)"),
        ("repa", ["--latent.unit-variance"], "--latent.unit-variance"),
        ("reglue", ["--class-token.unit-variance"], "--class-token.unit-variance"),
    ],
)
def test_combinations_that_nobody_published_are_refused_by_name(
    recipe: str, options: list[str], message: str, tiny_store: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    common = ["--store", str(tiny_store), "--out", str(tmp_path / "run"), *TINY_RECIPE, "--optimisation.steps=1"]
    train(parse(["train", recipe, *common, *options]))
    assert message in mistake(capsys, monkeypatch, "export", tmp_path / "run", "--out", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_codes_of_the_class_token_are_not_exported() -> None:
    """Whatever their width: the published code learns the token itself."""
    recipe = replace(RECIPES["reglue"], class_token=ClassToken(0.03, compressor="pca-16"))
    with pytest.raises(UserError, match=r"has no class_token\.compressor"):
        refuse_own_parts(recipe, "reglue")


def test_a_run_of_wide_images_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("sit", tmp_path / "in.pt", with_grid(2, 8))
    run = import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run", heads=HEADS))
    line = mistake(capsys, monkeypatch, "export", run, "--out", tmp_path / "out.pt")
    assert "build square models alone: a file of 2×8 patches would fit none of them" in line
    assert not (tmp_path / "out.pt").exists()


def test_an_imported_run_is_not_trained_on(tiny_store: Path, tmp_path: Path) -> None:
    write("sit", tmp_path / "in.pt")
    run = import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run", heads=HEADS))
    with pytest.raises(UserError, match=r"imported from in\.pt and cannot be trained on"):
        train(parse(["train", "sit", "--store", str(tiny_store), "--out", str(run), *TINY_RECIPE]))


def test_export_needs_a_known_ending(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in \.safetensors, \.pt, \.pth"):
        export_run(ExportRun(tiny_run, tmp_path / "out.bin"))


def test_uvits_folder_and_its_bare_file_are_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden, folder = Golden("uvit"), tmp_path / "imagenet256_uvit_huge"
    folder.mkdir()
    torch.save(golden.published, folder / "nnet_ema.pth")
    torch.save({name: value + 1 for name, value in golden.published.items()}, folder / "nnet.pth")
    torch.save(500_000, folder / "step.pth")
    runs = [
        import_run(ImportRun(file, tmp_path / name, heads=HEADS))
        for name, file in (("whole", folder), ("bare", folder / "nnet_ema.pth"))
    ]
    assert "uvit 4x48x4/2 of step 500000" in capsys.readouterr().out
    steps = [int(next((run / "checkpoints").iterdir()).name) for run in runs]
    assert steps == [500_000, 0]
    ours, theirs = (
        read_weights(run / "checkpoints" / f"{n:08d}" / "ema.safetensors") for run, n in zip(runs, steps, strict=True)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_uvit_without_classes_has_one_token_less(autoencoder: str, tmp_path: Path) -> None:
    weights = dict(Golden("uvit").published)
    weights.pop("label_emb.weight")
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    torch.save(weights, tmp_path / "nnet_ema.pth")
    run = import_run(ImportRun(tmp_path / "nnet_ema.pth", tmp_path / "run", autoencoder=autoencoder, heads=HEADS))
    model = load(run, device="cpu")
    assert model.record.class_names == ()
    assert model.default_sampling.guidance_scale == 1
    assert len(model.generate(count=2, steps=4)) == 2
    exported = read_official(export_run(ExportRun(run, tmp_path / "out.safetensors"))).weights
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder_pred.weight"), "not U-ViT's checkpoint: no decoder_pred.weight"),
        (lambda w: w.pop("patch_embed.proj.weight"), "not U-ViT's checkpoint: no patch_embed.proj.weight"),
        (lambda w: w.pop("out_blocks.1.skip_linear.weight"), "backbone.blocks.4.skip.weight"),
        (lambda w: w.update({"pos_embed": w["pos_embed"][:, 1:]}), "not a square grid"),
        (
            lambda w: w.update({"mid_block.attn.qkv.weight": torch.zeros(5, 5)}),
            "backbone.blocks.2.attention.qkv.weight",
        ),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith("mid_block")], "no blocks.2"),
    ],
)
def test_a_damaged_uvit_is_refused_in_one_line(
    change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = dict(Golden("uvit").published)
    change(weights)
    torch.save(weights, tmp_path / "nnet_ema.pth")
    assert message in mistake(
        capsys, monkeypatch, "import", tmp_path / "nnet_ema.pth", "--out", tmp_path / "run", "--heads=4"
    )


def test_lightningdits_heads_and_rotations_are_read_from_its_tables(tmp_path: Path) -> None:
    golden = write("lightningdit", tmp_path / "in.pt")
    record = RunRecord.read(import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run", autoencoder=PUBLISHED)))
    assert record.denoiser.heads == golden.about["num_heads"]
    write(
        "lightningdit",
        tmp_path / "turned.pt",
        lambda w: w.update({"feat_rope.freqs_cos": 0.5 * w["feat_rope.freqs_cos"]}),
    )
    with pytest.raises(UserError, match=r"turned\.pt: feat_rope\.freqs_cos has other rotary positions"):
        import_run(ImportRun(tmp_path / "turned.pt", tmp_path / "turned", autoencoder=PUBLISHED))


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("uvit", ["--prediction=velocity"], "prediction velocity"),
        ("uvit", ["--blocks.rope"], "U-ViT's kind with parts of LightningDiT"),
        ("reglue", ["--backbone=lightning"], "LightningDiT's kind with a class token, a local map, alignment"),
        ("sit", ["--blocks.convolution"], "LightningDiT's kind with a last convolution"),
    ],
)
def test_what_no_published_class_can_hold_is_not_exported(
    recipe: str, options: list[str], message: str, tiny_store: Path, tmp_path: Path
) -> None:
    line = ["train", recipe, "--store", str(tiny_store), "--out", str(tmp_path / "run"), *TINY_RECIPE, *options]
    run = train(parse([*line, "--optimisation.steps=1"]))
    with pytest.raises(UserError, match=f"no published code has a model .*{message}"):
        export_run(ExportRun(run, tmp_path / "out.pt"))


def test_sfd_comes_in_samples_and_goes_out(autoencoder: str, tmp_path: Path) -> None:
    golden = write("sfd", tmp_path / "0001234.pt")
    run = import_run(ImportRun(tmp_path / "0001234.pt", tmp_path / "run", autoencoder=autoencoder))
    record = RunRecord.read(run)
    assert (record.recipe.name, record.recipe.times, record.denoiser.times) == ("sfd", "lead", "lead")
    assert record.denoiser.alignment_depth == golden.about["repa_depth"]
    model = load(run, device="cpu")
    assert model.default_sampling.auto_scale == 1  # There is no weaker model yet.
    model.generate([0, 1], steps=2, guidance_scale=1.5)
    export_run(ExportRun(run, tmp_path / "out.safetensors"))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert {*file.keys()} == golden.published.keys()
        for name, value in golden.published.items():
            assert_close(file.get_tensor(name), value)
    # One embedding for two times has no place in SFD's files.
    weights = read_weights(run / "checkpoints" / "00001234" / "ema.safetensors")
    weights["time_offsets.local.weight"] += 0.1
    with pytest.raises(UserError, match="only what was imported can be exported"):
        export_official("sfd", record.denoiser, weights)
    with pytest.raises(UserError, match=r"not an SFD checkpoint: t_embedder_sem\.mlp\.0\.weight and"):
        import_official({**golden.published, "t_embedder_tex.mlp.0.weight": torch.ones(3)}, latent_channels=4)
