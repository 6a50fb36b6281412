"""A folder of curated shards: each a tar, its rows as a score table, an index for DALI, and statistics.

Every shard that this library writes has a ``_stats.json`` beside it. It is written before the files it describes
appear, and the tar appears last. So a shard with both is complete, files without statistics were written by something
else and are left alone, and a killed run leaves nothing that could be mistaken for either.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..schema import METADATA_KEY, arrow_schema, columns_of
from . import files
from .samples import format_idx
from .tar_copy import Copied, WriteError, write_tar
from .urls import fingerprint, lies_in, marks_changes, versions_in

#: Columns that the writer needs.
LOCATORS = ("key", "shard", "sample_offset", "sample_nbytes")

#: Columns by which it checks, if present, that an image is still the one scored.
_CHECKS = ("offset", "nbytes", "sha256")

_STATS = "_stats.json"
_SUFFIXES = (".tar", ".parquet", ".idx", _STATS)
_NAME = re.compile(r"(\d{5,})(\.tar|\.parquet|\.idx|_stats\.json)")


@dataclass(frozen=True)
class WriteSpec:
    """Where curated shards go, and their maximum size (a larger single sample gets its own shard).

    `made`: provenance of the rows. `sources`: folders that hold all source shards; None: they may be anywhere.
    """

    folder: str
    max_count: int = 10_000
    max_nbytes: int = 1_000_000_000
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    source_options: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] | None = None


def write_shard(number: int, tables: Sequence[pa.Table], spec: WriteSpec, resume: bool = True) -> dict[str, Any]:
    """Write rows as a curated shard and its companion files; a finished one with the same content is left alone."""
    stem = f"{number:05d}"
    table = concat_tables(tables)
    rows = table.select([name for name in (*LOCATORS, *_CHECKS) if name in table.column_names]).to_pylist()
    sources = dict(Counter(row["shard"] for row in rows))
    check_sources(spec.folder, sources)
    content = _content(table, sources, spec)
    urls = {suffix: files.join(spec.folder, stem + suffix) for suffix in _SUFFIXES}
    before = _read_stats(urls[_STATS], spec.storage_options)
    present = [suffix for suffix in _SUFFIXES if files.exists(urls[suffix], spec.storage_options)]
    if before is None and present:
        raise WriteError(
            f"{urls[present[0]]} exists and was not written by this library: "
            "choose another folder, or move the file away"
        )
    if resume and before is not None and before["content"] == content and {".tar", ".parquet"} <= set(present):
        return {**before, "resumed": True}
    with files.write_whole(urls[".tar"], spec.storage_options) as file:
        copied = write_tar(rows, file, spec.source_options)
        stats = {
            "shard": f"{stem}.tar",
            "count": len(rows),
            "nbytes": copied.nbytes,
            "sha256": copied.sha256,
            "sources": sources,
            "content": content,
        }
        # An older tar would look like the one that the new statistics describe.
        files.remove(urls[".tar"], spec.storage_options)
        _write(urls[_STATS], json.dumps(stats, indent=1, ensure_ascii=False).encode() + b"\n", spec)
        _write(urls[".parquet"], _to_parquet(_as_copied(table, copied, urls[".tar"], spec)), spec)
        idx = format_idx(copied.samples)
        if idx is None:
            files.remove(urls[".idx"], spec.storage_options)
        else:
            _write(urls[".idx"], idx.encode(), spec)
    return {**stats, "resumed": False}


def _write(url: str, data: Any, spec: WriteSpec) -> None:
    with files.write_whole(url, spec.storage_options) as file:
        file.write(data)


def concat_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """One table in one piece, whose bytes do not depend on how the rows were partitioned."""
    plain = []
    for table in tables:
        for i, column in enumerate(table.schema):
            if pa.types.is_dictionary(column.type):
                # Each partition of a categorical column may number its categories differently.
                values = table.column(i).cast(column.type.value_type)
                table = table.set_column(i, column.with_type(values.type), values)
        plain.append(table.replace_schema_metadata(None))
    # A user's column that is all null in a partition has no type there.
    return pa.concat_tables(plain, promote_options="permissive").combine_chunks()


def _as_copied(table: pa.Table, copied: Copied, url: str, spec: WriteSpec) -> pa.Table:
    """The rows as a score table of the curated tar: where samples are in it, and where they were copied from."""
    samples, images = copied.samples, copied.images
    lie = {
        "shard": [url] * len(samples),
        "sample_offset": [sample.offset for sample in samples],
        "sample_nbytes": [sample.end - sample.offset for sample in samples],
        "offset": [0 if image is None else image.offset for image in images],
        "nbytes": [0 if image is None else image.nbytes for image in images],
    }
    came = [column.name for column in columns_of("write")]
    sources = [table[name.removeprefix("source_")] for name in came]
    table = table.drop_columns([name for name in came if name in table.column_names])  # from an earlier copy
    for name in (name for name in lie if name in table.column_names):
        (known,) = arrow_schema([name])
        table = table.set_column(table.column_names.index(name), known, pa.array(lie[name], known.type))
    for known, column in zip(arrow_schema(came), sources, strict=True):
        table = table.append_column(known, column.cast(known.type))
    made = {**spec.made, "shard": url, "written": {"sources": sorted(set(sources[0].to_pylist()))}}
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(made, sort_keys=True)})


def _to_parquet(table: pa.Table, compression: str = "zstd") -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression)
    return sink.getvalue()


def _content(table: pa.Table, sources: Iterable[str], spec: WriteSpec) -> str:
    """Hash of everything that decides the shard's content: the rows, and the versions of their sources."""
    digest = hashlib.sha256()
    for url in sources:
        digest.update(f"{url} {fingerprint(url, spec.source_options)}\n".encode())
    digest.update(_to_parquet(table, "none"))
    return digest.hexdigest()


def write_sizes(spec: WriteSpec, written: Sequence[Mapping[str, Any]]) -> None:
    """Write ``sizes.json``, by which open_clip's training counts the samples of a folder's shards."""
    url = files.join(spec.folder, "sizes.json")
    if not written:
        files.remove(url, spec.storage_options)
        return
    text = json.dumps({stats["shard"]: stats["count"] for stats in written}, indent=1)
    if files.read_text(url, spec.storage_options) != text:
        _write(url, text.encode(), spec)


# --- the record of a finished folder --------------------------------------------------------------

_MEMORY = ".written.json"


@dataclass(frozen=True)
class Finished:
    """Unchanged results of an earlier run; `page`: version of the report it made."""

    written: list[dict[str, Any]]
    page: str


def find_finished(spec: WriteSpec, of: str) -> Finished | None:
    """Find out, without opening a shard, whether the result exists; `of`: hash of everything that decides it."""
    try:
        memory = json.loads(files.read_text(files.join(spec.folder, _MEMORY), spec.storage_options) or "{}")
    except ValueError:
        return None
    if not of or memory.get("of") != of or memory["files"] != _versions(spec):
        return None
    return Finished([{**stats, "resumed": True} for stats in memory["written"]], memory["page"])


def remember_finished(spec: WriteSpec, of: str, written: Sequence[Mapping[str, Any]], page: str = "") -> None:
    """Record what was written, for `find_finished`."""
    versions = _versions(spec)
    if of and all(map(marks_changes, versions.values())):
        memory = {"of": of, "files": versions, "written": written, "page": page}
        _write(files.join(spec.folder, _MEMORY), json.dumps(memory, ensure_ascii=False).encode(), spec)


def _versions(spec: WriteSpec) -> dict[str, str]:
    """Versions of a folder's curated shards and companion files, by name."""
    there = {
        url.rpartition("/")[2]: version for url, version in versions_in(spec.folder, "", spec.storage_options).items()
    }
    return {name: version for name, version in there.items() if _NAME.fullmatch(name) or name == "sizes.json"}


# --- the folder -----------------------------------------------------------------------------------


def check_sources(folder: str, sources: Iterable[str]) -> None:
    """Raise `WriteError` if a source shard is in the folder under a name that a curated shard may get."""
    for url in sources:
        if overwrites(folder, url):
            raise WriteError(f"{url} is a source shard in the output folder: choose another folder")


def is_allowed(source: str, spec: WriteSpec) -> bool:
    """Whether samples may be copied from a source."""
    return spec.sources is None or lies_in(source, spec.sources)


def check_outside(spec: WriteSpec, source: str) -> None:
    """Raise `WriteError` for a source that is not allowed: the URLs in a table come from whoever made it."""
    if not is_allowed(source, spec):
        known = f"lie in {', '.join(spec.sources[:3])}" if spec.sources else "are not known from its files"
        raise WriteError(
            f"a row names the shard {source}, but the shards of this table {known}: if you trust it, allow it "
            "with --allow-shards PREFIX (allow_shards=)"
        )


def overwrites(folder: str, url: str) -> bool:
    parent, _, name = url.rpartition("/")
    return _NAME.fullmatch(name) is not None and same_folder(parent, folder)


def check_replaced(folder: str, shards: Iterable[str], storage_options: Mapping[str, Any] | None = None) -> None:
    """Raise FileExistsError if a folder holds curated shards, none of which comes from these source shards."""
    before: set[str] = set()
    for stem in written_shards(folder, storage_options):
        before.update((_read_stats(files.join(folder, stem + _STATS), storage_options) or {}).get("sources", ()))
    if before and not before & set(shards):
        raise FileExistsError(
            f"{folder} holds curated shards made from other shards ({min(before)}): choose another folder, or replace "
            "them with --overwrite (overwrite=True)"
        )


def files_there(folder: str, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Names of files in a folder that look like a curated shard's, whatever wrote them."""
    names = (url.rpartition("/")[2] for url in files.list_files(folder, "", storage_options))
    return [name for name in names if _NAME.fullmatch(name)]


def written_shards(folder: str, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Stems of this library's curated shards in a folder, in order; one without its tar is unfinished."""
    names = files_there(folder, storage_options)
    stems = sorted((name.removesuffix(_STATS) for name in names if name.endswith(_STATS)), key=int)
    return [s for s in stems if _read_stats(files.join(folder, s + _STATS), storage_options) is not None]


def remove_surplus(folder: str, count: int, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Remove this library's curated shards beyond the first `count`, left from an earlier, larger selection."""
    surplus = [stem for stem in written_shards(folder, storage_options) if int(stem) >= count]
    for stem in surplus:
        for suffix in _SUFFIXES:  # the statistics last: they prove that the others are ours
            files.remove(files.join(folder, stem + suffix), storage_options)
    return surplus


def _read_stats(url: str, storage_options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Read a statistics file; None unless it is this library's (img2dataset calls its own the same)."""
    try:
        stats = json.loads(files.read_text(url, storage_options) or "null")
    except ValueError:
        return None
    return stats if isinstance(stats, dict) and {"content", "sha256", "shard"} <= stats.keys() else None


def same_folder(a: str, b: str) -> bool:
    """Whether two URLs name one folder."""
    if files.is_local(a) and files.is_local(b):
        return files.local_path(a).resolve() == files.local_path(b).resolve()
    (protocol_a, _, path_a), (protocol_b, _, path_b) = a.partition("://"), b.partition("://")
    return protocol_a == protocol_b and path_a.strip("/") == path_b.strip("/")
