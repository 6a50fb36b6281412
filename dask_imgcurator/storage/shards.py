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
from functools import partial
from pathlib import Path
from typing import IO, Any

from braceexpand import braceexpand

from .files import RemoteError, file_system, is_local, list_files, local_path, persist
from .remote import hold_copy, open_remote, read_ranges, version

__all__ = [
    "IMAGE_EXTENSIONS",
    "LeftOut",
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

#: Larger text and JSON members are left unread (bytes): a caption has no gigabytes, and a worker no room for them.
TEXT_LIMIT = 64 << 20

#: A sparse member that would be larger than this when expanded (bytes) is left out: a tar of 1 KB can claim exabytes.
SPARSE_LIMIT = 1 << 30

_NOTES = re.compile(r"__[^/]*__/")


class ShardError(OSError):
    """A shard cannot be found or read."""


@dataclass(frozen=True)
class Member:
    """One file in a tar: its name, extension, and where its data lie.

    Attributes
    ----------
    name, ext : str
        See `split_name`.
    offset, nbytes : int
        Where its data begin in the tar, and how long the file is.
    pieces : tuple of (int, int) or None
        Of a sparse file: offset in the file and length of each piece that is in the tar, where they follow each other;
        between them are zeros.
    """

    name: str
    ext: str
    offset: int
    nbytes: int
    pieces: tuple[tuple[int, int], ...] | None = None

    @property
    def stored(self) -> int:
        """Bytes that the tar holds of it, from `offset` on."""
        return self.nbytes if self.pieces is None else sum(nbytes for _, nbytes in self.pieces)

    def expand(self, data: bytes) -> bytes:
        """Content of the file, from the bytes that the tar holds of it."""
        if self.pieces is None:
            return data
        out, position = bytearray(self.nbytes), 0
        for start, nbytes in self.pieces:
            out[start : start + nbytes] = data[position : position + nbytes]
            position += nbytes
        return bytes(out)


@dataclass(frozen=True)
class LeftOut:
    """What has a sample's key, but cannot be one of its members: a link, say."""

    ext: str
    reason: str


@dataclass
class Sample:
    """Members that share a key, the extent that holds them all, and what is left out."""

    key: str
    offset: int
    end: int
    members: list[Member] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def get(self, ext: str) -> Member | None:
        """Return the member with this extension."""
        return next((m for m in self.members if m.ext == ext), None)

    def image(self, preferred: Sequence[str] = ()) -> Member | None:
        """Return the image of the sample.

        The first member, in the tar's order, whose extension is an image's; a plain extension (``jpg``) goes before one
        with a prefix (``seg.png``). Where there are preferred extensions, the member that has the first of them that
        any member has, and no other.
        """
        if preferred:
            return next((m for ext in preferred if (m := self.get(ext)) is not None), None)
        images = [m for m in self.members if _is_image(m.ext)]
        plain = [m for m in images if "." not in m.ext]
        return next(iter(plain or images), None)

    def why_no_image(self, preferred: Sequence[str] = ()) -> str:
        """Say what there is instead, where `image` finds none."""
        reasons = [x.reason for x in self.left_out if (x.ext in preferred if preferred else _is_image(x.ext))]
        if reasons:
            return reasons[0]
        wanted = f"the extension {' or '.join(preferred)}" if preferred else "an image extension"
        found = [*(m.ext for m in self.members), *(x.reason for x in self.left_out)]
        return f"no member with {wanted} (found: {', '.join(found)})"


def _is_image(ext: str) -> bool:
    return ext.rpartition(".")[2] in IMAGE_EXTENSIONS


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
    """

    samples: list[Sample]
    error: str | None = None
    broken: Sample | None = None


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
        key, ext = as_utf8(key), as_utf8(ext)
    return key, ext


def as_utf8(name: str) -> str:
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
            fs, path = file_system(pattern, storage_options)
            matches = sorted(persist(pattern, partial(fs.glob, path)))
            if not matches:
                raise FileNotFoundError(f"nothing matches {pattern!r}")
            out.extend(fs.unstrip_protocol(m) for m in matches)
        else:
            file_system(name, storage_options)  # raises for a protocol or options that cannot be used here
            out.append(name)
    return out


def _expand_folder(path: str) -> list[str]:
    tars = list_files(path, ".tar")
    if not tars:
        packed = [f for f in list_files(path, "") if re.search(r"\.(tar\.\w+|t[gx]z|tbz2?|tzst)$", f, re.IGNORECASE)]
        hint = f", only compressed ones: unpack {packed[0]} and its like first" if packed else ""
        raise FileNotFoundError(f"no *.tar in the folder {path}{hint}")
    return tars


def open_shard(url: str, storage_options: Mapping[str, Any] | None = None) -> IO[bytes]:
    """Open a shard for reading; seekable."""
    if is_local(url):
        return local_path(url).open("rb")
    return open_remote(url, storage_options)


def hold_shard(url: str, storage_options: Mapping[str, Any] | None = None) -> contextlib.AbstractContextManager[None]:
    """While this is entered, a remote shard is on this machine: what is read of it is read there."""
    return contextlib.nullcontext() if is_local(url) else hold_copy(url, storage_options)


def fingerprint(url: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """Return what identifies a version of a shard without reading it: its size, and its ETag or time of change.

    A shard that cannot be reached has the fingerprint ``"unreadable"``.
    """
    try:
        if is_local(url):
            stat = local_path(url).stat()
            return f"size={stat.st_size} mtime_ns={stat.st_mtime_ns}"
        return version(url, storage_options)
    except OSError:
        return "unreadable"


# --- indexing -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file in a tar: where its header (extension headers included) and its data begin, and what follows them."""

    name: str
    header: int
    offset: int
    nbytes: int
    end: int
    pieces: tuple[tuple[int, int], ...] | None = None
    left_out: str | None = None  # why it can be no member


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
        if sample is None or (entry.left_out is None and sample.get(ext) is not None):
            sample = Sample(key, entry.header, entry.end)
            self._latest[key] = sample
            self.samples.append(sample)
        if entry.left_out is None:
            sample.members.append(Member(entry.name, ext, entry.offset, entry.nbytes, entry.pieces))
        else:
            sample.left_out.append(LeftOut(ext, as_utf8(entry.left_out)))
        sample.end = entry.end
        return sample


def index_shard(url: str, storage_options: Mapping[str, Any] | None = None) -> ShardIndex:
    """Find the samples of a shard from its headers.

    Parameters
    ----------
    url : str
        The tar.
    storage_options : mapping, optional
        For fsspec.

    Returns
    -------
    ShardIndex
        Never raises for a damaged or missing tar: what is whole is listed, and `error` says what is wrong.
    """
    try:
        with hold_shard(url, storage_options), open_shard(url, storage_options) as file:
            return index_tar(file)
    except OSError as err:
        return ShardIndex([], explain(url, err))


def explain(url: str, err: OSError) -> str:
    """Say why a shard cannot be opened."""
    if isinstance(err, FileNotFoundError):
        return f"no such file: {url}"
    return str(err) if isinstance(err, RemoteError) else f"{type(err).__name__}: {err}"


def index_tar(file: IO[bytes], extent: bool = False) -> ShardIndex:
    """Index an open, seekable tar, or an extent of one, which has no end mark; see `index_shard`."""
    grouper = _Grouper()
    size = file.seek(0, io.SEEK_END)
    error, broken = None, None
    try:
        for entry in _entries(file, extent):
            sample = grouper.add(entry)
            if entry.end > size:
                broken = sample
    except ShardError as err:
        error = str(err)
    if broken is not None:
        grouper.samples.remove(broken)
    return ShardIndex(grouper.samples, error, broken)


def _entries(file: IO[bytes], extent: bool = False) -> Iterator[_Entry]:
    """Yield each file and link; raise `ShardError` where the tar is damaged.

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
        raise ShardError(f"not a tar that can be read: {err}{_compression_hint(file)}") from err
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
            problem = None if extent and position == size else _check_end(file, position)
            if problem is not None:
                raise ShardError(problem)
            return
        # Without this, tarfile keeps every header of a large shard in memory.
        tar.members = []  # type: ignore[attr-defined]
        if info.size < 0 or tar.offset <= position:
            # Older Pythons take a negative size, go back and read the same headers for ever.
            raise ShardError(f"the tar is damaged at byte {position:,}: impossible size of {info.name!r}")
        position, name = tar.offset, info.name
        if info.isreg() or info.issym() or info.islnk():
            yield _special_entry(info, position)
    raise ShardError(f"the tar ends at byte {size:,}, inside {name!r} (which goes to byte {position:,})")


def _special_entry(info: tarfile.TarInfo, end: int) -> _Entry:
    """Take over what tarfile read: a file, sparse or not, or a link."""
    pieces = reason = None
    if info.issparse():
        sparse: Any = info.sparse  # offsets and lengths, whatever the stubs say
        pieces = tuple((int(start), int(nbytes)) for start, nbytes in sparse if nbytes)  # some are fillers
        reason = _sparse_problem(info.size, pieces, end - info.offset_data)
    elif not info.isreg():
        kind, option = ("hard", "--hard-dereference") if info.islnk() else ("symbolic", "--dereference")
        reason = f"a {kind} link to {info.linkname}: links are not followed; pack the shard with {option}"
    if reason is not None:
        reason = f"{info.name} is {reason}"
    return _Entry(info.name, info.offset, info.offset_data, info.size, end, pieces, reason)


def _sparse_problem(size: int, pieces: tuple[tuple[int, int], ...], room: int) -> str | None:
    if size > SPARSE_LIMIT:
        return f"a sparse member of {size:,} bytes, of which the tar holds few: pack the shard without --sparse"
    position = 0
    for start, nbytes in pieces:
        if start < position or nbytes < 0:
            break
        position = start + nbytes
    else:
        if position <= size and sum(nbytes for _, nbytes in pieces) <= room:
            return None
    return "a sparse member whose map is damaged: pack the shard without --sparse"


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


#: How compressed files begin, what they are compressed with, and what unpacks them.
_COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
}


def _compression_hint(file: IO[bytes]) -> str:
    file.seek(0)
    head = file.read(8)
    for magic, (name, tool) in _COMPRESSIONS.items():
        if head.startswith(magic):
            return f"; it is compressed with {name}: unpack it first ({tool}), since members are read by their offsets"
    return ""


def _check_end(file: IO[bytes], position: int) -> str | None:
    """Tell an ended tar from a damaged one: tarfile stops in silence at either.

    Nothing but zeros may stand where the headers stop, and something must: a tar that was cut between two members is
    whole in every other way.
    """
    if file.seek(0, io.SEEK_END) == position:
        return (
            f"the tar has no end mark: it may have been cut at byte {position:,}; all members before are whole, but "
            "the last sample may lack some, and others may be missing"
        )
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


def format_idx(samples: Iterable[Sample]) -> str | None:
    """Write an index in the format of DALI's ``wds2idx``, version 1.2.

    A header line, then for each sample a line with ``ext offset size name`` for each member.

    Returns None when a name holds white space or bytes that are no UTF-8, or a member is sparse: the format cannot
    express these.
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
        if any(m.pieces is not None for m in sample.members):
            return None
        lines.append(" ".join(parts))
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


# --- reading --------------------------------------------------------------------------------------


def read_extents(
    url: str,
    extents: Iterable[tuple[int, int]],
    storage_options: Mapping[str, Any] | None = None,
    whole: bool = False,
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
    whole : bool
        Whether a remote shard is streamed as a whole, for when most of it is wanted; else only the pieces are fetched.

    Yields
    ------
    bytes
        Shorter than asked for where the file ends early.

    Raises
    ------
    OSError
        If the shard cannot be read.
    """
    if is_local(url):
        source: Any = contextlib.nullcontext()
    elif whole:
        source = hold_copy(url, storage_options)
    else:
        yield from read_ranges(url, list(extents), storage_options)
        return
    with source, open_shard(url, storage_options) as file:
        for offset, nbytes in extents:
            file.seek(offset)
            yield file.read(nbytes)


def read_text(file: IO[bytes], member: Member) -> str | None:
    """Read a text member; bytes that are no UTF-8 become U+FFFD, and a byte order mark is dropped.

    None where it is larger than `TEXT_LIMIT`.
    """
    if member.nbytes > TEXT_LIMIT:
        return None
    file.seek(member.offset)
    return member.expand(file.read(member.stored)).decode("utf-8-sig", errors="replace")


def read_json(file: IO[bytes], member: Member) -> dict[str, Any]:
    """Read a JSON member; an empty dict where it is not a JSON object, or larger than `TEXT_LIMIT`."""
    try:
        value = json.loads(read_text(file, member) or "")
    except (ValueError, RecursionError):  # the latter: thousands of brackets
        return {}
    return value if isinstance(value, dict) else {}


def first_json(url: str, count: int, storage_options: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the first JSON members of a shard, reading no further than it must; fewer where it is damaged."""
    with open_shard(url, storage_options) as file, contextlib.suppress(ShardError):
        for entry in _entries(file):
            parts = split_name(entry.name)
            if parts is None or parts[1] != "json" or entry.left_out is not None:
                continue
            yield read_json(file, Member(entry.name, parts[1], entry.offset, entry.nbytes, entry.pieces))
            count -= 1
            if count <= 0:
                return
