"""Remote shards: streamed whole, once, to a temporary file; or only the wanted ranges.

A shard that is scored is read from first to last byte, so it is streamed, in order and once, to an unnamed temporary
file, from which headers, captions and images are read as from any local tar. Memory holds one piece at a time; the
file's space is freed once no process holds it, however the process ends. If only some samples are wanted (to copy kept
ones, or to embed a filtered frame), only their ranges are fetched.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any
from weakref import WeakValueDictionary

from dask.base import tokenize

from .files import RemoteError, file_system, persist, scratch_folder

#: Bytes per request when a whole shard is streamed.
PIECE = 16 << 20
#: Ranges closer than this (bytes) are fetched as one; a request costs more than these bytes.
GAP = 16 << 10
#: Bytes of ranges fetched concurrently.
GROUP = 32 << 20


@dataclass
class _Copy:
    """A shard in a temporary file of this process."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    file: IO[bytes] | None = None
    version: str = ""
    holders: int = 0

    def open(self) -> IO[bytes]:
        assert self.file is not None
        # A handle with its own position; the file no longer has a name.
        return open(f"/proc/self/fd/{self.file.fileno()}", "rb")  # noqa: PTH123

    def __del__(self) -> None:
        if self.file is not None:
            self.file.close()


_copies: WeakValueDictionary[str, _Copy] = WeakValueDictionary()
_lock = threading.Lock()

# The copy that a thread used last stays until the thread takes another or ends: the next step on the same partition,
# in the same task, reads it too, even if other tasks stream theirs in between.
_latest = threading.local()


def _key(url: str, storage_options: Mapping[str, Any] | None) -> str:
    return f"{url} {tokenize(dict(storage_options or {}))}"


@contextlib.contextmanager
def hold_copy(url: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Hold a copy of a whole remote shard on this machine, shared by threads; `open_remote` then reads the copy."""
    key = _key(url, storage_options)
    with _lock:
        _latest.copy = copy = _copies.setdefault(key, _Copy())
        copy.holders += 1
    try:
        with copy.lock:
            now = version(url, storage_options)
            if copy.file is not None and copy.version != now and copy.holders == 1:
                # No other thread reads the copy of the shard's old version.
                copy.file.close()
                copy.file = None
            if copy.file is None:
                copy.file, copy.version = _download(url, storage_options), now
        yield
    finally:
        with _lock:
            copy.holders -= 1


#: File systems' names for a version marker, the most reliable first.
_CHANGED = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")


def version(url: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """The version of a remote file: its size, and its ETag or modification time."""
    fs, path = file_system(url, storage_options)
    return describe_version(persist(url, lambda: fs.info(path)))


def describe_version(info: Mapping[str, Any]) -> str:
    """The version of a file, from its file system's information about it."""
    changed = next((str(info[k]) for k in _CHANGED if info.get(k)), "")
    return f"size={info.get('size')} changed={changed}"


def find_copy(url: str, storage_options: Mapping[str, Any] | None = None) -> IO[bytes] | None:
    """Open the copy of a remote shard, if there is one."""
    with _lock:
        copy = _copies.get(_key(url, storage_options))
        return copy.open() if copy is not None and copy.file is not None and copy.holders else None


def open_remote(url: str, storage_options: Mapping[str, Any] | None = None) -> IO[bytes]:
    """Open a remote file for reading: its copy, or by ranges; seekable."""
    copy = find_copy(url, storage_options)
    if copy is not None:
        return copy
    fs, path = file_system(url, storage_options)
    file: IO[bytes] = persist(url, lambda: fs.open(path, "rb"))
    return file


def _download(url: str, storage_options: Mapping[str, Any] | None) -> IO[bytes]:
    """Stream a file, in order, into an unnamed temporary one."""
    fs, path = file_system(url, storage_options)
    folder = scratch_folder()
    target = tempfile.TemporaryFile(dir=folder, prefix="shard-")
    try:
        try:
            _in_pieces(fs, path, url, target)
        except ValueError:
            # A web server without ranges: in one go, restarting from the beginning when cut off.
            persist(url, lambda: _in_one_go(fs, path, url, target))
        target.flush()
    except BaseException as err:
        target.close()
        if isinstance(err, OSError) and not isinstance(err, RemoteError) and err.errno is not None:
            raise OSError(
                err.errno, f"no room for a copy of {url} in {folder} (set Dask's temporary-directory): {err.strerror}"
            ) from err
        raise
    return target


def _in_pieces(fs: Any, path: str, url: str, target: IO[bytes]) -> None:
    # No cache: each piece is requested once, and again if it was cut off.
    source = persist(url, lambda: fs.open(path, "rb", block_size=PIECE, cache_type="none"))
    with source:
        position = 0

        def piece() -> bytes:
            source.seek(position)
            data: bytes = source.read(PIECE)
            # Some servers close a slow connection as if the response were complete.
            if len(data) < PIECE and size is not None and position + len(data) < size:
                raise EOFError(f"the answer ends at byte {position + len(data):,} of {size:,}")
            return data

        size = getattr(source, "size", None)
        while data := persist(url, piece):
            target.write(data)
            position += len(data)
            if position == size:
                break


def _in_one_go(fs: Any, path: str, url: str, target: IO[bytes]) -> None:
    target.seek(0)
    target.truncate()
    size = fs.info(path).get("size")
    with fs.open(path, "rb", block_size=0) as source:
        while data := source.read(1 << 20):
            target.write(data)
    if size is not None and target.tell() != size:
        raise EOFError(f"the answer ends at byte {target.tell():,} of {size:,}")


# --- ranges ---------------------------------------------------------------------------------------


def read_ranges(
    url: str, extents: Sequence[tuple[int, int]], storage_options: Mapping[str, Any] | None = None
) -> Iterator[bytes]:
    """Yield pieces (offset, length) of a remote file, in order, with at most `GROUP` bytes (or one piece) in memory."""
    # Neighbours share a request; several requests run concurrently.
    fs, path = file_system(url, storage_options)
    probed = not url.startswith("http")
    for group in _groups(extents):
        requests = _merge(group)
        if not probed:
            # A web server without ranges responds with the whole file: then one copy serves all.
            first, probed = requests[0], True
            data = persist(url, lambda first=first: fs.cat_file(path, *first))  # type: ignore[misc]
            if len(data) > first[1] - first[0]:
                del data
                yield from _from_copy(url, extents, storage_options)
                return
            blobs = [data, *_fetch(fs, path, url, requests[1:])]
        else:
            blobs = _fetch(fs, path, url, requests)
        at = 0
        for offset, nbytes in group:
            while not (requests[at][0] <= offset and offset + nbytes <= requests[at][1]):
                at += 1
            start = offset - requests[at][0]
            yield blobs[at][start : start + nbytes]


def _from_copy(
    url: str, extents: Sequence[tuple[int, int]], storage_options: Mapping[str, Any] | None
) -> Iterator[bytes]:
    with hold_copy(url, storage_options), open_remote(url, storage_options) as file:
        for offset, nbytes in extents:
            file.seek(offset)
            yield file.read(nbytes)


def _fetch(fs: Any, path: str, url: str, requests: Sequence[tuple[int, int]]) -> list[bytes]:
    if not requests:
        return []
    paths, starts, ends = [path] * len(requests), [a for a, _ in requests], [b for _, b in requests]
    return list(persist(url, lambda: fs.cat_ranges(paths, starts, ends, on_error="raise")))


def _groups(extents: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    group: list[tuple[int, int]] = []
    total = 0
    for extent in extents:
        if group and total + extent[1] > GROUP:
            yield group
            group, total = [], 0
        group.append(extent)
        total += extent[1]
    if group:
        yield group


def _merge(extents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Start and end of the requests for some extents; neighbouring extents share one."""
    out: list[tuple[int, int]] = []
    for offset, nbytes in extents:
        if out and out[-1][0] <= offset <= out[-1][1] + GAP:
            out[-1] = (out[-1][0], max(out[-1][1], offset + nbytes))
        else:
            out.append((offset, offset + nbytes))
    return out
