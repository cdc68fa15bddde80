"""Runs by name: the package's own, and those on the Hugging Face hub, fetched from it and put there."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from reglue.errors import UserError
from reglue.run import COMPRESSOR
from reglue.run import FILE as RECORD
from reglue.training import checkpoints

STARTER = "starter"
"""The run that the package brings along."""
AUTOENCODER = "autoencoder"
"""Folder of an autoencoder that a shared run brings along."""
NEEDED = [
    RECORD,
    f"{checkpoints.FOLDER}/*/{checkpoints.EMA}",
    f"{checkpoints.FOLDER}/*/{checkpoints.PROGRESS}",
    f"{COMPRESSOR}/*",
    f"{AUTOENCODER}/*",
]
"""Of a repository, what sampling reads."""
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_run(run: str | Path, revision: str | None = None) -> Path:
    """The folder of a run: a local one, or else the package's (`starter`) or the local copy of `OWNER/NAME` on the hub.

    Raises UserError if the hub is asked and cannot be reached, or has no such repository. Whether the folder holds a
    run is for the caller to see.
    """
    folder = Path(run)
    if str(run) == STARTER and not folder.exists():
        return Path(str(resources.files("reglue.starter"))) / "model"
    if folder.exists() or not NAME.fullmatch(str(run)):
        return folder
    try:
        return Path(snapshot_download(str(run), revision=revision, allow_patterns=NEEDED, etag_timeout=5))
    except Exception as error:  # whatever the hub's client raises: offline, refused, not found
        raise UserError(
            f"{run}: there is no such folder, and the Hugging Face hub gives no such model ({_reason(error)}); check "
            "the name and the connection, or download the repository elsewhere and give its folder"
        ) from error


def known_as(run: str | Path) -> str:
    """The absolute path of a run's folder, so that it is found from elsewhere too; any other run's name."""
    return str(Path(run).resolve() if Path(run).exists() else run)


def push(folder: Path, name: str, private: bool) -> str:
    """Make the repository `OWNER/NAME` hold what a folder holds. Returns its address. Raises UserError."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name on the Hugging Face hub: give OWNER/NAME")
    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        # Weights of an earlier step would be taken for checkpoints of this run.
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Model, record and card, written by reglue",
            delete_patterns=[f"{checkpoints.FOLDER}/*"],
        )
    except Exception as error:  # whatever the hub's client raises: offline, not logged in, refused
        raise UserError(
            f"{name} cannot be written on the Hugging Face hub ({_reason(error)}); check the connection, log in with "
            "`hf auth login`, or write a folder with `ImageModel.save` and upload it yourself"
        ) from error
    return str(address)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
