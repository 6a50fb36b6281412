"""The whole job: score shards, select, write curated shards, leave a record; and its second half alone."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import dask.dataframe as dd
from distributed import Client

from ..engine.cluster import backend_for
from ..engine.run import Place, place
from ..monitor import Monitor
from ..report import report
from ..report.render import without_secrets
from ..results import Counts, RunResult
from ..runs.marks import alone
from ..runs.measured import Last
from ..runs.plan import ScoreOptions, make_plan
from ..runs.records import COMMON, Run, note_unfinished
from ..select import selection
from ..select.settle import Condition, Settled, settled_where
from ..select.steps import Step, expand_steps
from ..select.where import Where, combine, conjunction, parse_where
from ..steps.read import URLPath
from ..steps.score_table import ScoreFiles, check_makers, open_scores, scores_from_files
from ..steps.write import Group, check_keys, plan_write, run_write, write_spec
from ..storage import files
from ..storage.curated import Finished, check_replaced, find_finished, remember_finished, write_sizes
from ..storage.urls import expand, fingerprint, folders_of
from .dedup import Dedup, dedup_options, unique_rows
from .pack import pack, pictures_of
from .score import MissingShardsError, Scored, measure_files, score_into


def _made(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the rows' provenance that curated shards keep: how the values were made."""
    return {name: value for name, value in provenance.items() if name in (*COMMON, "added")}


def write_scored(client: Client | None, scored: Scored, last: Last, resume: bool, monitor: Monitor) -> Finished:
    """Write a score table's kept samples: `to_webdataset` of the filtered table, without holding it."""
    assert last.spec is not None
    if resume and (before := find_finished(last.spec, scored.decides(last.kind))):
        monitor.writing(len(before.written))
        for stats in before.written:
            monitor.wrote(stats)
        return before
    read = replace(scored.read, filters=(last.settled,))

    def regroup(groups: Sequence[Group], columns: Sequence[str] | None) -> dd.DataFrame:
        urls = [[scored.urls[i] for i in group.partitions] for group in groups]
        df = scores_from_files(urls, read)
        return df if columns is None else df[list(columns)]

    plan = plan_write(client, [one.kept for one in scored.measured if one.kept], regroup, last.spec, resume)
    monitor.writing(plan.firsts[-1])
    done = {}
    with alone(last.spec.folder, "write", last.spec.storage_options):
        for number, written in run_write(client, plan):
            done[number] = written
            for stats in written:
                monitor.wrote(stats)
    written = [stats for number in sorted(done) for stats in done[number]]
    write_sizes(last.spec, written)
    remember_finished(last.spec, scored.decides(last.kind), written)
    return Finished(written, "")


def write_selection(
    scores: URLPath,
    out: str | os.PathLike[str],
    where: str | None = None,
    *,
    max_count: int = 10_000,
    max_size: int | str = "1GB",
    resume: bool = True,
    overwrite: bool = False,
    allow_shards: Sequence[str | os.PathLike[str]] = (),
    storage_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
) -> tuple[Counts, list[dict[str, Any]]]:
    """Write curated shards from a score table, without scoring again.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        Folder for the curated shards.
    where : str, optional
        Expression on the columns; rows whose ``status`` is not ``ok`` are never kept.
    max_count, max_size : int, str
        See `to_webdataset`.
    resume : bool
        Whether existing curated shards with the same samples are reused.
    overwrite : bool
        Whether curated shards in `out` made from other source shards are replaced completely. Those from the same
        source shards always are: `out` then holds the new selection.
    allow_shards : sequence of str or path
        Folders (or shards) from which samples may be copied, besides the folders of the shards that the table's files
        describe. In a table from someone else, a row may name any file or address.
    storage_options, source_options : mapping, optional
        For the fsspec file systems of both folders, and of the source shards.
    backend : {"auto", "cudf", "pandas"}, optional
        Type of the frames; by default pandas, because a GPU would not pay off here.
    client : distributed.Client, str, or int, optional
        Where to run, as for `curate`.
    monitor : Monitor, optional
        Receives progress and notes.

    Returns
    -------
    (Counts, list of dict)
        Counts of the selection, and ``_stats.json`` of each shard.

    Raises
    ------
    FileExistsError
        If `out` holds curated shards made from other source shards and `overwrite` is False.
    ValueError
        If several models made the compared scores.
    WriteError
        If rows name shards elsewhere, or a source was changed after it was scored.
    """
    monitor = monitor or Monitor()
    table = open_scores(scores, storage_options)
    made_of = (file.provenance.get(name) for file in table.files for name in ("shard", "sources"))
    named = [url for value in made_of if value for url in ([value] if isinstance(value, str) else value)]
    allowed = [files.absolute(prefix) for prefix in allow_shards]
    sources = (*folders_of(named), *allowed)
    spec = write_spec(out, max_count, max_size, storage_options, source_options, sources)
    check_keys(table.schema)
    read = ScoreFiles(backend_for(backend, client, cheap=True), table.schema, table.storage_options)
    parsed = parse_where(where, table.kinds) if where is not None else None
    check_makers(table, () if parsed is None else parsed.columns)
    note_unfinished(scores, storage_options, monitor)
    shards = {file.provenance["shard"] for file in table.files if "shard" in file.provenance}
    if shards and not overwrite:
        check_replaced(spec.folder, shards, storage_options)
    last = Last(settled_where(parsed), replace(spec, made=_made(table.shared)))
    with files.no_partial(spec.folder), place(client, read.backend, monitor) as lent:
        found = measure_files(lent, table.urls, last, read)
        scored = Scored(table.urls, [found[url] for url in table.urls], read, dict.fromkeys(table.urls, ""))
        return scored.counts, write_scored(lent, scored, last, resume, monitor).written


def curate(
    urlpath: URLPath,
    out: str | os.PathLike[str],
    *,
    where: str | None = None,
    min_aesthetic: float | None = None,
    max_nsfw: float | None = None,
    steps: str | Step | Iterable[str | Step] = (),
    dedup: Dedup = None,
    max_count: int = 10_000,
    max_size: int | str = "1GB",
    resume: bool = True,
    overwrite: bool = False,
    allow_missing: bool = False,
    limit: int | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
    **options: Any,
) -> RunResult:
    """Curate shards: score every image, keep those that match an expression, write them as curated shards.

    The same as ``dask-imgcurator curate``.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Shards, as for `read_webdataset`; or a folder of pictures, which are first packed into ``packed/`` (`pack`).
    out : str or path
        Folder for ``scores/``, ``shards/``, ``report.html`` and ``run.json``.
    where : str, optional
        Expression on the columns, for example ``"aesthetic_score >= 5 and width >= 512"``. Rows whose ``status``
        is not ``ok`` are never kept.
    min_aesthetic, max_nsfw : float, optional
        Shorthands for ``aesthetic_score >= X`` and ``nsfw_score < X``.
    steps : str, Step, or iterable of them
        Further steps on the remaining rows, as for `apply_steps`: ``"top 30% by clip_score"``, ``"sample 10000"``.
    dedup : str, sequence of str, or mapping, optional
        Last of all, drop duplicates: the tiers (``"exact"``, ``["exact", "perceptual"]``), or options of
        `find_duplicates` (``{"tiers": ["exact"], "keep": "aesthetic_score"}``).
    max_count, max_size : int, str
        Size of the curated shards, see `to_webdataset`.
    resume : bool
        Whether completed work of an earlier run with the same provenance is reused.
    overwrite : bool
        Whether scores in `out` by another model, with other settings or of other shards are replaced completely.
    allow_missing : bool
        Whether to only note shards that cannot be read now, instead of raising an error at the end.
    limit : int, optional
        Only score the first `limit` shards, for a first look; a later run without it reuses them.
    client : distributed.Client, str, or int, optional
        Where to run: a client, the address of a scheduler (``tcp://host:8786``), or a number of new worker processes on
        this machine. By default new ones: one per GPU; on a CPU one per core with 4 GB.
    monitor : Monitor, optional
        Receives progress and notes.
    **options
        ``model``, ``pretrained``, ``batch_size``, ``dtype``, ``measures`` (True here): see `embed`; by default OpenAI's
        ViT-L-14, or the starter if its weights are unavailable. ``columns``, ``caption``, ``image``, ``backend``,
        ``storage_options``: see `read_webdataset`. ``aesthetic_head``, ``nsfw_head``: a head's name, ``auto`` (the one
        trained on the model) or ``none``. ``weights_dir``: folder with the heads. ``out_options``: for the fsspec file
        system of `out`.

    Returns
    -------
    RunResult
        Counts, timings and provenance; the same as in ``run.json``.

    Raises
    ------
    WhereError, SelectionError
        If the expression or a step has a mistake, before anything is done.
    FileExistsError
        If `out` holds something else and `overwrite` is False, or files that this library did not write.
    JobError
        If the run could not finish, or shards are missing. Completed work is saved: the same call resumes.
    """
    monitor = monitor or Monitor()
    begin = time.perf_counter()
    folder = os.fspath(out)
    result = RunResult(folder, notes=monitor.notes)
    given = ScoreOptions(**options)
    where, then = combine(where, min_aesthetic, max_nsfw), list(expand_steps(steps))
    if then and all(isinstance(step, Where) for step in then):  # applied while shards are scored; ranks need all rows
        where, then = conjunction([*([where] if where is not None else []), *(step.text for step in then)]), []
    curated = files.join(folder, "shards")
    if (pictures := pictures_of(urlpath, folder)) is not None:
        packed = files.join(folder, "packed")
        monitor.note(f"{pictures} holds no tars: its pictures are packed into {packed}.")
        urlpath = pack(
            pictures,
            packed,
            storage_options=given.storage_options,
            out_options=given.out_options,
            client=client,
            monitor=monitor,
            overwrite=overwrite,
        )
    urls = expand(urlpath, given.storage_options)[:limit]
    spec = write_spec(curated, max_count, max_size, given.out_options, given.storage_options, folders_of(urls))
    if not overwrite:
        check_replaced(curated, urls, given.out_options)
    plan, parsed = make_plan(urls, given, where, monitor, client)
    selection.check_steps(then, plan.kinds)
    unique = dedup_options(dedup, plan.kinds)
    last = Last(settled_where(parsed, planned=plan.planned), None if then or unique else spec, plan.chosen)
    scores, run_of = files.join(folder, "scores"), Run(resume, overwrite, monitor, result)
    with files.no_partial(scores, curated), place(client, plan.read.backend, monitor) as lent:
        assert lent is not None
        scored = score_into(lent, urls, scores, plan, last, run_of)
        if then or unique:
            settled = _settled(scored, then if parsed is None else [parsed, *then], last.settled)
            if unique:
                settled = _unique(scored, settled, unique, folder, run_of)
            scored, last = _recounted(lent, scored, replace(last, spec=spec, settled=settled))
        counts = scored.counts
        result.samples, result.by_status = counts.rows, counts.by_status
        result.kept, result.funnel = counts.kept, counts.funnel
        new = set(result.shards_missing) <= set(urls) and not scored.lost
        if not (new or allow_missing):  # their kept samples would vanish from the curated shards
            result.kept = None
            raise MissingShardsError(result, scored.why, "; the curated shards are left unchanged")
        scored = scored.readable
        last = replace(last, spec=replace(spec, made=_made(result.provenance)))
        finished = write_scored(lent, scored, last, resume, monitor)
    result.written = finished.written
    result.seconds = time.perf_counter() - begin
    arguments = {
        "shards": [without_secrets(url) for url in urls],
        "out": folder,
        "where": where,
        "steps": [step.text for step in then],
        "dedup": unique or None,
    } | given.record
    _record(folder, arguments, result, plan.storage_options)
    source_options = plan.read.storage_options
    page = files.join(folder, "report.html")
    if not finished.page or finished.page != fingerprint(page, plan.storage_options):
        report.write_run_report(folder, scored.urls, last.settled, result, plan.storage_options, source_options)
        version = fingerprint(page, plan.storage_options)
        remember_finished(spec, scored.decides(last.kind), result.written, version)
    if result.shards_missing and not allow_missing:
        raise MissingShardsError(result, scored.why)
    return result


def _settled(scored: Scored, steps: Sequence[Step], before: Settled) -> Settled:
    """Find the bounds of ranking steps on the scored rows."""
    df = scores_from_files(scored.urls, scored.read)
    return selection.settle(df, steps, alone=True, planned=before.planned).settled


def _unique(scored: Scored, settled: Settled, options: Mapping[str, Any], folder: str, run_of: Run) -> Settled:
    """Add to a selection that it drops the duplicates among its rows."""
    df = settled.filter(scores_from_files(scored.urls, scored.read))
    url, storage = files.join(folder, ".duplicates"), scored.read.storage_options
    step = unique_rows(df, options, url, run_of.result.provenance, run_of.monitor, storage)
    return replace(settled, conditions=(*settled.conditions, Condition(step)))


def _recounted(client: Client, scored: Scored, last: Last) -> tuple[Scored, Last]:
    """Count the scored rows again, with another selection."""
    found = measure_files(client, scored.urls, last, scored.read)
    return replace(scored, measured=[found[url] for url in scored.urls]), last


def _record(folder: str, arguments: dict[str, Any], result: RunResult, storage_options: Mapping[str, Any]) -> None:
    record = {
        "arguments": arguments,
        "python": platform.python_version(),
        "dask": version("dask"),
        **{k: v for k, v in asdict(result).items() if k != "out"},
    }
    with files.write_whole(files.join(folder, "run.json"), storage_options) as file:
        file.write(json.dumps(record, indent=1, ensure_ascii=False, default=str).encode() + b"\n")
