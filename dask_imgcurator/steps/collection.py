"""The public steps on Dask DataFrames: the only place that builds graphs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import dask
import dask.dataframe as dd
import pyarrow as pa

from .. import config
from ..engine.backend import backend_of, get_backend, is_dask, resolve_name
from ..models import heads, weights
from ..models.encoders import resolve_encoder
from ..schema import COLUMNS, arrow_schema
from ..storage import files, shards
from . import score, write

__all__ = ["embed", "read_scores", "read_webdataset", "score_aesthetic", "score_nsfw", "to_webdataset"]

URLPath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def read_webdataset(
    urlpath: URLPath,
    columns: Sequence[str] | Mapping[str, str] = (),
    *,
    caption: str | None = None,
    image: str | Sequence[str] = (),
    shards_per_partition: int = 1,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> dd.DataFrame:
    """Read webdataset shards as a Dask DataFrame: a shard is a partition, a sample is a row.

    Lazy: each tar is indexed by the task of its own partition. Image bytes are not read; rows say where they lie.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Shards: a path, a glob, brace notation (``{00000..00127}``), a folder, any fsspec URL.
    columns : sequence of str, or mapping of str to {"string", "int64", "float64", "bool"}
        Fields of the samples' ``.json`` members to read as columns. The types of a plain list are found from the
        first samples of the first shard that can be read; a value of another kind becomes null.
    caption : str, optional
        JSON field that holds the caption; by default it is the ``.txt`` member.
    image : str or sequence of str
        Extension of the member that is "the" image of a sample, as it stands after the key's dot (``"jpg"``,
        ``"seg.png"``; in any case), or several, the preferred one first; a sample without any of them is
        ``no_image``. By default the first member with an image's extension, a plain one (``jpg``) before one with a
        prefix (``seg.png``).
    shards_per_partition : int
        More than 1 for many small shards.
    storage_options : mapping, optional
        For the fsspec file system.
    backend : {"auto", "cudf", "pandas"}, optional
        Of the partitions; by default `imgcurator.backend`.

    Returns
    -------
    dask.dataframe.DataFrame
        With the columns ``key``, ``shard``, ``offset``, ``nbytes``, ``sample_offset``, ``sample_nbytes``, ``ext``,
        ``caption``, the chosen fields, ``status`` and ``error_message``. A tar that is damaged or missing
        adds one row with
        ``status = "read_error"``.

    Raises
    ------
    FileNotFoundError
        If a pattern matches nothing or no local shard exists.
    BackendError
        If cudf is asked for and cannot work here.

    Examples
    --------
    >>> df = read_webdataset("laion/{00000..00127}.tar", columns=["url", "license"])  # doctest: +SKIP
    """
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r} is a string: give a list, columns=[{columns!r}]")
    if shards_per_partition < 1:
        raise ValueError(f"shards_per_partition={shards_per_partition}: it must be at least 1")
    urls = shards.expand(urlpath, storage_options)
    spec = read_spec(urls, columns, caption, storage_options, backend, image)
    groups = [tuple(urls[i : i + shards_per_partition]) for i in range(0, len(urls), shards_per_partition)]
    meta = get_backend(spec.backend).from_arrow(spec.schema.empty_table())
    return dd.from_map(
        score.index_partition, groups, spec=spec, meta=meta, label="read-webdataset", enforce_metadata=False
    )


def read_spec(
    urls: Sequence[str],
    columns: Sequence[str] | Mapping[str, str],
    caption: str | None,
    storage_options: Mapping[str, Any] | None,
    backend: str | None,
    image: str | Sequence[str] = (),
) -> score.ReadSpec:
    """Settle, on the client, how shards become rows."""
    taken = [name for name in columns if name in COLUMNS]
    if taken:
        raise ValueError(
            f"columns={taken}: these names belong to columns of this library; rename the JSON fields or leave them out"
        )
    if isinstance(columns, Mapping):
        wrong = {n: t for n, t in columns.items() if t not in score.FIELD_TYPES}
        if wrong:
            raise ValueError(f"unknown types of columns {wrong}: use {', '.join(score.FIELD_TYPES)}")
        fields = dict(columns)
    else:
        fields = score.peek_fields(urls, list(columns), storage_options) if columns else {}
    extensions = tuple(ext.lower().removeprefix(".") for ext in ([image] if isinstance(image, str) else image))
    if not all(extensions):
        raise ValueError(f"image={image!r}: give an extension, such as 'jpg', or a list of them")
    return score.ReadSpec(
        resolve_name(backend), caption, tuple(fields.items()), dict(storage_options or {}), extensions
    )


def embed_spec(
    model: str,
    pretrained: str | None,
    batch_size: int | None,
    dtype: str | None,
    storage_options: Mapping[str, Any] | None,
    column: str = "embedding",
    measures: bool = False,
) -> score.EmbedSpec:
    """Settle, on the client, how rows get their embedding."""
    batch_size = config.get("batch-size", batch_size)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it must be at least 1")
    return score.EmbedSpec(
        resolve_encoder(model, pretrained, dtype),
        batch_size,
        config.get("decoder"),
        config.get("max-pixels"),
        bool(config.get("adjust-orientation")),
        column,
        dict(storage_options or {}),
        measures=measures,
    )


def apply_step(frame: Any, function: Any, spec: Any, added: pa.Schema) -> Any:
    """Apply a partition function to a frame of any kind; `added` are the columns that it adds or replaces."""
    if not is_dask(frame):
        return function(frame, spec)
    start = _meta_of(frame)
    new = backend_of(frame).from_arrow(added.empty_table())
    new.index = start.index
    meta = start.assign(**{name: new[name] for name in added.names})
    return frame.map_partitions(function, spec, meta=meta, enforce_metadata=False)


def require_columns(frame: Any, needed: Sequence[str], step: str, remedy: str) -> None:
    """Tell at once of columns that a step needs and a frame lacks."""
    backend_of(frame)  # raises for what is no frame
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise ValueError(
            f"{step} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}: {remedy} "
            f"(there are: {', '.join(map(str, frame.columns))})"
        )


def refuse_text(frame: Any, column: str) -> None:
    """Tell at once of text where vectors are expected: Dask makes it of objects."""
    dtype = str(_meta_of(frame)[column].dtype)
    if dtype == "str" or dtype.startswith("string"):
        raise TypeError(
            f"column {column!r} holds text, not vectors. Dask makes text of objects: set its configuration "
            "dataframe.convert-string to False before the DataFrame is made, or use a column of Arrow lists"
        )


def _meta_of(frame: Any) -> Any:
    from dask.dataframe.utils import make_meta

    return make_meta(frame) if is_dask(frame) else frame.iloc[:0]


def embed(
    df: Any,
    model: str = "ViT-L-14",
    pretrained: str | None = None,
    *,
    batch_size: int | None = None,
    dtype: str | None = None,
    column: str = "embedding",
    measures: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Decode and embed the images of a DataFrame.

    Each partition reads its shards once, in order; decoding of a batch runs while the batch before is in the encoder.
    A bad image costs itself only: ``status`` and ``error_message`` say why, its embedding is null.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        From `read_webdataset`; rows may be filtered, shuffled or repartitioned.
    model : str
        open_clip's name of a model, or ``starter`` (a preview that needs no download).
    pretrained : str, optional
        open_clip's tag, a checkpoint's path, or ``random:SEED``.
    batch_size : int, optional
        Images a forward pass; by default 16 on a CPU and 512 on a GPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}, optional
        Of the encoder; ``auto`` is settled on the worker, by its processor.
    column : str
        Name of the new column.
    measures : bool
        Also measure each image, in the same decode: ``brightness``, ``contrast``, ``blur``, ``entropy``,
        ``colourfulness`` and ``phash``; see `dask_imgcurator.images.quality`.
    storage_options : mapping, optional
        For the fsspec file system of the shards.

    Returns
    -------
    the frame's type
        With ``width``, ``height``, ``sha256`` and `column` (list of float32, unit length).

    Raises
    ------
    ModelError
        For a model or tag that does not exist, or weights that cannot be loaded.

    Notes
    -----
    Pixels are those of open_clip's own transform, see `dask_imgcurator.images.decode`.
    """
    require_columns(
        df,
        ["shard", "offset", "nbytes", "status", "error_message"],
        "embed",
        "read the shards with read_webdataset",
    )
    spec = embed_spec(model, pretrained, batch_size, dtype, storage_options, column, measures)
    return apply_step(df, score.embed_partition, spec, spec.schema)


def _score(df: Any, use: score.HeadUse) -> Any:
    require_columns(df, [use.embedding], f"score_{use.kind}", "make it with embed, or name yours with embedding=")
    refuse_text(df, use.embedding)
    if use.head != "auto":
        # A wrong name is told at once, not by a worker. Its own width fits it.
        spec = heads.HEADS.get(use.head)
        heads.resolve(use.kind, use.head, spec.width if spec else 0)
    return apply_step(df, score.score_partition, use, arrow_schema([use.column]))


def score_aesthetic(
    df: Any,
    head: str = "auto",
    embedding: str = "embedding",
    weights_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """Add ``aesthetic_score`` by one of LAION's aesthetic heads.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With an embedding column of any origin.
    head : str
        ``aesthetic-v2-l14``, ``aesthetic-v1-l14``, ``aesthetic-v1-b32``, ``aesthetic-v1-b16``, ``aesthetic-starter``,
        or ``auto``: by the embedding's width (768: v2-l14; 512: v1-b32).
    embedding : str
        Name of the embedding column.
    weights_dir : path, optional
        Folder with the published files; else Dask config ``imgcurator.weights-dir``, the cache, their published
        address.

    Returns
    -------
    the frame's type
        With ``aesthetic_score`` (float32), null where there is no embedding.

    Raises
    ------
    HeadError
        If the head is unknown or does not fit the embedding.
    WeightsError
        If its weights cannot be found or are not the published ones.
    """
    return _score(df, score.HeadUse("aesthetic", head, embedding, weights.resolve_dir(weights_dir)))


def score_nsfw(
    df: Any,
    head: str = "auto",
    embedding: str = "embedding",
    weights_dir: str | os.PathLike[str] | None = None,
    round_to: str | None = "float16",
) -> Any:
    """Add ``nsfw_score`` by one of LAION's NSFW heads: probability, 0 safe to 1 not safe for work.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With an embedding column of any origin.
    head : str
        ``nsfw-l14``, ``nsfw-b32``, ``nsfw-starter``, or ``auto``: by the embedding's width (768: l14; 512: b32).
    embedding : str
        Name of the embedding column.
    weights_dir : path, optional
        Folder with the published files; else Dask config ``imgcurator.weights-dir``, the cache, their published
        address.
    round_to : {"float16", None}
        The heads were trained on float16 embeddings and look some values up in a vocabulary of such: rounding comes
        first. None takes embeddings as they are.

    Returns
    -------
    the frame's type
        With ``nsfw_score`` (float32), null where there is no embedding.

    Raises
    ------
    HeadError
        If the head is unknown or does not fit the embedding.
    WeightsError
        If its weights cannot be found or are not the published ones.
    """
    return _score(df, score.HeadUse("nsfw", head, embedding, weights.resolve_dir(weights_dir), round_to))


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
    """Files of a score table, in the order of their shards."""
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
    return score.in_shard_order(urls, storage_options)


def scores_from_files(
    urls: Sequence[str], storage_options: Mapping[str, Any] | None = None, backend: str | None = None
) -> dd.DataFrame:
    """Read score files as partitions, in the order given."""
    name = resolve_name(backend)
    schema = score.file_schema(urls[0], storage_options)
    meta = get_backend(name).from_arrow(schema.empty_table())
    spec = score.ScoreFiles(name, tuple(schema.names), dict(storage_options or {}))
    return dd.from_map(
        score.read_score_file, list(urls), spec=spec, meta=meta, label="read-scores", enforce_metadata=False
    )


def to_webdataset(
    df: Any,
    urlpath: str | os.PathLike[str],
    *,
    max_count: int = 10_000,
    max_size: int | str = "1GB",
    storage_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    compute: bool = True,
) -> Any:
    """Write the samples of a DataFrame as curated webdataset shards.

    All members of each sample are copied from its source, names and bytes unchanged, in the order of the rows. Rows
    that stand for no sample (``read_webdataset`` adds one for a damaged tar) are left out.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With ``key``, ``shard``, ``sample_offset`` and ``sample_nbytes``. A Dask DataFrame is persisted first, since
        where a shard begins depends on all rows before it.
    urlpath : str or path
        Folder for ``00000.tar``, ``00000.parquet`` (the rows), ``00000.idx`` and ``00000_stats.json``.
    max_count : int
        Samples a shard, at most.
    max_size : int or str
        Size of a shard, at most; bytes, or for example ``"500MB"``.
    storage_options, source_options : mapping, optional
        For the fsspec file systems of the folder and of the source shards.
    overwrite : bool
        Whether curated shards that are there already are replaced.
    compute : bool
        False: return the Dask Delayed that writes.

    Returns
    -------
    list of dict, or dask.delayed.Delayed
        For each shard what its ``_stats.json`` says.

    Raises
    ------
    FileExistsError
        If the folder holds curated shards, or files called like theirs, and `overwrite` is False.
    WriteError
        If a source was changed after it was indexed, if it lies in the folder itself, or if a file in the way was not
        written by this library.

    Notes
    -----
    Names are copied as they are, also such as would lead out of a folder (``../x.jpg``): nothing is extracted here, but
    extract tars of unknown origin with care.

    Hard and symbolic links of a source are no members of its samples, here as in webdataset: they are left out. Sparse
    members (up to 1 GiB) are written expanded.
    """
    require_columns(df, write.LOCATORS, "to_webdataset", "read the shards with read_webdataset and keep these columns")
    if max_count < 1:
        raise ValueError(f"max_count={max_count}: it must be at least 1")
    folder = os.fspath(urlpath)
    spec = write.WriteSpec(
        folder, max_count, write.parse_size(max_size), dict(storage_options or {}), dict(source_options or {})
    )
    present = write.files_there(folder, storage_options)
    if present and not overwrite:
        raise FileExistsError(
            f"{folder} holds files of curated shards already ({present[0]}"
            f"{f' and {len(present) - 1} more' if len(present) > 1 else ''}): "
            "choose another folder, or pass overwrite=True"
        )
    files.make_folder(folder)
    df = df[df["sample_nbytes"] > 0]
    if is_dask(df):
        parts, cut = df.persist().to_delayed(), dask.delayed(_slice)
        sizes = dask.compute(*[dask.delayed(locate)(part) for part in parts])
        sources = dask.compute(*[dask.delayed(_sources)(part) for part in parts])
    else:
        parts, cut, sizes, sources = [df], _slice, [locate(df)], [_sources(df)]
    write.check_sources(folder, set().union(*sources))
    plan = list(write.plan_shards(sizes, spec.max_count, spec.max_nbytes))
    jobs = [
        dask.delayed(write.write_shard)(
            number, [cut(parts[s.partition], s.start, s.stop) for s in slices], spec, not overwrite
        )
        for number, slices in enumerate(plan)
    ]
    result = dask.delayed(_finish)(jobs, spec)
    return result.compute() if compute else result


def locate(frame: Any) -> tuple[list[str | None], list[int]]:
    """Keys and sizes of a partition's rows."""
    host = backend_of(frame).to_host(frame, list(write.LOCATORS)).to_pydict()
    return host["key"], write.sample_sizes(host["shard"], host["sample_offset"], host["sample_nbytes"])


def host_column(frame: Any, name: str) -> list[Any]:
    """Values of a column as Python objects."""
    return list(backend_of(frame).to_host(frame, [name])[name].to_pylist())


def _sources(frame: Any) -> set[str]:
    return set(host_column(frame, "shard"))


def _slice(frame: Any, start: int, stop: int) -> Any:
    return frame.iloc[start:stop]


def _finish(results: list[dict[str, Any]], spec: write.WriteSpec) -> list[dict[str, Any]]:
    write.remove_surplus(spec.folder, len(results), spec.storage_options)
    return results
