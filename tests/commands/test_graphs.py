"""Runs as ONNX graphs: what they compute, in the real runtime, is what PyTorch computes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from PIL import Image

import reglue
from reglue.cli import parse
from reglue.commands.export_run import export_run
from reglue.commands.sample import sample
from reglue.errors import UserError
from reglue.graphs import FlatDenoiser, Graph, as_float16, as_int8, distances
from reglue.run import RunRecord

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

SHORT = {"steps": 3, "sampler": "heun", "precision": "float32"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    out = tmp_path_factory.mktemp("exported") / "graphs"
    export_run(parse(["export", str(tiny_run), "--to", "onnx", "--out", str(out)]))
    return out


def test_the_same_seeds_are_the_same_images(exported: Path, tiny_run: Path, tmp_path: Path) -> None:
    graph, run = reglue.load(exported), reglue.load(tiny_run, device="cpu")
    ours, theirs = (
        model.generate([0, 1, 2], seed=1, output="tensor", guidance_scale=2.0, batch_size=2, **SHORT).int()
        for model in (run, graph)
    )
    assert (ours - theirs).abs().max() <= 1
    sample(parse(["sample", str(exported), "--out", str(tmp_path / "drawn"), "--count=2", "--steps=2"]))
    assert len([*(tmp_path / "drawn").glob("*.png")]) == 2
    protocol = json.loads((tmp_path / "drawn" / "samples.json").read_text())
    assert protocol["sampling"]["precision"] == "float32", "that of the graph, whatever suits the processor"


def test_an_image_is_encoded_as_by_the_run(exported: Path, tiny_run: Path) -> None:
    model = reglue.load(tiny_run, device="cpu")
    pixels = torch.randint(0, 256, (3, 3, *model.record.resolution), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(str(exported / "encoder.onnx"))
    found = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, {"pixels": pixels.numpy()}), strict=True)
    )
    expected = model.image_encoder().encode(pixels)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), value, rtol=1e-3, atol=1e-3)


def test_what_a_runtime_needs_is_described(exported: Path, tiny_run: Path) -> None:
    described = json.loads((exported / "graphs.json").read_text())
    model = reglue.load(tiny_run, device="cpu")
    shapes = {each["name"]: tuple(each["shape"]) for each in described["modalities"]}
    assert shapes == model.record.denoiser.shapes()
    assert described["sampling"]["sampler"] == model.default_sampling.sampler
    for graph in described["graphs"]:
        assert (exported / graph["file"]).stat().st_size == graph["bytes"]
        assert graph["difference"] < 1e-4
        assert 0 < graph["largest"] < 1e-3
        content = (exported / graph["file"]).read_bytes()
        assert not any(module.__path__[0].encode() in content for module in (reglue, torch))


@pytest.mark.parametrize(("shrink", "share", "bound"), [(as_float16, 0.8, 0.01), (as_int8, 0.8, 0.2)])
def test_smaller_weights_are_nearly_the_same(
    shrink: Callable[[Path], None], share: float, bound: float, exported: Path, tiny_run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    (file,) = copy.rglob("denoiser.onnx")
    size = file.stat().st_size
    shrink(file)
    assert file.stat().st_size < share * size
    denoiser = FlatDenoiser(reglue.load(tiny_run, device="cpu").denoiser)
    example = denoiser.example(3)
    found = Graph(file)(**dict(zip(denoiser.inputs, example, strict=True)))
    relative, largest = distances([found[name] for name in denoiser.outputs], denoiser(*example))
    assert 0 < relative < bound
    assert largest > 0
    assert reglue.load(copy).generate([0, 1], output="tensor", **SHORT).shape == (2, 3, 16, 16)


def test_a_graph_is_not_exported_again_nor_trained_on(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was exported to ONNX already; export the run that it was made of"):
        export_run(parse(["export", str(exported), "--to", "onnx", "--out", str(tmp_path / "again")]))
    with pytest.raises(UserError, match="was exported to ONNX: save the run that it was made of"):
        reglue.load(exported).save(tmp_path / "saved")
    with pytest.raises(UserError, match="was exported to ONNX: edit with the run that it was made of"):
        reglue.load(exported).edit(Image.new("RGB", (16, 16)), keep=("local",))
    with pytest.raises(UserError, match=r"denoiser\.onnx is a graph, not weights; give the run that it was made of"):
        export_run(parse(["export", str(exported), "--out", str(tmp_path / "weights.safetensors")]))


def test_a_damaged_graph_is_named(exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    (file,) = copy.rglob("denoiser.onnx")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"denoiser\.onnx cannot be read .*; export the run again"):
        reglue.load(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=a.pt", "--precision=int8"], "precision int8 is for --to onnx; leave it out"),
        (["--out=a", "--to=onnx", "--precision=float8"], "precision float8 is for --to reglue; leave it out"),
        (["--out=a", "--to=torch", "--precision=float16"], "float16 is for --to reglue or onnx; leave it out"),
        (["--out=a.pt", "--batch=2"], "batch 2 is for --to onnx or torch; leave it out"),
        (["--out=a.onnx", "--to=onnx"], "--to onnx makes a folder; choose a name without .onnx"),
        (["--out=a", "--to=onnx", "--weights=model"], "--weights model is for published .safetensors files"),
        (["--out=a", "--to=onnx", "--batch=0"], "batch 0: choose at least 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["export", "run", *arguments])


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """Of a run whose vision encoder is not at hand."""
    folder = tmp_path_factory.mktemp("programs")
    run = Path(shutil.copytree(tiny_run, folder / "run"))
    record = RunRecord.read(run)
    assert record.encoder
    replace(record, encoder=replace(record.encoder, name=str(folder / "nowhere"))).write(run)
    return export_run(parse(["export", str(run), "--to", "torch", "--out", str(folder / "programs")]))


def test_programs_run_where_this_package_is_not(programs: Path, tiny_run: Path, tmp_path: Path) -> None:
    described = json.loads((programs / "graphs.json").read_text())
    assert [graph["file"] for graph in described["graphs"]] == ["checkpoints/00000006/denoiser.pt2", "decoder.pt2"]
    assert all(graph["difference"] < 1e-4 for graph in described["graphs"])
    model = reglue.load(tiny_run, device="cpu")
    assert described["graphs"][0]["inputs"] == FlatDenoiser(model.denoiser).inputs
    page = (Path(__file__).parents[2] / "docs/portable.md").read_text()
    (block,) = [part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "torch.export" in part]
    drawing = f"import sys\nsys.modules['reglue'] = None\n{block}\ntorch.save(image, {str(tmp_path / 'image.pt')!r})"
    subprocess.run([sys.executable, "-c", drawing], check=True, cwd=programs.parent)
    image = torch.load(tmp_path / "image.pt")
    assert image.shape == (1, 3, *model.record.resolution)
    assert image.isfinite().all()
    for file in programs.rglob("*.pt2"):
        with ZipFile(file) as archive:
            assert not any(
                str(Path(reglue.__file__).parent).encode() in archive.read(name) for name in archive.namelist()
            )


def test_programs_are_not_opened_here(programs: Path) -> None:
    with pytest.raises(UserError, match=r"denoiser\.pt2 is for PyTorch without this package"):
        reglue.load(programs)
    assert "decoder.pt2" in reglue.info(reglue.Info(programs))["graphs"]


@pytest.mark.parametrize("fixture", ["exported", "programs"])
def test_another_graph_than_was_written_is_found(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(fixture), tmp_path / "copy"))
    assert reglue.verify(reglue.Verify(folder)) == folder
    graphs = [*folder.rglob("*.onnx"), *folder.rglob("*.pt2")]
    assert len(graphs) >= 2
    for file in graphs:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{file.name} is missing or damaged"):
            reglue.verify(reglue.Verify(folder))
        file.write_bytes(content)
