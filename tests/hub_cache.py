"""A cache of the Hugging Face hub on disk, so that what would be fetched is found there by the hub's own client."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def use_hub_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """As HF_HUB_CACHE and HF_HUB_OFFLINE in the environment, which the client reads but once."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def put_into_hub_cache(cache: Path, repository: str, files: dict[str, Path]) -> None:
    """Copy files (path within the repository → file on disk) into the cache, as a download would leave them."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    for name, file in files.items():
        place = folder / "snapshots" / COMMIT / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
