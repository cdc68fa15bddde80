"""The store: what is written comes back, and nothing damaged is taken for whole."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import reglue.data.store
from reglue.data.images import UnreadableImage
from reglue.data.manifest import Contents, Source, is_intact
from reglue.data.store import Store, dequantised, quantised
from reglue.data.store_writer import StoreWriter, add_codes
from reglue.encoders.autoencoders import AutoencoderSpec
from reglue.encoders.compressors import CompressorSpec
from reglue.errors import UserError
from reglue.files import BESIDE

AUTOENCODER = AutoencoderSpec("vae", "AutoencoderKL", "12ab", 3, 2, (0.0,) * 3, (1.0,) * 3)


def contents(count: int = 23, shard_rows: int = 10) -> Contents:
    return Contents(
        source=Source("photos", "f00d", (8, 12), ("ape", "zebra"), count),
        autoencoder=AUTOENCODER,
        encoder=None,
        features=False,
        latent_dtype="float32",
        shard_rows=shard_rows,
        statistics_images=100,
        statistics_seed=0,
    )


def name_of(index: int) -> str:
    return f"ape/{index}é.png"


UNREADABLE = {0, 7, *range(10, 20)}  # All of the second shard among them.
READABLE = [index for index in range(23) if index not in UNREADABLE]


def latents(indices: list[int]) -> dict[str, torch.Tensor]:
    noise = torch.randn(23, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    return {"mean": noise[indices] + 100, "std": torch.full((len(indices), 3, 4, 6), 0.5)}


def fill(writer: StoreWriter, blocks: int | None = None) -> None:
    for block in writer.pending[:blocks]:
        rows = [index for index in block if index not in UNREADABLE]
        columns = {"label": {"label": torch.tensor(rows, dtype=torch.int64) % 2}, "latent": latents(rows)}
        skipped = [UnreadableImage(name_of(index), "broken") for index in block if index in UNREADABLE]
        writer.write(
            block, [name_of(index) for index in rows], skipped, columns if rows else {"label": {}, "latent": {}}
        )


def write_store(folder: Path) -> Store:
    writer = StoreWriter(folder, contents())
    fill(writer)
    return writer.finish(torch.arange(writer.rows))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("whole") / "store")


def test_manifest_survives_json(whole: Store):
    assert Store.open(whole.folder).manifest == whole.manifest
    assert [image.name for image in whole.manifest.skipped] == [name_of(index) for index in sorted(UNREADABLE)]
    assert not (whole.folder / "manifest.partial.json").exists()
    assert not list(whole.folder.glob(f"*{BESIDE}"))


@settings(max_examples=50)
@given(st.lists(st.integers(0, len(READABLE) - 1), max_size=30))
def test_rows_come_in_any_order_and_number(whole: Store, rows: list[int]):
    expected = latents([READABLE[row] for row in rows])
    read = whole.read("latent", torch.tensor(rows, dtype=torch.int64))
    assert read.keys() == {"mean", "std"}
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor)
    assert whole.names(torch.tensor(rows)) == [name_of(READABLE[row]) for row in rows]


@settings(max_examples=50)
@given(
    rows=st.lists(st.integers(0, len(READABLE) - 1), max_size=30),
    start=st.none() | st.integers(-4, 4),
    stop=st.none() | st.integers(-4, 4),
)
def test_rows_are_read_straight_into_pinned_memory(whole: Store, rows: list[int], start: int | None, stop: int | None):
    channels, wanted = slice(start, stop), torch.tensor(rows, dtype=torch.int64)
    pinned: list[tuple[int, bool]] = []
    original = torch.empty

    def empty(*arguments, pin_memory=False, **options):
        made = original(*arguments, **options)
        pinned.append((made.data_ptr(), pin_memory))
        return made

    store = Store(whole.folder, whole.manifest, pinned=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", empty)
        read = store.read("latent", wanted, channels)
    assert [(tensor.data_ptr(), True) for tensor in read.values()] == pinned
    for name, tensor in latents([READABLE[row] for row in rows]).items():
        assert torch.equal(read[name], tensor[:, channels])


def test_no_more_files_stay_mapped_than_allowed(whole: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reglue.data.store, "MAPPED_AT_ONCE", 1)
    store = Store.open(whole.folder)
    rows = torch.tensor([10, 0, 8, 2])
    for _ in range(2):
        assert torch.equal(store.read("latent", rows)["mean"], whole.read("latent", rows)["mean"])
    assert len(store._mapped) == 1


def read_elsewhere(store: Store, rows: torch.Tensor, queue) -> None:
    queue.put(store.read("latent", rows)["mean"].tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_the_store_it_was_given(whole: Store, method: str):
    rows = torch.tensor([10, 0, 8])
    here = whole.read("latent", rows)["mean"]
    context: Any = torch.multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=read_elsewhere, args=(whole, rows, queue))
    process.start()
    assert torch.equal(torch.tensor(queue.get()), here)
    process.join()


def test_labels_and_length(whole: Store):
    assert len(whole) == len(READABLE)
    assert torch.equal(whole.labels, torch.tensor(READABLE) % 2)


def test_scan_visits_the_asked_rows_in_order(whole: Store):
    rows = torch.tensor([0, 1, 2, 5, 8, 10])
    parts = list(whole.scan("latent", rows, chunk=2))
    assert torch.equal(torch.cat([part for part, _ in parts]), rows)
    assert torch.equal(torch.cat([tensors["mean"] for _, tensors in parts]), whole.read("latent", rows)["mean"])
    assert max(len(part) for part, _ in parts) == 2
    assert sum(len(part) for part, _ in whole.scan("latent")) == len(whole)


def test_statistics_are_those_of_drawn_latents_and_survive_a_large_offset(whole: Store):
    moments = latents(READABLE)
    values = moments["mean"].double().transpose(0, 1).flatten(1)
    statistics = whole.manifest.statistics["latent"]
    torch.testing.assert_close(torch.tensor(statistics.mean, dtype=torch.float64), values.mean(1))
    variance = values.var(1, correction=0) + 0.25
    torch.testing.assert_close(torch.tensor(statistics.std, dtype=torch.float64), variance.sqrt())
    assert statistics.images == len(READABLE)


def test_shards_can_be_read_with_nothing_but_safetensors(whole: Store):
    path = whole.folder / "latent-00002.safetensors"
    assert torch.equal(load_file(path)["mean"], latents([20, 21, 22])["mean"])
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["reglue"])["names"] == [name_of(index) for index in (20, 21, 22)]


def test_files_may_be_read_by_those_who_may_read_the_folder(whole: Store, tmp_path: Path):
    (tmp_path / "new").touch()
    assert (whole.folder / "latent-00000.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_store_travels_to_other_processes(whole: Store):
    whole.read("latent", torch.tensor([0]))
    assert torch.equal(copy.deepcopy(whole).labels, whole.labels)


def test_an_interrupted_store_continues_to_the_same_bytes(whole: Store, tmp_path: Path):
    folder = tmp_path / "store"
    fill(StoreWriter(folder, contents()), blocks=1)
    with pytest.raises(UserError, match="half-written"):
        Store.open(folder)
    with (folder / "prepare.jsonl").open("a") as journal:
        journal.write('{"index": 1, "rows"')  # The process died here.
    (folder / f"latent-00001.safetensors{BESIDE}").write_bytes(b"half")

    writer = StoreWriter(folder, contents())
    assert [block.start for block in writer.pending] == [10, 20]
    fill(writer)
    store = writer.finish(torch.arange(writer.rows))

    assert store.manifest == whole.manifest
    for shard in whole.folder.glob("*.safetensors"):
        assert (folder / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (replace(contents(), source=replace(contents().source, resolution=(16, 16))), "source.resolution"),
        (replace(contents(), source=replace(contents().source, fingerprint="beef")), "source.fingerprint"),
        (replace(contents(), autoencoder=replace(AUTOENCODER, name="tiny", weights_sha256="34cd")), "tiny"),
        (replace(contents(), latent_dtype="float16"), "latent_dtype float32, not float16"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_contents_are_refused_and_harm_nothing(tmp_path: Path, other: Contents, says: str, finished: bool):
    folder = tmp_path / "store"
    writer = StoreWriter(folder, contents())
    if finished:
        fill(writer)
        writer.finish(torch.arange(writer.rows))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=says):
        StoreWriter(folder, other)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_same_images_at_another_path_are_the_same_contents(tmp_path: Path):
    write_store(tmp_path / "store")
    moved = replace(contents(), source=replace(contents().source, path="elsewhere"))
    assert StoreWriter(tmp_path / "store", moved).complete


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        StoreWriter(tmp_path, contents())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot make"):
        StoreWriter(tmp_path / "thesis.tex" / "store", contents())
    with pytest.raises(UserError, match="not a store"):
        Store.open(tmp_path)


def test_damage_is_named_and_a_lost_shard_is_made_again(tmp_path: Path):
    folder = tmp_path / "store"
    store = write_store(folder)
    shard = folder / "latent-00002.safetensors"
    original = shard.read_bytes()

    shard.write_bytes(original[:-1])
    with pytest.raises(UserError, match=r"latent-00002\.safetensors is missing or cut short"):
        Store.open(folder)

    shard.write_bytes(original[:-1] + b"x")
    shards = [shard for column in Store.open(folder).manifest.columns.values() for shard in column.shards]
    assert [one.file for one in shards if not is_intact(folder, one)] == [shard.name]

    shard.write_bytes(b"\xff" * len(original))
    with pytest.raises(UserError, match=r"latent-00002\.safetensors is damaged"):
        Store.open(folder).read("latent", torch.tensor([len(store) - 1]))

    shard.unlink()
    writer = StoreWriter(folder, contents())
    assert not writer.complete
    assert [block.start for block in writer.pending] == [20]
    fill(writer)
    assert writer.finish(torch.arange(writer.rows)).manifest == store.manifest
    assert shard.read_bytes() == original


@pytest.mark.parametrize(
    "edit", [lambda text: text[:-20], lambda text: text.replace("zebra", "horse"), lambda _: "[1]"]
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, edit):
    folder = write_store(tmp_path / "store").folder
    manifest = folder / "manifest.json"
    manifest.write_text(edit(manifest.read_text()))
    with pytest.raises(UserError, match=r"manifest\.json") as caught:
        Store.open(folder)
    assert "\n" not in str(caught.value)


def test_unknown_columns_and_rows_outside_are_refused(whole: Store):
    with pytest.raises(UserError, match=r"no column local\.conv-16 \(it has label, latent\)"):
        whole.read("local.conv-16", torch.tensor([0]))
    with pytest.raises(IndexError):
        whole.read("latent", torch.tensor([len(whole)]))
    with pytest.raises(IndexError):
        whole.read("latent", torch.tensor([-1]))


def test_images_of_which_none_can_be_read(tmp_path: Path):
    writer = StoreWriter(tmp_path / "store", contents(count=1))
    fill(writer)
    with pytest.raises(UserError, match=r"no image in photos can be read.*broken"):
        writer.finish(torch.arange(0))


def test_values_that_are_not_finite_are_refused(tmp_path: Path):
    writer = StoreWriter(tmp_path / "store", contents(count=1))
    tensors = {"label": {"label": torch.tensor([0])}, "latent": {"mean": torch.full((1, 3, 4, 6), torch.nan)}}
    writer.write(writer.pending[0], ["a.png"], [], tensors)
    with pytest.raises(UserError, match=r"latent .* not finite"):
        writer.finish(torch.arange(1))


def test_codes_are_added_with_statistics(tmp_path: Path):
    store = write_store(tmp_path / "store")
    codes = torch.randn(len(store), 2, 4, 4)
    spec = CompressorSpec("pca", 6, 0, 2, "cafe")
    added = add_codes(store, "pca-2", spec, iter(codes.split([8, 0, 3])))
    assert torch.equal(added.read("local.pca-2", torch.arange(len(store)))["local"], codes)
    assert Store.open(store.folder).manifest == added.manifest
    assert added.manifest.compressors == {"pca-2": spec}
    torch.testing.assert_close(
        torch.tensor(added.manifest.statistics["local.pca-2"].mean), codes.mean((0, 2, 3)), atol=1e-6, rtol=1e-5
    )
    (store.folder / "local.pca-2-00000.safetensors").unlink()
    with pytest.raises(UserError, match="run the same `reglue compress` again"):
        Store.open(store.folder)
    assert not Store.open(store.folder, to_be_replaced="local.pca-2").has_whole("local.pca-2")


@given(
    st.integers(0, 2**31),
    st.lists(st.floats(1e-6, 1e4), min_size=3, max_size=3),
    st.sampled_from([torch.float16, torch.float32]),
)
@settings(max_examples=50)
def test_eight_bits_lose_half_a_step_of_the_channel_at_most(seed: int, sizes: list[float], dtype: torch.dtype):
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    features = (noise * torch.tensor(sizes)[:, None, None]).to(dtype)
    features[0, 0] = 0
    stored = quantised(features)
    assert stored["features"].dtype == torch.int8
    again = dequantised(stored)["features"]
    assert again.dtype == torch.float16
    # Half a step, what float16 rounds off the scale and the product, and its smallest numbers.
    allowed = features.float().abs().amax((2, 3), keepdim=True) * (0.5 / 127 + 2**-10) + 2e-5
    assert ((again.float() - features.float()).abs() <= allowed).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_eight_bits_do_not_hide_what_is_not_finite(bad: float):
    features = torch.ones(1, 2, 2, 2)
    features[0, 1, 0, 0] = bad
    again = dequantised(quantised(features))["features"]
    assert not again[0, 1].isfinite().all()
    assert torch.allclose(again[0, 0].float(), features[0, 0], atol=1e-3)
