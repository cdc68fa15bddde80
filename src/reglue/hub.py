"""Files of the Hugging Face hub: from its cache on this machine, else from the network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

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
    weights from one day to the next, and works offline.

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
    if all(isinstance(path, str) for path in cached):
        return Path(str(cached[0])).parent
    try:
        # One question first, because hf_hub_download asks an unreachable network for half a minute.
        get_hf_file_metadata(hf_hub_url(repository, files[0]))
        paths = [Path(hf_hub_download(repository, file)) for file in files]
        if optional is not None:
            with suppress(EntryNotFoundError):
                hf_hub_download(repository, optional)
    except Exception as error:  # whatever the hub's client raises: offline, refused, not found
        terms = ""
        if gated or isinstance(error, GatedRepoError):
            terms = "accept its terms on its page there and log in with `hf auth login`, or "
        raise UserError(
            f"{wanted} is not in the hub's cache and cannot be fetched ({type(error).__name__}): {terms}download "
            f"{' and '.join(files)} of {repository} from the Hugging Face hub and {instead}"
        ) from error
    return paths[0].parent
