"""A store whose features are without the encoder's final norm, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reglue.commands.evaluate import Evaluate, evaluate
from reglue.commands.prepare import Prepare, prepare
from reglue.data.store import Store
from reglue.data.targets import OnlineTargets


@pytest.fixture
def bare_store(tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, tmp_path: Path) -> Store:
    options = Prepare(tiny_images, tmp_path / "store", 16, tiny_autoencoder, tiny_encoder, device="cpu", workers=0)
    return prepare(Prepare(**{**vars(options), "features": True, "final_norm": False}))


def test_features_differ_and_class_tokens_do_not(bare_store: Store, tiny_store: Path):
    rows = torch.arange(len(bare_store))
    normed = Store.open(tiny_store)
    bare, features = (store.read("features", rows)["features"].float() for store in (bare_store, normed))
    assert not torch.allclose(bare, features, atol=0.1)
    tokens = (store.read("cls", rows)["cls"] for store in (bare_store, normed))
    torch.testing.assert_close(*tokens)


def test_online_targets_are_the_cached_ones(bare_store: Store):
    rows = torch.arange(4)
    encoder = bare_store.manifest.encoder
    assert encoder is not None
    targets = OnlineTargets(bare_store, encoder, torch.device("cpu"))
    online = targets.tokens(targets.read(rows)).features
    cached = bare_store.read("features", rows)["features"][:, -encoder.width :].float()
    torch.testing.assert_close(online, cached, atol=2e-3, rtol=2e-3)


def test_class_tokens_of_the_store_serve_as_reference(bare_store: Store, tiny_images: Path):
    evaluation = evaluate(
        Evaluate(tiny_images, bare_store.folder, feature_network="store", kernel_subsets=3, device="cpu")
    )
    assert evaluation.reference_features == "class tokens cached in the store"
