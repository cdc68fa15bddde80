"""`hub.fetch` with the hub's own client: from a cache on disk, from a server, and without either."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest

from hub_cache import COMMIT, put_into_hub_cache, use_hub_cache
from reglue.errors import UserError
from reglue.hub import fetch

FILES = {"vae/config.json": b"{}", "vae/weights": b"1234"}


class Hub(BaseHTTPRequestHandler):
    """Serves FILES of owner/model, and says of owner/gated that one must log in first."""

    asked: list[str]
    failing: set[str]

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, with_content: bool) -> None:
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        _, _, file = rest.partition("/")
        self.server.asked.append(self.path)  # type: ignore[reportAttributeAccessIssue]
        content = FILES.get(file) if repository == "owner/model" else None
        if with_content and file in self.server.failing:  # type: ignore[reportAttributeAccessIssue]
            self.send_error(400)
            return
        self.send_response(200 if content is not None else 401 if repository == "owner/gated" else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        if content is None:
            self.send_header("X-Error-Code", "GatedRepo" if repository == "owner/gated" else "EntryNotFound")
        else:
            self.send_header("ETag", f'"{file.replace("/", "-")}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if with_content and content is not None:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_hub_cache(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


def go_online(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A hub on this machine, which fails to send what is in its `failing`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked, server.failing = [], set()  # type: ignore[reportAttributeAccessIssue]
        go_online(monkeypatch, server.server_port)
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def asked(hub: ThreadingHTTPServer) -> list[str]:
    """What the hub was asked for."""
    return hub.asked  # type: ignore[reportAttributeAccessIssue]


@pytest.fixture
def failing(hub: ThreadingHTTPServer) -> set[str]:
    """Files that the hub fails to send."""
    return hub.failing  # type: ignore[reportAttributeAccessIssue]


def refusal(repository: str, gated: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        fetch("autoencoder mine", repository, list(FILES), instead="put them elsewhere", gated=gated)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_in_the_cache_is_not_asked_for(cache: Path, tmp_path: Path, asked: list[str]):
    (tmp_path / "file").write_text("cached")
    put_into_hub_cache(cache, "owner/model", dict.fromkeys(FILES, tmp_path / "file"))
    folder = fetch("mine", "owner/model", list(FILES), instead="")
    assert (folder / "weights").read_text() == "cached"
    assert asked == []


def test_files_are_fetched_and_kept(asked: list[str]):
    folder = fetch("mine", "owner/model", ["vae/config.json"], instead="", optional="vae/weights")
    assert (folder / "config.json").read_bytes() == FILES["vae/config.json"]
    assert (folder / "weights").read_bytes() == FILES["vae/weights"]
    asked.clear()
    assert fetch("mine", "owner/model", list(FILES), instead="") == folder
    assert asked == []


def test_what_is_optional_may_be_absent(asked: list[str]):
    folder = fetch("mine", "owner/model", list(FILES), instead="", optional="vae/mean_std.json")
    assert {file.name for file in folder.iterdir()} == {"config.json", "weights"}
    assert any("mean_std.json" in path for path in asked)


CONFIG, OPTIONAL = "vae/config.json", "vae/weights"


def fetch_config(cache: Path, tmp_path: Path) -> Path:
    """With only the configuration in the cache, as what does not know the optional file leaves it."""
    (tmp_path / "file").write_text("cached")
    put_into_hub_cache(cache, "owner/model", {CONFIG: tmp_path / "file"})
    return fetch("mine", "owner/model", [CONFIG], instead="", optional=OPTIONAL)


def test_what_is_optional_is_asked_for_beside_what_is_cached(cache: Path, tmp_path: Path, asked: list[str]):
    folder = fetch_config(cache, tmp_path)
    assert (folder / "config.json").read_text() == "cached"
    assert (folder / "weights").read_bytes() == FILES[OPTIONAL]
    assert all(COMMIT in path for path in asked), "of the cached commit"
    asked.clear()
    assert fetch_config(cache, tmp_path) == folder
    assert asked == []


def test_that_what_is_optional_is_absent_is_asked_once(cache: Path, tmp_path: Path, asked: list[str]):
    (tmp_path / "file").write_text("cached")
    put_into_hub_cache(cache, "owner/model", {CONFIG: tmp_path / "file"})
    for questions in (True, False):
        asked.clear()
        fetch("mine", "owner/model", [CONFIG], instead="", optional="vae/mean_std.json")
        assert bool(asked) == questions


def test_without_a_network_the_unknown_optional_file_is_named(cache: Path, tmp_path: Path):
    with pytest.warns(UserWarning, match=r"mine: whether owner/model has vae/weights is not known"):
        folder = fetch_config(cache, tmp_path)
    assert (folder / "config.json").read_text() == "cached"


def test_an_optional_file_that_fails_leaves_no_set_that_looks_complete(
    failing: set[str], monkeypatch: pytest.MonkeyPatch
):
    failing.add(OPTIONAL)
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("mine", "owner/model", [CONFIG], instead="", optional=OPTIONAL)
    failing.clear()
    folder = fetch("mine", "owner/model", [CONFIG], instead="", optional=OPTIONAL)
    assert {file.name for file in folder.iterdir()} == {"config.json", "weights"}


def test_terms_that_must_be_accepted_are_said(asked: list[str]):
    message = refusal("owner/gated")
    assert "accept its terms" in message
    assert "hf auth login" in message
    assert "accept its terms" not in refusal("owner/other")
    assert "accept its terms" in refusal("owner/other", gated=True)


def test_without_a_network_it_says_at_once_what_to_download(cache: Path, monkeypatch: pytest.MonkeyPatch):
    needed = "download vae/config.json and vae/weights of owner/model from the Hugging Face hub and put them elsewhere"
    assert f"autoencoder mine is not in the hub's cache and cannot be fetched (OfflineModeIsEnabled): {needed}" in (
        refusal("owner/model")
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        closed = server.server_port
    go_online(monkeypatch, closed)
    started = time.perf_counter()
    assert f"(ConnectError): {needed}" in refusal("owner/model")
    assert time.perf_counter() - started < 5
