"""Check a finished folder against its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..steps.score_table import file_provenance, look_at
from ..storage import files, tar_copy
from ..storage.curated import LOCATORS, written_shards
from ..storage.tar_index import hold_shard, index_shard, open_shard
from ..storage.tar_read import read_extents

Options = Mapping[str, Any] | None


def verify(
    folder: str, *, storage_options: Options = None, source_options: Options = None
) -> Iterator[tuple[str, str | None]]:
    """Compare curated shards with their source tars, byte for byte, and the score table with both."""
    # `folder` is the output of `curate`, or holds curated shards; the options are for its file system and the sources'.
    # Yields what was checked, and what is wrong with it, or None.
    record = files.read_text(files.join(folder, "run.json"), storage_options)
    curated = files.join(folder, "shards") if record is not None else folder
    stems = written_shards(curated, storage_options)
    if record is None and not stems:
        raise FileNotFoundError(f"{folder} holds neither run.json nor curated shards (00000_stats.json …)")
    kept = 0
    for stem in stems:
        stats = json.loads(files.read_text(files.join(curated, f"{stem}_stats.json"), storage_options) or "{}")
        kept += stats.get("count", 0)
        url = files.join(curated, f"{stem}.tar")
        try:
            with hold_shard(url, storage_options):
                problem = _shard_problem(url, stats.get("sha256"), storage_options, source_options)
        except (tar_copy.WriteError, OSError) as err:
            problem = str(err)
        yield f"{stem}.tar", problem
    if record is not None:
        yield "run.json", _record_problem(folder, json.loads(record), kept, storage_options)


def _shard_problem(url: str, sha256: str | None, options: Options, source_options: Options) -> str | None:
    with open_shard(url, options) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if digest != sha256:
        return f"sha256 is {digest}, its _stats.json says {sha256}"
    with files.opened_parquet(url.removesuffix(".tar") + ".parquet", options) as parquet:
        rows = parquet.read().to_pylist()
    index = index_shard(url, options)
    if index.error is not None:
        return index.error
    if len(index.samples) != len(rows):
        return f"it holds {len(index.samples)} samples, its Parquet file {len(rows)} rows"
    try:
        copied_from = [{"key": row["key"], **{name: row[f"source_{name}"] for name in LOCATORS[1:]}} for row in rows]
    except KeyError:
        return "its Parquet file does not say where its samples come from: an earlier version wrote it; write it again"
    sources = tar_copy.source_members(copied_from, dict(source_options or {}))
    for row, sample, source in zip(rows, index.samples, sources, strict=True):
        pieces = read_extents(url, [(m.offset, m.nbytes) for m in sample.members], options, whole=True)
        copied = list(zip((m.name for m in sample.members), pieces, strict=True))
        if copied != source.members:
            return f"sample {row['key']!r} differs from its source in {row['source_shard']}"
        if (row["sample_offset"], row["sample_nbytes"]) != (sample.offset, sample.end - sample.offset):
            return f"sample {row['key']!r} is not where its Parquet file says"
        known, image = row.get("sha256"), sample.get(row.get("ext") or "")
        if known and image is not None and hashlib.sha256(dict(copied)[image.name]).hexdigest() != known:
            return f"the image of sample {row['key']!r} is not the one that was scored"
    return None


def _record_problem(folder: str, record: Mapping[str, Any], kept: int, options: Options) -> str | None:
    if record.get("kept") != kept:
        return f"it counts {record.get('kept')} kept samples, the curated shards hold {kept}"
    by_shard: dict[str, str] = {}
    for url in files.list_files(files.join(folder, "scores"), ".parquet", options):
        provenance = file_provenance(url, options)
        if provenance is None:
            return f"{url} cannot be read, or is not a score file of this library"
        by_shard[provenance.get("shard", "")] = url
    samples = 0
    for shard in record["arguments"]["shards"]:
        if shard not in by_shard and shard in record.get("shards_missing", ()):
            continue
        if shard not in by_shard:
            return f"there are no scores of {shard}"
        samples += look_at(by_shard[shard], options).rows
    if samples != record.get("samples"):
        return f"it counts {record.get('samples')} samples, the score table holds {samples}"
    return None
