"""Check a finished folder against its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq

from ..steps import score, write
from ..storage import files, shards

__all__ = ["verify"]


def verify(
    folder: str, *, storage_options: Mapping[str, Any] | None = None, source_options: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str | None]]:
    """Compare curated shards with the tars that they were copied from, byte for byte, and the score table with both.

    Parameters
    ----------
    folder : str
        What `curate` left, or a folder of curated shards.
    storage_options, source_options : mapping, optional
        For the fsspec file systems of the folder and of the source shards.

    Yields
    ------
    (str, str or None)
        What was looked at, and what is wrong with it; None where it is right.

    Raises
    ------
    FileNotFoundError
        If the folder holds no curated shards and no record of a run.
    """
    record = files.read_text(files.join(folder, "run.json"), storage_options)
    curated = files.join(folder, "shards") if record is not None else folder
    stems = write.written_shards(curated, storage_options)
    if record is None and not stems:
        raise FileNotFoundError(f"{folder} holds neither run.json nor curated shards (00000_stats.json …)")
    kept = 0
    for stem in stems:
        stats = json.loads(files.read_text(files.join(curated, f"{stem}_stats.json"), storage_options) or "{}")
        kept += stats.get("count", 0)
        yield f"{stem}.tar", _shard_problem(curated, stem, stats, dict(storage_options or {}), source_options)
    if record is not None:
        yield "run.json", _record_problem(folder, json.loads(record), kept, storage_options)


def _shard_problem(
    folder: str,
    stem: str,
    stats: Mapping[str, Any],
    storage_options: Mapping[str, Any],
    source_options: Mapping[str, Any] | None,
) -> str | None:
    url = files.join(folder, f"{stem}.tar")
    try:
        with shards.hold_shard(url, storage_options):
            return _differences(url, files.join(folder, f"{stem}.parquet"), stats, storage_options, source_options)
    except (write.WriteError, OSError) as err:
        return str(err)


def _differences(
    url: str,
    table: str,
    stats: Mapping[str, Any],
    storage_options: Mapping[str, Any],
    source_options: Mapping[str, Any] | None,
) -> str | None:
    with shards.open_shard(url, storage_options) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    with files.opened(table, storage_options) as file:
        rows = pq.read_table(file).to_pylist()
    if digest != stats.get("sha256"):
        return f"sha256 is {digest}, its _stats.json says {stats.get('sha256')}"
    index = shards.index_shard(url, storage_options)
    if index.error is not None:
        return index.error
    if len(index.samples) != len(rows):
        return f"it holds {len(index.samples)} samples, its Parquet file {len(rows)} rows"
    sources = write.source_members(rows, dict(source_options or {}))
    for row, sample, members in zip(rows, index.samples, sources, strict=True):
        extents = [(m.offset, m.nbytes) for m in sample.members]
        pieces = shards.read_extents(url, extents, storage_options, whole=True)
        copied = list(zip((m.name for m in sample.members), pieces, strict=True))
        if copied != members:
            return f"sample {row['key']!r} differs from its source in {row['shard']}"
        known, image = row.get("sha256"), sample.get(row.get("ext") or "")
        if known and image is not None and hashlib.sha256(dict(copied)[image.name]).hexdigest() != known:
            return f"the image of sample {row['key']!r} is not the one that was scored"
    return None


def _record_problem(
    folder: str, record: Mapping[str, Any], kept: int, storage_options: Mapping[str, Any] | None
) -> str | None:
    if record.get("kept") != kept:
        return f"it says that {record.get('kept')} samples were kept, the curated shards hold {kept}"
    by_shard: dict[str, str] = {}
    samples = 0
    for url in files.list_files(files.join(folder, "scores"), ".parquet", storage_options):
        provenance = score.file_provenance(url, storage_options)
        if provenance is None:
            return f"{url} cannot be read, or is not a score file of this library"
        by_shard[provenance.get("shard", "")] = url
    for shard in record["arguments"]["shards"]:
        if shard not in by_shard:
            return f"there are no scores of {shard}"
        with files.opened(by_shard[shard], storage_options) as file:
            samples += pq.read_metadata(file).num_rows
    if samples != record.get("samples"):
        return f"it says that there are {record.get('samples')} samples, the score table holds {samples}"
    return None
