"""Copy samples from tars to a tar, byte for byte.

A written tar holds the samples' members, names and bytes as in the source, in row order. Headers are new, with fixed
owner, mode and time, so the same selection gives the same file on every machine. Nothing is extracted: a member called
``../x.jpg`` in the source keeps that name, and tools that extract it must guard against it (as Python's
``filter="data"`` and GNU tar do).
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from .samples import Member, Sample
from .tar_index import BLOCK, hold_shard, index_tar, open_shard
from .tar_read import read_extents

#: A longer extent (bytes) is not read in one piece: its members may be far apart.
_LONG_EXTENT = 256 << 20


class WriteError(RuntimeError):
    """A curated shard cannot be written: a sample has changed since it was scored, or another file is in the way."""


def sample_sizes(urls: Sequence[str], offsets: Sequence[int], extents: Sequence[int]) -> list[int]:
    """Bytes that samples will take in a curated shard, from their extents (source, offset, length)."""
    # Overlapping extents (of samples whose members are not adjacent) share evenly what they cover together, since each
    # may span the whole tar.
    sizes: dict[tuple[str, int, int], int] = {}
    for (url, start), group in _overlapping(set(zip(urls, offsets, extents, strict=True))):
        left = max(offset + nbytes for offset, nbytes in group) - start
        for done, (offset, nbytes) in enumerate(sorted(group, key=lambda extent: extent[1])):
            size = min(nbytes, -(-left // (len(group) - done)))
            sizes[url, offset, nbytes] = size
            left -= size
    return [sizes[row] for row in zip(urls, offsets, extents, strict=True)]


def _overlapping(
    extents: Iterable[tuple[str, int, int]],
) -> Iterator[tuple[tuple[str, int], list[tuple[int, int]]]]:
    """Group overlapping extents (source, offset, length); most groups have one."""
    group: list[tuple[int, int]] = []
    key, end = ("", 0), 0
    for url, offset, nbytes in sorted(extents):
        if group and (url != key[0] or offset >= end):
            yield key, group
            group = []
        if not group:
            key, end = (url, offset), 0
        group.append((offset, nbytes))
        end = max(end, offset + nbytes)
    if group:
        yield key, group


@dataclass(frozen=True)
class Copied:
    """A finished tar, its samples, and for each the member that is its row's image."""

    nbytes: int
    sha256: str
    samples: list[Sample]
    images: list[Member | None]


def write_tar(rows: list[dict[str, Any]], file: IO[bytes], source_options: Mapping[str, Any]) -> Copied:
    """Write the samples of some rows as a tar."""
    sink = _Counted(file)
    samples: list[Sample] = []
    images: list[Member | None] = []
    for row, source in zip(rows, source_members(rows, source_options), strict=True):
        samples.append(_add(sink, row["key"], source.members))
        images.append(None if source.image is None else samples[-1].members[source.image])
    end = sink.nbytes + 2 * BLOCK
    sink.write(bytes(2 * BLOCK + -end % tarfile.RECORDSIZE))
    return Copied(sink.nbytes, sink.digest.hexdigest(), samples, images)


class _Counted:
    """A sink that counts and hashes what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.nbytes, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self.nbytes += len(data)
        self._file.write(data)


@dataclass(frozen=True)
class Source:
    """Names and bytes of a sample's members, and which of them is its row's image."""

    members: list[tuple[str, bytes]]
    image: int | None


def source_members(rows: list[dict[str, Any]], source_options: Mapping[str, Any]) -> Iterator[Source]:
    """Yield the members of each row's sample, opening a source once per run of rows that it holds."""
    # An extent is read in one piece with everything in it. If that would read other samples' members over and over (for
    # example, if all images come before all captions), members are read one by one, by an index of the source.
    wanted = _scattered(rows)
    known: dict[str, _Known] = {}
    start = 0
    while start < len(rows):
        url, stop = rows[start]["shard"], start
        while stop < len(rows) and rows[stop]["shard"] == url:
            stop += 1
        run = rows[start:stop]
        try:
            if url not in wanted:
                yield from _in_one_piece(url, run, source_options)
            else:
                if url not in known:
                    known[url] = _find_samples(url, wanted[url], source_options)
                yield from _one_by_one(url, run, known[url], source_options)
        except OSError as err:
            raise WriteError(f"cannot read {url}, from which {stop - start} samples are to be copied: {err}") from err
        start = stop


def _scattered(rows: Iterable[Mapping[str, Any]]) -> dict[str, set[int]]:
    """Sources with overlapping or very long extents, with the offsets of all samples wanted from them."""
    offsets: dict[str, set[int]] = {}
    for row in rows:
        offsets.setdefault(row["shard"], set()).add(row["sample_offset"])
    extents = {(row["shard"], row["sample_offset"], row["sample_nbytes"]) for row in rows}
    long = {url for url, _, nbytes in extents if nbytes > _LONG_EXTENT}
    overlapping = {url for (url, _), group in _overlapping(extents) if len(group) > 1}
    return {url: offsets[url] for url in long | overlapping}


def _in_one_piece(url: str, rows: list[dict[str, Any]], source_options: Mapping[str, Any]) -> Iterator[Source]:
    extents = [(row["sample_offset"], row["sample_nbytes"]) for row in rows]
    for row, data in zip(rows, read_extents(url, extents, source_options), strict=True):
        index = index_tar(io.BytesIO(data), extent=True)
        # After the sample's first member, other samples' members may follow before its next one.
        sample = _checked(row, index.samples[0] if index.samples else None, index.error, row["sample_offset"])
        stored = [data[m.offset : m.offset + m.stored] for m in sample.members]
        yield _expanded(row, sample, stored, row["sample_offset"])


@dataclass(frozen=True)
class _Known:
    """What a source's index says about some of its samples, by offset."""

    samples: dict[int, Sample]
    error: str | None


def _find_samples(url: str, offsets: set[int], source_options: Mapping[str, Any]) -> _Known:
    with hold_shard(url, source_options), open_shard(url, source_options) as file:
        index = index_tar(file)
    return _Known({s.offset: s for s in index.samples if s.offset in offsets}, index.error)


def _one_by_one(
    url: str, rows: list[dict[str, Any]], known: _Known, source_options: Mapping[str, Any]
) -> Iterator[Source]:
    samples = [_checked(row, known.samples.get(row["sample_offset"]), known.error) for row in rows]
    extents = [(m.offset, m.stored) for sample in samples for m in sample.members]
    # A remote source was streamed to be indexed: for most of it, that copy serves better than ranges.
    whole = 2 * sum(nbytes for _, nbytes in extents) >= max((offset + nbytes for offset, nbytes in extents), default=0)
    pieces = read_extents(url, extents, source_options, whole)
    for row, sample in zip(rows, samples, strict=True):
        yield _expanded(row, sample, [next(pieces) for _ in sample.members])


def _checked(row: Mapping[str, Any], sample: Sample | None, error: str | None, base: int = 0) -> Sample:
    """Return the sample found where a row says; raise `WriteError` if it is not the row's."""
    if sample is None:
        raise _changed(row, error or "no sample begins there")
    if sample.key != row["key"]:
        raise _changed(row, error or f"{sample.key!r} is there")
    if (sample.offset + base, sample.end - sample.offset) != (row["sample_offset"], row["sample_nbytes"]):
        raise _changed(row, error or "its members have other sizes")
    return sample


def _expanded(row: Mapping[str, Any], sample: Sample, stored: list[bytes], base: int = 0) -> Source:
    """Contents of a sample's members; raise `WriteError` if its image is not the one scored."""
    for member, data in zip(sample.members, stored, strict=True):
        if len(data) < member.stored:
            raise _changed(row, f"{member.name!r} is cut off")
    image = next((i for i, m in enumerate(sample.members) if m.offset + base == row.get("offset")), None)
    if (
        row.get("sha256") is not None
        and "offset" in row
        and (image is None or hashlib.sha256(stored[image]).hexdigest() != row["sha256"])
    ):
        raise _changed(row, "its image has another sha256")
    members = [(m.name, m.expand(data)) for m, data in zip(sample.members, stored, strict=True)]
    return Source(members, image)


def _changed(row: Mapping[str, Any], wrong: str) -> WriteError:
    where = f"{row['shard']}, bytes {row['sample_offset']:,} to {row['sample_offset'] + row['sample_nbytes']:,}"
    return WriteError(
        f"the sample {row['key']!r} is not as it was at {where}: {wrong}. The shard was changed: score it again."
    )


def _add(sink: _Counted, key: str, members: list[tuple[str, bytes]]) -> Sample:
    sample = Sample(key, sink.nbytes, sink.nbytes)
    for name, data in members:
        sink.write(header(name, len(data)))
        ext = name.rpartition("/")[2].partition(".")[2].lower()
        sample.members.append(Member(name, ext, sink.nbytes, len(data)))
        sink.write(data)
        sink.write(bytes(-len(data) % BLOCK))
    sample.end = sink.nbytes
    return sample


def _by_tarfile(name: str, nbytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = nbytes, 0o644
    return info.tobuf(tarfile.PAX_FORMAT, tarfile.ENCODING, "surrogateescape")


#: What is the same in all ordinary headers: between name, size, checksum, and the end. The sum counts spaces for the
#: checksum.
_PARTS = tuple(_by_tarfile("", 0)[part] for part in (slice(100, 124), slice(136, 148), slice(155, 512)))
_SUM = sum(map(sum, _PARTS)) + 7 * ord(" ")


def header(name: str, nbytes: int) -> bytes:
    """Make a member's header, as tarfile does, which takes many times as long for an ordinary one."""
    if len(name) > 100 or nbytes >= 8**11 or not name.isascii():
        return _by_tarfile(name, nbytes)
    first, size = name.encode().ljust(100, b"\0"), b"%011o\0" % nbytes
    checksum = b"%06o\0" % (_SUM + sum(first) + sum(size))
    return b"".join((first, _PARTS[0], size, _PARTS[1], checksum, _PARTS[2]))
