"""Shards: expand their URLs, index a tar, read members by offset.

A sample is a run of tar members that share a key, as in webdataset: the key is a member's path up to the first dot of
its last component, the extension (lower case) is what follows that dot.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import fsspec
from braceexpand import braceexpand

from .files import is_local, list_files, local_path

__all__ = [
    "IMAGE_EXTENSIONS",
    "Member",
    "Sample",
    "ShardError",
    "ShardIndex",
    "expand",
    "fingerprint",
    "format_idx",
    "index_shard",
    "open_shard",
    "read_extents",
    "split_name",
]

#: Extensions by which a member is taken for an image. What the bytes are is decided later, by content.
IMAGE_EXTENSIONS = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "gif",
        "bmp",
        "tif",
        "tiff",
        "avif",
        "heic",
        "heif",
        "jxl",
        "jp2",
        "ppm",
        "pgm",
        "pbm",
    ]
)

BLOCK = 512

_NOTES = re.compile(r"__[^/]*__/")


class ShardError(OSError):
    """A shard cannot be found or read."""


@dataclass(frozen=True)
class Member:
    """One file in a tar: its name, extension, and where its data lie."""

    name: str
    ext: str
    offset: int
    nbytes: int


@dataclass
class Sample:
    """Members that share a key, and the extent that holds them all."""

    key: str
    offset: int
    end: int
    members: list[Member] = field(default_factory=list)

    def get(self, ext: str) -> Member | None:
        """Return the member with this extension."""
        return next((m for m in self.members if m.ext == ext), None)

    def image(self) -> Member | None:
        """Return the image of the sample.

        The first member, in the tar's order, whose extension is an image's; a plain extension (``jpg``) goes before one
        with a prefix (``seg.png``).
        """
        images = [m for m in self.members if m.ext.rpartition(".")[2] in IMAGE_EXTENSIONS]
        plain = [m for m in images if "." not in m.ext]
        return next(iter(plain or images), None)


@dataclass
class ShardIndex:
    """What a tar holds.

    Attributes
    ----------
    samples : list of Sample
        In the tar's order, whole samples only.
    error : str or None
        What is wrong with the tar, when it cannot be read to its end.
    broken : Sample or None
        The sample in which the damage lies.
    source : {"tar", "idx"}
        Whether the members come from the tar's headers or from the index file beside it.
    """

    samples: list[Sample]
    error: str | None = None
    broken: Sample | None = None
    source: str = "tar"


def split_name(name: str) -> tuple[str, str] | None:
    r"""Split a member's name into key and lower-case extension; None for a name that belongs to no sample.

    The rules are webdataset's: the key runs to the first dot after the last slash; names without an extension, hidden
    files and what lies under ``__…__/`` (notes on the shard) are left out. Bytes of a name that are no UTF-8 stand as
    ``\xe9`` in the key, since a string column cannot hold them.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, ext = base.partition(".")
    if not stem or not dot or _NOTES.match(name):
        return None
    key, ext = folder + slash + stem, ext.lower()
    if not name.isascii():
        key, ext = _as_utf8(key), _as_utf8(ext)
    return key, ext


def _as_utf8(name: str) -> str:
    # tarfile decodes with "surrogateescape", so that odd bytes survive.
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# --- URLs -----------------------------------------------------------------------------------------


def expand(
    urlpath: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    storage_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Turn paths, globs, brace notation, folders and lists of them into shard URLs.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        ``data/00000.tar``, ``data/*.tar``, ``data/{00000..00127}.tar``, ``data/`` (its ``*.tar``), ``s3://…``.
    storage_options : mapping, optional
        For the fsspec file system of the URLs.

    Returns
    -------
    list of str
        Absolute local paths or full URLs: lists and braces in the order given, globs and folders sorted. A shard that
        is named twice is taken once.

    Raises
    ------
    FileNotFoundError
        If a pattern matches nothing, or if none of the local shards exists. (A single missing shard among others is
        reported in its row, with ``status = "read_error"``, and does not stop the others.)
    """
    items = [urlpath] if isinstance(urlpath, str | os.PathLike) else list(urlpath)
    if not items:
        raise FileNotFoundError("no shards were given: name at least one tar, glob or folder")
    found: list[str] = []
    for item in items:
        found.extend(_expand_one(os.fspath(item), dict(storage_options or {})))
    found = list(dict.fromkeys(found))
    local = [u for u in found if is_local(u)]
    if local and len(local) == len(found) and not any(Path(u).exists() for u in local):
        more = f" (nor any of {len(local) - 1} others)" if len(local) > 1 else ""
        raise FileNotFoundError(f"no such shard: {local[0]}{more}")
    return found


def _expand_one(item: str, storage_options: dict[str, Any]) -> list[str]:
    if is_local(item) and local_path(item).exists():
        # An existing file may have braces or brackets in its name.
        return _expand_folder(str(local_path(item))) if local_path(item).is_dir() else [str(local_path(item))]
    try:
        names = list(braceexpand(item)) if "{" in item else [item]
    except ValueError:  # braceexpand.UnbalancedBracesError, which its stubs do not export
        raise FileNotFoundError(f"unbalanced braces in {item!r}") from None
    out: list[str] = []
    for name in names:
        # The question mark of an http address begins its query (a signature, say).
        magic = glob.has_magic(name.partition("?")[0] if name.startswith("http") else name)
        if is_local(name):
            path = str(local_path(name))
            if magic:
                matches = sorted(glob.glob(path, recursive=True))
                if not matches:
                    raise FileNotFoundError(f"no file matches {name!r}")
                out.extend(matches)
            elif Path(path).is_dir():
                out.extend(_expand_folder(path))
            else:
                out.append(path)
        elif magic or name.endswith("/"):
            pattern = name.rstrip("/") + "/*.tar" if name.endswith("/") else name
            fs, path = fsspec.core.url_to_fs(pattern, **storage_options)
            matches = sorted(fs.glob(path))
            if not matches:
                raise FileNotFoundError(f"nothing matches {pattern!r}")
            out.extend(fs.unstrip_protocol(m) for m in matches)
        else:
            out.append(name)
    return out


def _expand_folder(path: str) -> list[str]:
    tars = list_files(path, ".tar")
    if not tars:
        raise FileNotFoundError(f"no *.tar in the folder {path}")
    return tars


def open_shard(url: str, storage_options: Mapping[str, Any] | None = None) -> IO[bytes]:
    """Open a shard for reading; seekable."""
    if is_local(url):
        return local_path(url).open("rb")
    return fsspec.open(url, "rb", **(storage_options or {})).open()


def fingerprint(url: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """Return what identifies a version of a shard without reading it: its size, and its ETag or time of change.

    A shard that cannot be reached has the fingerprint ``"unreadable"``.
    """
    try:
        if is_local(url):
            stat = local_path(url).stat()
            return f"size={stat.st_size} mtime_ns={stat.st_mtime_ns}"
        fs, path = fsspec.core.url_to_fs(url, **(storage_options or {}))
        info = fs.info(path)
    except OSError:
        return "unreadable"
    changed = next((str(info[k]) for k in _CHANGED if info.get(k)), "")
    return f"size={info.get('size')} changed={changed}"


#: What file systems call the mark of a version, the surest first.
_CHANGED = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created")


# --- indexing -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file in a tar: where its header (extension headers included) and its data begin, and what follows them."""

    name: str
    header: int
    offset: int
    nbytes: int
    end: int


class _Grouper:
    """Gathers members into samples: by key, and a repeated extension begins a new sample of the same key."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._latest: dict[str, Sample] = {}

    def add(self, entry: _Entry) -> Sample | None:
        parts = split_name(entry.name)
        if parts is None:
            return None
        key, ext = parts
        sample = self._latest.get(key)
        if sample is None or sample.get(ext) is not None:
            sample = Sample(key, entry.header, entry.end)
            self._latest[key] = sample
            self.samples.append(sample)
        sample.members.append(Member(entry.name, ext, entry.offset, entry.nbytes))
        sample.end = entry.end
        return sample


def index_shard(url: str, storage_options: Mapping[str, Any] | None = None, use_idx: bool = True) -> ShardIndex:
    """Find the samples of a shard from its headers, or from a right index file beside it.

    Parameters
    ----------
    url : str
        The tar.
    storage_options : mapping, optional
        For fsspec.
    use_idx : bool
        Whether a ``.idx`` beside the tar (DALI's ``wds2idx`` format) may be used. It is checked against the tar first
        and left aside when anything disagrees.

    Returns
    -------
    ShardIndex
        Never raises for a damaged or missing tar: what is whole is listed, and `error` says what is wrong.
    """
    try:
        with open_shard(url, storage_options) as file:
            if use_idx:
                index = _index_from_idx(url, file, storage_options)
                if index is not None:
                    return index
            return index_tar(file)
    except OSError as err:
        return ShardIndex([], _explain(url, err))


def _explain(url: str, err: OSError) -> str:
    if isinstance(err, FileNotFoundError):
        return f"no such file: {url}"
    return f"{type(err).__name__}: {err}"


def index_tar(file: IO[bytes]) -> ShardIndex:
    """Index an open, seekable tar; see `index_shard`."""
    grouper = _Grouper()
    size = file.seek(0, io.SEEK_END)
    error, broken = None, None
    try:
        for entry in _plain_files(file):
            sample = grouper.add(entry)
            if entry.end > size:
                broken = sample
    except ShardError as err:
        error = str(err)
    if broken is not None:
        grouper.samples.remove(broken)
    return ShardIndex(grouper.samples, error, broken)


def _plain_files(file: IO[bytes]) -> Iterator[_Entry]:
    """Yield each file whose bytes lie in one piece; raise `ShardError` where the tar is damaged.

    tarfile reads the headers that are in some way special; the others are read here, since it takes most of the time
    of indexing to read them with tarfile.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    # On damaged headers tarfile raises not only its own errors, but ValueError, OverflowError, MemoryError and
    # RecursionError too.
    try:
        tar = tarfile.open(fileobj=file, mode="r:")
    except Exception as err:
        raise ShardError(f"not a tar that can be read: {err}{_gzip_hint(file)}") from err
    position, name = 0, ""
    while position <= size:
        # tarfile has the first header already; and a global header may change all that follow it.
        if position > 0 and not tar.pax_headers:
            entry = _ordinary_entry(file, position)
            if entry is not None:
                position, name = entry.end, entry.name
                yield entry
                continue
            tar.offset = position
        try:
            info = tar.next()
        except Exception as err:
            raise ShardError(f"the tar is damaged at byte {position:,}: {err}") from err
        if info is None:
            if (problem := _check_end(file, position)) is not None:
                raise ShardError(problem)
            return
        # Without this, tarfile keeps every header of a large shard in memory.
        tar.members = []  # type: ignore[attr-defined]
        if info.size < 0 or tar.offset <= position:
            # Older Pythons take a negative size, go back and read the same headers for ever.
            raise ShardError(f"the tar is damaged at byte {position:,}: impossible size of {info.name!r}")
        position, name = tar.offset, info.name
        if info.isreg() and not info.issparse():
            yield _Entry(name, info.offset, info.offset_data, info.size, position)
    raise ShardError(f"the tar ends at byte {size:,}, inside {name!r} (which goes to byte {position:,})")


# What tar writers put into an ordinary header: numbers in octal, a name that fits its field and so no prefix.
# Groups: name, size, checksum, type (file or pax extension).
_NUMBER = rb"(?:[0-7]{7}\0|[0-7]{6} \0|\0{8})"
_ORDINARY = re.compile(
    rb"(.{100})" + _NUMBER * 3 + rb"([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6}[0-7\0 ])[\0 ]"
    rb"([0x]).{100}ustar.{67}" + _NUMBER * 2 + rb"\0.{166}",
    re.DOTALL,
)
#: A pax extension that says no more than when the file was changed: webdataset's own writer puts one before each file.
_TIME = re.compile(rb"(\d\d) mtime=\d+(?:\.\d+)?\n")


def _ordinary_entry(file: IO[bytes], position: int) -> _Entry | None:
    """Read the entry whose header is there; None for all that tarfile had better look at."""
    file.seek(position)
    head = file.read(3 * BLOCK)
    offset = BLOCK
    match = _ordinary_header(head[:BLOCK])
    if match is not None and match[4] == b"x":
        record = head[BLOCK : 2 * BLOCK].rstrip(b"\0")
        time = _TIME.fullmatch(record)
        if time is None or not int(time[1]) == int(match[2], 8) == len(record):
            return None
        offset = 3 * BLOCK
        match = _ordinary_header(head[2 * BLOCK :])
    if match is None or match[4] != b"0":
        return None
    name = match[1].partition(b"\0")[0].decode(tarfile.ENCODING, "surrogateescape")
    nbytes, offset = int(match[2], 8), position + offset
    return _Entry(name, position, offset, nbytes, offset + -(-nbytes // BLOCK) * BLOCK)


def _ordinary_header(block: bytes) -> re.Match[bytes] | None:
    match = _ORDINARY.fullmatch(block)
    # The checksum counts its own field as spaces.
    if match is None or int(match[3].strip(b"\0 "), 8) != sum(block) - sum(block[148:156]) + 8 * 32:
        return None
    return match


def _gzip_hint(file: IO[bytes]) -> str:
    file.seek(0)
    if file.read(2) == b"\x1f\x8b":
        return "; it is compressed with gzip: unpack it first (gunzip), since members are read by their offsets"
    return ""


def _check_end(file: IO[bytes], position: int) -> str | None:
    """Tell an ended tar from a damaged one: tarfile stops in silence at either.

    Nothing but zeros may stand where the headers stop.
    """
    file.seek(position)
    start = position
    while chunk := file.read(1 << 20):
        rest = chunk.lstrip(b"\0")
        if rest:
            found = position + len(chunk) - len(rest)
            if found < start + BLOCK:
                return f"the tar is damaged at byte {start:,}: neither a header nor the end of the archive"
            return (
                f"the archive ends at byte {start:,}, but more follows at byte {found:,}: it is damaged, or made of "
                "several tars (then pack it anew)"
            )
        position += len(chunk)
    return None


# --- wds2idx files --------------------------------------------------------------------------------


def idx_url(url: str) -> str:
    """Where the index file of a shard would be."""
    return (url[: -len(".tar")] if url.endswith(".tar") else url) + ".idx"


def format_idx(samples: Iterable[Sample]) -> str | None:
    """Write an index in the format of DALI's ``wds2idx``, version 1.2.

    A header line, then for each sample a line with ``ext offset size name`` for each member.

    Returns None when a name holds white space or bytes that are no UTF-8, which the format cannot express.
    """
    lines = []
    for sample in samples:
        parts: list[str] = []
        for m in sample.members:
            # DALI wants the extension as it stands in the name.
            ext = m.name.rpartition("/")[2].partition(".")[2]
            parts += [ext, str(m.offset), str(m.nbytes), m.name]
        if any(not part or any(c.isspace() or "\ud800" <= c <= "\udfff" for c in part) for part in parts):
            return None
        lines.append(" ".join(parts))
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


def _index_from_idx(url: str, tar: IO[bytes], storage_options: Mapping[str, Any] | None) -> ShardIndex | None:
    """Use the index file beside a tar, or return None if there is none or it does not describe this tar."""
    try:
        with open_shard(idx_url(url), storage_options) as file:
            text = file.read().decode()
    except (OSError, UnicodeDecodeError, ValueError):
        return None
    members = _parse_idx(text)
    size = tar.seek(0, io.SEEK_END)
    if not members:
        return None
    # A stale index of a shard that was written anew would misplace members, so every one is compared with the header
    # in front of it. Where anything else lies between them, the tar's own headers are the better source.
    grouper = _Grouper()
    position = 0
    for name, offset, nbytes in members:
        entry = _ordinary_entry(tar, position)
        if entry is None or (entry.name, entry.offset, entry.nbytes) != (name, offset, nbytes):
            return None
        grouper.add(entry)
        position = entry.end
    if position > size or _check_end(tar, position) is not None:
        return None
    return ShardIndex(grouper.samples, source="idx")


def _parse_idx(text: str) -> list[tuple[str, int, int]] | None:
    lines = text.splitlines()
    head = lines[0].split() if lines else []
    if len(head) != 2 or head[0] != "v1.2" or head[1] != str(len(lines) - 1):
        return None
    members = []
    for line in lines[1:]:
        parts = line.split()
        if not parts or len(parts) % 4:
            return None
        for ext, offset, nbytes, name in zip(*[iter(parts)] * 4, strict=True):
            if not name.endswith(ext):
                return None
            try:
                members.append((name, int(offset), int(nbytes)))
            except ValueError:
                return None
    members.sort(key=lambda m: m[1])
    return members


# --- reading --------------------------------------------------------------------------------------


def read_extents(
    url: str, extents: Iterable[tuple[int, int]], storage_options: Mapping[str, Any] | None = None
) -> Iterator[bytes]:
    """Read pieces of a shard, in the order given (ascending offsets read it once, in sequence).

    Parameters
    ----------
    url : str
        The tar.
    extents : iterable of (int, int)
        Offset and length of each piece, bytes.
    storage_options : mapping, optional
        For fsspec.

    Yields
    ------
    bytes
        Shorter than asked for where the file ends early.
    """
    with open_shard(url, storage_options) as file:
        for offset, nbytes in extents:
            file.seek(offset)
            yield file.read(nbytes)


def read_text(file: IO[bytes], member: Member) -> str:
    """Read a small text member; bytes that are no UTF-8 become U+FFFD, and a byte order mark is dropped."""
    file.seek(member.offset)
    return file.read(member.nbytes).decode("utf-8-sig", errors="replace")


def read_json(file: IO[bytes], member: Member) -> dict[str, Any]:
    """Read a JSON member; an empty dict where it is not a JSON object."""
    try:
        value = json.loads(read_text(file, member))
    except (ValueError, RecursionError):  # the latter: thousands of brackets
        return {}
    return value if isinstance(value, dict) else {}


def first_json(url: str, count: int, storage_options: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the first JSON members of a shard, reading no further than it must; fewer where it is damaged."""
    with open_shard(url, storage_options) as file, contextlib.suppress(ShardError):
        for entry in _plain_files(file):
            parts = split_name(entry.name)
            if parts is None or parts[1] != "json":
                continue
            yield read_json(file, Member(entry.name, parts[1], entry.offset, entry.nbytes))
            count -= 1
            if count <= 0:
                return
