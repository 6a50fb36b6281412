"""Curated shards: which samples go into which tar, and writing one of them. No Dask in here.

A written tar holds the members of the kept samples, names and bytes as in the source, in the order of the rows. Its
headers are made anew with fixed owner, mode and time, so the same selection gives the same file on every machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from . import files, shards
from .backend import backend_of

__all__ = ["Slice", "WriteError", "WriteSpec", "parse_size", "plan_shards", "write_shard", "written_shards"]

#: Columns that the writer needs.
LOCATORS = ("key", "shard", "sample_offset", "sample_nbytes")

_OURS = re.compile(r"(\d{5,})(?:\.tar|\.parquet|\.idx|_stats\.json)")


class WriteError(RuntimeError):
    """A kept sample cannot be copied as it was scored."""


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
        Bytes of samples a shard, at most (a single larger sample gets a shard of its own).
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


def plan_shards(
    partitions: Iterable[tuple[Sequence[str | None], Sequence[int]]], max_count: int, max_nbytes: int
) -> Iterator[list[Slice]]:
    """Pack kept samples into shards, in order.

    Parameters
    ----------
    partitions : iterable of (keys, sizes)
        For each partition the keys and extents (bytes) of its kept rows.
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
        If a source no longer holds a sample where it was when it was indexed.
    """
    stem = f"{number:05d}"
    table = pa.concat_tables([backend_of(f).to_arrow(f) for f in frames])
    rows = table.select(list(LOCATORS)).to_pylist()
    content = _content(table, rows, spec.source_options)
    stats_url = files.join(spec.folder, f"{stem}_stats.json")
    if resume and (done := _finished(spec, stem, content)) is not None:
        return {**done, "resumed": True}
    files.remove(stats_url, spec.storage_options)
    samples: list[shards.Sample] = []
    sources: dict[str, int] = {}
    with files.write_whole(files.join(spec.folder, f"{stem}.tar"), spec.storage_options) as file:
        sink = _Counted(file)
        with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for row, members in zip(rows, _members(rows, spec.source_options), strict=True):
                samples.append(_add(tar, row, members))
                sources[row["shard"]] = sources.get(row["shard"], 0) + 1
    with files.write_whole(files.join(spec.folder, f"{stem}.parquet"), spec.storage_options) as file:
        pq.write_table(table.replace_schema_metadata(None), file, compression="zstd")
    idx = shards.format_idx(samples)
    idx_url = files.join(spec.folder, f"{stem}.idx")
    if idx is None:
        files.remove(idx_url, spec.storage_options)
    else:
        with files.write_whole(idx_url, spec.storage_options) as file:
            file.write(idx.encode())
    stats = {
        "shard": f"{stem}.tar",
        "count": len(rows),
        "nbytes": sink.nbytes,
        "sha256": sink.digest.hexdigest(),
        "sources": sources,
        "content": content,
    }
    # Last, because it is what says that the shard is finished.
    with files.write_whole(stats_url, spec.storage_options) as file:
        file.write(json.dumps(stats, indent=1, ensure_ascii=False).encode() + b"\n")
    return {**stats, "resumed": False}


def written_shards(folder: str, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Stems of the finished curated shards in a folder, in order."""
    suffix = "_stats.json"
    names = (url.rpartition("/")[2] for url in files.list_files(folder, suffix, storage_options))
    return sorted((n.removesuffix(suffix) for n in names if _OURS.fullmatch(n)), key=int)


def remove_surplus(folder: str, count: int, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Remove finished shards of an earlier, larger selection; only such as this library wrote."""
    surplus = [stem for stem in written_shards(folder, storage_options) if int(stem) >= count]
    for stem in surplus:
        for suffix in (".tar", ".parquet", ".idx", "_stats.json"):
            files.remove(files.join(folder, stem + suffix), storage_options)
    return surplus


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


def _content(table: pa.Table, rows: list[dict[str, Any]], source_options: Mapping[str, Any]) -> str:
    """Hash of all that decides what the shard's files hold: the rows, and the versions of their sources."""
    digest = hashlib.sha256()
    for url in dict.fromkeys(row["shard"] for row in rows):
        digest.update(f"{url} {shards.fingerprint(url, source_options)}\n".encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata(None).combine_chunks())
    digest.update(sink.getvalue())
    return digest.hexdigest()


def _finished(spec: WriteSpec, stem: str, content: str) -> dict[str, Any] | None:
    text = files.read_text(files.join(spec.folder, f"{stem}_stats.json"), spec.storage_options)
    try:
        stats = json.loads(text) if text else None
    except ValueError:
        return None
    if not isinstance(stats, dict) or stats.get("content") != content:
        return None
    present = all(files.exists(files.join(spec.folder, stem + s), spec.storage_options) for s in (".tar", ".parquet"))
    return stats if present else None


def _members(rows: list[dict[str, Any]], source_options: Mapping[str, Any]) -> Iterator[list[tuple[str, bytes]]]:
    """Names and bytes of each row's members; a source is opened once for each run of rows that it holds."""
    start = 0
    while start < len(rows):
        url, stop = rows[start]["shard"], start
        while stop < len(rows) and rows[stop]["shard"] == url:
            stop += 1
        extents = [(row["sample_offset"], row["sample_nbytes"]) for row in rows[start:stop]]
        try:
            for row, data in zip(rows[start:stop], shards.read_extents(url, extents, source_options), strict=True):
                yield _parse(row, data)
        except OSError as err:
            raise WriteError(f"cannot read {url}, from which {stop - start} samples are to be copied: {err}") from err
        start = stop


def _parse(row: dict[str, Any], data: bytes) -> list[tuple[str, bytes]]:
    """Members of one sample out of its extent, in which other samples' members may lie between."""
    where = f"{row['shard']}, bytes {row['sample_offset']:,} to {row['sample_offset'] + row['sample_nbytes']:,}"
    out: dict[str, tuple[str, bytes]] = {}
    if row["sample_nbytes"] > 0 and len(data) == row["sample_nbytes"]:
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for info in tar:
                    parts = shards.split_name(info.name) if info.isreg() else None
                    if parts is None or parts[0] != row["key"]:
                        continue
                    if parts[1] in out:
                        break
                    content = tar.extractfile(info)
                    assert content is not None
                    out[parts[1]] = (info.name, content.read())
        except tarfile.TarError as err:
            raise WriteError(
                f"the sample {row['key']!r} is no longer at {where}: {err}. Score the shard again."
            ) from err
    if not out:
        raise WriteError(f"the sample {row['key']!r} is not at {where}. The shard was changed: score it again.")
    return list(out.values())


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
