"""Any frame as a score table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..engine.backend import backend_of, is_dask
from ..engine.run import Wave, current_client, results, run
from ..steps.read import URLPath
from ..steps.score_table import open_scores, write_score_file
from ..storage import files
from ..storage.urls import folders_of


def to_scores(
    df: Any,
    urlpath: str | os.PathLike[str],
    *,
    like: URLPath | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write a frame as a score table, which all commands and any Parquet reader can open.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        Rows with any columns; ``shard``, ``key``, ``sample_offset`` and ``sample_nbytes`` are needed to write their
        samples later.
    urlpath : str or path
        A new folder, for one file per partition.
    like : str, path, or sequence of them, optional
        Score table that the embeddings and scores come from; the new one then records the same model and heads.
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
        raise FileExistsError(f"{folder} already holds Parquet files ({there[0]}): choose a new folder")
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


def _write_part(frame: Any, url: str, provenance: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    backend = backend_of(frame)
    if "shard" in frame.columns:  # the shards that this table may copy from
        shards = backend.to_host(frame[["shard"]].drop_duplicates(), ["shard"])["shard"].drop_null().to_pylist()
        provenance = {**provenance, "sources": folders_of(map(str, shards))}
    write_score_file(frame, url, provenance, backend.name, options)
