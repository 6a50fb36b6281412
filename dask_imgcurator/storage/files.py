"""Small file operations on any fsspec URL: join, list, read, write atomically; with retries."""

from __future__ import annotations

import contextlib
import copy
import errno
import glob
import os
import random
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

T = TypeVar("T")

_PARTIAL = ".partial-"

#: Files to process concurrently, how many are timed first, and seconds per file above which threads pay off.
_AT_ONCE, _TRIED, _QUICK = 16, 8, 0.002

#: Attempts per request to a remote file system, besides the file system's own retries.
ATTEMPTS = 5


class RemoteError(OSError):
    """A remote file system failed repeatedly."""


# --- names ----------------------------------------------------------------------------------------


def is_local(url: str) -> bool:
    """Whether a URL names a local file."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> Path:
    """Return a local URL's absolute path; links are kept."""
    return Path(_local_name(url))


def _local_name(url: str) -> str:
    name = url.split("://", 1)[-1]
    if name.startswith("~") and not os.path.exists(name):  # noqa: PTH110
        name = os.path.expanduser(name)  # noqa: PTH111  (no such user: it is a file name)
    return os.path.abspath(name)  # noqa: PTH100  (resolve() would follow links)


def absolute(url: str | os.PathLike[str]) -> str:
    """A URL that means the same in processes with other working directories."""
    return _local_name(os.fspath(url)) if is_local(os.fspath(url)) else os.fspath(url)


def at_once(function: Callable[[str], T], urls: Iterable[str]) -> list[T]:
    """Apply a function to many files, concurrently if each takes a while, like a request to an object store."""
    items, begin = list(urls), time.perf_counter()
    found = [function(url) for url in items[:_TRIED]]
    if time.perf_counter() - begin < _QUICK * len(found):  # on a disk, threads take twice the time
        return found + [function(url) for url in items[_TRIED:]]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return found + list(pool.map(function, items[_TRIED:]))


def join(folder: str, name: str) -> str:
    """Append a name to a folder's URL."""
    return str(local_path(folder) / name) if is_local(folder) else f"{folder.rstrip('/')}/{name}"


# --- remote file systems --------------------------------------------------------------------------


def file_system(url: str, storage_options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """Return the fsspec file system and path of a URL; ValueError if fsspec cannot (the message says why)."""
    # A copy, because botocore changes nested options in place; they would no longer identify the file system or copy.
    options = copy.deepcopy(dict(storage_options or {}))
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as err:
        raise ValueError(f"cannot open {url}: {err}") from err
    except TypeError as err:
        raise ValueError(f"cannot open {url} with storage options {sorted(options)}: {err}") from err
    # Other processes write to the same folders: a cached listing would hide their files.
    fs.invalidate_cache()
    return fs, path


#: Errors that a retry would only repeat. By name, because their packages may not be installed.
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)
_PERMANENT_NAMES = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ParamValidationError"}
_FULL = (errno.ENOSPC, errno.EDQUOT)

#: Packages under fsspec's file systems, whose errors are not `OSError`.
_NETWORK = {"aiohttp", "aiobotocore", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"}


def _is_transient(err: BaseException | None) -> bool:
    if isinstance(err, FileNotFoundError) and type(err.__cause__).__module__.startswith("aiohttp"):
        # fsspec raises this for any failure to get a file's size from a web server.
        err = err.__cause__
    if not isinstance(err, Exception) or isinstance(err, _PERMANENT) or type(err).__name__ in _PERMANENT_NAMES:
        return False
    if isinstance(err, OSError) and err.errno in _FULL:
        return False
    status = getattr(err, "status", None)  # of aiohttp's errors
    return not (isinstance(status, int) and (status == 501 or 400 <= status < 500) and status not in (408, 429))


def persist(url: str, action: Callable[[], T]) -> T:
    """Run an action on a remote file, retrying after a pause; RemoteError once all `ATTEMPTS` failed."""
    # File systems raise many kinds of errors; here all are `OSError`. Where a retry cannot help (FileNotFoundError,
    # PermissionError …), the error is raised at once. `url` is for the message.
    # A library's retry objects hold a `threading.local` each. Python 3.11 deadlocks when one is collected as garbage
    # while a Dask worker's profiler asks for the frames of all threads (python/cpython#106883).
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as err:
            again = _is_transient(err)
            if isinstance(err, TypeError):  # a file system may be constructed only now
                raise ValueError(f"cannot open {url}: {err}; are the storage options right?") from err
            if isinstance(err, PermissionError) and url.split("://")[-1] not in str(err):  # s3fs does not name the file
                raise PermissionError(f"{url}: {err}") from err
            if not again and (isinstance(err, _PERMANENT) or (isinstance(err, OSError) and err.errno in _FULL)):
                raise
            if not again or attempt == ATTEMPTS:
                cause = err.__cause__ if again and isinstance(err, FileNotFoundError) else err
                times = f" ({ATTEMPTS} attempts)" if again else ""
                raise RemoteError(f"{url}: {type(cause).__name__}: {cause or 'no answer'}{times}") from err
        time.sleep(random.uniform(0, min(20, 0.5 * 2**attempt)))
    raise AssertionError("the last attempt returns or raises")


def scratch_folder() -> str:
    """Folder for temporary copies: that of the Dask worker, which Dask's ``temporary-directory`` sets."""
    from distributed import get_worker

    try:
        return str(get_worker().local_directory)
    except ValueError:  # not in a task
        return tempfile.gettempdir()


# --- chores ---------------------------------------------------------------------------------------


def make_folder(url: str) -> None:
    """Create a local folder and its parents; object stores have no folders."""
    if is_local(url):
        local_path(url).mkdir(parents=True, exist_ok=True)


def exists(url: str, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether a file exists."""
    if is_local(url):
        return local_path(url).exists()
    fs, path = file_system(url, storage_options)

    def look() -> bool:
        fs.invalidate_cache()
        return bool(fs.exists(path))

    return persist(url, look)


def list_files(
    folder: str, suffix: str, storage_options: Mapping[str, Any] | None = None, prefix: str = ""
) -> list[str]:
    """Sorted URLs of the files in a folder with this ending; none if the folder does not exist."""
    if is_local(folder):
        names = local_path(folder).glob(f"{prefix}*{suffix}") if local_path(folder).is_dir() else []
        return sorted(str(p) for p in names if prefix or not p.name.startswith("."))
    fs, path = file_system(folder, storage_options)

    def look() -> list[str]:
        fs.invalidate_cache()
        return list(fs.glob(f"{glob.escape(path.rstrip('/'))}/{prefix}*{suffix}"))

    return sorted(fs.unstrip_protocol(p) for p in persist(folder, look))


def open_local(url: str) -> IO[bytes]:
    """Open a local file for reading; OSError unless it is a regular file: opening a pipe could wait forever."""
    path = local_path(url)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


@contextlib.contextmanager
def opened(url: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[IO[bytes]]:
    """Open a file for reading; seekable, remote ones by ranges."""
    if is_local(url):
        with open_local(url) as file:
            yield file
        return
    fs, path = file_system(url, storage_options)
    try:
        with persist(url, lambda: fs.open(path, "rb")) as file:
            yield file
    except Exception as err:
        if type(err).__module__.partition(".")[0] in _NETWORK:
            raise RemoteError(f"{url}: {type(err).__name__}: {err or 'no answer'}") from err
        raise


@contextlib.contextmanager
def opened_parquet(url: str, options: Mapping[str, Any] | None = None, coded: Iterable[str] = ()) -> Iterator[Any]:
    """Open a Parquet file (`pyarrow.parquet.ParquetFile`); text columns in `coded` are read as dictionaries."""
    if is_local(url):
        # Python file objects, and prefetching by threads as object stores need it, would make reads 50 % slower.
        name = _local_name(url)
        footer, _ = _footer(name, version := _version(name))
        with pa.OSFile(name) as file:
            same = _version(name) == version  # else it was replaced meanwhile
            yield pq.ParquetFile(file, metadata=footer if same else None, read_dictionary=list(coded), pre_buffer=False)
        return
    with opened(url, options) as remote:
        yield persist(url, lambda: pq.ParquetFile(remote, read_dictionary=list(coded)))


def parquet_footer(url: str, storage_options: Mapping[str, Any] | None = None) -> tuple[pq.FileMetaData, pa.Schema]:
    """Read a Parquet file's footer, and its schema; those of an unchanged local file are cached."""
    if not is_local(url):
        with opened_parquet(url, storage_options) as remote:
            return remote.metadata, remote.schema_arrow
    return _footer(name := _local_name(url), _version(name))


def _version(name: str) -> tuple[int, ...]:
    found = os.stat(name)  # noqa: PTH116  (a Path takes twice the time)
    if not stat.S_ISREG(found.st_mode):
        open_local(name)  # raises
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(2000)  # each pass over a table reads its footers first; those of 1,000 score files take 31 MB
def _footer(name: str, version: tuple[int, ...]) -> tuple[pq.FileMetaData, pa.Schema]:
    with pa.OSFile(name) as file:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        return parquet.metadata, parquet.schema_arrow


def read_text(url: str, storage_options: Mapping[str, Any] | None = None) -> str | None:
    """Content of a small text file; None if it does not exist."""
    try:
        if is_local(url):
            with open_local(url) as file:
                return file.read().decode()
        fs, path = file_system(url, storage_options)
        return str(persist(url, lambda: fs.cat_file(path)).decode())
    except FileNotFoundError:
        return None


def remove(url: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Remove a file if it exists."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
        return
    fs, path = file_system(url, storage_options)
    with contextlib.suppress(FileNotFoundError):
        persist(url, lambda: fs.rm_file(path))


#: The writing job: a process and thread, which may work through others.
_writer: ContextVar[str | None] = ContextVar("writer", default=None)


def this_writer() -> str:
    """Name of the current job: the process and thread that run it, whichever process writes for it."""
    return _writer.get() or f"{os.uname().nodename}-{os.getpid()}-{threading.get_native_id()}"


@contextlib.contextmanager
def writing_for(writer: str) -> Iterator[None]:
    """Write on behalf of another process."""
    token = _writer.set(writer)
    try:
        yield
    finally:
        _writer.reset(token)


def temporary_name(url: str) -> str:
    """Temporary name beside a local file, hidden from globs for results."""
    path = local_path(url)
    return str(path.with_name(f"{_PARTIAL}{this_writer()}-{uuid.uuid4().hex[:8]}-{path.name}"))


def remove_partial(folder: str, own: bool = False) -> int:
    """Remove partial files of dead jobs on this machine, or with `own` all of this job's; returns their number."""
    if not is_local(folder) or not local_path(folder).is_dir():
        return 0
    prefix = f"{_PARTIAL}{this_writer() if own else os.uname().nodename}-"
    removed = 0
    for path in local_path(folder).glob(f"{glob.escape(prefix)}*"):
        pid = path.name.removeprefix(prefix).partition("-")[0]
        if own or (pid.isdigit() and not is_alive(int(pid))):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


@contextlib.contextmanager
def no_partial(*folders: str) -> Iterator[None]:
    """Remove partial files of dead jobs from folders, and at the end those of this job."""
    for folder in folders:
        remove_partial(folder)
    try:
        yield
    finally:
        for folder in folders:
            remove_partial(folder, own=True)


def is_alive(pid: int) -> bool:
    """Whether a process is alive on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextlib.contextmanager
def write_whole(url: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only once complete."""
    # Local files are written under a temporary name and renamed. Remote ones are written to a local temporary file and
    # then uploaded, so that a failed upload can be retried.
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
    fs, path = file_system(url, storage_options)
    with tempfile.NamedTemporaryFile(dir=scratch_folder(), prefix="upload-") as file:
        yield file
        file.flush()
        options = {"chunksize": 16 << 20} if "s3" in fs.protocol else {}  # by default, s3fs keeps 500 MB in memory
        try:
            persist(url, lambda: fs.put_file(file.name, path, **options))
        except NotImplementedError as err:
            raise RemoteError(f"{url}: nothing can be written there ({type(fs).__name__} only reads)") from err


def write_new(url: str, data: bytes, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Write a small file unless it exists; if several processes try, one succeeds (on object stores: usually)."""
    if not is_local(url):
        if exists(url, storage_options):
            return False
        with write_whole(url, storage_options) as file:
            file.write(data)
        return True
    temporary = Path(temporary_name(url))
    temporary.write_bytes(data)
    try:
        os.link(temporary, local_path(url))
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if local_path(url).exists():
            return False
        temporary.replace(local_path(url))
    finally:
        temporary.unlink(missing_ok=True)
    return True
