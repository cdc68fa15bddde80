"""Published files as strangers save them: containers, prefixes, averages, several projectors, families, NaN."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import METHODS, Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from helpers import mistake
from reglue.commands.export_run import ExportRun, export_run
from reglue.commands.import_run import ImportRun, import_run
from reglue.commands.verify import Verify, verify
from reglue.errors import UserError
from reglue.published.containers import RECORD, WRAPPERS, read_official
from reglue.published.families import (
    DIT,
    ENCODER_DEPTH,
    FAMILY,
    LABEL_DROPOUTS,
    MAP_DROPOUT,
    NAMES,
    NUM_CLASSES,
    NUM_HEADS,
    PATH_TYPE,
    PREDICTION,
)
from reglue.run import RunRecord
from reglue.training import checkpoints

Weights = dict[str, Tensor]
Container = Callable[[Weights, Weights], dict[str, Any]]


def under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}.{name}": value for name, value in weights.items()}


def without_dots(prefix: str, weights: Weights) -> Weights:
    """As latent-diffusion's code keeps its averages: without what is not trained."""
    kept = {name: value for name, value in weights.items() if name != "pos_embed"}
    return {f"model_ema.{(prefix + name).replace('.', '')}": value for name, value in kept.items()}


# The first argument are the averaged weights, the second those that were trained.
WITH_AVERAGES: dict[str, Container] = {
    "model, ema": lambda ema, raw: {"model": raw, "ema": ema, "opt": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "model, model_ema": lambda ema, raw: {"model": raw, "model_ema": ema, "epoch": 3},
    "state_dict, state_dict_ema": lambda ema, raw: {"state_dict": raw, "state_dict_ema": ema},
    "ema_state_dict": lambda ema, raw: {"ema_state_dict": ema, "global_step": 7},
    "ema inside": lambda ema, raw: {"state": {"net": raw, "EMA": {"module": ema}}},
    "averaged model of torch": lambda ema, raw: {
        "model": raw, "ema": {"n_averaged": torch.tensor(3), **under("module", ema)}
    },
    "compiled": lambda ema, raw: {"model": under("_orig_mod", raw), "ema": under("module._orig_mod", ema)},
    "Lightning": lambda ema, raw: {
        "state_dict": {**under("net", raw), **under("ema_model.module", ema), "vae.w": torch.ones(2, 2)},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0)}},
        "pytorch-lightning_version": "2.5.0",
    },
    "Lightning, latent diffusion": lambda ema, raw: {
        "state_dict": {**under("model.diffusion_model", raw), **without_dots("diffusion_model.", ema),
                       "model_ema.decay": torch.tensor(0.9999)},
    },
    "one module within the other": lambda ema, raw: {**under("model", raw), **under("model.ema", ema)},
    "ema_pytorch": lambda ema, raw: {
        "ema": {**under("online_model", raw), **under("ema_model", ema), "initted": torch.tensor(True)}
    },
    **{
        f"{first}, {second}": lambda ema, raw, first=first, second=second: {first: raw, second: ema}
        for first, second in [
            ("model", "modelEMA"), ("model", "emaModel"), ("net", "EMANet"), ("model", "avg_model"),
            ("student", "teacher"), ("cinema", "model_averages"), ("schemaNet", "netAvg"), ("exp_avg", "ema1"),
        ]
    },
}  # fmt: skip
WITHOUT: dict[str, Container] = {
    "bare": lambda ema, raw: dict(ema),
    "wrapped": lambda ema, raw: under("module", ema),
    "model": lambda ema, raw: {"model": ema},
    "Lightning without": lambda ema, raw: {"state_dict": under("model._orig_mod", ema)},
}


@pytest.mark.parametrize("container", [*WITH_AVERAGES, *WITHOUT])
def test_the_averaged_weights_are_found(container: str, tmp_path: Path) -> None:
    ema = dict(Golden("sit").published)
    raw = {name: value if name == "pos_embed" else value + 1 for name, value in ema.items()}
    torch.save({**WITH_AVERAGES, **WITHOUT}[container](ema, raw), tmp_path / "file.ckpt")
    found = read_official(tmp_path / "file.ckpt")
    assert found.weights.keys() == ema.keys()
    assert all(torch.equal(found.weights[name], ema[name]) for name in ema)
    said = [note for note in found.notes if "no averaged (EMA) weights" in note]
    assert len(said) == (container in ("model", "Lightning without"))


def test_which_of_several_averages_is_taken_is_said(tmp_path: Path) -> None:
    ema = dict(Golden("sit").published)
    other = {name: value + 1 for name, value in ema.items()}
    torch.save({"model": other, "model_ema1": ema, "model_ema2": other}, tmp_path / "file.pt")
    found = read_official(tmp_path / "file.pt")
    assert torch.equal(found.weights["pos_embed"], ema["pos_embed"])
    assert found.notes == ("It has several averages of the weights: taking model_ema1 (the others are model_ema2).",)


@settings(max_examples=30)
@given(prefixes=st.lists(st.sampled_from([*sorted(WRAPPERS), "model", "net", "ema_model", "ema"]), max_size=5))
def test_prefixes_in_any_order(prefixes: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("prefixes") / "file.safetensors"
    weights = {"x_embedder.proj.weight": torch.ones(4, 2), "blocks.0.attn.qkv.bias": torch.ones(3)}
    save_file({".".join([*prefixes, name]): value for name, value in weights.items()}, file)
    assert read_official(file).weights.keys() == weights.keys()


def test_wrappers_inside_the_names(tmp_path: Path) -> None:
    weights = {"x_embedder.proj.weight": torch.ones(4, 2), "blocks.0._orig_mod.attn.qkv.bias": torch.ones(3)}
    torch.save({"ema": weights}, tmp_path / "file.pt")
    assert "blocks.0.attn.qkv.bias" in read_official(tmp_path / "file.pt").weights


@pytest.mark.parametrize("method", ["repa", "reglue"])
def test_surplus_projectors_are_left_out_and_said(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = dict(Golden(method).published)
    for name in [name for name in weights if name.startswith("projectors.0.")]:
        for other in (1, 2):
            weights[name.replace("projectors.0", f"projectors.{other}")] = weights[name] + 1
    torch.save({"ema": weights}, tmp_path / "in.pt")
    run = import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run", autoencoder="sd-vae-ft-mse", heads=4))
    assert "projectors 1, 2, which only training uses, are left out" in capsys.readouterr().out
    assert RunRecord.read(run).denoiser.alignment_width


# ---- the family


def saved(method: str, file: Path, arguments: dict[str, Any] | None = None, *, unused: float = 1.0) -> Path:
    """A checkpoint of SiT's or DiT's shapes."""
    weights = dict(Golden(method).published)
    if unused != 1 and method == "sit":
        outputs = weights["final_layer.linear.weight"].clone()
        outputs.unflatten(0, (4, 8))[:, 4:] *= unused
        weights["final_layer.linear.weight"] = outputs
    content: dict[str, Any] = {"ema": weights}
    if arguments is not None:
        content["args"] = argparse.Namespace(**arguments)
    torch.save(content, file)
    return file


@pytest.mark.parametrize(
    ("name", "arguments", "family", "said"),
    [
        ("0400000.pt", {"model": "DiT-XL/2"}, None, "its options name the model DiT-XL/2"),
        ("sit.pt", {"model": "DiT-B/4"}, None, "its options name the model DiT-B/4"),
        ("DiT-XL-2-256x256.pt", None, None, "its name says so"),
        ("dit_b2.pt", {}, None, "its name says so"),
        ("0400000.pt", {"model": "SiT-XL/2"}, "dit", "family says so"),
        ("SiT.pt", None, "dit", "family says so"),
    ],
)
def test_what_speaks_for_dit_is_said(
    name: str, arguments: dict[str, Any] | None, family: Any, said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = saved("sit", tmp_path / name, arguments)
    run = import_run(ImportRun(file, tmp_path / "run", family=family, heads=4))
    record = RunRecord.read(run)
    assert (record.recipe.name, record.recipe.prediction, record.denoiser.prediction) == ("dit", "noise", "noise")
    line = capsys.readouterr().out
    assert said in line
    assert "By its shapes it is SiT or DiT: DiT, since" in line
    # Its time is not turned round, nor its outputs.
    ours = checkpoints.read_weights(checkpoints.find(run) / checkpoints.EMA)
    assert torch.equal(ours["velocity.weight"], Golden("sit").published["final_layer.linear.weight"])


@pytest.mark.parametrize(
    ("name", "arguments", "family", "unused", "said"),
    [
        ("0400000.pt", {"model": "SiT-XL/2"}, None, 1, "its options name the model SiT-XL/2"),
        ("0400000.pt", {"path_type": "Linear", "prediction": "velocity"}, None, 1, "its options are those of SiT"),
        ("SiT-XL-2-256x256.pt", None, None, 1, "its name says so"),
        ("DiT.pt", {"model": "SiT-S/2"}, None, 1, "its options name the model"),
        ("DiT.pt", {"model": "DiT-S/2"}, "sit", 1, "family says so"),
        ("weights.pt", None, None, 0, "the second half of its outputs is zero"),
        ("weights.pt", None, None, 1, "nothing says which: assuming SiT (though"),
        ("sit-or-dit.pt", None, None, 1, "nothing says which: assuming SiT (though"),
    ],
)
def test_what_speaks_for_sit_is_said(
    name: str, arguments: Any, family: Any, unused: float, said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = saved("sit", tmp_path / name, arguments, unused=unused)
    run = import_run(ImportRun(file, tmp_path / "run", family=family, heads=4))
    assert RunRecord.read(run).recipe.name == "sit"
    assert said in capsys.readouterr().out


def test_sit_without_sigma_has_repas_shapes_and_the_other_time(tmp_path: Path) -> None:
    """A REPA model without its projector is either: their times run in opposite directions."""
    weights = {n: v for n, v in Golden("repa").published.items() if not n.startswith("projectors")}
    read: dict[str, Any] = {}
    for name, arguments in {"repa": {}, "sit": {"path_type": "Linear", "prediction": "velocity"}}.items():
        torch.save({"ema": weights, "args": argparse.Namespace(**arguments)}, tmp_path / f"{name}-in.pt")
        run = import_run(ImportRun(tmp_path / f"{name}-in.pt", tmp_path / name, heads=4))
        read[name] = RunRecord.read(run)
    assert [record.recipe.name for record in read.values()] == ["repa", "sit"]
    assert not read["sit"].denoiser.learn_sigma


@pytest.mark.parametrize("method", METHODS)
def test_another_family_than_the_shapes_say_is_refused(method: str, tmp_path: Path) -> None:
    torch.save(Golden(method).published, tmp_path / "in.pt")
    for family in {"sit", "repa", "redi", "reg", "reglue", DIT} - {method, "sit", DIT}:
        told: Any = {"family": family, "autoencoder": "sd-vae-ft-mse", "heads": 4}
        options = ImportRun(tmp_path / "in.pt", tmp_path / "run", **told)
        with pytest.raises(UserError, match=rf"family {family}: by their shapes these weights are {NAMES[method]}'s"):
            import_run(options)


@pytest.mark.parametrize(
    ("key", "whose"),
    [
        ("t_pixel_embedder.mlp.0.weight", "Latent Forcing's"),
        ("transformer_blocks.0.attn1.to_q.weight", "of a transformer of diffusers"),
    ],
)
def test_other_models_are_named(key: str, whose: str, tmp_path: Path) -> None:
    torch.save({"ema": {key: torch.ones(2, 2), "pos_embed": torch.ones(1, 4, 8)}}, tmp_path / "in.pt")
    with pytest.raises(UserError, match=rf"in\.pt: these weights are {whose}; they cannot be imported"):
        import_run(ImportRun(tmp_path / "in.pt", tmp_path / "run"))


# ---- no null label


@pytest.mark.parametrize("how", ["num_classes", "cfg_prob", "names", "hyper_parameters"])
def test_trained_without_label_dropout(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Ten rows for ten classes: all of them classes, and no guidance, since nothing stands for none."""
    weights = dict(Golden("sit").published)
    weights["y_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"][:10].clone()
    content: dict[str, Any] = {"ema": weights}
    if how == "hyper_parameters":
        content[how] = {"network": {"num_classes": 10}}
    elif how != "names":
        content["args"] = argparse.Namespace(**{how: {"num_classes": 10, "cfg_prob": 0.0}[how]})
    torch.save(content, tmp_path / "sit.pt")
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    names = tmp_path / "names.txt" if how == "names" else None
    run = import_run(ImportRun(tmp_path / "sit.pt", tmp_path / "run", class_names=names, heads=4))
    assert "10 classes without a null class, so no guidance" in capsys.readouterr().out
    record = RunRecord.read(run)
    assert (record.denoiser.classes, len(record.class_names), record.has_null_class) == (10, 10, False)
    # What is exported again has ten rows too.
    out = export_run(ExportRun(run, tmp_path / "again.safetensors"))
    assert torch.equal(
        read_official(out).weights["y_embedder.embedding_table.weight"], weights["y_embedder.embedding_table.weight"]
    )
    assert not RunRecord.read(import_run(ImportRun(out, tmp_path / "back"))).has_null_class


# ---- numbers that are none


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(
    number: float, dtype: torch.dtype, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    weights = {name: value.to(dtype) for name, value in Golden("repa").published.items()}
    weights["blocks.1.attn.qkv.bias"][5] = number
    file = tmp_path / f"in{ending}"
    save_file(weights, file) if ending == ".safetensors" else torch.save({"ema": weights}, file)
    line = mistake(capsys, monkeypatch, "import", file, "--out", tmp_path / "run", "--heads=4")
    assert f"{file} is damaged (1 of the 144 numbers in blocks.1.attn.qkv.bias are NaN or infinite)" in line
    assert not (tmp_path / "run").exists()


# ---- names and endings that say another thing than the content


def test_the_content_tells_what_a_file_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = dict(Golden("sit").published)
    save_file(weights, tmp_path / "sit.bin")
    assert read_official(tmp_path / "sit.bin").weights.keys() == weights.keys()
    torch.save({"ema": weights}, tmp_path / "sit")
    assert read_official(tmp_path / "sit").weights.keys() == weights.keys()
    torch.save({"ema": weights}, tmp_path / "sit.safetensors")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "sit.bin").read_bytes()[:5000])
    for file, message in {
        "sit.safetensors": "sit.safetensors is PyTorch's and no safetensors; rename it to sit.pth",
        "pointer.safetensors": "is a Git LFS pointer",
        "cut.safetensors": "cut.safetensors is damaged",
        ".": "a folder; give the file in it",
    }.items():
        line = mistake(capsys, monkeypatch, "import", tmp_path / file, "--out", tmp_path / "run", "--heads=4")
        assert message in line


def test_options_in_the_file_spare_those_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = dict(Golden("sit").published)
    arguments = {"network": {"num_heads": 4, "num_classes": 7}, "path_type": "Linear"}
    torch.save({"state_dict_ema": weights, "hyper_parameters": arguments}, tmp_path / "in.ckpt")
    run = import_run(ImportRun(tmp_path / "in.ckpt", tmp_path / "run"))
    assert RunRecord.read(run).denoiser.heads == 4
    assert "Of 7 classes its labels have 1001 rows: taken for 1000 and none." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (torch.tensor(1e300, dtype=torch.float64), "1 of the 144 numbers in {} are NaN or infinite"),
        (torch.tensor(complex(1, torch.nan)), "the numbers in {} are of the type torch.complex64"),
        (torch.tensor(1j), "the numbers in {} are of the type torch.complex64"),
        (torch.tensor(0, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "of the type torch.float4_e2m1fn_x2"),
    ],
    ids=["beyond float32", "complex NaN", "complex", "of four bits"],
)
def test_weights_of_numbers_without_use_are_refused(number: Tensor, reason: str, tmp_path: Path) -> None:
    name, weights = "blocks.1.attn.qkv.bias", dict(Golden("sit").published)
    if number.dtype == torch.float4_e2m1fn_x2:
        weights[name] = torch.zeros(72, dtype=torch.uint8).view(number.dtype)
    else:
        weights[name] = weights[name].to(number.dtype)
        weights[name][0] = number
    save_file(weights, tmp_path / "file.safetensors")
    with pytest.raises(UserError) as caught:
        read_official(tmp_path / "file.safetensors")
    assert reason.format(name) in str(caught.value)
    assert "file.safetensors is damaged" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "steps", "taken"),
    [
        ("1700000000.pt", None, 0),
        ("0400000.pt", 10**12, 400_000),
        ("last.pt", 10**8, 0),
        ("last.pt", 10**30, 0),
        ("last.pt", 10**8 - 1, 10**8 - 1),
    ],
)
def test_steps_that_no_training_reaches_are_not_taken(
    name: str, steps: int | None, taken: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"ema": dict(Golden("sit").published), "steps": steps}, tmp_path / name)
    run = import_run(ImportRun(tmp_path / name, tmp_path / "run", autoencoder="sd-vae-ft-mse", heads=4))
    assert checkpoints.steps(run) == [taken]
    assert ("which no training reaches" in capsys.readouterr().out) == (taken != steps)
    assert verify(Verify(run)) == run
    shutil.rmtree(run / checkpoints.FOLDER)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        verify(Verify(run))


@pytest.mark.parametrize("value", [np.array([1, 2]), torch.ones(2), [1], (1, 2), b"v", {"a": np.ones(2)}], ids=repr)
def test_options_that_are_no_plain_values_are_as_if_not_there(value: Any, tmp_path: Path) -> None:
    names = [
        PREDICTION, PATH_TYPE, ENCODER_DEPTH, NUM_CLASSES, NUM_HEADS, *LABEL_DROPOUTS, FAMILY, MAP_DROPOUT, RECORD,
        "model",
    ]  # fmt: skip
    file = saved("redi", tmp_path / "file.pt", dict.fromkeys(names, value))
    run = import_run(ImportRun(file, tmp_path / "run", autoencoder="sd-vae-ft-mse", heads=4))
    other = import_run(ImportRun(saved("redi", file), tmp_path / "other", autoencoder="sd-vae-ft-mse", heads=4))
    assert RunRecord.read(run) == RunRecord.read(other)
