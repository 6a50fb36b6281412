"""Score tables: a Parquet file per shard, with its provenance in the footer; `read_scores`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import dask.dataframe as dd
import pyarrow as pa
import pyarrow.parquet as pq

from ..engine.backend import get_backend, resolve_name
from ..engine.frames import from_map
from ..storage import files
from .read import URLPath

#: Key of this library's entry in a Parquet file's metadata.
METADATA_KEY = "imgcurator"


class RowFilter(Protocol):
    """Which rows of a partition are wanted, judging by some of its columns."""

    @property
    def columns(self) -> list[str]: ...

    def mask(self, frame: Any) -> Any: ...


@dataclass(frozen=True)
class ScoreFiles:
    """How score files are read; `keep` drops rows before their other columns are read."""

    backend: str
    columns: tuple[str, ...]
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    keep: RowFilter | None = None


def read_score_files(urls: Sequence[str], spec: ScoreFiles, columns: Sequence[str] | None = None) -> Any:
    """Read score files as one partition; Dask's optimizer sets `columns` to those used later."""
    wanted = list(spec.columns if columns is None else columns)
    frames = [_read_file(url, spec, wanted) for url in urls]
    if len(frames) == 1:
        return frames[0]
    backend = get_backend(spec.backend)
    return backend.from_arrow(pa.concat_tables([backend.to_arrow(f) for f in frames], promote_options="permissive"))


def _read_file(url: str, spec: ScoreFiles, wanted: list[str]) -> Any:
    first = [name for name in spec.keep.columns if name in spec.columns] if spec.keep is not None else []
    if not first or spec.keep is None:
        return get_backend(spec.backend).read_parquet(url, wanted, spec.storage_options)
    frame = get_backend(spec.backend).read_parquet(url, first, spec.storage_options)
    return read_kept(url, spec, frame, spec.keep.mask(frame))[wanted]


def read_kept(url: str, spec: ScoreFiles, frame: Any, mask: Any) -> Any:
    """Read the remaining columns of rows kept by a mask; `frame` has those already read."""
    backend = get_backend(spec.backend)
    if not mask.any():
        schema = file_schema(url, spec.storage_options)
        return backend.from_arrow(schema.empty_table().select(list(spec.columns)).replace_schema_metadata(None))
    rest = [name for name in spec.columns if name not in frame.columns]
    if rest:
        more = backend.read_parquet(url, rest, spec.storage_options)
        frame = frame.assign(**{name: more[name] for name in rest})
    return frame[list(spec.columns)][mask].reset_index(drop=True)


def write_score_file(
    frame: Any, url: str, provenance: Mapping[str, Any], backend: str, storage_options: Mapping[str, Any]
) -> None:
    """Write a partition as a score file."""
    metadata = {METADATA_KEY: json.dumps(provenance, sort_keys=True)}
    get_backend(backend).write_parquet(frame, url, metadata, storage_options)


def file_schema(url: str, storage_options: Mapping[str, Any] | None = None) -> pa.Schema:
    """Arrow schema of a score file, from its footer."""

    def read() -> pa.Schema:
        with files.opened(url, storage_options) as file:
            return pq.read_schema(file)

    return files.persist(url, read)


def file_provenance(url: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return a score file's provenance; None if it is missing, damaged or not this library's."""
    try:
        metadata = file_schema(url, storage_options).metadata or {}
        return json.loads(metadata[METADATA_KEY.encode()])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None


def in_shard_order(urls: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Sort score files by their shard's URL; files of other origin by their own."""

    def order(url: str) -> tuple[str, str]:
        provenance = file_provenance(url, storage_options) or {}
        return str(provenance.get("shard", "")), url

    return sorted(urls, key=order)


def read_scores(
    urlpath: URLPath, *, storage_options: Mapping[str, Any] | None = None, backend: str | None = None
) -> dd.DataFrame:
    """Read a score table: the Parquet files that `score`, `select` or `to_webdataset` left.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Folder with ``*.parquet``, or the files themselves.
    storage_options : mapping, optional
        For the fsspec file system.
    backend : {"auto", "cudf", "pandas"}, optional
        Of the partitions.

    Returns
    -------
    dask.dataframe.DataFrame
        One partition a file. Files are ordered by the shard that they describe (as its URL sorts), which is the order
        of the samples that `to_webdataset` writes.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    return scores_from_files(score_urls(urlpath, storage_options), storage_options, backend)


def score_urls(urlpath: URLPath, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Files of a score table, in shard order."""
    items = [urlpath] if isinstance(urlpath, str | os.PathLike) else list(urlpath)
    urls: list[str] = []
    for item in [os.fspath(i) for i in items]:
        if item.endswith(".parquet") and (not files.is_local(item) or files.local_path(item).is_file()):
            urls.append(str(files.local_path(item)) if files.is_local(item) else item)
            continue
        found = files.list_files(item, ".parquet", storage_options)
        if not found:
            raise FileNotFoundError(f"no score table at {item!r}: expected a .parquet file or a folder with such files")
        urls.extend(found)
    return in_shard_order(urls, storage_options)


def scores_from_files(
    urls: Iterable[str | Sequence[str]],
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    keep: RowFilter | None = None,
) -> dd.DataFrame:
    """Read score files as partitions, in the order given, one or several files each."""
    groups = [(item,) if isinstance(item, str) else tuple(item) for item in urls]
    name = resolve_name(backend)
    schema = file_schema(groups[0][0], storage_options)
    meta = get_backend(name).from_arrow(schema.empty_table())
    spec = ScoreFiles(name, tuple(schema.names), dict(storage_options or {}), keep)
    return from_map(read_score_files, groups, "read-scores", meta, spec=spec)
