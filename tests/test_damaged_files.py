"""Every file that the package writes, damaged in every way: one line that names it, or the same as before.

`READERS` lists the files with what reads them, and a test looks into the folders for files that the list leaves out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers import draw_masks
from reglue.arrays import UNSEALED
from reglue.cli import parse
from reglue.commands.autoencode import TrainingRecord, autoencode
from reglue.commands.compress import Compress, compress
from reglue.commands.edit import Edit, edit
from reglue.commands.evaluate import Evaluate, evaluate
from reglue.commands.export_run import ExportRun, export_run
from reglue.commands.probe import Probe, probe
from reglue.commands.prototypes import MakePrototypes, prototypes
from reglue.commands.sample import Sample, sample
from reglue.commands.synthesise import Synthesise, read_rows, synthesise
from reglue.commands.synthesise import read_record as read_dataset
from reglue.commands.train_head import HeadRecord, train_head
from reglue.commands.verify import Verify, verify
from reglue.contact_sheet import read_hashes
from reglue.data.manifest import MANIFEST, PARTIAL, Contents, read_manifest
from reglue.data.store import Store
from reglue.data.store_writer import StoreWriter
from reglue.diffusion.denoiser import Denoiser
from reglue.editing.folder import read_record
from reglue.editing.painting import load_prototypes
from reglue.encoders.alignment import load_alignment
from reglue.encoders.autoencoders import load_autoencoder
from reglue.encoders.compressors import load_compressor
from reglue.encoders.vision import load_encoder
from reglue.errors import UserError
from reglue.files import plain, read_json, read_jsonl, to_json
from reglue.metrics.image_sets import open_image_set
from reglue.perception.heads import Head, HeadSpec, load_head
from reglue.perception.probing import ProbeReport
from reglue.portable import pipeline_record
from reglue.run import RunRecord, find_run
from reglue.samples import read_protocol
from reglue.training import checkpoints, tracking

AUTOENCODER = [
    "--architecture.widths", "4", "8", "--architecture.norm-groups=2", "--architecture.layers-per-block=1",
    "--architecture.latent-channels=3", "--architecture.no-attention", "--alignment.hidden=16", "--resolution=16",
    "--optimisation.steps=1", "--optimisation.batch-size=4", "--validation=0.1", "--log-every=1", "--workers=0",
    "--device=cpu",
]  # fmt: skip


# ---- folders of files that the package has written


@pytest.fixture(scope="session")
def begun_store(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    """A store whose making was interrupted after its second block."""
    folder = Path(shutil.copytree(tiny_store, tmp_path_factory.mktemp("begun") / "store"))
    contents = contents_of(folder)
    (folder / MANIFEST).unlink()
    lines = (folder / "prepare.jsonl").read_text().splitlines(keepends=True)
    journal = "".join(lines[:2])
    shutil.rmtree(folder)
    StoreWriter(folder, contents)
    for file in tiny_store.glob("*-0000[01].safetensors"):
        shutil.copy(file, folder)
    (folder / "prepare.jsonl").write_text(journal)
    return folder


@pytest.fixture(scope="session")
def tiny_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    Head(HeadSpec("segmentation", "vit", 16, (3, 4), 3)).save(folder)
    (folder / "training.json").write_text(to_json(HeadRecord({}, "0", 1, 1, 1, 1.0, {})))
    return folder


@pytest.fixture(scope="session")
def starter() -> Path:
    """The small model of the package."""
    return find_run("starter")


@pytest.fixture(scope="session")
def aligned_autoencoder(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_encoder: str) -> Path:
    """What one step of `reglue autoencode` leaves behind."""
    out = tmp_path_factory.mktemp("aligned") / "out"
    return autoencode(parse(["autoencode", str(tiny_images), str(out), "--encoder", tiny_encoder, *AUTOENCODER]))


@pytest.fixture(scope="session")
def encoder_folder(tiny_encoder: str) -> Path:
    return Path(tiny_encoder)


@pytest.fixture(scope="session")
def tiny_samples(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    return sample(Sample(tiny_run, tmp_path_factory.mktemp("samples") / "out", 2, steps=2, device="cpu"))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    return export_run(ExportRun(tiny_run, tmp_path_factory.mktemp("pipeline") / "out", to="diffusers"))


@pytest.fixture(scope="session")
def tiny_edits(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, tiny_images: Path) -> Path:
    out, image = tmp_path_factory.mktemp("edits") / "out", tiny_images / "circle" / "000.png"
    return edit(Edit(tiny_run, out, 1, images=(image,), keep=("local",), steps=1, device="cpu"))


@pytest.fixture(scope="session")
def tiny_looks(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, tiny_images: Path) -> Path:
    folder = tmp_path_factory.mktemp("looks")
    prototypes(MakePrototypes(tiny_store, draw_masks(folder / "masks", tiny_images), folder / "out", "local.pca-4"))
    return folder / "out"


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, tiny_store: Path, tiny_images: Path) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    line = ["head", str(tiny_store), "--masks", str(draw_masks(folder / "masks", tiny_images)), "--layers=all"]
    train_head(parse([*line, "--out", str(folder / "head"), "--steps=2", "--device=cpu"]))
    drawn = Synthesise(tiny_run, folder / "out", 3, head=folder / "head", agreement=0.01, steps=1, device="cpu")
    return synthesise(drawn)


@pytest.fixture(scope="session")
def tiny_probe(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Path:
    out = tmp_path_factory.mktemp("probe") / "out"
    probe(Probe(tiny_store, out, columns=("cls", "latent"), steps=2, hidden=4, device="cpu"))
    return out


# ---- what reads them: of a folder and the file in it that is damaged


ASKED = "asked.json"


def contents_of(folder: Path) -> Contents:
    if not (folder / MANIFEST).is_file():
        return read_json(folder / PARTIAL, Contents, "")
    manifest = read_manifest(folder)
    return Contents(**{name: getattr(manifest, name) for name in Contents.__dataclass_fields__})


def read_store(folder: Path, file: Path) -> Any:
    store = Store.open(folder)
    rows = torch.arange(len(store))
    return store.names(rows), {column: store.read(column, rows) for column in store.manifest.columns}


def continue_store(folder: Path, file: Path) -> Any:
    asked = folder.parent / ASKED
    if not asked.exists():  # Written down before anything is damaged.
        asked.write_text(to_json(contents_of(folder)))
    writer = StoreWriter(folder, read_json(asked, Contents, ""))
    # A lost line of the journal costs a block, which is made again.
    return writer.complete or set(writer.pending) >= {range(20, 24)}


def read_compressor(folder: Path, file: Path) -> Any:
    compressor = load_compressor(file.parent)
    return compressor.spec(), compressor.state_dict()


def compress_again(folder: Path, file: Path) -> Any:
    pca = "pca" in file.parent.name
    options = Compress(folder, channels=4, device="cpu", **({"kind": "pca"} if pca else {"hidden": 8, "epochs": 1}))  # type: ignore[reportArgumentType]
    return compress(options).manifest.compressors


def read_checkpoint(folder: Path, file: Path) -> Any:
    model = Denoiser(RunRecord.read(folder).denoiser)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters())
    step = checkpoints.restore(file.parent, model, ema, optimiser)
    return step, model.state_dict(), ema, optimiser.state_dict()["state"]


def read_all_tensors(folder: Path, file: Path) -> Any:
    checkpoints.read_weights(file)
    return "read"


def read_the_head(folder: Path, file: Path) -> Any:
    head = load_head(folder)
    return head.spec, head.state_dict()


def read_autoencoder(folder: Path, file: Path) -> Any:
    autoencoder = load_autoencoder(str(folder))
    return {**plain(autoencoder.spec), "name": "", "weights_sha256": ""}, autoencoder.state_dict()


def read_encoder(folder: Path, file: Path) -> Any:
    encoder = load_encoder(str(folder), 16)
    return {**plain(encoder.spec), "name": "", "weights_sha256": ""}, encoder.state_dict()


def read_alignment(folder: Path, file: Path) -> Any:
    network = load_alignment(folder)
    return network.spec, network.state_dict()


def read_looks(folder: Path, file: Path) -> Any:
    looks = load_prototypes(folder)
    return looks.spec, looks.codes


Read = Callable[[Path, Path], Any]
READERS: list[tuple[str, str, Read]] = [
    ("tiny_store", "manifest.json", read_store),
    ("tiny_store", "*.safetensors", read_store),
    ("tiny_store", "prepare.jsonl", continue_store),
    ("tiny_store", "compressors/*/compressor.*", read_compressor),
    ("tiny_store", "compressors/*/options.json", compress_again),
    ("tiny_store", "compressors/*/metrics.jsonl", lambda _, file: read_jsonl(file, dict[str, float], "delete it")),
    ("begun_store", "manifest.partial.json", continue_store),
    ("begun_store", "prepare.jsonl", continue_store),
    ("begun_store", "*.safetensors", continue_store),
    ("tiny_run", "run.json", lambda folder, _: RunRecord.read(folder)),
    ("tiny_run", "metrics.jsonl", lambda folder, _: tracking.read(folder)),
    ("tiny_run", "compressors/*/compressor.*", read_compressor),
    ("tiny_run", "checkpoints/*/*", read_checkpoint),
    ("tiny_pipeline", "model_index.json", lambda folder, _: pipeline_record(folder)),
    ("tiny_pipeline", "transformer/config.json", lambda folder, _: pipeline_record(folder)),
    ("tiny_pipeline", "transformer/*.safetensors", read_all_tensors),
    ("tiny_pipeline", "vae/*", lambda folder, _: read_autoencoder(folder / "vae", _)),
    ("tiny_head", "head.*", read_the_head),
    ("tiny_head", "training.json", lambda _, file: read_json(file, HeadRecord, "delete it")),
    ("aligned_autoencoder", "config.json", read_autoencoder),
    ("aligned_autoencoder", "mean_std.json", read_autoencoder),
    ("aligned_autoencoder", "diffusion_pytorch_model.safetensors", read_autoencoder),
    ("aligned_autoencoder", "alignment.safetensors", read_alignment),
    ("aligned_autoencoder", "training.json", lambda _, file: read_json(file, TrainingRecord, "delete it")),
    ("aligned_autoencoder", "metrics.jsonl", lambda folder, _: tracking.read(folder)),
    (
        "aligned_autoencoder",
        "checkpoints/*/progress.json",
        lambda _, f: read_json(f, checkpoints.Progress, "delete it"),
    ),
    ("aligned_autoencoder", "checkpoints/*/*.safetensors", read_all_tensors),
    ("encoder_folder", "config.json", read_encoder),
    ("encoder_folder", "model.safetensors", read_encoder),
    ("tiny_samples", "samples.json", lambda _, file: read_protocol(file)),
    ("tiny_samples", "samples.csv", lambda folder, _: verify(Verify(folder)) and read_hashes(folder)),
    ("tiny_edits", "edits.json", lambda folder, _: read_record(folder)),
    ("tiny_looks", "prototypes.*", read_looks),
    ("tiny_dataset", "dataset.json", lambda folder, _: read_dataset(folder)),
    ("tiny_dataset", "drawn.jsonl", lambda folder, _: read_rows(folder)),
    ("tiny_dataset", "annotations.json", lambda folder, _: verify(Verify(folder)) and "whole"),
    ("tiny_probe", "report.json", lambda _, file: read_json(file, ProbeReport, "delete it")),
]


# ---- damage


def first_number(content: bytes, number: str) -> bytes | None:
    """JSON with another number in the place of the first one."""
    found: list[int | float] = []

    def put(value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool) and not found:
            found.append(value)
            return "@"
        if isinstance(value, dict):
            return {key: put(item) for key, item in value.items()}
        return [put(item) for item in value] if isinstance(value, list) else value

    first, newline, rest = (
        content.partition(b"\n") if content.count(b"\n") and is_lines(content) else (content, b"", b"")
    )
    if not is_lines(first):
        return None
    changed = json.dumps(put(json.loads(first)))
    return changed.replace('"@"', number).encode() + newline + rest if found else None


def is_lines(content: bytes) -> bool:
    try:
        json.loads(content.partition(b"\n")[0])
    except ValueError:
        return False
    return True


TEXT_DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "another type": lambda _: b"[]\n[]\n",
    "a number": lambda _: b"3\n3\n",
    "text": lambda _: b'"text"\n"text"\n',
    "null": lambda _: b"null\nnull\n",
    "an empty object": lambda content: None if content.count(b"}\n{") or content.endswith(b"}\n") else b"{}",
    "deep nesting": lambda _: b"[" * 100_000 + b"\n[\n",
    "deep objects": lambda _: b'{"a":' * 100_000 + b"\n{\n",
    "an absurd number": lambda content: first_number(content, "10000000000000000000"),
    "a number of many digits": lambda content: first_number(content, "1" * 5000),
    "NaN": lambda content: first_number(content, "NaN"),
    "infinity": lambda content: first_number(content, "-Infinity"),
    "an overflow": lambda content: first_number(content, "1e999"),
    "a byte that is not UTF-8": lambda content: content[:3] + b"\xff" + content[3:],
    "UTF-16": lambda content: content.decode().encode("utf-16-be"),
}
RAW_DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda _: b"",
    "half": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[: len(content.rstrip()) - 1],
    "zeros": lambda content: bytes(len(content)),
    "zeros at the end": lambda content: content[: len(content) // 3] + bytes(len(content) - len(content) // 3),
    "a web page": lambda _: b"<!doctype html><html></html>",
}


UNSEEN = "zeros at the end"
"""Tensors of zeros are tensors: of shards only a hash tells, which `reglue verify` takes."""


def with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A safetensors file with another header over the same bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def first_tensor(header: dict[str, Any]) -> dict[str, Any]:
    return header[next(name for name in header if name != "__metadata__")]


TENSOR_DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "a header of an absurd length": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "a header that is no JSON": lambda content: with_header(content, lambda _: b"\xff{"),
    "a header of deep nesting": lambda content: with_header(content, lambda _: b'{"a":' * 100_000),
    "a header that is a list": lambda content: with_header(content, lambda _: b"[]"),
    "no metadata": lambda content: with_header(content, lambda header: header.pop("__metadata__", None) and None),
    "metadata of no sense": lambda content: with_header(
        content, lambda header: header.update(__metadata__=dict.fromkeys(header.get("__metadata__", {}), "[" * 9999))
    ),
    "an absurd shape": lambda content: with_header(content, lambda header: first_tensor(header).update(shape=[10**18])),
    "a negative shape": lambda content: with_header(content, lambda header: first_tensor(header).update(shape=[-1])),
    "an unknown type": lambda content: with_header(content, lambda header: first_tensor(header).update(dtype="X7")),
    "offsets beyond the end": lambda content: with_header(
        content, lambda header: first_tensor(header).update(data_offsets=[0, 10**12])
    ),
}


def change_tensors(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Write a safetensors file again with other tensors."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 not a dict
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, file, metadata)


def first_of(tensors: dict[str, Tensor]) -> str:
    return min(tensors)


OTHER_TENSORS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "a tensor is missing": lambda tensors: tensors.pop(first_of(tensors), None),
    "no tensor at all": lambda tensors: tensors.clear(),
    "one tensor too many": lambda tensors: tensors.update(more=torch.zeros(2)),
    "another shape": lambda tensors: tensors.update({first_of(tensors): torch.zeros(3, 1, 2)}),
}


def damage(file: Path, kind: str) -> bool:
    """Damage a file. Returns whether this kind of damage exists for it."""
    if kind == "missing":
        file.unlink()
    elif kind == "a folder":
        file.unlink()
        file.mkdir()
    elif kind in OTHER_TENSORS:
        change_tensors(file, OTHER_TENSORS[kind])
    else:
        content = {**RAW_DAMAGE, **TEXT_DAMAGE, **TENSOR_DAMAGE}[kind](file.read_bytes())
        if content is None:
            return False
        file.write_bytes(content)
    return True


def kinds_of(file: str) -> list[str]:
    tensors = file.endswith(".safetensors")
    kinds = ["missing", "a folder", *RAW_DAMAGE, *((TENSOR_DAMAGE | OTHER_TENSORS) if tensors else TEXT_DAMAGE)]
    return [kind for kind in kinds if kind != UNSEEN or not tensors]


# ---- the tests


def files_in(folder: Path) -> list[str]:
    """Without reports, which tests that evaluate the run leave in it."""
    found = [path for suffix in ("csv", "json", "jsonl", "safetensors") for path in folder.rglob(f"*.{suffix}")]
    return sorted(str(path.relative_to(folder)) for path in found if path.parent.name != "reports")


def matching(folder: Path, pattern: str) -> list[str]:
    """The files of a pattern, of shards and checkpoints of one kind the last alone."""
    files = [file for file in files_in(folder) if fnmatch(file, pattern) and file.count("/") == pattern.count("/")]
    assert files, f"{folder} has no {pattern}"
    return list({file.rpartition("-0")[0] or file: file for file in files}.values())


def outcome(read: Read, folder: Path, file: Path) -> Any:
    """What a reader gives, comparable; or None for a line that names the file, or its folder."""
    try:
        return comparable(read(folder, file))
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert len(message) < 700, message
        part = str(file.relative_to(folder).parent)
        assert file.name in message or (part != "." and part in message), message
        return None


def comparable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    return type(value)(map(comparable, value)) if type(value) in (list, tuple) else value


def test_every_file_has_a_reader_in_the_list(request: pytest.FixtureRequest) -> None:
    for fixture in {fixture for fixture, _, _ in READERS}:
        patterns = [pattern for name, pattern, _ in READERS if name == fixture]
        for file in files_in(request.getfixturevalue(fixture)):
            assert any(fnmatch(file, pattern) for pattern in patterns), f"nothing reads {file} of {fixture}"


@pytest.fixture(params=READERS, ids=lambda reader: "/".join(reader[:2]))
def damageable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path, Read]]:
    fixture, pattern, read = request.param
    original = request.getfixturevalue(fixture)

    def copies() -> Iterator[tuple[Path, Path, Read]]:
        for name in matching(original, pattern):
            folder = Path(shutil.copytree(original, tmp_path / name.replace("/", " ") / "copy"))
            yield folder, folder / name, read

    return copies()


def put_back(file: Path, content: bytes) -> None:
    if file.is_dir():
        file.rmdir()
    file.unlink(missing_ok=True)  # Not written over: it may be mapped.
    file.write_bytes(content)


def test_damage_of_any_file_is_one_line_that_names_it(damageable: Iterator[tuple[Path, Path, Read]]) -> None:
    for folder, file, read in damageable:
        content, intact = file.read_bytes(), comparable(read(folder, file))
        assert intact is not None
        for kind in kinds_of(file.name):
            if damage(file, kind):
                found = outcome(read, folder, file)
                # A log may lack lines that were not written yet.
                same = found == (intact[: len(found)] if isinstance(found, list) else intact)
                assert found is None or same, f"{file.name} with {kind} is read as if it were whole"
            put_back(file, content)


def changed_values(content: Any, others: Sequence[Any]) -> Iterator[Any]:
    """JSON with one of its values another, one key gone or one more, everywhere; of a list its first item alone."""
    yield from others
    if isinstance(content, dict):
        yield {**content, "unknown": 1}
        for key, value in content.items():
            yield {name: item for name, item in content.items() if name != key}
            yield from ({**content, key: changed} for changed in changed_values(value, others))
    if isinstance(content, list) and content:
        yield content[1:]
        yield from ([changed, *content[1:]] for changed in changed_values(content[0], others))


def test_values_of_another_type_are_one_line_too(damageable: Iterator[tuple[Path, Path, Read]]) -> None:
    for folder, file, read in damageable:
        if file.suffix != ".json" or read is compress_again:
            continue
        content = file.read_bytes()
        for changed in changed_values(json.loads(content), [None, 2.5, "text", [10**18], 10**18]):
            put_back(file, json.dumps(changed).encode())
            outcome(read, folder, file)
        put_back(file, content)


VERIFIED = [
    *("tiny_store", "tiny_run", "tiny_pipeline", "tiny_head", "aligned_autoencoder", "tiny_samples", "tiny_dataset"),
    "starter",
]


@pytest.mark.parametrize("fixture", VERIFIED)
def test_verify_finds_damage_of_any_file_that_counts(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = request.getfixturevalue(fixture)
    folder = Path(shutil.copytree(original, tmp_path / fixture))
    assert verify(Verify(folder)) == folder
    for name in files_in(folder):
        file = folder / name
        if name.endswith(("options.json", ".jsonl", "mean_std.json")):
            continue
        content = file.read_bytes()
        for kind in ("missing", *RAW_DAMAGE):
            damage(file, kind)
            found = outcome(lambda *_: verify(Verify(folder)), folder, file)
            assert found is None, f"verify does not see {name} with {kind}"
            put_back(file, content)
        capsys.readouterr()
    assert verify(Verify(folder)) == folder


def flip(file: Path, place: float) -> None:
    """Change one bit of a file, at a share of its length."""
    content = bytearray(file.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 1
    put_back(file, bytes(content))


@pytest.mark.parametrize("fixture", VERIFIED)
def test_a_flipped_bit_is_found_by_verify_and_by_what_reads_tensors(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(fixture), tmp_path / fixture))
    readers = [(pattern, read) for name, pattern, read in READERS if name == fixture and "store" not in name]
    for file in [*folder.rglob("*.safetensors"), *folder.rglob("*.png")]:
        name, content = str(file.relative_to(folder)), file.read_bytes()
        if name.endswith("codes.png"):
            continue
        for place in (0.3, 0.7, 1.0 if file.suffix != ".png" else 0.8):
            flip(file, place)
            assert outcome(lambda *_: verify(Verify(folder)), folder, file) is None, f"verify does not see {name}"
            for pattern, read in readers:
                if fnmatch(name, pattern):
                    assert outcome(read, folder, file) is None, f"{name} with another bit is read as if it were whole"
            put_back(file, content)
        capsys.readouterr()


def test_a_flipped_bit_of_a_sample_is_not_measured(tiny_run: Path, tiny_encoder: str, tmp_path: Path) -> None:
    folder = sample(Sample(tiny_run, tmp_path / "out", 6, steps=1, device="cpu"))
    flip(folder / "000001.png", 0.5)
    with pytest.raises(UserError, match=r"000001\.png is damaged"):
        evaluate(Evaluate(folder, folder, feature_network=tiny_encoder, resamples=0, device="cpu"))


def test_a_flipped_bit_of_an_archive_is_found(tiny_run: Path, tmp_path: Path) -> None:
    archive = sample(Sample(tiny_run, tmp_path / "out.npz", 2, steps=2, device="cpu"))
    assert verify(Verify(archive)) == archive
    content = archive.read_bytes()
    size, end = len(content), len(content) - len(UNSEALED)
    # The members and all that leads to them; where they begin and end; and the comment.
    for place in [*range(0, size, size // 20), *range(40), *range(end - 120, size, 3)]:
        flip(archive, (place + 0.5) / size)
        for read in (verify, lambda options: open_image_set(options.folder)):
            if read is verify or place < end:
                with pytest.raises(UserError, match=r"out\.npz"):
                    read(Verify(archive))
        put_back(archive, content)


def changed_cells(table: str) -> Iterator[str]:
    """A table with another word in one of its cells."""
    rows = [line.split(",") for line in table.splitlines()]
    for y, row in enumerate(rows):
        for x in range(len(row)):
            changed = [*row[:x], "bat", *row[x + 1 :]]
            yield "".join(",".join(cells) + "\n" for cells in [*rows[:y], changed, *rows[y + 1 :]])


def test_any_change_of_what_is_said_of_samples_is_found(
    tiny_samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_samples, tmp_path / "samples"))
    protocol, table = ((folder / name).read_text() for name in ("samples.json", "samples.csv"))
    said = json.loads(protocol)
    others = [json.dumps(other) for other in changed_values(said, [0, 1.5, "bat"]) if other != said]
    for name, before, changes in (("samples.json", protocol, others), ("samples.csv", table, changed_cells(table))):
        for changed in changes:
            put_back(folder / name, changed.encode())
            with pytest.raises(UserError, match=name):
                verify(Verify(folder))
        put_back(folder / name, before.encode())
    verify(Verify(folder))
