"""`prepare`: what it stores, and what it does when images, disk or process fail."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError
from webdataset.writer import ShardWriter

import reglue.commands.prepare
import reglue.data.decoding
import reglue.data.manifest
import reglue.data.store
import reglue.data.store_writer
from helpers import CLASSES, mistake
from processes import start_ranks
from profiles import ADOBE_RGB
from reglue.cli import parse
from reglue.commands.compress import Compress, compress
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.probe import Probe, probe
from reglue.commands.train import train
from reglue.data.decoding import MOST_WORKERS, decoded, default_workers
from reglue.data.images import ImageFolder, crop_to
from reglue.data.opening import open_images
from reglue.data.reading import Subset
from reglue.data.store import Store
from reglue.encoders.autoencoders import load_autoencoder
from reglue.encoders.vision import load_encoder
from reglue.errors import UserError
from reglue.files import BESIDE


@pytest.fixture
def options(tmp_path: Path, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str) -> Callable[..., Prepare]:
    """Options with changes; three shards of the 24 images."""

    def make(**changes) -> Prepare:
        defaults = {
            "images": tiny_images,
            "out": tmp_path / "store",
            "resolution": 16,
            "autoencoder": tiny_autoencoder,
            "encoder": tiny_encoder,
            "features": True,
            "shard_size": 10,
            "workers": 0,
            "device": "cpu",
        }
        return Prepare(**{**defaults, **changes})

    return make


@pytest.fixture
def own_images(tmp_path: Path, tiny_images: Path) -> Path:
    return Path(shutil.copytree(tiny_images, tmp_path / "images"))


def shards_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.glob("*.safetensors")}


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_are_what_the_networks_say_about_the_crops(options, tiny_images, tiny_encoder, tiny_autoencoder):
    store = prepare(options())
    names = store.names(torch.arange(len(store)))
    assert names == sorted(path.relative_to(tiny_images).as_posix() for path in tiny_images.rglob("*.png"))

    rows = torch.tensor([23, 0, 9])
    crops = [crop_to(Image.open(tiny_images / names[row]), (16, 16)) for row in rows.tolist()]
    pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2)
    moments = load_autoencoder(tiny_autoencoder).encode(pixels / 127.5 - 1)
    described = load_encoder(tiny_encoder, 16).describe(pixels)
    stored = {column: store.read(column, rows) for column in ("latent", "cls", "features")}
    torch.testing.assert_close(stored["latent"]["mean"], moments.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stored["latent"]["std"], moments.std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stored["cls"]["cls"], described.class_token, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stored["features"]["features"], described.features.half(), atol=2e-3, rtol=2e-3)

    assert store.manifest.source.class_names == ("circle", "square", "stripes")
    assert store.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert len(store.manifest.statistics["features"].mean) == described.features.shape[1]


def test_batch_size_and_workers_change_nothing_but_rounding(options, tmp_path: Path):
    one = prepare(options(batch_size=1))
    many = prepare(options(batch_size=7, workers=2, out=tmp_path / "many"))
    rows = torch.arange(len(one))
    for column in ("label", "latent", "cls", "features"):
        for name, tensor in one.read(column, rows).items():
            tolerance = 2e-3 if tensor.dtype == torch.float16 else 1e-5
            torch.testing.assert_close(many.read(column, rows)[name], tensor, atol=tolerance, rtol=tolerance)


def test_oblong_unconditional_latents_alone_in_half_precision(options, tiny_images: Path):
    store = prepare(
        options(images=tiny_images / "circle", resolution=(8, 20), encoder="none", features=False, dtype="float16")
    )
    assert store.manifest.columns.keys() == {"label", "latent"}
    assert store.manifest.columns["latent"].tensors["mean"].shape == (3, 4, 10)
    assert store.read("latent", torch.tensor([0]))["mean"].dtype == torch.float16
    assert store.manifest.source.class_names == ()
    assert store.labels.tolist() == [0] * 8


def test_lower_precision_is_recorded_and_changes_the_third_digit(options, tmp_path: Path):
    exact = prepare(options())
    store = prepare(options(precision="bfloat16", out=tmp_path / "lower"))
    assert (exact.manifest.precision, store.manifest.precision) == ("float32", "bfloat16")
    rows = torch.arange(len(store))
    for column, name in (("latent", "mean"), ("cls", "cls"), ("features", "features")):
        expected, lower = exact.read(column, rows)[name].float(), store.read(column, rows)[name].float()
        assert store.manifest.columns[column].tensors == exact.manifest.columns[column].tensors
        difference = (lower - expected).norm() / expected.norm()
        assert 1e-5 < difference < 2e-2


def test_the_networks_do_not_wait_for_the_disk(options, monkeypatch: pytest.MonkeyPatch):
    """The next block is encoded while one is written."""
    write_shard, describe = reglue.data.store_writer.write_shard, reglue.commands.prepare.encode_columns
    encoding_second = threading.Event()
    described = []

    def noted(*arguments):
        described.append(arguments)
        if len(described) > 1:
            encoding_second.set()
        return describe(*arguments)

    def slow(*arguments):
        assert encoding_second.wait(30), "nothing was encoded meanwhile"
        return write_shard(*arguments)

    monkeypatch.setattr(reglue.commands.prepare, "encode_columns", noted)
    monkeypatch.setattr(reglue.data.store_writer, "write_shard", slow)
    assert len(prepare(options())) == 24


def test_a_device_has_the_next_batch_before_it_is_done_with_one(options, monkeypatch: pytest.MonkeyPatch):
    """And no block is written before its last batch has been copied."""
    order: list[str] = []
    describe, put, write_shard = (
        reglue.commands.prepare.encode_columns,
        reglue.commands.prepare.put,
        reglue.data.store_writer.write_shard,
    )

    def noted(*arguments):
        order.append(f"describe {sum(step.startswith('describe') for step in order)}")
        return describe(*arguments)

    def marked(device: torch.device) -> Callable[[], object]:
        described = sum(step.startswith("describe") for step in order)
        return lambda: order.append(f"wait {described - 1}") if described else None

    def wrote(folder, column, index, *more):
        order.append(f"write {column} {index}")
        return write_shard(folder, column, index, *more)

    monkeypatch.setattr(reglue.commands.prepare, "encode_columns", noted)
    monkeypatch.setattr(reglue.commands.prepare, "put", lambda *a, **k: (order.append("put"), put(*a, **k)))
    monkeypatch.setattr(reglue.commands.prepare, "mark", marked)
    monkeypatch.setattr(reglue.data.store_writer, "write_shard", wrote)
    prepare(options(shard_size=24, batch_size=8))
    assert order[:8] == ["describe 0", "put", "describe 1", "put", "wait 0", "describe 2", "put", "wait 1"]
    assert order[8:10] == ["wait 2", "write label 0"]


def test_a_gpu_copies_what_it_found_by_itself_into_the_block(monkeypatch: pytest.MonkeyPatch):
    empty, copy, asked = torch.empty, torch.Tensor.copy_, []

    def noted_empty(*arguments, pin_memory: bool, **more):
        asked.append(pin_memory)
        return empty(*arguments, **more)

    def noted_copy(self, source, non_blocking=False):
        asked.append(("copy", non_blocking))
        return copy(self, source)

    found = torch.arange(6.0).view(2, 3)
    columns: dict[str, dict[str, torch.Tensor]] = {}
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", noted_empty)
        patched.setattr(torch.Tensor, "copy_", noted_copy)
        patched.setattr(torch.Tensor, "is_cuda", True)
        for at in (0, 2):
            reglue.commands.prepare.put(columns, {"cls": {"cls": found + at}}, at=at, rows=4)
    assert asked == [True, ("copy", True), ("copy", True)]
    assert torch.equal(columns["cls"]["cls"], torch.cat([found, found + 2]))


def test_several_threads_write_the_store_of_one(options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alone = prepare(options(shard_size=3))
    original, together = reglue.data.store_writer.write_shard, threading.Barrier(2)

    def meet(folder, column, index, *more):
        if column == "label":
            together.wait(30)
        return original(folder, column, index, *more)

    assert reglue.commands.prepare.writers_for(torch.device("cuda")) == 2
    monkeypatch.setattr(reglue.data.store_writer, "write_shard", meet)
    monkeypatch.setattr(reglue.commands.prepare, "writers_for", lambda _: 2)
    store = prepare(options(shard_size=3, out=tmp_path / "many"))
    assert shards_of(store.folder) == shards_of(alone.folder)
    assert len((store.folder / "prepare.jsonl").read_text().splitlines()) == 8


def test_every_core_decodes_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch):
    cores = len(os.sched_getaffinity(0))
    assert default_workers() == min(cores, MOST_WORKERS)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    assert default_workers() == 1


def test_decoding_asks_for_no_more_processes_than_it_can_use(tiny_images: Path, monkeypatch: pytest.MonkeyPatch):
    images = open_images(tiny_images)
    asked: list[int] = []
    monkeypatch.setattr(
        reglue.data.decoding, "DataLoader", lambda *_, num_workers, **__: asked.append(num_workers) or []
    )
    for workers, batches in ((0, [[0]]), (4, [[0], [1]]), (1, [[0], [1]])):
        decoded(images, batches, (16, 16), workers)
    assert asked == [0, 2, 1]


def test_statistics_are_over_a_random_sample_and_not_the_first_class(options):
    store = prepare(options(statistics_images=4, seed=3))
    assert store.manifest.statistics["cls"].images == 4
    tokens = store.read("cls", torch.arange(24))["cls"].double()
    mean = torch.tensor(store.manifest.statistics["cls"].mean, dtype=torch.float64)
    assert not torch.allclose(mean, tokens[:4].mean(0), atol=1e-3)
    subsets = torch.combinations(torch.arange(24), 4)
    assert torch.isclose(tokens[subsets].mean(1), mean, atol=1e-6).all(1).sum() == 1, "not the mean of four rows"


def test_speed_and_memory_are_reported(options, capsys: pytest.CaptureFixture[str]):
    out = prepare(options()).folder
    assert "images/s, peak memory" in capsys.readouterr().out
    measured = [json.loads(line)["measured"] for line in (out / "prepare.jsonl").read_text().splitlines()]
    assert len(measured) == 3
    assert all(block["images_per_second"] > 0 and block["peak_rss_mib"] > 1 for block in measured)


def test_the_same_command_again_does_nothing(options, capsys: pytest.CaptureFixture[str]):
    out = prepare(options()).folder
    before = everything_in(out)
    assert len(prepare(options(batch_size=3))) == 24
    assert "complete already" in capsys.readouterr().out
    assert everything_in(out) == before


def test_bad_images_are_named_and_skipped(options, own_images: Path, capsys: pytest.CaptureFixture[str]):
    cut = own_images / "circle" / "003.png"
    cut.write_bytes(cut.read_bytes()[:60])
    (own_images / "square" / "text.jpg").write_text("no image")

    store = prepare(options(images=own_images))

    assert len(store) == 23
    assert [image.name for image in store.manifest.skipped] == ["circle/003.png", "square/text.jpg"]
    said = capsys.readouterr().err
    assert str(cut) in said
    assert "text.jpg" in said
    names = store.names(torch.arange(23))
    assert "circle/003.png" not in names
    assert [store.manifest.source.class_names[label] for label in store.labels] == [
        name.split("/")[0] for name in names
    ]


def test_strict_stops_at_a_bad_image(options, own_images: Path):
    (own_images / "square" / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"square/text\.jpg: .*--strict"):
        prepare(options(images=own_images, strict=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resolution": 18}, "multiples of 4"),
        ({"resolution": 17}, "multiples of 2"),
        ({"resolution": 0}, "resolution 0"),
        ({"layers": (9,)}, r"blocks 0 to 4"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"seed": -1}, "seed -1"),
        ({"encoder": "none"}, "--features needs an encoder"),
        ({"features": False, "features_dtype": "int8"}, "--features-dtype int8 .* add --features"),
        ({"encoder": "dino-v99"}, "dino-v99"),
        ({"images": Path("nowhere")}, "nowhere: no such folder"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(options, tmp_path: Path, changes, says: str):
    with pytest.raises(UserError, match=says) as caught:
        prepare(options(**changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": (0, 1)}, r"encoder\.layers \(1, 2, 3, 4\) .*, not \(0, 1\)"),
        ({"resolution": 20}, r"resolution \(16, 16\)"),
        ({"features_dtype": "int8"}, r"features_dtype float16, not int8"),
    ],
)
def test_a_store_made_otherwise_is_refused_and_unharmed(options, changes, says: str):
    out = prepare(options()).folder
    before = everything_in(out)
    with pytest.raises(UserError, match=says):
        prepare(options(**changes))
    assert everything_in(out) == before


@pytest.mark.parametrize("within", ["store", "circle/store", "."])
def test_a_store_among_its_images_is_refused(
    options, own_images: Path, within: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything_in(own_images)
    monkeypatch.chdir(own_images)
    with pytest.raises(UserError, match=r"lies within .*images, where a store would be taken for a class"):
        options(images=own_images, out=Path(within))
    assert everything_in(own_images) == before
    options(images=own_images, out=Path("../images-store"))


def test_images_that_changed_since_are_refused(options, own_images: Path):
    prepare(options(images=own_images))
    (own_images / "circle" / "000.png").unlink()
    with pytest.raises(UserError, match=r"source\.fingerprint"):
        prepare(options(images=own_images))


def test_the_default_run_keeps_its_fingerprint(options, tiny_images: Path):
    """Stores that exist are recognised: names and sizes of the files, and nothing that came later."""
    digest = hashlib.sha256()
    for path in sorted(tiny_images.rglob("*.png")):
        digest.update(f"{path.relative_to(tiny_images).as_posix()}\0{path.stat().st_size}\n".encode())
    out = prepare(options()).folder
    assert Store.open(out).manifest.source.fingerprint == digest.hexdigest()

    manifest = json.loads((out / "manifest.json").read_text())
    for later in ("reading", "subset", "flips"):
        del manifest["source"][later]
    manifest["hash"] = reglue.data.manifest._hash(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    assert len(prepare(options())) == 24


def write_tars(images: Path, folder: Path) -> Path:
    folder.mkdir()
    with ShardWriter(str(folder / "shard-%02d.tar"), maxcount=10, verbose=0) as writer:
        for path in sorted(images.rglob("*.png")):
            key = path.relative_to(images).with_suffix("").as_posix()
            writer.write({"__key__": key, "png": path.read_bytes(), "cls": CLASSES.index(path.parent.name)})
    return folder


def test_shards_and_streams_give_the_rows_that_the_folder_gives(options, tiny_images: Path, tmp_path: Path):
    folder = prepare(options())
    tars = write_tars(tiny_images, tmp_path / "tars")
    table = pa.table(
        {
            "image": [path.read_bytes() for path in sorted(tiny_images.rglob("*.png"))],
            "label": [path.parent.name for path in sorted(tiny_images.rglob("*.png"))],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    named = ("--class-names", str(tmp_path / "names.txt"))
    stream = (*named, "--streaming", "--count", "24")
    for name, path, more in (("tar", tars, named), ("parquet", tmp_path / "a.parquet", ()), ("stream", tars, stream)):
        here = options(images=path, out=tmp_path / f"{name}-store", workers=2)
        store = prepare(parse(arguments(here, *more)))
        assert store.manifest.source.class_names == CLASSES
        rows = torch.arange(24)
        assert torch.equal(store.labels, folder.labels)
        for column in ("latent", "cls", "features"):
            read, expected = store.read(column, rows), folder.read(column, rows)
            assert all(torch.equal(read[part], expected[part]) for part in expected)
        opened = store.manifest.source.open()
        assert [opened.names[row] for row in range(24)] == store.names(rows)


def test_a_stream_that_is_too_short_is_said_in_one_line(options, tiny_images: Path, tmp_path: Path):
    tars = write_tars(tiny_images, tmp_path / "tars")
    more = ("--streaming", "--count", "25", "--no-labels")
    with pytest.raises(UserError, match="ends before image 24 of count 25") as caught:
        prepare(parse(arguments(options(images=tars, workers=1), *more)))
    assert "\n" not in str(caught.value)


def test_mirror_images_have_rows_after_their_originals(options, own_images: Path):
    (own_images / "circle" / "003.png").write_text("no image")
    store = prepare(options(images=own_images, flips=True, shard_size=7))
    plain = prepare(options(images=own_images, out=own_images.parent / "plain"))
    assert (len(store), len(plain)) == (46, 23)
    assert torch.equal(plain.originals, torch.arange(23))
    assert store.originals.tolist() == list(range(0, 46, 2))
    assert store.names(store.originals) == plain.names(plain.originals)
    assert store.names(store.originals + 1) == [name + "#flipped" for name in store.names(store.originals)]
    assert torch.equal(store.labels[store.originals], plain.labels)
    torch.testing.assert_close(
        store.read("latent", store.originals)["mean"], plain.read("latent", plain.originals)["mean"]
    )
    pixels = torch.stack([torch.as_tensor(ImageFolder.open(own_images).load(0, (16, 16))).flip(-1)])
    torch.testing.assert_close(
        store.read("latent", torch.tensor([1]))["mean"],
        load_autoencoder(options().autoencoder).encode(pixels / 127.5 - 1).mean,
        atol=1e-5,
        rtol=1e-5,
    )
    assert not torch.equal(store.read("cls", torch.tensor([0]))["cls"], store.read("cls", torch.tensor([1]))["cls"])
    with pytest.raises(UserError, match=r"prepared with source\.(count|flips)"):
        prepare(options(images=own_images, shard_size=7))


def test_a_subset_is_part_of_what_the_store_is(options):
    store = prepare(options(share=0.5, seed=3))
    assert len(store) == 12
    assert store.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert store.manifest.source.subset == Subset(0.5, None, 3)
    assert len(prepare(options(share=0.5, seed=3))) == 12
    with pytest.raises(UserError, match=r"source\.subset"):
        prepare(options(share=0.5, seed=4))


KILLED = """
import os, pathlib, signal, sys
import reglue.data.store_writer as store_writer
from reglue.commands import prepare as job
from reglue.options import prepare as options
calls = iter(range(100))
hash_file = store_writer.file_sha256
def dying(path):
    # In the second block of the last process, between writing a shard and putting it in place.
    if next(calls) == 6 and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return hash_file(path)
store_writer.file_sha256 = dying
job.prepare(eval(sys.argv[1], {**vars(options), "PosixPath": pathlib.Path}))
"""


def test_killed_and_run_again_gives_the_same_store(options, tmp_path: Path):
    whole = prepare(options(out=tmp_path / "whole"))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, repr(options())], capture_output=True, timeout=120, check=False
    )
    assert killed.returncode == -9, killed.stderr
    with pytest.raises(UserError, match="half-written"):
        Store.open(tmp_path / "store")
    done = shards_of(tmp_path / "store")
    assert 4 <= len(done) < 12

    store = prepare(options())

    assert store.manifest == whole.manifest
    assert shards_of(store.folder) == shards_of(whole.folder)
    assert not list(store.folder.glob(f"*{BESIDE}"))


def run_on_processes(count: int, *program: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run(
        [*launcher, *map(str, program)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def arguments(options: Prepare, *more: str) -> list[str]:
    """The options of these tests on the command line."""
    named = ("resolution", "autoencoder", "encoder", "shard_size", "workers", "device")
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(options, name))) for name in named]
    return ["prepare", str(options.images), str(options.out), "--features", *sum(pairs, ()), *more]


def test_two_processes_of_which_one_is_killed_and_the_others_that_continue_make_the_store_of_one(
    options, own_images: Path, tmp_path: Path
):
    (own_images / "square" / "text.jpg").write_text("no image")
    whole = prepare(options(images=own_images, out=tmp_path / "whole", shard_size=4))
    here = options(images=own_images, shard_size=4)
    (tmp_path / "killed.py").write_text(KILLED)

    killed = run_on_processes(2, tmp_path / "killed.py", repr(here))
    assert "SIGKILL" in killed.stderr
    with pytest.raises(UserError, match="half-written"):
        Store.open(here.out)
    assert "prepare-1.jsonl" in everything_in(here.out)

    ended = run_on_processes(3, "-m", "reglue", *arguments(here))
    assert ended.returncode == 0, ended.stderr

    assert shards_of(here.out) == shards_of(whole.folder)
    assert Store.open(here.out).manifest == whole.manifest
    assert (here.out / "manifest.json").read_bytes() == (whole.folder / "manifest.json").read_bytes()
    assert everything_in(here.out).keys() == everything_in(whole.folder).keys()
    indices = [json.loads(line)["index"] for line in (here.out / "prepare.jsonl").read_text().splitlines()]
    assert indices == list(range(7))


def test_a_mistake_that_one_process_meets_ends_all(options, own_images: Path):
    (own_images / "stripes" / "text.jpg").write_text("no image")  # In the last block, which the last process does.
    ended = run_on_processes(2, "-m", "reglue", *arguments(options(images=own_images), "--strict"))
    assert ended.returncode != 0
    assert len([line for line in ended.stderr.splitlines() if "text.jpg" in line]) == 1
    assert "reglue: " in ended.stderr
    assert "reglue/commands" not in ended.stderr, "a traceback of ours; that of the launcher is there anyway"
    with pytest.raises(UserError, match="half-written"):
        Store.open(options().out)


def test_killed_before_the_manifest_and_run_again(options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reglue.data.store.Store, "statistics", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(options())
    assert len(prepare(options())) == 24


def test_a_file_that_cannot_be_written_leaves_no_half(options, tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*latent-00000\.safetensors: .*[Tt]oo large") as caught:
            prepare(options())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert shards_of(tmp_path / "store").keys() == {"label-00000.safetensors"}
    assert not list((tmp_path / "store").glob(f"*{BESIDE}"))
    assert len(prepare(options())) == 24


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_one_line(options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    save = reglue.data.store_writer.save_file

    def full(tensors, path, metadata):
        if "features-00001" in str(path):
            path.write_bytes(b"half")
            raise error
        save(tensors, path, metadata)

    monkeypatch.setattr(reglue.data.store_writer, "save_file", full)
    with pytest.raises(UserError, match=r"features-00001\.safetensors: No space left on device.*free some space"):
        prepare(options())
    assert not (tmp_path / "store" / "features-00001.safetensors").exists()
    assert not list((tmp_path / "store").glob(f"*{BESIDE}"))
    monkeypatch.undo()
    assert len(prepare(options())) == 24


@pytest.mark.trains
def test_features_in_eight_bits_take_half_the_disk_and_serve_all_that_read_them(options, tmp_path: Path):
    full, half = (
        prepare(options(out=tmp_path / dtype, features_dtype=dtype, per_class=4)) for dtype in ("float16", "int8")
    )
    tensors = half.manifest.columns["features"].tensors
    assert {name: spec.dtype for name, spec in tensors.items()} == {"features": "int8", "scale": "float16"}
    rows = torch.arange(12)
    kept, exact = (store.read("features", rows)["features"] for store in (half, full))
    assert kept.dtype == exact.dtype
    assert torch.nn.functional.cosine_similarity(kept.float(), exact.float(), dim=1).min() > 0.999
    scanned = torch.cat([part["features"] for _, part in half.scan("features")])
    assert torch.equal(scanned, kept)
    np.testing.assert_allclose(
        half.manifest.statistics["features"].std, full.manifest.statistics["features"].std, rtol=0.02
    )
    # 64 channels of 16 positions, and a scale for each.
    stored = half.read_stored("features", rows)
    assert sum(tensor.nbytes for tensor in stored.values()) == exact.nbytes * (16 + 2) // 32

    for store in (full, half):
        compress(Compress(store.folder, "pca", channels=4, device="cpu"))
    options_of_train = ["--alignment.hidden=8", "--model=1x16x2/2", "--device=cpu", "--preview-every=0"]
    descent = ["--optimisation.steps=2", "--optimisation.batch-size=12", "--optimisation.precision=float32"]
    losses = []
    for store in (full, half):
        command = ["train", "repa", "--store", str(store.folder), "--out", str(store.folder / "run")]
        run = train(parse([*command, *options_of_train, *descent]))
        losses.append(json.loads((run / "metrics.jsonl").read_text())["alignment"])
        probing = {"columns": ("features",), "conv": False, "device": "cpu"}
        assert len(probe(Probe(store.folder, out=tmp_path / f"probes-{len(losses)}", **probing)).results) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_an_autoencoder_of_grey_images_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    network = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    network.save_pretrained(tmp_path / "grey")
    made = ["--resolution", "16", "--encoder", "none", "--device", "cpu"]
    prepare_grey = ["prepare", tiny_images, tmp_path / "store", "--autoencoder", tmp_path / "grey", *made]
    assert "takes images of 1 channel and gives 1" in mistake(capsys, monkeypatch, *prepare_grey)
    assert {path.name for path in tmp_path.iterdir()} == {"grey"}


@pytest.mark.parametrize("workers", [0, 2])
def test_16_bit_images_that_are_nearly_black_are_counted(
    options, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, highest in {"twelve-bits": 4095, "also": 300, "sixteen-bits": 65535, "just": 4096, "black": 0}.items():
        grey = np.linspace(0, highest, 256).reshape(16, 16).astype(np.uint16)
        Image.fromarray(grey).save(folder / f"{name}.png")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "colours.png")
    made = {"images": folder, "encoder": "none", "features": False, "workers": workers, "flips": True}
    prepare(options(**made))
    assert "\n2 of the 5 16-bit images use less than a sixteenth of their range" in capsys.readouterr().out

    for name in ("twelve-bits", "also"):
        (folder / f"{name}.png").unlink()
    prepare(options(**made, out=tmp_path / "bright"))
    assert "16-bit" not in capsys.readouterr().out


def refuse_to_load(*_: object, **__: object) -> None:
    raise AssertionError("a network was loaded")


def test_a_complete_store_is_known_without_loading_a_network(
    options, own_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    changed = Path(shutil.copytree(options().autoencoder, tmp_path / "autoencoder"))
    here = partial(options, images=own_images, autoencoder=str(changed))
    prepare(here())
    with monkeypatch.context() as patch:
        for name in ("load_autoencoder", "load_encoder"):
            patch.setattr(reglue.commands.prepare, name, refuse_to_load)
        assert len(prepare(here(layers=(1, 2, 3, 4)))) == 24
        assert "complete already: 24 images" in capsys.readouterr().out
        for changes, says in (
            ({"features": False}, r"features True, not False"),
            ({"flips": True}, r"source\.count 24, not 48"),
            ({"dtype": "float16"}, "latent_dtype float32, not float16"),
        ):
            with pytest.raises(UserError, match=says):
                prepare(here(**changes))
        for changes in ({"layers": (0,)}, {"final_norm": False}, {"encoder": "starter"}, {"autoencoder": "starter"}):
            with pytest.raises(AssertionError, match="a network was loaded"):
                prepare(here(**changes))
    # The same name, but another network since.
    network: Any = AutoencoderKL.from_pretrained(changed)
    with torch.no_grad():
        network.encoder.conv_in.bias.add_(1)
    network.save_pretrained(changed)
    with pytest.raises(UserError, match=r"prepared with autoencoder\.weights_sha256"):
        prepare(here())


def test_what_was_found_is_said(options, own_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a.xyz", "b.xyz", "c"):
        (own_images / "circle" / name).write_text("no image")
    (own_images / "__MACOSX").mkdir()
    (own_images / "square" / "000.png").rename(own_images / "square" / "new\nline.png")
    (own_images / "square" / "bad\x1b.png").write_text("no image")
    (own_images / "stripes").rename(own_images / "str\nipes")
    store = prepare(options(images=own_images))
    said = capsys.readouterr()
    first, second, third, last = said.out.splitlines()
    assert first.endswith(r"25 images in 3 classes: circle 8, square 9, str\nipes 8")
    assert second == "passed over: 2 .xyz, 1 without an ending"
    assert "sees 32×32 pixels of each image, and its maps have 4×4 patches; resolution 64 gives 16" in third
    assert "24 images (1 unreadable)" in last
    assert r"square/bad\x1b.png" in said.err
    assert "square/new\nline.png" in store.names(torch.arange(24))
    assert store.manifest.source.class_names[2] == "str\nipes"
    assert len(prepare(options(images=own_images))) == 24

    many = tmp_path / "many"
    for number in range(30):
        (many / str(number)).mkdir(parents=True)
        for image in range(1 + number % 2):
            shutil.copy(own_images / "circle" / "000.png", many / str(number) / f"{image}.png")
    prepare(options(images=many, out=tmp_path / "other", features=False, encoder="none"))
    assert "45 images in 30 classes of 1 to 2" in capsys.readouterr().out


def test_colours_of_other_profiles_are_brought_to_srgb_and_recorded(
    options, own_images: Path, capsys: pytest.CaptureFixture[str]
):
    file = own_images / "circle" / "000.png"
    Image.open(file).save(file, icc_profile=ADOBE_RGB)
    store = prepare(options(images=own_images, workers=2))
    assert "the colours of 1 images were brought from their ICC profile to sRGB" in capsys.readouterr().out
    assert json.loads((store.folder / "manifest.json").read_text())["source"]["colours"] == "sRGB"


IMPATIENT = """
from datetime import timedelta
from reglue.training import distributed
distributed.JOIN_WAIT = timedelta(seconds=2)
"""
DIES_BEFORE = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
DIES_BETWEEN = """
import os, signal
from reglue.training import distributed
distributed.private_group = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("dying", [DIES_BEFORE, DIES_BETWEEN], ids=["before it joins", "while it joins"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_waits_for_one_that_has_died_ends(options, dying: str, rank: int):
    """Also where nothing but itself ends it: SLURM starts processes so, without torchrun's agent."""
    preludes = (dying, IMPATIENT) if rank == 0 else (IMPATIENT, dying)
    processes = start_ranks(2, *arguments(options()), preludes=preludes)
    dead, left = (processes[index].result(check=False, timeout=60) for index in (rank, 1 - rank))
    assert (dead.returncode, left.returncode) == (-9, 2)
    said = [line for line in left.stderr.splitlines() if line.startswith("reglue: ")]
    assert len(said) == 1
    assert "see which one" in said[0] or "waited for another one that has stopped" in said[0]
    assert "Traceback" not in left.stderr
    assert len(prepare(options())) == 24
