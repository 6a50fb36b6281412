"""Score tables: a Parquet file per shard, with its provenance in the footer; `read_scores`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import dask.dataframe as dd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.base import tokenize

from ..engine.backend import backend_of, empty_frame, get_backend, is_dask
from ..engine.cluster import backend_for
from ..engine.frames import from_map, objects_stay
from ..engine.run import Wave, current_client, results, run
from ..schema import METADATA_KEY, conform, kinds_of_schema, unify_schemas
from ..storage import files
from ..storage.urls import fingerprints, first_bytes, what_is
from .read import URLPath

#: Rows of a streamed table in memory at a time.
_BATCH = 16_384


class RowFilter(Protocol):
    """Which rows of a partition are wanted, judging by some of its columns."""

    @property
    def columns(self) -> list[str]: ...

    def mask(self, frame: Any) -> Any: ...


@dataclass(frozen=True)
class ScoreFiles:
    """How score files are read; `keep` drops rows before their other columns are read."""

    backend: str
    schema: pa.Schema
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    keep: RowFilter | None = None
    versions: str = ""  # of the files: persisted rows of an older one have other keys


def read_score_files(urls: Sequence[str], spec: ScoreFiles, columns: Sequence[str] | None = None) -> Any:
    """Read score files as one partition; Dask's optimizer sets `columns` to those used later."""
    wanted = list(spec.schema.names if columns is None else columns)
    backend = get_backend(spec.backend)
    if spec.keep is None:
        return backend.from_arrow(pa.concat_tables([_read(url, spec, wanted) for url in urls]))
    frames = [_read_kept(url, spec, wanted) for url in urls]
    if len(frames) == 1:
        return frames[0]
    return backend.from_arrow(pa.concat_tables([backend.to_arrow(f) for f in frames], promote_options="permissive"))


def _read(url: str, spec: ScoreFiles, names: Sequence[str]) -> pa.Table:
    """Read columns of a file as the table's types; null where the file has none of a name."""

    def read() -> pa.Table:
        with files.opened(url, spec.storage_options) as file:
            parquet = pq.ParquetFile(file)
            return parquet.read([name for name in names if name in parquet.schema_arrow.names])

    return conform(files.persist(url, read), pa.schema([spec.schema.field(name) for name in names]), url)


def _read_kept(url: str, spec: ScoreFiles, wanted: list[str]) -> Any:
    assert spec.keep is not None
    first = [name for name in spec.keep.columns if name in spec.schema.names]
    frame = get_backend(spec.backend).from_arrow(_read(url, spec, first))
    return read_kept(url, spec, frame, spec.keep.mask(frame))[wanted]


def read_kept(url: str, spec: ScoreFiles, frame: Any, mask: Any) -> Any:
    """Read the remaining columns of rows kept by a mask; `frame` has those already read."""
    backend, names = get_backend(spec.backend), spec.schema.names
    if not mask.any():
        return backend.from_arrow(spec.schema.empty_table())
    rest = [name for name in names if name not in frame.columns]
    if rest:
        more = backend.from_arrow(_read(url, spec, rest))
        frame = frame.assign(**{name: more[name] for name in rest})
    return frame[names][mask].reset_index(drop=True)


def write_score_file(
    frame: Any, url: str, provenance: Mapping[str, Any], backend: str, storage_options: Mapping[str, Any]
) -> pa.Schema:
    """Write a partition as a score file, and return its schema."""
    table = get_backend(backend).to_arrow(frame)
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(provenance, sort_keys=True)})
    # Bytes of vectors compress better by their place, and repeat too seldom for a dictionary.
    vectors = [f.name for f in table.schema if f.type == pa.list_(pa.float32())]
    options = {
        "compression": "zstd",
        "use_dictionary": [name for name in table.column_names if name not in vectors],
        "use_byte_stream_split": [f"{name}.list.element" for name in vectors],
    }
    with files.write_whole(url, storage_options) as file, pq.ParquetWriter(file, table.schema, **options) as writer:
        if len(table):  # an empty row group is an error to some readers
            writer.write_table(table)
    return table.schema.remove_metadata()


def _write_part(frame: Any, url: str, provenance: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    write_score_file(frame, url, provenance, backend_of(frame).name, options)


# --- what the files are ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreFile:
    """What a score file's footer says; `provenance` is empty for files of other origin."""

    url: str
    schema: pa.Schema
    provenance: Mapping[str, Any]

    @property
    def json_fields(self) -> set[str]:
        """Columns that come from fields of the samples' JSON."""
        return set(self.provenance.get("read", {}).get("fields", {}))


def look_at(url: str, storage_options: Mapping[str, Any] | None = None) -> ScoreFile:
    """Read a score file's footer."""

    def read() -> pa.Schema:
        with files.opened(url, storage_options) as file:
            return pq.read_schema(file)

    try:
        schema = files.persist(url, read)
    except pa.ArrowException as err:
        words = what_is(first_bytes(url, storage_options))
        raise ValueError(
            f"{url} is no Parquet file that can be read{f'; it is {words}' if words else f': {err}'}"
        ) from err
    try:
        provenance = json.loads((schema.metadata or {})[METADATA_KEY.encode()])
    except (KeyError, ValueError):
        provenance = {}
    return ScoreFile(url, schema.remove_metadata(), provenance)


def look_at_all(urls: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> list[ScoreFile]:
    """Read the footers of score files."""
    return files.at_once(lambda url: look_at(url, storage_options), urls)


def file_provenance(url: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return a score file's provenance; None if it is missing, damaged or not this library's."""
    try:
        return dict(look_at(url, storage_options).provenance) or None
    except (OSError, ValueError):
        return None


def schema_of(found: Iterable[ScoreFile]) -> pa.Schema:
    """Schema of a table of several files: all their columns."""
    distinct: dict[pa.Schema, ScoreFile] = {}
    for file in found:
        distinct.setdefault(file.schema, file)
    loose = set[str]().union(*(file.json_fields for file in distinct.values()))
    return unify_schemas(((file.url, schema) for schema, file in distinct.items()), loose)


@dataclass(frozen=True)
class ScoreTable:
    """Score files that are one table, ordered by their shards' URLs; files of other origin by their own."""

    files: Sequence[ScoreFile]
    storage_options: Mapping[str, Any]

    @property
    def urls(self) -> list[str]:
        """The files' URLs."""
        return [file.url for file in self.files]

    @cached_property
    def schema(self) -> pa.Schema:
        """All columns of all files."""
        return schema_of(self.files)

    @property
    def shared(self) -> dict[str, Any]:
        """What the provenance of all files has in common."""
        first, *others = (file.provenance for file in self.files)
        return {name: value for name, value in first.items() if all(made.get(name) == value for made in others)}

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of each column, as `parse_where` wants it."""
        return kinds_of_schema(self.schema)

    def batches(self, columns: Container[str]) -> Iterator[pa.Table]:
        """Stream those of the columns that the table has, a few thousand rows at a time."""
        schema = pa.schema([field for field in self.schema if field.name in columns])
        for file in self.files:
            names = [name for name in schema.names if name in file.schema.names]
            with files.opened(file.url, self.storage_options) as opened:
                for batch in pq.ParquetFile(opened).iter_batches(_BATCH, columns=names):
                    yield conform(pa.Table.from_batches([batch]), schema, file.url)

    def frame(self, backend: str, versions: str = "") -> dd.DataFrame:
        """Make a lazy frame with a partition per file; `versions` of the files, where a user may persist it."""
        return scores_from_files(self.urls, ScoreFiles(backend, self.schema, self.storage_options, versions=versions))


# --- who made a column ----------------------------------------------------------------------------

#: What tells one model from another.
_MODEL = ("model", "pretrained", "weights_sha256", "backbone_sha256", "starter_sha256")


class MixedModelsError(ValueError):
    """A column of a table was made by several models, so that its values cannot be compared."""


def model_name(provenance: Mapping[str, Any]) -> str:
    """The model of a score file, as people call it."""
    encoder = provenance.get("encoder", {})
    named = " of ".join(str(encoder[name]) for name in ("model", "pretrained") if encoder.get(name))
    return named or "an unknown model"


def check_makers(table: ScoreTable, columns: Iterable[str]) -> dict[str, Any]:
    """Raise `MixedModelsError` if several models made embeddings or scores that are used; returns a provenance."""
    for column in columns:
        first: tuple[str, Mapping[str, Any]] | None = None
        for file in table.files:
            maker = _maker(column, file.provenance)
            if maker is None:
                continue
            if first is None:
                first = file.url, maker
            elif maker != first[1]:
                differs = next(name for name in {**first[1], **maker} if first[1].get(name) != maker.get(name))
                raise MixedModelsError(
                    f"the values of {column!r} in {first[0]} were made with {differs} {first[1].get(differs)!r}, those "
                    f"of {file.url} with {maker.get(differs)!r}: they cannot be compared, give the files of one model"
                )
    return dict(table.files[0].provenance)


def _maker(column: str, provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """What made a column of a file; None if no model did."""
    encoder = {name: provenance.get("encoder", {}).get(name) for name in _MODEL}
    if column == "embedding":
        return encoder
    made = {**provenance.get("heads", {}), **provenance.get("added", {})}.get(column)
    return {**encoder, "head": made} if made else None


# --- opening them ---------------------------------------------------------------------------------


def open_scores(urlpath: URLPath, storage_options: Mapping[str, Any] | None = None) -> ScoreTable:
    """Find the files of a score table, and look at each; ValueError for tables that are not of images."""
    table = open_files(urlpath, storage_options)
    # Tables of other origin may lack much, even keys; but they have samples to write or embeddings to compare.
    if "shard" not in table.kinds and "list" not in table.kinds.values():
        first = table.urls[0]
        raise ValueError(
            f"{first} is no score table: it has neither a column 'shard' nor embeddings (there are: "
            f"{', '.join(table.schema.names)}); if shards lie beside it, as img2dataset leaves them, score those "
            f"first: dask-imgcurator score '{first.rpartition('/')[0]}/*.tar' --out SCORES"
        )
    return table


def open_files(urlpath: URLPath, storage_options: Mapping[str, Any] | None = None) -> ScoreTable:
    """Find Parquet files, and look at each."""
    items = [urlpath] if isinstance(urlpath, str | os.PathLike) else list(urlpath)
    urls: list[str] = []
    for item in [os.fspath(i) for i in items]:
        if item.endswith(".parquet") and (not files.is_local(item) or files.local_path(item).is_file()):
            urls.append(files.absolute(item))
            continue
        found = files.list_files(item, ".parquet", storage_options)
        if not found:
            raise FileNotFoundError(f"no score table at {item!r}: expected a .parquet file or a folder with such files")
        urls.extend(found)
    looks = look_at_all(list(dict.fromkeys(urls)), storage_options)
    looks.sort(key=lambda file: (str(file.provenance.get("shard", "")), file.url))
    return ScoreTable(looks, dict(storage_options or {}))


def scores_from_files(urls: Iterable[str | Sequence[str]], spec: ScoreFiles) -> dd.DataFrame:
    """Read score files as partitions, in the order given, one or several files each."""
    groups = [(item,) if isinstance(item, str) else tuple(item) for item in urls]
    meta = empty_frame(spec.backend, spec.schema)
    with objects_stay() if spec.backend == "cudf" else contextlib.nullcontext():
        return from_map(read_score_files, groups, "read-scores", meta, spec=spec)


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
        One partition per file, with the columns of all files: null where a file lacks one. Files are ordered by the
        shard that they describe (as its URL sorts), which is the order of the samples that `to_webdataset` writes.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a column is of types in two files that have no common one.
    """
    table = open_files(urlpath, storage_options)
    return table.frame(backend_for(backend), tokenize(fingerprints(table.urls, storage_options)))


def to_scores(
    df: Any,
    urlpath: str | os.PathLike[str],
    *,
    like: URLPath | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write a frame as a score table, which all commands and any reader of Parquet open.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        Rows with any columns; ``shard``, ``key``, ``sample_offset`` and ``sample_nbytes`` are needed to write their
        samples later.
    urlpath : str or path
        A new folder, for one file per partition.
    like : str, path, or sequence of them, optional
        Score table that the embeddings and scores come from: the new one then names the same model and heads.
    storage_options : mapping, optional
        For the fsspec file systems of both.

    Returns
    -------
    list of str
        The files.

    Raises
    ------
    FileExistsError
        If the folder holds Parquet files.

    Examples
    --------
    >>> to_scores(df.merge(ratings, on="key"), "run/rated", like="run/scores")  # doctest: +SKIP
    """
    folder, options = files.absolute(urlpath), dict(storage_options or {})
    if there := files.list_files(folder, ".parquet", options):
        raise FileExistsError(f"{folder} holds Parquet files already ({there[0]}): choose a new folder")
    files.make_folder(folder)
    first = open_scores(like, options).files[0].provenance if like is not None else {}
    provenance = {"command": "to_scores", **{name: first[name] for name in ("encoder", "heads") if name in first}}
    targets = [files.join(folder, f"{i:05d}.parquet") for i in range(df.npartitions if is_dask(df) else 1)]
    if not is_dask(df):
        _write_part(df, targets[0], provenance, options)
        return targets
    graph = Wave(targets, results(df, _write_part, provenance, options, label="to-scores", each=targets))
    for _ in run(current_client(), [graph], "writing"):
        pass
    return targets
