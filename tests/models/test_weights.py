"""Search order, verification and download of weights files, against a real local web server."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dask
import pytest

from dask_imgcurator.models import weights
from dask_imgcurator.models.heads import HEADS
from dask_imgcurator.models.weights import WeightsError, WeightsFile, find, read, resolve_dir

GOOD = b"published bytes" * 100
BAD = b"<html>please log in</html>"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path == "/missing.pth":
            self.send_error(404)
            return
        body = BAD if self.path == "/wrong.pth" else GOOD
        self.send_response(200)
        self.send_header("Content-Length", str(len(GOOD) if self.path == "/cut.pth" else len(body)))
        self.end_headers()
        self.wfile.write(body[:50] if self.path == "/cut.pth" else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as httpd:
        httpd.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No proxy between a test and its server, and no configuration or cache of the machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with dask.config.set({"imgcurator.weights-dir": None, "imgcurator.cache-dir": str(tmp_path / "cache")}):
        yield


def described(url: str = "http://127.0.0.1:9/head.pth") -> WeightsFile:
    return WeightsFile("aesthetic", "head.pth", hashlib.sha256(GOOD).hexdigest(), url, "MIT")


def served(server: ThreadingHTTPServer, name: str) -> WeightsFile:
    return described(f"http://127.0.0.1:{server.server_address[1]}/{name}")


def put(folder: Path, name: str = "aesthetic/head.pth", data: bytes = GOOD) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("layout", ["aesthetic/head.pth", "head.pth"])
def test_weights_dir_in_both_layouts(tmp_path: Path, layout: str) -> None:
    path = put(tmp_path / "w", layout)
    assert find(described(), tmp_path / "w") == path
    assert read(described(), str(tmp_path / "w")) == GOOD


def test_order_of_places(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    """Each place serves only where those before it have nothing: the first is taken away, again and again."""
    file = served(server, "head.pth")
    argument, configured = tmp_path / "argument", tmp_path / "configured"
    cached = tmp_path / "cache" / "weights" / "aesthetic" / "head.pth"
    places = [put(argument), put(argument, "head.pth"), put(configured), put(configured, "head.pth")]
    places.append(put(cached.parent, cached.name))
    with dask.config.set({"imgcurator.weights-dir": str(configured)}):
        for place in places:
            assert find(file, argument) == place
            place.unlink()
        assert server.asked == []
        assert find(file, argument) == cached
    assert server.asked == ["/head.pth"]
    assert cached.read_bytes() == GOOD
    assert find(file) == cached
    assert server.asked == ["/head.pth"]  # the second time from the cache
    assert list(cached.parent.iterdir()) == [cached]


@pytest.mark.parametrize("place", ["argument", "configured", "cache/weights"])
def test_wrong_bytes_stop_the_search(tmp_path: Path, server: ThreadingHTTPServer, place: str) -> None:
    path = put(tmp_path / place, data=BAD)
    (tmp_path / "argument").mkdir(exist_ok=True)
    config = {"imgcurator.weights-dir": str(tmp_path / "configured")} if place == "configured" else {}
    with dask.config.set(config), pytest.raises(WeightsError) as caught:
        find(served(server, "head.pth"), tmp_path / "argument")
    message = str(caught.value)
    assert str(path) in message
    assert hashlib.sha256(BAD).hexdigest() in message
    assert hashlib.sha256(GOOD).hexdigest() in message
    assert "remove it" in message
    assert server.asked == []


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    put(tmp_path / "cache" / "weights")
    with pytest.raises(WeightsError, match="nowhere is not a folder"):
        find(described(), tmp_path / "nowhere")
    with (
        dask.config.set({"imgcurator.weights-dir": str(tmp_path / "nowhere")}),
        pytest.raises(WeightsError, match=r"imgcurator\.weights-dir.*nowhere is not a folder"),
    ):
        find(described())
    with pytest.raises(WeightsError, match="is not a folder"):
        find(described(), put(tmp_path, "file"))


def test_not_found_names_every_place_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        dask.config.set({"imgcurator.weights-dir": str(tmp_path / "b"), "imgcurator.cache-dir": str(tmp_path / "c")}),
        pytest.raises(WeightsError) as caught,
    ):
        find(described(), tmp_path / "a", download=False)
    message = str(caught.value)
    for folder in "a", "b", "c/weights":
        assert str(tmp_path / folder / "aesthetic" / "head.pth") in message
    for word in (
        described().url,
        "--weights-dir",
        "DASK_IMGCURATOR__WEIGHTS_DIR",
        "nsfw-starter",
        "turned off",
    ):
        assert word in message
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [("missing.pth", "404"), ("wrong.pth", hashlib.sha256(BAD).hexdigest()), ("cut.pth", "head.pth")],
    ids=["404", "wrong", "cut"],
)
def test_download_that_fails_leaves_nothing(tmp_path: Path, server: ThreadingHTTPServer, name: str, says: str) -> None:
    file = served(server, name)
    with pytest.raises(WeightsError, match=says) as caught:
        find(file)
    assert file.url in str(caught.value)
    assert "--weights-dir" in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.pth*"))


def test_connection_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nobody else can answer there
        with pytest.raises(WeightsError, match=r"download failed: .*refused") as caught:
            find(described(f"http://127.0.0.1:{taken.getsockname()[1]}/head.pth"))
    assert "cache" in str(caught.value)


def test_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(WeightsError, match="timed out"):
            find(described(f"http://127.0.0.1:{silent.getsockname()[1]}/head.pth"))


def test_endless_answer(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_BYTES", 100)
    with pytest.raises(WeightsError, match="served 101 bytes"):
        find(served(server, "head.pth"))


def test_many_processes_download_at_once(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    file = served(server, "head.pth")
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: find(file), range(16)))
    assert [p.read_bytes() for p in paths] == [GOOD]
    assert set(next(iter(paths)).parent.iterdir()) == paths


def test_cache_that_cannot_be_written(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    blocked = put(tmp_path, "file")  # a file where the folder should be: holds for root too
    with (
        dask.config.set({"imgcurator.cache-dir": str(blocked)}),
        pytest.raises(WeightsError, match="DASK_IMGCURATOR__CACHE_DIR"),
    ):
        find(served(server, "head.pth"))


def test_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dask.config.set({"imgcurator.cache-dir": None}):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        path = put(tmp_path / "xdg" / "dask_imgcurator" / "weights")
        assert find(described(), download=False) == path
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        path = put(tmp_path / "home" / ".cache" / "dask_imgcurator" / "weights")
        assert find(described(), download=False) == path


def test_resolve_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_dir(None) is None
    assert resolve_dir("w") == str(tmp_path / "w")
    assert resolve_dir("~/w") == str(tmp_path / "w")
    with dask.config.set({"imgcurator.weights-dir": "configured"}):
        assert resolve_dir(None) == str(tmp_path / "configured")
        assert resolve_dir("w") == str(tmp_path / "w")
    with dask.config.set({"imgcurator.weights-dir": ""}):
        assert resolve_dir(None) is None


def test_environment_variable_and_light_import(tmp_path: Path) -> None:
    code = (
        "import sys; import dask_imgcurator.models.heads; from dask_imgcurator.models.weights import resolve_dir; "
        "print(resolve_dir(None)); assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "DASK_IMGCURATOR__WEIGHTS_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path)


def test_error_reaches_the_client_whole() -> None:
    """Dask pickles what a worker raises."""
    error = pickle.loads(pickle.dumps(WeightsError("what, where, remedy")))
    assert isinstance(error, WeightsError)
    assert str(error) == "what, where, remedy"


def test_published_files(shared: Path, tmp_path: Path) -> None:
    sums = dict(reversed(row.split()) for row in (shared / "weights/SHA256SUMS").read_text().splitlines())
    files = [spec.weights for spec in HEADS.values() if spec.weights]
    assert len(files) == 6
    for file in files:
        assert sums[f"{file.folder}/{file.filename}"] == file.sha256
        assert find(file, shared / "weights", download=False).parent.name == file.folder
        shutil.copyfile(shared / "weights" / file.folder / file.filename, tmp_path / file.filename)
        assert find(file, tmp_path, download=False).parent == tmp_path
        with pytest.raises(WeightsError, match="is not the published"):
            find(replace(file, sha256="0" * 64), tmp_path)
