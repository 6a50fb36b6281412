"""Write a score table in the layouts of other projects, and lists of what was selected.

    export(df, "out/", format="clip-retrieval")
    to_uid_subset(df, "subset.npy")

================  =======================================  ============================================================
format            what is written                          for
================  =======================================  ============================================================
clip-retrieval    ``img_emb/img_emb_0.npy`` (float16),     clip-retrieval (index, back end), autofaiss,
                  ``metadata/metadata_0.parquet``          embedding-reader
datacomp          ``00000000.parquet``, ``00000000.npz``   DataComp's baselines and filters
datacomp-subset   one ``.npy`` of sorted ``u8,u8``         DataComp's resharder
laion             ``part-00000.parquet``                   img2dataset and what else reads LAION's tables
list              one value a line                         anything
================  =======================================  ============================================================

In folders, each partition that has rows is written by a task of its own, so memory is bounded by the largest partition,
and files are numbered without gaps. Rows whose ``status`` is not ``ok`` are left out. Files get their names when all
are written; where something fails, none of them is left. Only columns that are written are read, once; one light column
is read once more before, to count. So give it a score table, not a lazy `embed`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..engine.backend import backend_of
from ..schema import COLUMNS, kind_of
from ..select.ranks import IDENTITY, arrow_type, partitions
from ..storage import files

__all__ = [
    "FORMATS",
    "ExportError",
    "Exported",
    "Format",
    "export",
    "to_clip_retrieval",
    "to_datacomp",
    "to_laion",
    "to_list",
    "to_uid_subset",
]

URL = str | os.PathLike[str]
_WAVE = 256  # partitions that are worked on before the next ones begin
_UID = "^[0-9a-fA-F]{32}$"


class ExportError(ValueError):
    """Rows that cannot be written in a format."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    files : list of str
        Their paths or URLs.
    rows : int
        Rows of the table that they hold.
    """

    files: list[str]
    rows: int


# --- which columns go where -----------------------------------------------------------------------

#: The function that adds the columns of a step.
_FROM = {
    "read": "read_webdataset",
    "embed": "embed",
    "measure": "embed",
    "aesthetic": "score_aesthetic",
    "nsfw": "score_nsfw",
    "text": "score_clip",
}

#: LAION's columns as `laion/aesthetics_v2` spells and types them, and which of ours they are made of, the first that
#: there is; then those of other releases, which are only passed on.
_LAION: tuple[tuple[str, tuple[str, ...], pa.DataType | None], ...] = (
    ("URL", ("url", "URL"), pa.string()),
    ("TEXT", ("caption", "TEXT"), pa.string()),
    ("WIDTH", ("original_width", "WIDTH", "width"), pa.float64()),
    ("HEIGHT", ("original_height", "HEIGHT", "height"), pa.float64()),
    ("similarity", ("clip_score", "similarity"), pa.float64()),
    ("punsafe", ("nsfw_score", "punsafe"), pa.float32()),
    ("pwatermark", ("pwatermark", "watermark_score"), pa.float32()),
    ("AESTHETIC_SCORE", ("aesthetic_score", "AESTHETIC_SCORE"), pa.float32()),
    ("hash", ("hash",), pa.int64()),
    ("SAMPLE_ID", ("SAMPLE_ID",), None),
    ("LICENSE", ("LICENSE", "license"), None),
    ("NSFW", ("NSFW",), None),
    ("LANGUAGE", ("LANGUAGE",), None),
)

_DATACOMP: tuple[tuple[str, tuple[str, ...], pa.DataType | None], ...] = (
    ("url", ("url", "URL"), pa.string()),
    ("text", ("caption", "text"), pa.string()),
    ("original_width", ("original_width", "width"), pa.int64()),
    ("original_height", ("original_height", "height"), pa.int64()),
    ("clip_b32_similarity_score", ("clip_b32_similarity_score",), pa.float32()),
    ("clip_l14_similarity_score", ("clip_l14_similarity_score",), pa.float32()),
    ("face_bboxes", ("face_bboxes",), None),
    ("sha256", ("sha256",), pa.string()),
)


@dataclass(frozen=True)
class Content:
    """What a task writes of a partition.

    Attributes
    ----------
    columns : tuple of (str, str, pyarrow.DataType or None)
        Name in the Parquet file, column of the table, type (None: as it is).
    vectors : tuple of (str, str)
        Name of the array, column of the table.
    uid_from : tuple of str
        Columns of which the column ``uid`` is made, if it is.
    """

    columns: tuple[tuple[str, str, pa.DataType | None], ...]
    vectors: tuple[tuple[str, str], ...] = ()
    uid_from: tuple[str, ...] = ()

    @property
    def needed(self) -> list[str]:
        """Columns of the table."""
        names = [*self.uid_from, *(source for _, source, _ in self.columns), *(source for _, source in self.vectors)]
        return list(dict.fromkeys(names))


def _require(df: Any, column: str, format_: str, vector: bool = False) -> None:
    backend_of(df)  # raises for what is no frame
    if column in df.columns:
        return
    remedy = f"read the shards with read_webdataset(columns=[{column!r}, …])"
    if column in COLUMNS:
        remedy = f"{_FROM[COLUMNS[column].step]} adds it"
    elif vector:
        remedy = "embed or embed_text adds it, under the name that they are given"
    raise ExportError(f"{format_} needs the column {column!r}: {remedy} (there are: {', '.join(map(str, df.columns))})")


def _require_filled(df: Any, columns: Sequence[tuple[str, str, Any]], wanted: Mapping[str, str], format_: str) -> None:
    """Complain of a column of a layout that nothing fills, by the name of the one that would."""
    filled = {name for name, _, _ in columns}
    for name, column in wanted.items():
        if name not in filled:
            _require(df, column, format_)


def _found(df: Any, table: Any) -> list[tuple[str, str, pa.DataType | None]]:
    """Which columns of a layout a frame can fill, and from what."""
    there = set(df.columns)
    found = []
    for name, sources, type_ in table:
        source = next((s for s in sources if s in there), None)
        if source is not None:
            found.append((name, source, type_))
    return found


def _ok(df: Any) -> Any:
    return df[df["status"] == "ok"] if "status" in df.columns else df


# --- tasks ----------------------------------------------------------------------------------------


def _table(frame: Any, content: Content) -> pa.Table:
    """The light columns of a partition, under their new names."""
    backend = backend_of(frame)
    arrays: dict[str, Any] = {}
    if content.uid_from:
        arrays["uid"] = _derived_uids(backend.to_host(frame, list(content.uid_from)))
    host = backend.to_host(frame, [source for _, source, _ in content.columns])
    for name, source, type_ in content.columns:
        try:
            arrays[name] = host[source] if type_ is None else host[source].cast(type_)
        except pa.ArrowInvalid as err:
            raise ExportError(f"column {source!r} cannot be written as {name!r} of {type_}: {err}") from err
    return pa.table(arrays)


def _derived_uids(table: pa.Table) -> pa.Array:
    """Make 128 bits out of what a row is known by: BLAKE2b of shard, key and sample_offset, as 32 digits."""
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    uids = (hashlib.blake2b("\0".join(map(str, row)).encode(), digest_size=16).hexdigest() for row in rows)
    return pa.array(uids, pa.string())


def _half(frame: Any, column: str) -> np.ndarray:
    """Vectors of all rows of a partition: (n, d) float16."""
    values, rows = backend_of(frame).matrix(frame[column])
    if len(rows) < len(frame):
        missing = np.setdiff1d(np.arange(len(frame)), rows)[0]
        name = "key" if "key" in frame.columns else frame.columns[0]
        row = backend_of(frame).to_host(frame.iloc[missing : missing + 1], [name])[name][0].as_py()
        raise ExportError(
            f"{len(frame) - len(rows)} rows have no vector in column {column!r}, among them that of {name} {row!r}: "
            f"drop them first, with {column} is not null"
        )
    return np.asarray(values.half().cpu().numpy())


@dataclass(frozen=True)
class _Job:
    """One partition's files; `targets` maps what is written to where."""

    content: Content
    targets: Mapping[str, str]
    rows: int
    storage_options: Mapping[str, Any]

    def run(self, frame: Any, widths: Sequence[int]) -> list[int] | Exception:
        """Write them; returns the vectors' widths, which must be `widths` if any are given, or what went wrong.

        An exception that is raised would end the export while other tasks are still writing.
        """
        try:
            return self._run(frame, widths)
        except Exception as err:
            return err

    def _run(self, frame: Any, widths: Sequence[int]) -> list[int]:
        if len(frame) != self.rows:
            raise ExportError(f"a partition had {self.rows} rows and now has {len(frame)}: its files changed meanwhile")
        table = _table(frame, self.content)
        arrays = {name: _half(frame, column) for name, column in self.content.vectors}
        for (_, column), array, width in zip(self.content.vectors, arrays.values(), widths, strict=False):
            if array.shape[1] != width:
                raise ExportError(
                    f"column {column!r} holds vectors of {array.shape[1]} numbers and of {width}: "
                    "export what one model has embedded"
                )
        for name, url in self.targets.items():
            with files.write_whole(url, self.storage_options) as file:
                if name == "parquet":
                    pq.write_table(table, file, compression="snappy")  # which every reader knows
                elif name == "npz":
                    np.savez(file, **arrays)  # type: ignore[arg-type]
                else:
                    np.save(file, arrays[name])
        return [array.shape[1] for array in arrays.values()]


# --- folders --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Names of the files of a folder.

    Attributes
    ----------
    names : mapping of str to str
        What is written (``parquet``, ``npz`` or the name of an array), and its path in the folder, with ``{}`` for the
        number.
    digits : int
        Of the number; 0: as many as the number of files has.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    digits: int = 0

    def targets(self, folder: str, number: int, count: int) -> dict[str, str]:
        """Return the URLs of one partition's files."""
        shown = str(number).zfill(self.digits or len(str(count)))
        return {name: files.join(folder, path.format(shown)) for name, path in self.names.items()}

    def present(self, folder: str, options: Mapping[str, Any]) -> list[str]:
        """Return the files in a folder that are called so."""
        found = []
        for path in self.names.values():
            inside, _, name = path.rpartition("/")
            pattern = re.compile(re.escape(name).replace(r"\{\}", "[0-9]+"))
            listed = files.list_files(files.join(folder, inside) if inside else folder, Path(name).suffix, options)
            found += [url for url in listed if pattern.fullmatch(url.rpartition("/")[2])]
        return found


def _write_folder(
    df: Any, out: URL, content: Content, layout: Layout, storage_options: Mapping[str, Any] | None, overwrite: bool
) -> Exported:
    folder, options = os.fspath(out), dict(storage_options or {})
    there = layout.present(folder, options)
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} holds such files already ({there[0]}{f' and {len(there) - 1} more' if there[1:] else ''}): "
            "choose another folder, or overwrite"
        )
    df = _ok(df)
    light = next((c for c in content.needed if kind_of(arrow_type(df, c)) != "list"), content.needed[0])
    counts = dask.compute(*[dask.delayed(len)(part) for part in partitions(df, [light])])
    full = [(part, n) for part, n in zip(partitions(df, content.needed), counts, strict=True) if n]
    if not full:
        raise ExportError(f"there is nothing to write to {folder}: no row is left, or none is ok")
    final = [layout.targets(folder, number, len(full)) for number in range(len(full))]
    for inside in {url.rpartition("/")[0] for targets in final for url in targets.values()}:
        files.make_folder(inside)
        files.remove_partial(inside)
    first = [{name: _landing(url) for name, url in targets.items()} for targets in final]
    jobs = [_Job(content, targets, n, options) for targets, (_, n) in zip(first, full, strict=True)]
    written = [url for targets in first for url in targets.values()]
    try:
        _run_all(jobs, [part for part, _ in full])
    except BaseException:
        for url in written:
            files.remove(url, options)
        raise
    urls = [url for targets in final for url in targets.values()]
    for url, target in zip(written, urls, strict=True):
        if url != target:
            files.local_path(url).replace(files.local_path(target))
    new = {url.rpartition("/")[2] for url in urls}  # whole URLs may be spelled in several ways
    for url in there:
        if url.rpartition("/")[2] not in new:
            files.remove(url, options)
    return Exported(urls, sum(counts))


def _landing(url: str) -> str:
    """Where a file is written first; remote ones cannot be renamed."""
    return files.temporary_name(url) if files.is_local(url) else url


def _run_all(jobs: Sequence[_Job], parts: Sequence[Any]) -> None:
    """Run the jobs; the first tells the others how wide its vectors are, and none begins after one has failed."""
    widths: list[int] = []
    waves = [slice(0, 1), *(slice(start, start + _WAVE) for start in range(1, len(jobs), _WAVE))]
    for wave in waves:
        tasks = [dask.delayed(job.run)(part, widths) for job, part in zip(jobs[wave], parts[wave], strict=True)]
        for result in dask.compute(*tasks):
            if isinstance(result, Exception):
                raise result
            widths = result


# --- public ---------------------------------------------------------------------------------------


def to_clip_retrieval(
    df: Any,
    out: URL,
    *,
    embedding: str = "embedding",
    text_embedding: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the folder that ``clip-retrieval inference`` writes.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        A score table; rows that are not ``ok`` are left out.
    out : str or path
        Folder.
    embedding, text_embedding : str
        Columns of the image vectors, and, if given, of the text vectors.
    storage_options : mapping, optional
        For the fsspec file system.
    overwrite : bool
        Whether such files that are there are replaced.

    Returns
    -------
    Exported
        ``img_emb/img_emb_<i>.npy`` (n, d) float16 and ``metadata/metadata_<i>.parquet`` of the same rows, i padded with
        zeros to the length of the number of files; ``text_emb/text_emb_<i>.npy`` for text vectors. The metadata have
        ``image_path`` (the table's, or else ``key``, as clip-retrieval has it for webdatasets), ``caption``, and every
        other column but vectors.

    Raises
    ------
    ExportError
        If a column is missing, a row has no vector, vectors differ in length, or no row is left.
    FileExistsError
        If such files are there and `overwrite` is False.

    References
    ----------
    .. [1] rom1504/clip-retrieval, clip_retrieval/clip_inference/writer.py.
    """
    vectors = [("img_emb", embedding)] + ([("text_emb", text_embedding)] if text_embedding else [])
    for _, column in vectors:
        _require(df, column, "clip-retrieval", vector=True)
    path = "image_path" if "image_path" in df.columns else "key"
    _require(df, path, "clip-retrieval")
    skipped = {path, "caption", *(column for _, column in vectors)}
    columns = [("image_path", path, None)] + ([("caption", "caption", None)] if "caption" in df.columns else [])
    columns += [(c, c, None) for c in df.columns if c not in skipped and kind_of(arrow_type(df, c)) != "list"]
    names = {name: f"{name}/{name}_{{}}.npy" for name, _ in vectors} | {"parquet": "metadata/metadata_{}.parquet"}
    return _write_folder(df, out, Content(tuple(columns), tuple(vectors)), Layout(names), storage_options, overwrite)


def to_datacomp(
    df: Any,
    out: URL,
    *,
    arch: str | None = None,
    embedding: str | None = "embedding",
    text_embedding: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write metadata as DataComp distributes them.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        A score table; rows that are not ``ok`` are left out.
    out : str or path
        Folder.
    arch : {"b32", "l14"}
        The CLIP model that ``clip_score`` and the vectors are of, ViT-B/32 or ViT-L/14. Needed if there are any.
    embedding, text_embedding : str, optional
        Columns of the image and the text vectors; None, or a missing default: no ``.npz``.
    storage_options : mapping, optional
        For the fsspec file system.
    overwrite : bool
        Whether such files that are there are replaced.

    Returns
    -------
    Exported
        ``<8 digits>.parquet`` with ``uid``, ``text``, ``original_width``, ``original_height`` and, where the table has
        them, ``url``, ``clip_<arch>_similarity_score`` (from ``clip_score``), ``face_bboxes`` and ``sha256``;
        ``<8 digits>.npz`` of the same rows with ``<arch>_img`` and ``<arch>_txt``, float16.

    Raises
    ------
    ExportError
        If a column or `arch` is missing, a uid is none, a row has no vector, or no row is left.
    FileExistsError
        If such files are there and `overwrite` is False.

    Notes
    -----
    Without a column ``uid``, uids are made: 128 bits of BLAKE2b of ``shard``, ``key`` and ``sample_offset``. The
    samples in the tars do not have these, so the resharder would not find them. ``original_width`` and
    ``original_height`` are of the image before img2dataset resized it: read these JSON fields if there are any, else
    the size as decoded is written.

    References
    ----------
    .. [1] mlfoundations/datacomp, baselines/apply_filter.py and baselines/image_based_clustering.py.
    """
    if embedding == "embedding" and embedding not in df.columns:
        embedding = None
    vectors = [(kind, column) for kind, column in (("img", embedding), ("txt", text_embedding)) if column]
    columns = _found(df, _DATACOMP)
    scored = "clip_score" in df.columns
    if arch not in ("b32", "l14") and (vectors or scored or arch is not None):
        raise ExportError(f"arch={arch!r}: say of which CLIP model the scores and vectors are, 'b32' or 'l14'")
    if scored:
        columns = [c for c in columns if c[0] != f"clip_{arch}_similarity_score"]
        columns.append((f"clip_{arch}_similarity_score", "clip_score", pa.float32()))
    _require_filled(
        df, columns, {"text": "caption", "original_width": "width", "original_height": "height"}, "datacomp"
    )
    for _, column in vectors:
        _require(df, column, "datacomp", vector=True)
    content = _with_uid(df, Content(tuple(columns), tuple((f"{arch}_{kind}", column) for kind, column in vectors)))
    names = {"parquet": "{}.parquet"} | ({"npz": "{}.npz"} if vectors else {})
    return _write_folder(df, out, content, Layout(names, 8), storage_options, overwrite)


def _with_uid(df: Any, content: Content) -> Content:
    if "uid" in df.columns:
        return Content((("uid", "uid", pa.string()), *content.columns), content.vectors)
    _require(df, "key", "datacomp")
    return Content(content.columns, content.vectors, tuple(name for name in IDENTITY if name in df.columns))


def to_laion(
    df: Any, out: URL, *, storage_options: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Exported:
    """Write a table with LAION's column names.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        A score table with ``url``; rows that are not ``ok`` are left out.
    out : str or path
        Folder.
    storage_options : mapping, optional
        For the fsspec file system.
    overwrite : bool
        Whether such files that are there are replaced.

    Returns
    -------
    Exported
        ``part-<5 digits>.parquet`` with ``URL``, ``TEXT`` (caption), ``WIDTH``, ``HEIGHT`` (the original ones where
        there are JSON fields ``original_width`` and ``original_height``, else as decoded), ``similarity``
        (clip_score), ``punsafe`` (nsfw_score), ``pwatermark``, ``AESTHETIC_SCORE``, ``hash`` and ``SAMPLE_ID``,
        ``LICENSE``, ``NSFW``, ``LANGUAGE``: those for which the table has something. Types are those of
        ``laion/aesthetics_v2_4.75``; LAION's ``similarity`` is ViT-B/32's.

    Raises
    ------
    ExportError
        If there is no ``url`` or ``caption``, or no row is left.
    FileExistsError
        If such files are there and `overwrite` is False.
    """
    columns = _found(df, _LAION)
    _require_filled(df, columns, {"URL": "url", "TEXT": "caption"}, "laion")
    layout = Layout({"parquet": "part-{}.parquet"}, 5)
    return _write_folder(df, out, Content(tuple(columns)), layout, storage_options, overwrite)


def _values(df: Any, column: str) -> Iterator[pa.ChunkedArray]:
    """Values of a column that are not null, partition by partition, a few at a time."""
    parts = partitions(_ok(df), [column])
    for start in range(0, len(parts), _WAVE):
        yield from dask.compute(*[dask.delayed(_host_values)(part, column) for part in parts[start : start + _WAVE]])


def _host_values(frame: Any, column: str) -> pa.ChunkedArray:
    return backend_of(frame).to_host(frame, [column])[column].drop_null()


def _check_free(path: str, options: Mapping[str, Any], overwrite: bool) -> None:
    if not overwrite and files.exists(path, options):
        raise FileExistsError(f"{path} is there already: choose another name, or overwrite")
    files.make_folder(path.rpartition("/")[0] or ".")


def to_list(
    df: Any,
    path: URL,
    column: str = "key",
    *,
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the values of a column, one a line, in UTF-8.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        A score table; rows that are not ``ok`` are left out, and rows where the column is null.
    path : str or path
        File.
    column : str
        A column of text or integers.
    storage_options : mapping, optional
        For the fsspec file system.
    overwrite : bool
        Whether a file that is there is replaced.

    Returns
    -------
    Exported

    Raises
    ------
    ExportError
        If the column is missing or of another type, or a value would not be one line.
    FileExistsError
        If the file is there and `overwrite` is False.
    """
    _require(df, column, "list")
    type_ = arrow_type(df, column)
    if not (kind_of(type_) == "string" or pa.types.is_integer(type_) or pa.types.is_null(type_)):
        raise ExportError(f"column {column!r} holds {type_}: a list is of text or integers")
    target, options = os.fspath(path), dict(storage_options or {})
    _check_free(target, options, overwrite)
    rows = 0
    with files.write_whole(target, options) as file:
        for values in _values(df, column):
            for value in map(str, values.to_pylist()):
                if "\n" in value or "\r" in value:
                    raise ExportError(f"column {column!r} holds {value!r}, which is more than one line: leave it out")
                file.write(value.encode() + b"\n")
            rows += len(values)
    return Exported([target], rows)


def to_uid_subset(
    df: Any,
    path: URL,
    uid: str = "uid",
    *,
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the uids of the rows as DataComp's resharder reads them.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        A score table; rows that are not ``ok`` are left out.
    path : str or path
        File, ``.npy``.
    uid : str
        Column of the uids, 32 hexadecimal digits each: the samples' own, from their JSON
        (``read_webdataset(columns=["uid"])``), because the resharder looks there.
    storage_options : mapping, optional
        For the fsspec file system.
    overwrite : bool
        Whether a file that is there is replaced.

    Returns
    -------
    Exported
        A NumPy array of dtype ``u8,u8``, shape (n,): the upper and the lower 64 bits, sorted by both, each uid once
        (the resharder writes a sample as often as its uid occurs).

    Raises
    ------
    ExportError
        If the column is missing, or a uid is none.
    FileExistsError
        If the file is there and `overwrite` is False.

    Notes
    -----
    The uids are sorted in the memory of this process: about 64 bytes each at the peak.

    References
    ----------
    .. [1] mlfoundations/datacomp, README.md, "Selecting samples in the filtering track", and resharder.py.
    """
    _require(df, uid, "datacomp-subset")
    target, options = os.fspath(path), dict(storage_options or {})
    _check_free(target, options, overwrite)
    pieces = [_uid_words(values, uid) for values in _values(df, uid)]
    words = np.concatenate([np.empty((0, 2), np.uint64), *pieces])
    words = words[np.lexsort((words[:, 1], words[:, 0]))]
    once = np.r_[True, (words[1:] != words[:-1]).any(1)][: len(words)]
    subset = np.ascontiguousarray(words[once]).view(np.dtype("u8,u8")).reshape(-1)
    with files.write_whole(target, options) as file:
        np.save(file, subset)
    return Exported([target], len(subset))


def _uid_words(values: pa.ChunkedArray, column: str) -> np.ndarray:
    """Split uids into two numbers each: (n, 2) uint64."""
    values = values.cast(pa.string())
    good = pc.match_substring_regex(values, _UID)
    if not pc.all(good, min_count=0).as_py():
        wrong = values.filter(pc.invert(good))[0].as_py()
        raise ExportError(f"column {column!r} holds {wrong!r}: a uid has 32 hexadecimal digits")
    digits = bytes.fromhex("".join(values.to_pylist()))
    return np.frombuffer(digits, ">u8").astype(np.uint64).reshape(-1, 2)


@dataclass(frozen=True)
class Format:
    """A format of `export`.

    Attributes
    ----------
    about : str
        One line, for ``--help``.
    write : callable
        ``write(df, out, **options)``.
    folder : bool
        Whether `out` is a folder; else it is a file.
    """

    about: str
    write: Callable[..., Exported]
    folder: bool


#: What `export` can write.
FORMATS: Mapping[str, Format] = {
    "clip-retrieval": Format("img_emb/*.npy (float16) and metadata/*.parquet", to_clip_retrieval, True),
    "datacomp": Format("*.parquet and *.npz as DataComp distributes them", to_datacomp, True),
    "datacomp-subset": Format("sorted uids (u8,u8) for DataComp's resharder, one .npy file", to_uid_subset, False),
    "laion": Format("part-*.parquet with LAION's column names", to_laion, True),
    "list": Format("one key, or value of another column, a line", to_list, False),
}


def export(df: Any, out: URL, format: str, **options: Any) -> Exported:
    """Write a score table in the layout of another project.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        A score table; rows that are not ``ok`` are left out.
    out : str or path
        Folder, or file for the formats ``datacomp-subset`` and ``list``.
    format : {"clip-retrieval", "datacomp", "datacomp-subset", "laion", "list"}
        See `FORMATS`.
    **options
        Of the format's function: `to_clip_retrieval`, `to_datacomp`, `to_uid_subset`, `to_laion`, `to_list`.

    Returns
    -------
    Exported
        The files, and their rows.

    Raises
    ------
    ExportError
        If there is no such format, or its function raises it.
    FileExistsError
        If such files are there and `overwrite` is False.
    """
    if format not in FORMATS:
        raise ExportError(f"unknown format {format!r}: use {', '.join(FORMATS)}")
    return FORMATS[format].write(df, out, **options)
