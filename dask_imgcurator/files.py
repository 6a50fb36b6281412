"""Small file chores on any fsspec URL: join, list, write whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import fsspec

__all__ = [
    "exists",
    "is_local",
    "join",
    "list_files",
    "local_path",
    "make_folder",
    "read_text",
    "remove",
    "remove_partial",
    "temporary_name",
    "write_whole",
]

_PARTIAL = ".partial-"


def is_local(url: str) -> bool:
    """Whether a URL names a file of this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> Path:
    """Return the absolute path of a local URL; links are kept."""
    return Path(os.path.abspath(Path(url.split("://", 1)[-1]).expanduser()))  # noqa: PTH100  (resolve() would follow links)


def join(folder: str, name: str) -> str:
    """Append a name to a folder's URL."""
    return str(local_path(folder) / name) if is_local(folder) else f"{folder.rstrip('/')}/{name}"


def make_folder(url: str) -> None:
    """Create a local folder and its parents; object stores have none."""
    if is_local(url):
        local_path(url).mkdir(parents=True, exist_ok=True)


def exists(url: str, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether there is a file."""
    if is_local(url):
        return local_path(url).exists()
    fs, path = fsspec.core.url_to_fs(url, **(storage_options or {}))
    return bool(fs.exists(path))


def list_files(folder: str, suffix: str, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """URLs of the files in a folder whose name ends so, sorted; none for a folder that does not exist."""
    if is_local(folder):
        names = local_path(folder).glob(f"*{suffix}") if local_path(folder).is_dir() else []
        return sorted(str(p) for p in names if not p.name.startswith("."))
    fs, path = fsspec.core.url_to_fs(folder, **(storage_options or {}))
    return sorted(fs.unstrip_protocol(p) for p in fs.glob(f"{path.rstrip('/')}/*{suffix}"))


def read_text(url: str, storage_options: Mapping[str, Any] | None = None) -> str | None:
    """Content of a small text file; None where there is none."""
    try:
        with fsspec.open(url, "rb", **(storage_options or {})) as file:
            return file.read().decode()
    except FileNotFoundError:
        return None


def remove(url: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Remove a file, if it is there."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    fs, path = fsspec.core.url_to_fs(url, **(storage_options or {}))
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def temporary_name(url: str) -> str:
    """Name beside a local file under which it is written; hidden, so that no glob for results finds it."""
    path = local_path(url)
    return str(path.with_name(f"{_PARTIAL}{uuid.uuid4().hex[:8]}-{path.name}"))


def remove_partial(folder: str) -> int:
    """Remove what processes that were killed left half written; returns how many files those were."""
    if not is_local(folder) or not local_path(folder).is_dir():
        return 0
    stale = list(local_path(folder).glob(f"{_PARTIAL}*"))
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


@contextlib.contextmanager
def write_whole(url: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when it is whole.

    Local files are written under a temporary name and renamed; an object store shows an object when its upload is
    closed, and not at all after an error.
    """
    if is_local(url):
        temporary = Path(temporary_name(url))
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(local_path(url))
        finally:
            temporary.unlink(missing_ok=True)
        return
    # A file system of its own: fsspec shares them between threads, and a transaction holds all that is written by one.
    fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, **(storage_options or {}))
    with fs.transaction, fs.open(path, "wb") as file:
        yield file
