"""Find the samples of a tar from its headers."""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

from .files import RemoteError, is_local, open_local
from .remote import hold_copy, open_remote
from .samples import LeftOut, Member, Sample, ShardIndex, as_utf8, split_name
from .urls import HEAD, what_is

BLOCK = 512

#: A sparse member that would be larger than this when expanded (bytes) is left out: a tar of 1 KB can claim exabytes.
SPARSE_LIMIT = 1 << 30


#: Limit for names and attributes (bytes); extension headers can claim gigabytes, and tarfile would read them.
HEADER_LIMIT = 1 << 20


class ShardError(OSError):
    """A shard cannot be found or read."""


def open_shard(url: str, storage_options: Mapping[str, Any] | None = None) -> IO[bytes]:
    """Open a shard for reading; seekable."""
    if is_local(url):
        return open_local(url)
    return open_remote(url, storage_options)


def hold_shard(url: str, storage_options: Mapping[str, Any] | None = None) -> contextlib.AbstractContextManager[None]:
    """Within this context, a remote shard is copied to this machine and read from there."""
    return contextlib.nullcontext() if is_local(url) else hold_copy(url, storage_options)


class _Headers:
    """The headers of a tar, for tarfile to read. A header may claim that the next one has gigabytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, nbytes: int) -> bytes:
        if nbytes > HEADER_LIMIT:
            raise tarfile.ReadError(f"an extension header of {nbytes:,} bytes")
        return self._file.read(nbytes)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file in a tar: where its header (with extension headers) and data begin, and what follows."""

    name: str
    header: int
    offset: int
    nbytes: int
    end: int
    pieces: tuple[tuple[int, int], ...] | None = None
    left_out: str | None = None  # why it cannot be a member


class _Grouper:
    """Groups members into samples by key; a repeated extension begins a new sample of the same key."""

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
    """List the whole samples of a shard; damage or absence is reported in `error`, never raised."""
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
        for entry in entries(file, extent):
            sample = grouper.add(entry)
            if entry.end > size:
                broken = sample
    except ShardError as err:
        error = str(err)
    if broken is not None:
        grouper.samples.remove(broken)
    return ShardIndex(grouper.samples, error, broken)


def entries(file: IO[bytes], extent: bool = False) -> Iterator[_Entry]:
    """Yield each file and link; raise `ShardError` where the tar is damaged."""
    # tarfile reads special headers only: reading the ordinary ones with it takes most of the indexing time.
    size = file.seek(0, io.SEEK_END)
    tar: tarfile.TarFile | None = None
    position, name = 0, ""
    while position <= size:
        if tar is None or not tar.pax_headers:  # a global header may change all that follow
            entry = _ordinary_entry(file, position)
            if entry is not None:
                position, name = entry.end, entry.name
                yield entry
                continue
            if extent and 0 < position == size:
                return
            if tar is None:
                tar = _open_tar(file)
            if position > 0:
                tar.offset, tar.firstmember = position, None  # type: ignore[attr-defined]
        try:
            info = tar.next()
        except Exception as err:  # see `_open_tar`
            raise ShardError(f"the tar is damaged at byte {position:,}: {err}") from err
        if info is None:
            problem = _check_end(file, position)
            if problem is not None:
                raise ShardError(problem)
            return
        # Without this, tarfile keeps every header of a large shard in memory.
        tar.members = []  # type: ignore[attr-defined]
        if info.size < 0 or tar.offset <= position:
            # Older Pythons accept a negative size, seek back and read the same headers forever.
            raise ShardError(f"the tar is damaged at byte {position:,}: impossible size of {info.name!r}")
        position, name = tar.offset, info.name
        if info.isreg() or info.issym() or info.islnk():
            yield _special_entry(info, position)
    raise ShardError(f"the tar ends at byte {size:,}, inside {name!r} (which goes to byte {position:,})")


def _open_tar(file: IO[bytes]) -> tarfile.TarFile:
    # On damaged headers, tarfile raises not only its own errors but also ValueError, OverflowError, MemoryError and
    # RecursionError.
    file.seek(0)
    try:
        return tarfile.open(fileobj=cast(IO[bytes], _Headers(file)), mode="r:")
    except Exception as err:
        file.seek(0)
        raise ShardError(f"not a tar that can be read: {what_is(file.read(HEAD)) or err}") from err


def _special_entry(info: tarfile.TarInfo, end: int) -> _Entry:
    """Convert what tarfile read: a file, sparse or not, or a link."""
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


# The usual header that tar writers make: numbers in octal, and a name that fits its field, hence no prefix.
# Groups: name, size, checksum, type (file or pax extension).
_NUMBER = rb"(?:[0-7]{7}\0|[0-7]{6} \0|\0{8})"
_ORDINARY = re.compile(
    rb"(.{100})" + _NUMBER * 3 + rb"([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6}[0-7\0 ])[\0 ]"
    rb"([0x]).{100}ustar.{67}" + _NUMBER * 2 + rb"\0.{166}",
    re.DOTALL,
)
#: A pax extension with nothing but the modification time: webdataset's own writer puts one before each file.
_TIME = re.compile(rb"(\d\d) mtime=\d+(?:\.\d+)?\n")


def _ordinary_entry(file: IO[bytes], position: int) -> _Entry | None:
    """Read the entry whose header is here; None for anything better left to tarfile."""
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


def _check_end(file: IO[bytes], position: int) -> str | None:
    """Tell a finished tar from a damaged one: tarfile stops silently at either."""
    # After the last header come zeros and nothing else: a tar cut between two members is otherwise intact.
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
                "several tars (then repack it)"
            )
        position += len(chunk)
    return None
