"""Curated shards: which samples go into which tar, and writing one of them. No Dask in here.

A written tar holds the members of the kept samples, names and bytes as in the source, in the order of the rows. Its
headers are made anew with fixed owner, mode and time, so the same selection gives the same file on every machine.

Nothing is extracted here: a member called ``../x.jpg`` in the source is called so in the curated tar, and it is for
whoever extracts one to guard against that (Python's ``filter="data"`` and GNU tar do).

Whatever this library wrote has its ``_stats.json`` beside it, written before the files that it speaks of come to light,
the tar last. So a shard is finished when it has both, files without one are someone else's and are left alone, and a
run that was killed leaves nothing that could be taken for either.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..engine.backend import backend_of
from ..storage import files, shards

__all__ = [
    "Slice",
    "WriteError",
    "WriteSpec",
    "check_sources",
    "files_there",
    "parse_size",
    "plan_shards",
    "remove_surplus",
    "sample_sizes",
    "write_shard",
    "written_shards",
]

#: Columns that the writer needs.
LOCATORS = ("key", "shard", "sample_offset", "sample_nbytes")

#: Columns by which it checks, where they are there, that an image is still the one that was scored.
_CHECKS = ("offset", "nbytes", "sha256")

#: A longer extent (bytes) is not read in one piece: its members may lie far apart.
_LONG_EXTENT = 256 << 20

_STATS = "_stats.json"
_SUFFIXES = (".tar", ".parquet", ".idx", _STATS)
_NAME = re.compile(r"(\d{5,})(\.tar|\.parquet|\.idx|_stats\.json)")


class WriteError(RuntimeError):
    """A curated shard cannot be written: a sample is not as it was scored, or someone else's file is in the way."""


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of the kept rows of a partition."""

    partition: int
    start: int
    stop: int


@dataclass(frozen=True)
class WriteSpec:
    """Where curated shards go.

    Attributes
    ----------
    folder : str
        URL of the folder.
    max_count : int
        Samples a shard, at most.
    max_nbytes : int
        Bytes of samples a shard, at most, by their `sample_sizes` (a single larger sample gets a shard of its own).
    storage_options, source_options : mapping
        For fsspec, of the folder and of the source shards.
    """

    folder: str
    max_count: int = 10_000
    max_nbytes: int = 1_000_000_000
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    source_options: Mapping[str, Any] = field(default_factory=dict)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str | int) -> int:
    """Read a size in bytes: ``500MB``, ``1GiB``, ``250000``.

    Raises
    ------
    ValueError
        If it is none, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?)?B?\s*", str(text), re.IGNORECASE)
    nbytes = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if nbytes <= 0:
        raise ValueError(f"cannot read {text!r} as a size: write for example 500MB, 1GiB or a number of bytes")
    return nbytes


def sample_sizes(urls: Sequence[str], offsets: Sequence[int], extents: Sequence[int]) -> list[int]:
    """Bytes that samples take in a curated shard, by what they take in their sources.

    Parameters
    ----------
    urls : sequence of str
        Source of each.
    offsets, extents : sequence of int
        Where its extent begins there, and its length, bytes.

    Returns
    -------
    list of int
        The extent's length. Extents that overlap (the members of a sample do not follow each other) share what they
        cover together, evenly, since each of them may span the whole tar.
    """
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
    """Gather extents (source, offset, length) that overlap; most stand alone."""
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


def plan_shards(
    partitions: Iterable[tuple[Sequence[str | None], Sequence[int]]], max_count: int, max_nbytes: int
) -> Iterator[list[Slice]]:
    """Pack kept samples into shards, in order.

    Parameters
    ----------
    partitions : iterable of (keys, sizes)
        For each partition the keys and `sample_sizes` of its kept rows.
    max_count, max_nbytes : int
        See `WriteSpec`.

    Yields
    ------
    list of Slice
        The rows of one shard. A key that is in the shard already begins the next one: readers of webdataset would
        take two neighbours with one key for one sample.
    """
    current: list[Slice] = []
    keys_here: set[str | None] = set()
    nbytes_here = 0
    for number, (keys, sizes) in enumerate(partitions):
        start = 0
        for row, (key, nbytes) in enumerate(zip(keys, sizes, strict=True)):
            full = len(keys_here) >= max_count or nbytes_here + nbytes > max_nbytes or key in keys_here
            if full and keys_here:
                if row > start:
                    current.append(Slice(number, start, row))
                yield current
                current, keys_here, nbytes_here, start = [], set(), 0, row
            keys_here.add(key)
            nbytes_here += nbytes
        if len(keys) > start:
            current.append(Slice(number, start, len(keys)))
    if current:
        yield current


def write_shard(number: int, frames: Sequence[Any], spec: WriteSpec, resume: bool = True) -> dict[str, Any]:
    """Write one curated shard and what stands beside it.

    Parameters
    ----------
    number : int
        Of the shard; ``7`` gives ``00007.tar``, ``00007.parquet``, ``00007.idx`` and ``00007_stats.json``.
    frames : sequence of pandas or cuDF DataFrame
        Rows, in order.
    spec : WriteSpec
        Where to.
    resume : bool
        Whether a finished shard of the same content is left as it is.

    Returns
    -------
    dict
        What ``_stats.json`` holds: ``shard``, ``count``, ``nbytes`` and ``sha256`` of the tar, ``sources`` (kept
        samples by source shard), ``content`` (hash of what was asked for).

    Raises
    ------
    WriteError
        If a source no longer holds a sample as it was when it was indexed (and scored, where there is a ``sha256``); if
        a source lies where curated shards go; or if a file of that name is there that this library did not write.
    """
    stem = f"{number:05d}"
    table = _concat([backend_of(f).to_arrow(f) for f in frames])
    rows = table.select([name for name in (*LOCATORS, *_CHECKS) if name in table.column_names]).to_pylist()
    sources = dict(Counter(row["shard"] for row in rows))
    check_sources(spec.folder, sources)
    parquet = _to_parquet(table)
    content = _content(parquet, sources, spec.source_options)
    urls = {suffix: files.join(spec.folder, stem + suffix) for suffix in _SUFFIXES}
    before = _read_stats(urls[_STATS], spec.storage_options)
    present = [suffix for suffix in _SUFFIXES if files.exists(urls[suffix], spec.storage_options)]
    if before is None and present:
        raise WriteError(
            f"{urls[present[0]]} is there, and was not written by this library: "
            "choose another folder, or move the file away"
        )
    if resume and before is not None and before["content"] == content and {".tar", ".parquet"} <= set(present):
        return {**before, "resumed": True}

    samples: list[shards.Sample] = []
    with files.write_whole(urls[".tar"], spec.storage_options) as file:
        sink = _Counted(file)
        with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for row, members in zip(rows, source_members(rows, spec.source_options), strict=True):
                samples.append(_add(tar, row, members))
        stats = {
            "shard": f"{stem}.tar",
            "count": len(rows),
            "nbytes": sink.nbytes,
            "sha256": sink.digest.hexdigest(),
            "sources": sources,
            "content": content,
        }
        # An older tar would seem to be the one that the new statistics speak of.
        files.remove(urls[".tar"], spec.storage_options)
        _write(urls[_STATS], json.dumps(stats, indent=1, ensure_ascii=False).encode() + b"\n", spec)
        _write(urls[".parquet"], parquet, spec)
        idx = shards.format_idx(samples)
        if idx is None:
            files.remove(urls[".idx"], spec.storage_options)
        else:
            _write(urls[".idx"], idx.encode(), spec)
    return {**stats, "resumed": False}


def check_sources(folder: str, sources: Iterable[str]) -> None:
    """Refuse to write over the shards that are read.

    Parameters
    ----------
    folder : str
        Where curated shards go.
    sources : iterable of str
        URLs of the shards that samples come from.

    Raises
    ------
    WriteError
        If one of them lies in the folder, under a name that a curated shard may get.
    """
    for url in sources:
        parent, _, name = url.rpartition("/")
        if _NAME.fullmatch(name) and _same_folder(parent, folder):
            raise WriteError(f"{url} is read, and lies in the folder that is to be written: choose another folder")


def files_there(folder: str, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Names of the files in a folder that are called like those of a curated shard, whoever wrote them."""
    names = (url.rpartition("/")[2] for url in files.list_files(folder, "", storage_options))
    return [name for name in names if _NAME.fullmatch(name)]


def written_shards(folder: str, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Stems of this library's curated shards in a folder, in order; one without its tar is unfinished."""
    names = files_there(folder, storage_options)
    stems = sorted((name.removesuffix(_STATS) for name in names if name.endswith(_STATS)), key=int)
    return [s for s in stems if _read_stats(files.join(folder, s + _STATS), storage_options) is not None]


def remove_surplus(folder: str, count: int, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Remove curated shards of an earlier, larger selection, finished or not; only such as this library wrote.

    Parameters
    ----------
    folder : str
        Where they are.
    count : int
        Shards that the selection has now.
    storage_options : mapping, optional
        For fsspec.

    Returns
    -------
    list of str
        Stems of the shards that were removed.
    """
    surplus = [stem for stem in written_shards(folder, storage_options) if int(stem) >= count]
    for stem in surplus:
        for suffix in _SUFFIXES:  # the statistics last: they say whose the others are
            files.remove(files.join(folder, stem + suffix), storage_options)
    return surplus


def _read_stats(url: str, storage_options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Read a statistics file; None unless it is this library's (img2dataset calls its own the same)."""
    try:
        stats = json.loads(files.read_text(url, storage_options) or "null")
    except ValueError:
        return None
    return stats if isinstance(stats, dict) and {"content", "sha256", "shard"} <= stats.keys() else None


def _same_folder(a: str, b: str) -> bool:
    if files.is_local(a) and files.is_local(b):
        return files.local_path(a).resolve() == files.local_path(b).resolve()
    (protocol_a, _, path_a), (protocol_b, _, path_b) = a.partition("://"), b.partition("://")
    return protocol_a == protocol_b and path_a.strip("/") == path_b.strip("/")


def _write(url: str, data: Any, spec: WriteSpec) -> None:
    with files.write_whole(url, spec.storage_options) as file:
        file.write(data)


class _Counted(io.RawIOBase):
    """A sink that counts and hashes what passes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.nbytes, self.digest = file, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.nbytes += len(data)
        return self._file.write(data)


def _concat(tables: list[pa.Table]) -> pa.Table:
    """One table in one piece, whose bytes do not tell how the rows were cut into partitions."""
    plain = []
    for table in tables:
        for i, column in enumerate(table.schema):
            if pa.types.is_dictionary(column.type):
                # Each partition of a categorical column may number its categories in another way.
                values = table.column(i).cast(column.type.value_type)
                table = table.set_column(i, column.with_type(values.type), values)
        plain.append(table.replace_schema_metadata(None))
    # A user's column that is all null in one partition has no type there.
    return pa.concat_tables(plain, promote_options="permissive").combine_chunks()


def _to_parquet(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _content(parquet: pa.Buffer, sources: Iterable[str], source_options: Mapping[str, Any]) -> str:
    """Hash of all that decides what the shard's files hold: the rows, and the versions of their sources."""
    digest = hashlib.sha256()
    for url in sources:
        digest.update(f"{url} {shards.fingerprint(url, source_options)}\n".encode())
    digest.update(parquet)
    return digest.hexdigest()


def source_members(rows: list[dict[str, Any]], source_options: Mapping[str, Any]) -> Iterator[list[tuple[str, bytes]]]:
    """Names and bytes of each row's members; a source is opened once for each run of rows that it holds.

    An extent is read in one piece, with what lies in it. Where that would be others' members, over and over (all images
    of a tar stand before all captions, say), the members are read one by one, by an index of the source.
    """
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
    """Sources in which extents overlap or are very long, with the offsets of all samples that are wanted of them."""
    offsets: dict[str, set[int]] = {}
    for row in rows:
        offsets.setdefault(row["shard"], set()).add(row["sample_offset"])
    extents = {(row["shard"], row["sample_offset"], row["sample_nbytes"]) for row in rows}
    long = {url for url, _, nbytes in extents if nbytes > _LONG_EXTENT}
    overlapping = {url for (url, _), group in _overlapping(extents) if len(group) > 1}
    return {url: offsets[url] for url in long | overlapping}


def _in_one_piece(
    url: str, rows: list[dict[str, Any]], source_options: Mapping[str, Any]
) -> Iterator[list[tuple[str, bytes]]]:
    extents = [(row["sample_offset"], row["sample_nbytes"]) for row in rows]
    for row, data in zip(rows, shards.read_extents(url, extents, source_options), strict=True):
        index = shards.index_tar(io.BytesIO(data), extent=True)
        # Behind the sample's first member, others' members may lie between.
        sample = _checked(row, index.samples[0] if index.samples else None, index.error, row["sample_offset"])
        stored = [data[m.offset : m.offset + m.stored] for m in sample.members]
        yield _expanded(row, sample, stored, row["sample_offset"])


@dataclass(frozen=True)
class _Known:
    """What the index of a source says of some of its samples, by their offsets."""

    samples: dict[int, shards.Sample]
    error: str | None


def _find_samples(url: str, offsets: set[int], source_options: Mapping[str, Any]) -> _Known:
    with shards.hold_shard(url, source_options), shards.open_shard(url, source_options) as file:
        index = shards.index_tar(file)
    return _Known({s.offset: s for s in index.samples if s.offset in offsets}, index.error)


def _one_by_one(
    url: str, rows: list[dict[str, Any]], known: _Known, source_options: Mapping[str, Any]
) -> Iterator[list[tuple[str, bytes]]]:
    samples = [_checked(row, known.samples.get(row["sample_offset"]), known.error) for row in rows]
    extents = [(m.offset, m.stored) for sample in samples for m in sample.members]
    # A remote source was streamed to be indexed: for most of it, that copy serves better than ranges.
    whole = 2 * sum(nbytes for _, nbytes in extents) >= max((offset + nbytes for offset, nbytes in extents), default=0)
    pieces = shards.read_extents(url, extents, source_options, whole)
    for row, sample in zip(rows, samples, strict=True):
        yield _expanded(row, sample, [next(pieces) for _ in sample.members])


def _checked(row: Mapping[str, Any], sample: shards.Sample | None, error: str | None, base: int = 0) -> shards.Sample:
    """Return the sample that was found where a row says; raise `WriteError` if it is not the row's."""
    if sample is None:
        raise _changed(row, error or "no sample begins there")
    if sample.key != row["key"]:
        raise _changed(row, error or f"{sample.key!r} is there")
    if (sample.offset + base, sample.end - sample.offset) != (row["sample_offset"], row["sample_nbytes"]):
        raise _changed(row, error or "its members have other sizes")
    return sample


def _expanded(
    row: Mapping[str, Any], sample: shards.Sample, stored: list[bytes], base: int = 0
) -> list[tuple[str, bytes]]:
    """Names and contents of a sample's members; raise `WriteError` if its image is not the one that was scored."""
    for member, data in zip(sample.members, stored, strict=True):
        if len(data) < member.stored:
            raise _changed(row, f"{member.name!r} is cut off")
    if row.get("sha256") is not None and "offset" in row:
        image = next((d for m, d in zip(sample.members, stored, strict=True) if m.offset + base == row["offset"]), None)
        if image is None or hashlib.sha256(image).hexdigest() != row["sha256"]:
            raise _changed(row, "its image has another sha256")
    return [(m.name, m.expand(data)) for m, data in zip(sample.members, stored, strict=True)]


def _changed(row: Mapping[str, Any], wrong: str) -> WriteError:
    where = f"{row['shard']}, bytes {row['sample_offset']:,} to {row['sample_offset'] + row['sample_nbytes']:,}"
    return WriteError(
        f"the sample {row['key']!r} is not as it was at {where}: {wrong}. The shard was changed: score it again."
    )


def _add(tar: tarfile.TarFile, row: dict[str, Any], members: list[tuple[str, bytes]]) -> shards.Sample:
    first = tar.offset
    sample = shards.Sample(row["key"], first, first)
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        tar.addfile(info, io.BytesIO(data))
        padded = -(-len(data) // shards.BLOCK) * shards.BLOCK
        ext = name.rpartition("/")[2].partition(".")[2].lower()
        sample.members.append(shards.Member(name, ext, tar.offset - padded, len(data)))
    sample.end = tar.offset
    return sample
