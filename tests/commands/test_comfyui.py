"""Runs as packs of nodes for ComfyUI, of which a stand-in for its documented interface takes the place here."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import comfyui_stand_in
import reglue
from reglue.cli import parse
from reglue.commands.export_run import export_run
from reglue.commands.sample import sample
from reglue.commands.verify import verify
from reglue.errors import UserError
from reglue.options.verify import Verify

NODES = "reglue.portable.comfyui"


def imported(pack: Path) -> ModuleType:
    """The pack as ComfyUI imports it, by its path."""
    spec = spec_from_file_location(str(pack).replace(".", "_x_"), pack / "__init__.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    out = tmp_path_factory.mktemp("exported") / "shapes"
    return export_run(parse(["export", str(tiny_run), "--to", "comfyui", "--out", str(out)]))


@pytest.fixture(scope="module")
def nodes(pack: Path) -> Any:
    """The nodes by their ids."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in comfyui_stand_in.modules().items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, NODES, raising=False)
        found = asyncio.run(imported(pack).comfy_entrypoint().get_node_list())
        yield {node.define_schema().node_id: node for node in found}
        sys.modules.pop(NODES, None)


@pytest.fixture(scope="module")
def model(nodes: Any, tiny_encoder: str) -> Any:
    return executed(nodes["ReglueLoad_shapes"], encoder=tiny_encoder, device="cpu")


def executed(node: Any, **inputs: Any) -> Any:
    """What a node gives for these inputs, and for its own defaults."""
    own = {i.id: i.default for i in node.define_schema().inputs if not i.optional and i.default is not None}
    (result,) = node.execute(**own | inputs).result
    return result


def pixels(image: Tensor) -> np.ndarray:
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    return (255 * image).round().to(torch.uint8).numpy()


def test_every_node_says_what_it_does(nodes: Any) -> None:
    expected = ["ReglueLoad_shapes", "ReglueSample", "ReglueEncode", "ReglueEdit", "ReglueDecode", "ReglueSee_map"]
    assert list(nodes) == expected
    for node in nodes.values():
        schema = node.define_schema()
        assert schema.category == "reglue"
        assert schema.description
        assert not {i.id for i in schema.inputs} & {o.id for o in schema.outputs}


def test_a_sample_is_that_of_the_command(nodes: Any, model: Any, pack: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"classes": "square, 2", "count": 3, "seed": 4, "steps": 2, "guidance": 1.5}
    state = executed(nodes["ReglueSample"], model=model, **asked)
    drawn = pixels(executed(nodes["ReglueDecode"], model=model, state=state))
    options = ["--count=3", "--classes", "square", "2", "--seed=4", "--steps=2", "--guidance-scale=1.5", "--device=cpu"]
    sample(parse(["sample", str(pack), "--out", str(tmp_path / "out"), *options]))
    for i, image in enumerate(drawn):
        assert np.array_equal(image, np.asarray(Image.open(tmp_path / "out" / f"{i:06d}.png")))
    bar = comfyui_stand_in.ProgressBar.bars[-1]
    assert bar.current == bar.total == 2
    seen = executed(nodes["ReglueSee_map"], model=model, state=state)
    assert seen.shape[0] == 1
    assert seen.shape[-1] == 3


def test_images_are_encoded_and_edited(nodes: Any, model: Any) -> None:
    draws = torch.Generator().manual_seed(0)
    image = torch.rand(2, 16, 16, 3, generator=draws)
    state = executed(nodes["ReglueEncode"], model=model, image=image)
    for name, value in model.encode(Image.fromarray(pixels(image)[1])).items():
        torch.testing.assert_close(state[name][1:], value)
    mask = torch.zeros(1, 16, 16)
    mask[:, :, 8:] = 1
    edit, asked = nodes["ReglueEdit"], {"model": model, "image": image, "steps": 2, "seed": 1}
    (masked,) = pixels(executed(edit, **asked | {"image": image[:1]}, mask=mask))
    assert masked.shape == (16, 16, 3)
    again = model.edit(
        Image.fromarray(pixels(image)[0]), mask=Image.fromarray(255 * mask[0].numpy().astype(np.uint8)), seed=1, steps=2
    )
    assert np.array_equal(masked, np.asarray(again[0]))
    kept = executed(edit, **asked, keep="both", count=2, mask=torch.zeros(1, 64, 64))
    assert kept.shape == (4, 16, 16, 3)
    first = model.edit(Image.fromarray(pixels(image)[0]), keep=("local", "cls"), count=2, seed=1, steps=2)
    assert np.array_equal(pixels(kept)[:2], [np.asarray(one) for one in first])
    other = executed(edit, **asked, map_from=image[:1].flip(2), classes="circle", strength=0.5)
    assert other.shape == image.shape
    with pytest.raises(UserError, match="nothing of the image would be left"):
        executed(edit, **asked)


def test_it_ends_when_the_user_cancels(nodes: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui_stand_in.ProgressBar, "cancelled", True)
    with pytest.raises(InterruptedError):
        executed(nodes["ReglueSample"], model=model, steps=2)


def test_the_workflow_that_comes_along(nodes: Any, pack: Path) -> None:
    for node in json.loads((pack / "workflow.json").read_text()).values():
        known = nodes.get(node["class_type"])
        assert known or node["class_type"] == "PreviewImage"
        assert not known or {i.id for i in known.define_schema().inputs if not i.optional} == node["inputs"].keys()


def test_the_folder_is_a_run_that_says_what_is_in_it(pack: Path, tiny_run: Path) -> None:
    assert verify(Verify(pack)) == pack
    assert "**Load shapes**" in (pack / "README.md").read_text()
    assert "circle, square, stripes" in (pack / "README.md").read_text()
    for file in pack.rglob("*"):
        assert not file.is_file() or str(tiny_run.parent).encode() not in file.read_bytes()
    code = (pack / "__init__.py").read_text()
    (pack / "__init__.py").write_text(code + "\n")
    try:
        with pytest.raises(UserError, match=r"__init__\.py is missing or is not the code that was written"):
            verify(Verify(pack))
    finally:
        (pack / "__init__.py").write_text(code)


def test_what_is_missing_is_named(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NODES, None)
    with pytest.raises(ImportError, match=r"these nodes need the package reglue \(pip install reglue\)"):
        imported(pack).comfy_entrypoint()
    with pytest.raises(UserError, match="shapes holds other files"):
        export_run(reglue.ExportRun(pack, pack, to="comfyui"))


def test_a_pack_that_is_there_stays(pack: Path, tiny_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pack, tmp_path / pack.name))
    options = parse(["export", str(tiny_run), "--to", "comfyui", "--out", str(copy)])
    (copy / "mine.txt").touch()
    export_run(options)
    (copy / "README.md").write_text("mine")
    with pytest.raises(UserError, match="shapes holds other files"):
        export_run(options)
    assert (copy / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [pack.name]
