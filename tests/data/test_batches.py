"""Training samples: a function of seed and position, and what is dropped from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import reglue.data.manifest
from reglue.commands.compress import Compress, compress
from reglue.config import Recipe
from reglue.data.batches import CPU, HostBatch, TrainingData, denoiser_config
from reglue.data.store import Store
from reglue.data.targets import alignment_targets
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.objective import loss_terms
from reglue.diffusion.paths import PATHS
from reglue.encoders.compressors import load_compressor, resize
from reglue.errors import UserError
from reglue.papers import RECIPES
from reglue.run import RunRecord
from reglue.seeds import generator, normals, permutation


def tiny(name: str) -> Recipe:
    recipe = RECIPES[name]
    return replace(recipe, model="2x32x2/2", local=replace(recipe.local, compressor="conv-4"))


def data(store: Store, recipe: Recipe, seed: int = 0) -> TrainingData:
    return TrainingData(store, recipe, denoiser_config(store, recipe), seed)


def test_a_sample_depends_on_seed_and_position_alone(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    whole = data(store, tiny("reglue")).sample(range(40, 60))
    alone = data(store, tiny("reglue")).sample(range(47, 48))
    for kind in ("data", "noise", "condition"):
        for name, value in getattr(alone, kind).items():
            assert torch.equal(value[0], getattr(whole, kind)[name][7]), (kind, name)
    for kind in ("time", "alignment_target"):
        assert torch.equal(getattr(alone, kind)[0], getattr(whole, kind)[7]), kind
    other = data(store, tiny("reglue"), seed=1).sample(range(47, 48))
    assert not torch.equal(other.noise["latent"], alone.noise["latent"])


def test_every_epoch_shows_each_image_once_in_an_order_of_its_own(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    epochs = [data(store, tiny("sit")).rows(range(n * len(store), (n + 1) * len(store))).tolist() for n in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(store)))
    assert epochs[0] != epochs[1]


def test_labels_and_maps_are_dropped_as_often_as_asked(tiny_store: Path) -> None:
    recipe = tiny("redi")
    recipe = replace(recipe, local=replace(recipe.local, dropout=0.2))
    sample = data(Store.open(tiny_store), recipe).sample(range(2000))
    assert (sample.condition["class"] == 3).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert sample.keep["local"].float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert isinstance(sample.time, torch.Tensor)
    assert sample.time.min() >= 0
    assert sample.time.max() <= 1
    assert sample.time.mean().item() == pytest.approx(0.5, abs=0.03)


def test_unit_variance_is_what_it_says(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    recipe = tiny("reglue")
    recipe = replace(
        recipe,
        latent=replace(recipe.latent, unit_variance=True),
        class_token=replace(recipe.class_token, unit_variance=True),
        local=replace(recipe.local, unit_variance=True),
    )
    # The grid of the encoder, so that resizing does not smooth the map.
    state = data(store, recipe).sample(range(len(store))).data
    for name in ("latent", "cls"):
        values = state[name].transpose(0, 1).flatten(1)
        assert values.mean(1).abs().max() < 0.1, name
        assert (values.std(1) - 1).abs().max() < 0.1, name
    plain = data(store, tiny("reglue")).sample(range(len(store))).data
    assert plain["local"].shape == state["local"].shape == (24, 4, 8, 8)
    assert not torch.equal(plain["local"], state["local"])


def test_targets_are_the_encoders_last_layer_on_the_models_tokens(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    trained = data(store, tiny("reglue"))
    sample, rows = trained.sample(range(4)), trained.rows(range(4))
    assert sample.alignment_target is not None
    assert sample.alignment_target.shape == (4, 1 + 16, 16)
    assert torch.equal(sample.alignment_target[:, 0], store.read("cls", rows)["cls"])
    patches = store.read("features", rows)["features"][:, -16:].float().flatten(2).transpose(1, 2)
    assert torch.equal(sample.alignment_target[:, 1:], patches)
    without_token = data(store, tiny("repa")).sample(range(4)).alignment_target
    assert without_token is not None
    assert torch.equal(without_token, patches)


def test_a_recipe_may_learn_codes_of_the_class_token_and_align_with_the_token_itself(
    tiny_store: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    recipe = tiny("reglue")
    chosen = replace(recipe, class_token=replace(recipe.class_token, compressor="pca-3"))
    with pytest.raises(
        UserError, match=r"needs column cls.pca-3.*reglue compress .* --column cls --kind pca --channels 3`"
    ):
        RunRecord.of(Store.open(folder), chosen, seed=0)

    store = compress(Compress(folder, "pca", "cls", channels=3, device="cpu"))
    record = RunRecord.of(store, chosen, seed=0)
    assert record.denoiser.shapes()["cls"] == (3,)
    assert record.denoiser.alignment_width == 16
    assert record.compressors["cls"] == store.manifest.compressors["cls.pca-3"]
    trained, plain = data(store, chosen), data(store, recipe)
    sample = trained.sample(range(4))
    assert torch.equal(sample.data["cls"], store.read("cls.pca-3", trained.rows(range(4)))["cls"])
    target, same = sample.alignment_target, plain.sample(range(4)).alignment_target
    assert target is not None
    assert same is not None
    assert torch.equal(target, same)

    scaled = replace(chosen, class_token=replace(chosen.class_token, unit_variance=True))
    token = RunRecord.of(store, scaled, seed=0).denoiser.modality("cls")
    assert token
    assert token.normalisation
    assert len(token.normalisation.scale) == 3
    assert record.store_hash != RunRecord.of(store, recipe, seed=0).store_hash
    assert RunRecord.of(store, recipe, seed=0) == RunRecord.of(Store.open(tiny_store), recipe, seed=0)
    loss = loss_terms(Denoiser(record.denoiser), PATHS[chosen.path], sample)
    assert all(value.isfinite() for value in loss.values())


@pytest.mark.parametrize(
    ("recipe", "column", "remedy"), [("reglue", "conv-16", "compress"), ("repa", "features", "--features")]
)
def test_what_the_store_lacks_is_named(
    recipe: str, column: str, remedy: str, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, tmp_path: Path
) -> None:
    from reglue.commands.prepare import Prepare, prepare

    store = prepare(Prepare(tiny_images, tmp_path / "s", 16, tiny_autoencoder, tiny_encoder, workers=0, device="cpu"))
    with pytest.raises(UserError, match=rf"{column}.*{remedy}"):
        denoiser_config(store, RECIPES[recipe])


def test_the_bits_that_are_drawn_stay() -> None:
    """Runs of earlier versions go on with the same noise: these numbers were drawn by the first version."""
    generators = [generator(3, "training sample", position) for position in (0, 7)]
    uniform = [list(g.random(3)) for g in generators]
    noise = normals(generators, {"posterior": (1, 2, 2), "latent": (1, 2, 2), "cls": (3,)})
    assert uniform == [
        [0.8280138193791616, 0.5782087567150834, 0.4485933005047199],
        [0.211201164744371, 0.3989272826930297, 0.5947362391908176],
    ]
    assert noise["posterior"].dtype == torch.float32
    assert noise["posterior"][0].flatten().tolist() == [
        -0.045415762811899185, -2.0717790126800537, 0.3085392117500305, 0.8557471632957458,
    ]  # fmt: skip
    assert noise["cls"][1].tolist() == [0.4850558340549469, 0.4251280426979065, 0.5285350680351257]
    assert permutation(3, "order of images", 1, 8).tolist() == [0, 3, 4, 2, 5, 7, 6, 1]


def test_a_sample_is_what_its_definition_says_to_the_bit(tiny_store: Path) -> None:
    """The definition spelled out for one position, in the plainest way."""
    store, recipe, position = Store.open(tiny_store), tiny("reglue"), 50
    sample = data(store, recipe, seed=5).sample(range(48, 56))
    row = permutation(5, "order of images", position // 24, 24)[position % 24][None]
    draws = generator(5, "training sample", position)
    uniform = draws.random(3)
    sizes = [3 * 64, 3 * 64, 4 * 64, 16]
    posterior, *noise = torch.from_numpy(draws.standard_normal(sum(sizes), dtype=np.float32)).split(sizes)
    moments = store.read("latent", row)
    shift, scale = (torch.tensor(getattr(store.manifest.autoencoder, n))[:, None, None] for n in ("shift", "scale"))
    latent = (moments["mean"] + moments["std"] * posterior.view(3, 8, 8) - shift) * scale
    assert torch.equal(sample.data["latent"][2:3], latent)
    assert torch.equal(sample.data["local"][2:3], resize(store.read("local.conv-4", row)["local"], (8, 8)))
    assert torch.equal(sample.data["cls"][2:3], store.read("cls", row)["cls"])
    for value, name in zip(noise, ("latent", "local", "cls"), strict=True):
        assert torch.equal(sample.noise[name][2].flatten(), value)
    assert isinstance(sample.time, torch.Tensor)
    assert sample.time[2] == np.float32(uniform[0])
    assert sample.condition["class"][2] == (3 if uniform[1] < 0.1 else store.labels[row])


def test_threads_that_are_in_two_epochs_at_once_read_the_same_as_one(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    parts = [range(start, start + 7) for start in range(0, 24 * 20, 7)]
    alone = [data(store, tiny("sit")).rows(part) for part in parts]
    shared = data(store, tiny("sit"))
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(shared.rows, parts))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def aligned(name: str, **changes: Any) -> Recipe:
    recipe = tiny(name)
    return replace(recipe, alignment=replace(recipe.alignment, **changes))


@pytest.fixture(scope="module")
def store_without_features(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny store once its features were deleted, as one does when the compressor is made."""
    folder = Path(shutil.copytree(tiny_store, tmp_path_factory.mktemp("slim") / "store"))
    for file in folder.glob("features-*"):
        file.unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["columns"]["features"]
    manifest["hash"] = reglue.data.manifest._hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", ["repa", "reg", "reglue"])
@pytest.mark.parametrize("compressor", ["conv-4", "pca-4"])
def test_decoded_targets_are_what_the_compressor_says_of_its_codes(
    name: str, compressor: str, tiny_store: Path, store_without_features: Path
) -> None:
    recipe = aligned(name, targets="decoded", compressor=None if compressor == "conv-4" else compressor)
    store = Store.open(store_without_features)
    trained = data(store, recipe)
    rows = trained.rows(range(6))
    target = trained.sample(range(6)).alignment_target
    assert target is not None
    assert not target.requires_grad
    codes = store.read(f"local.{compressor}", rows)["local"]
    decoded = load_compressor(tiny_store / "compressors" / compressor).decode(codes)[:, -16:].detach()
    token = name != "repa"
    torch.testing.assert_close(target[:, token:], decoded.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    if token:
        assert torch.equal(target[:, 0], store.read("cls", rows)["cls"])
    # It is near what it stands for: nearer than the features of other images are.
    cached = data(Store.open(tiny_store), aligned(name)).sample(range(6)).alignment_target
    assert cached is not None
    near, far = (F.cosine_similarity(target, other, dim=-1).mean() for other in (cached, cached.roll(1, 0)))
    assert near > far


def test_decoded_targets_are_part_of_what_a_run_was_trained_on(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    hashes = {
        RunRecord.of(store, recipe, seed=0).store_hash
        for recipe in (
            aligned("repa"),
            aligned("repa", targets="decoded"),
            aligned("repa", targets="decoded", compressor="pca-4"),
        )
    }
    assert len(hashes) == 3
    codes = store.manifest.compressors
    other = {**codes, "conv-4": replace(codes["conv-4"], weights_sha256="another")}
    changed = Store(store.folder, replace(store.manifest, compressors=other))
    recipe = aligned("repa", targets="decoded")
    assert RunRecord.of(changed, recipe, seed=0).store_hash not in hashes
    with pytest.raises(UserError, match=r"did not make column local\.conv-4"):
        data(changed, recipe)


def test_what_decoded_targets_lack_is_named(tiny_store: Path) -> None:
    store = Store.open(tiny_store)
    with pytest.raises(UserError, match=r"needs column local\.conv-9.*reglue compress .* --kind conv --channels 9`"):
        denoiser_config(store, aligned("repa", targets="decoded", compressor="conv-9"))
    encoder = store.manifest.encoder
    assert encoder is not None
    early = replace(store.manifest, encoder=replace(encoder, layers=(0, 1, 2, 3)))
    with pytest.raises(UserError, match=r"holds layers \[0, 1, 2, 3\], not the last one \(4\)"):
        denoiser_config(Store(store.folder, early), aligned("repa", targets="decoded"))
    with pytest.raises(
        UserError, match=r"^alignment\.compressor conv-4 is for alignment\.targets decoded alone; leave it out$"
    ):
        aligned("repa", compressor="conv-4")


def parts_of(draft: HostBatch) -> list[dict[str, torch.Tensor]]:
    return [*draft.columns.values(), draft.target, draft.noise, draft.condition, draft.drawn]


class Gpu:
    """Stands for a GPU: a stream that copies, one that computes, and what was asked of them."""

    device = torch.device("cpu")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pinned, self.copied, self.asked, self.current = set[int](), list[int](), list[Any](), False
        empty, to = torch.empty, torch.Tensor.to

        def noted_empty(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            made = empty(*arguments, **options)
            if pin_memory:
                self.pinned.add(made.data_ptr())
            return made

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            """As PyTorch does: pinned memory stays where it is."""
            return tensor if tensor.data_ptr() in self.pinned else tensor.clone()

        def noted_to(tensor: torch.Tensor, *where: Any, **how: Any) -> torch.Tensor:
            if how.get("non_blocking"):
                assert self.current, "copied by the stream that computes"
                self.copied.append(tensor.data_ptr())
                return tensor.clone()
            return to(tensor, *where)

        monkeypatch.setattr(torch, "empty", noted_empty)
        monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
        monkeypatch.setattr(torch.Tensor, "to", noted_to)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.asked.append(tensor.data_ptr()))
        monkeypatch.setattr(torch.cuda, "stream", self.made_current)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)

    @contextmanager
    def made_current(self, stream: Gpu) -> Iterator[None]:
        assert stream is self
        self.current = True
        yield
        self.current = False

    def record_event(self) -> str:
        return f"{len(self.copied)} copies"

    def wait_event(self, event: str) -> None:
        self.asked.append(event)


@pytest.mark.parametrize("name", ["reglue", "sit"])
def test_a_gpu_copies_what_is_read_and_drawn_from_where_it_was_written(
    name: str, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read and drawn into pinned memory, copied by a stream of its own, for which the computing one waits."""
    store = Store.open(tiny_store)
    expected = data(store, tiny(name)).sample(range(5))
    trained = data(store, tiny(name))
    with monkeypatch.context() as patched:
        gpu = Gpu(patched)
        trained.store = Store(store.folder, store.manifest, pinned=True)
        trained.targets = alignment_targets(trained.store, tiny(name), CPU) if name == "reglue" else None
        trained.copies = gpu  # type: ignore[assignment]
        draft = trained.read(range(5))
        count = sum(map(len, parts_of(draft)))
        assert len(gpu.copied) == count
        small = len(draft.drawn) + len(draft.condition)  # times and conditions are pinned afterwards
        assert len(gpu.pinned.intersection(gpu.copied[: count - small])) == count - small
        assert not gpu.asked
        sample = trained.finish(draft)
    on_gpu = {tensor.data_ptr() for part in parts_of(draft) for tensor in part.values()}
    assert gpu.asked[0] == f"{count} copies"
    assert set(gpu.asked[1:]) == on_gpu
    for kind in ("data", "noise"):
        for part, value in getattr(expected, kind).items():
            assert torch.equal(value, getattr(sample, kind)[part]), (kind, part)
    assert isinstance(expected.time, torch.Tensor)
    assert isinstance(sample.time, torch.Tensor)
    assert torch.equal(expected.time, sample.time)


def test_nothing_is_copied_once_more_where_there_is_no_gpu(tiny_store: Path) -> None:
    trained = data(Store.open(tiny_store), tiny("reglue"))
    draft = trained.read(range(4))
    for part, moved in zip(parts_of(draft), parts_of(draft.to(CPU)), strict=True):
        assert {n: x.data_ptr() for n, x in part.items()} == {n: x.data_ptr() for n, x in moved.items()}
    assert all(x.is_contiguous() and not x.is_pinned() for part in parts_of(draft) for x in part.values())
    assert trained.finish(draft).noise["local"].data_ptr() == draft.noise["local"].data_ptr()


@pytest.mark.gpu
def test_a_gpu_gets_the_samples_of_the_cpu(tiny_store: Path) -> None:
    store, recipe = Store.open(tiny_store), tiny("reglue")
    expected = data(store, recipe)
    trained = TrainingData(store, recipe, denoiser_config(store, recipe), 0, torch.device("cuda"))
    with ThreadPoolExecutor(4) as threads:
        drafts = list(threads.map(trained.read, [range(n, n + 8) for n in range(0, 160, 8)]))
    for number, draft in enumerate(drafts):
        ours, theirs = trained.finish(draft), expected.sample(range(8 * number, 8 * number + 8))
        for name, noise in theirs.noise.items():
            assert torch.equal(ours.noise[name].cpu(), noise), name
            torch.testing.assert_close(ours.data[name].cpu(), theirs.data[name])
