"""Files of the Hugging Face hub: from its cache on this machine, else from the network."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

from reglue.errors import UserError


def fetch(
    wanted: str,
    repository: str,
    files: Sequence[str],
    *,
    instead: str,
    optional: str | None = None,
    gated: bool = False,
) -> Path:
    """The folder that holds the files of a repository, in the hub's cache.

    What is in the cache already is taken from there, without a look at the network: the same name gives the same
    weights from one day to the next, and works offline. Only for an optional file of which the cache does not know
    whether the repository has it is the network asked; where that fails, the rest is taken with a warning.

    Args:
        wanted: what the user asked for, for the message: `encoder dinov2-b`.
        repository: `OWNER/REPOSITORY`.
        files: paths within the repository, all in one folder of it.
        instead: what to do with files that were downloaded by hand, for the message.
        optional: a file that is fetched too if the repository has it.
        gated: whether the repository is known to ask for its terms to be accepted.

    Raises:
        UserError: the files are neither in the cache nor can they be fetched. It comes at once: nothing is retried.
    """
    cached = [try_to_load_from_cache(repository, file) for file in files]
    found = [Path(path) for path in cached if isinstance(path, str)]
    if len(found) == len(files):
        _complete(wanted, repository, optional, commit=found[0].parents[files[0].count("/")].name)
        return found[0].parent
    try:
        _ask(repository, files[0])
        if optional is not None:  # First, so that whatever stops this leaves no set that looks complete.
            _download_if_there(repository, optional)
        paths = [Path(hf_hub_download(repository, file)) for file in files]
    except Exception as error:  # whatever the hub's client raises: offline, refused, not found
        terms = ""
        if gated or isinstance(error, GatedRepoError):
            terms = "accept its terms on its page there and log in with `hf auth login`, or "
        raise UserError(
            f"{wanted} is not in the hub's cache and cannot be fetched ({type(error).__name__}): {terms}download "
            f"{' and '.join(files)} of {repository} from the Hugging Face hub and {instead}; starter needs no download"
        ) from error
    return paths[0].parent


def _complete(wanted: str, repository: str, optional: str | None, commit: str) -> None:
    """Fetch the optional file beside files of a commit that are in the cache, unless the cache knows about it.

    The commit is named, so that a newer one on the hub does not take the place of what is cached.
    """
    if optional is None or try_to_load_from_cache(repository, optional, revision=commit) is not None:
        return  # There, or known to be absent.
    try:
        _download_if_there(repository, optional, commit)
    except Exception as error:  # as in `fetch`
        warnings.warn(
            f"{wanted}: whether {repository} has {optional} is not known here and cannot be asked "
            f"({type(error).__name__}); going on without it",
            stacklevel=3,
        )


def _download_if_there(repository: str, file: str, commit: str | None = None) -> None:
    """Download a file, or have the cache note that the repository has none."""
    with suppress(EntryNotFoundError):
        _ask(repository, file, commit)
    try:
        hf_hub_download(repository, file, revision=commit)
    except LocalEntryNotFoundError:  # The network failed, which is an EntryNotFoundError as well.
        raise
    except EntryNotFoundError:
        pass


def _ask(repository: str, file: str, commit: str | None = None) -> None:
    """Raise what is wrong, at once: `hf_hub_download` asks an unreachable network for half a minute."""
    get_hf_file_metadata(hf_hub_url(repository, file, revision=commit))
