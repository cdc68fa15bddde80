"""A process that dies at any change of the file system: the same command again makes what it would have made.

Every command that writes is run once to count its changes (files opened for writing, renames, removals, folders), then
killed before some of them, spread over all, and run again. `-m slow` kills it before each.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import TINY_RECIPE, draw_masks, run_reglue
from reglue.cli import parse
from reglue.commands.export_run import FOLDERS, export_run
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.train_head import train_head
from reglue.files import BESIDE, LOCK

CRASH = """
import os, sys, threading
changes, one_at_a_time = 0, threading.RLock()
def audit(event, arguments):
    global changes
    paths = [os.fspath(one) for one in arguments[:2] if isinstance(one, (str, os.PathLike))]
    if not any(str(path).startswith({root!r}) for path in paths):
        return
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.truncate"):
        with one_at_a_time:
            changes += 1
            with open({count!r}, "w") as file:
                file.write(str(changes))
            if changes == {last}:
                os._exit(137)
sys.addaudithook(audit)
"""
SOME = 3
"""Deaths of each command, unless all are asked for."""
AUTOENCODER = [
    "--architecture.widths", "4", "8", "--architecture.norm-groups=2", "--architecture.layers-per-block=1",
    "--architecture.latent-channels=3", "--architecture.no-attention", "--alignment.hidden=16", "--resolution=16",
    "--optimisation.steps=2", "--optimisation.batch-size=4", "--validation=0.1", "--log-every=1", "--workers=0",
    "--checkpoint-every=1", "--device=cpu",
]  # fmt: skip
TRAIN = [*TINY_RECIPE[:-3], "--sampling.steps=1", "--log-every=1", "--device=cpu", "--optimisation.steps=2"]
TRAIN += ["--checkpoint-every=1", "--preview-every=1", "--preview-count=1", "--preview-steps=1"]


@dataclass(frozen=True)
class Inputs:
    """What the commands read."""

    images: Path
    encoder: str
    autoencoder: str
    store: Path
    run: Path
    bare: Path
    """A store without compressors."""
    head: Path
    segmenter: Path
    pictures: list[Path]
    masks: Path
    exported: Path


@pytest.fixture(scope="session")
def inputs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_images: Path,
    tiny_encoder: str,
    tiny_autoencoder: str,
    tiny_store: Path,
    tiny_run: Path,
) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    export_run(parse(["export", str(tiny_run), "--out", str(folder / "exported.safetensors")]))
    heads = [str(tiny_store), "--out", str(folder / "head"), "--layers=all", "--steps=2", "--device=cpu"]
    train_head(parse(["head", *heads]))
    masks = draw_masks(folder / "masks", tiny_images)
    heads = [str(tiny_store), "--out", str(folder / "segmenter"), "--layers=all", "--steps=2", "--device=cpu"]
    train_head(parse(["head", *heads, "--masks", str(masks)]))
    prepare(
        Prepare(
            tiny_images, folder / "bare", 16, tiny_autoencoder, tiny_encoder, features=True, workers=0, device="cpu"
        )
    )
    return Inputs(
        images=tiny_images,
        encoder=tiny_encoder,
        autoencoder=tiny_autoencoder,
        store=tiny_store,
        run=tiny_run,
        bare=folder / "bare",
        head=folder / "head",
        segmenter=folder / "segmenter",
        pictures=[next((tiny_images / name).iterdir()) for name in ("circle", "square")],
        masks=masks,
        exported=folder / "exported.safetensors",
    )


Line = Callable[[Inputs, Path], list[str | Path]]
COMMANDS: dict[str, Line] = {
    "prepare": lambda i, out: [
        *("prepare", i.images, out, "--resolution=16", f"--autoencoder={i.autoencoder}", f"--encoder={i.encoder}"),
        *("--features", "--workers=0", "--shard-size=10", "--device=cpu"),
    ],
    "compress": lambda i, out: [
        *("compress", out, "--kind=conv", "--channels=4", "--hidden=8", "--epochs=2", "--device=cpu"),
    ],
    "compress pca": lambda i, out: ["compress", out, "--kind=pca", "--channels=4", "--device=cpu"],
    "train": lambda i, out: ["train", "reglue", "--store", i.store, "--out", out, *TRAIN],
    "train --from": lambda i, out: ["train", "reglue", "--store", i.store, "--out", out, *TRAIN, "--from", i.run],
    "sample": lambda i, out: ["sample", i.run, "--out", out, "--count=3", "--steps=1", "--device=cpu"],
    "sample npz": lambda i, out: ["sample", i.run, "--out", f"{out}.npz", "--count=3", "--steps=1", "--device=cpu"],
    "edit": lambda i, out: [
        *("edit", i.run, *i.pictures, "--out", out, "--keep", "local", "--count=2", "--steps=1", "--device=cpu"),
    ],
    "prototypes": lambda i, out: [
        *("prototypes", i.store, "--masks", i.masks, "--out", out, "--column=local.conv-4", "--looks=2"),
    ],
    "evaluate": lambda i, out: [
        *("evaluate", i.images, "--reference", i.store, "--out", out / "report.json", "--feature-network", i.encoder),
        *("--resamples=0", "--device=cpu"),
    ],
    "autoencode": lambda i, out: ["autoencode", i.images, out, f"--encoder={i.encoder}", *AUTOENCODER],
    "reencode": lambda i, out: [
        *("reencode", i.store, out, f"--autoencoder={i.autoencoder}", "--dtype=float16", "--workers=0", "--device=cpu"),
    ],
    "probe": lambda i, out: ["probe", i.store, "--out", out, "--columns", "cls", "latent", "--steps=2", "--device=cpu"],
    "head": lambda i, out: ["head", i.store, "--out", out, "--layers=all", "--steps=2", "--device=cpu"],
    "perceive": lambda i, out: ["perceive", i.run, "--out", out, "--count=2", "--head", i.head, "--steps=1"],
    "synthesise": lambda i, out: [
        *("synthesise", i.run, "--out", out, "--head", i.segmenter, "--count=3", "--batch-size=2", "--steps=1"),
        *("--agreement=0.01", "--format=coco", "--device=cpu"),
    ],
    "import": lambda i, out: ["import", i.exported, "--out", out, f"--autoencoder={i.autoencoder}"],
    "export": lambda i, out: ["export", i.run, "--out", out / "weights.safetensors"],
    **{f"export {to}": lambda i, out, to=to: ["export", i.run, "--to", to, "--out", out] for to in FOLDERS},
    "report": lambda i, out: [
        *("report", i.run, "--out", out / "report.html", "--samples-per-class=1", "--steps=1", "--device=cpu"),
    ],
    "info": lambda i, out: ["info", i.store, "--out", out / "store.png"],
}
SLOW = ("export torch", "export onnx")
EACH = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in COMMANDS]


def begin(name: str, inputs: Inputs, folder: Path) -> Path:
    """The place of a command's output, with what has to be there before."""
    folder.mkdir()
    out = folder / "out"
    if name.startswith("compress"):
        shutil.copytree(inputs.bare, out)
    return out


def run(name: str, inputs: Inputs, out: Path, last: int) -> tuple[int, int]:
    """Run a command that dies before its change `last`, counted from 1; 0 never. Returns its code and its changes."""
    count = out.parent.with_suffix(".count")
    result = run_reglue(
        *COMMANDS[name](inputs, out),
        check=False,
        prelude=CRASH.format(root=f"{out.parent}/", last=last, count=str(count)),
    )
    assert result.returncode == (137 if last else 0), result.stderr[-2000:]
    return result.returncode, int(count.read_text())


VOLATILE = ("seconds", "images_per_second", "peak", "encoded_per_second", "date", "created", "threads")


def plain(value: Any) -> Any:
    """JSON without figures of time and memory."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not any(part in key for part in VOLATILE)}
    return [plain(item) for item in value] if isinstance(value, list) else value


def content(file: Path, out: Path) -> Any:
    """What must be the same however often the command was killed."""
    text = file.read_bytes().replace(str(out.parent).encode(), b"")
    if file.suffix == ".json":
        return plain(json.loads(text))
    if file.suffix == ".jsonl":
        lines = [plain(json.loads(line)) for line in text.splitlines()]
        return lines if "prepare" not in file.name else sorted(map(str, lines))
    if file.suffix == ".npz":
        return file.stat().st_size  # Zip files have dates.
    return None if file.name in ("report.md", "figure.png") else text  # Their tables hold speeds.


def tree(out: Path) -> dict[str, Any]:
    """Everything beside and below an output."""
    files = sorted(file for file in out.parent.rglob("*") if file.is_file())
    return {str(file.relative_to(out.parent)): content(file, out) for file in files}


def check(name: str, inputs: Inputs, folder: Path, most: int | None) -> None:
    out = begin(name, inputs, folder / "whole")
    _, changes = run(name, inputs, out, last=0)
    assert changes > 3, "the audit sees no changes"
    whole = tree(out)
    assert not [file for file in whole if file.endswith((BESIDE, LOCK))]
    points = range(1, changes + 1)
    if most is not None and changes > most:
        points = torch.linspace(1, changes, most).round().int().tolist()
    for last in points:
        out = begin(name, inputs, folder / f"died-{last}")
        run(name, inputs, out, last)
        try:
            run(name, inputs, out, last=0)
        except AssertionError as error:
            raise AssertionError(f"{name} does not go on after its death before change {last}: {error}") from error
        after = tree(out)
        assert after.keys() == whole.keys(), (last, after.keys() ^ whole.keys())
        different = [file for file in whole if after[file] != whole[file]]
        assert not different, f"{name} has other {different} after its death before change {last} of {changes}"
        shutil.rmtree(out.parent)


@pytest.mark.parametrize("name", EACH)
def test_a_command_that_died_is_run_again(name: str, inputs: Inputs, tmp_path: Path) -> None:
    check(name, inputs, tmp_path, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_died_anywhere_is_run_again(name: str, inputs: Inputs, tmp_path: Path) -> None:
    check(name, inputs, tmp_path, None)
