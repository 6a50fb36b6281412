"""The whole job: score shards (with resume), select, write curated shards, leave a record."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from distributed import Client, as_completed
from distributed.scheduler import KilledWorker

from ..engine.backend import resolve_name
from ..engine.runner import JobError, lend_client, run_tasks
from ..models import weights
from ..models.encoders import ModelError
from ..models.weights import WeightsError
from ..monitor import Monitor, Progress
from ..results import RunResult, Selection
from ..schema import kinds_of_schema
from ..select import where as filters
from ..steps import collection, score, write
from ..storage import files, shards
from .plan import choose_heads, choose_model, model_notes, score_files
from .tasks import ScorePlan, describe, locate_kept, score_shard, write_kept

__all__ = ["curate", "score_shards", "write_selection"]


#: Shards whose version is asked for side by side.
_LOOKS = 16


@dataclass(frozen=True)
class ScoreOptions:
    """Arguments of the expensive half; see `score_shards`."""

    model: str | None = None
    pretrained: str | None = None
    columns: Sequence[str] | Mapping[str, str] = ()
    caption: str | None = None
    image: str | Sequence[str] = ()
    aesthetic_head: str = "auto"
    nsfw_head: str = "auto"
    weights_dir: str | os.PathLike[str] | None = None
    batch_size: int | None = None
    dtype: str | None = None
    measures: bool = True
    backend: str | None = None
    storage_options: Mapping[str, Any] | None = None
    out_options: Mapping[str, Any] | None = None


def _plan(urls: Sequence[str], options: ScoreOptions, where: str | None, monitor: Monitor) -> ScorePlan:
    model, pretrained = choose_model(options.model, options.pretrained, monitor)
    read = collection.read_spec(
        urls, options.columns, options.caption, options.storage_options, options.backend, options.image
    )
    embed = collection.embed_spec(
        model, pretrained, options.batch_size, options.dtype, options.storage_options, measures=options.measures
    )
    weights_dir = weights.resolve_dir(options.weights_dir)
    uses = choose_heads(model, pretrained, options.aesthetic_head, options.nsfw_head, weights_dir, monitor)
    plan = ScorePlan(read, embed, uses, where, dict(options.out_options or {}))
    if where is not None:
        # A mistake in the expression is told now, not after the scoring.
        parsed = filters.parse_where(where, plan.columns)
        if model == "starter" and "nsfw_score" in parsed.columns:
            monitor.note(
                "The starter's nsfw_score stays near 0 for every picture: a condition on it removes next to nothing."
            )
    for note in model_notes(model, pretrained):
        monitor.note(note)
    return plan


def _score(
    client: Client, urls: Sequence[str], folder: str, plan: ScorePlan, resume: bool, monitor: Monitor, result: RunResult
) -> list[str]:
    """Score what is not scored yet; returns the score files in the order of the shards."""
    begin = time.perf_counter()
    options = plan.storage_options
    files.make_folder(folder)
    try:
        client.wait_for_workers(1, timeout=60)
        # All workers load the model now, side by side; what the first one tells holds for all.
        loading = [client.submit(describe, plan, pure=False, workers=[address]) for address in client.nthreads()]
        provenance = next(iter(as_completed(loading))).result()
    except TimeoutError:
        raise JobError(f"the scheduler at {client.scheduler_info()['address']} has no worker: start one") from None
    except (ModelError, WeightsError) as err:
        raise JobError(str(err)) from err
    except KilledWorker:
        raise JobError(
            "the worker died while it loaded the model: it probably needs more memory (fewer --n-workers)"
        ) from None
    result.provenance = provenance
    # From here on all workers use what the first one has.
    encoder = replace(plan.embed.encoder, dtype=provenance["encoder"]["dtype"])
    plan = replace(plan, embed=replace(plan.embed, encoder=encoder, decoder=provenance["decode"]["decoder"]))

    targets = score_files(urls, folder, options)

    def look(url: str) -> tuple[dict[str, Any], bool]:
        full = {**provenance, "shard": url, "fingerprint": shards.fingerprint(url, plan.read.storage_options)}
        before = score.file_provenance(targets[url], options) or {}
        before.pop("added", None)  # columns that came later belong to none of its making
        return full, resume and before == json.loads(json.dumps(full))

    # Side by side, because each look at an object store takes a while.
    with ThreadPoolExecutor(_LOOKS) as pool:
        looked = dict(zip(targets, pool.map(look, targets), strict=True))
    todo = {url: full for url, (full, done) in looked.items() if not done}
    taken_over = len(targets) - len(todo)
    result.shards_taken_over = taken_over
    result.loading_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    monitor.scoring(len(urls), taken_over)

    state = Progress(total_shards=len(todo))
    seen: dict[str, dict[str, Any]] = {}

    totals: Counter[str] = Counter()
    lock = threading.Lock()

    def update(counts: dict[str, Any]) -> None:
        # Events come in the client's event loop, results in this thread; a shard that is done again begins at 0.
        with lock:
            before = seen.get(counts["shard"], {})
            if before.get("finished"):
                return
            seen[counts["shard"]] = counts
            for name in ("rows", "done", "errors"):
                totals[name] += counts[name] - before.get(name, 0)
            state.images, state.errors = totals["done"], totals["errors"]
            state.expected = round(totals["rows"] * len(todo) / len(seen))
        monitor.progress(state)

    def on_event(event: Any) -> None:
        update(event[1])

    topic = f"imgcurator-{os.getpid()}-{time.time_ns()}"
    client.subscribe_topic(topic, on_event)
    jobs = ((url, (url, targets[url], plan, full, topic)) for url, full in todo.items())

    def isolated(url: str, *arguments: Any) -> tuple[Any, ...]:
        monitor.note(f"A worker died while it scored {url}: doing it again with its images decoded apart.")
        return tuple(
            replace(a, embed=replace(a.embed, isolate=True)) if isinstance(a, ScorePlan) else a for a in arguments
        )

    try:
        for _, counts in run_tasks(client, jobs, score_shard, "scoring", isolated):
            state.shards += 1
            state.kept += counts["kept"]
            state.decided += counts["rows"]
            update({**counts, "done": counts["rows"], "finished": True})
    finally:
        client.unsubscribe_topic(topic)
        result.shards_scored = state.shards
        result.images_scored = state.decided
        result.scoring_seconds = time.perf_counter() - begin
    return [targets[url] for url in urls]


def _located(client: Client, urls: Sequence[str], where: str | None, read: score.ScoreFiles) -> Selection:
    jobs = ((url, (url, where, read)) for url in urls)
    found = dict(run_tasks(client, jobs, locate_kept, "reading"))
    return Selection(list(urls), where, [found[url] for url in urls])


def _write(
    client: Client, selection: Selection, read: score.ScoreFiles, spec: write.WriteSpec, resume: bool, monitor: Monitor
) -> list[dict[str, Any]]:
    sizes = ((part["keys"], part["sizes"]) for part in selection.located)
    plan = list(write.plan_shards(sizes, spec.max_count, spec.max_nbytes))
    # Before the first one is written: a shard may be the source of another one's samples.
    write.check_sources(spec.folder, {url for part in selection.located for url in part["sources"]})
    files.make_folder(spec.folder)
    monitor.writing(len(plan))
    jobs = (
        (
            f"{n:05d}.tar",
            (n, [(selection.urls[s.partition], s.start, s.stop) for s in slices], selection.where, read, spec, resume),
        )
        for n, slices in enumerate(plan)
    )
    done = {}
    for name, stats in run_tasks(client, jobs, write_kept, "writing"):
        done[name] = stats
        monitor.wrote(stats)
    write.remove_surplus(spec.folder, len(plan), spec.storage_options)
    return [done[name] for name in sorted(done, key=lambda n: int(n.partition(".")[0]))]


def _score_reader(urls: Sequence[str], backend: str, storage_options: Mapping[str, Any] | None) -> score.ScoreFiles:
    return score.ScoreFiles(
        backend, tuple(score.file_schema(urls[0], storage_options).names), dict(storage_options or {})
    )


def score_shards(
    urlpath: collection.URLPath,
    out: str | os.PathLike[str],
    *,
    resume: bool = True,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    monitor: Monitor | None = None,
    **options: Any,
) -> RunResult:
    """Score shards into a score table: the expensive half of `curate`.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Shards, as for `read_webdataset`.
    out : str or path
        Folder for one Parquet file a shard.
    resume : bool
        Whether files of an earlier run with the same provenance are taken over.
    client, scheduler, n_workers
        Where to run: a `distributed.Client`, the address of a scheduler, or a new cluster with so many workers.
    monitor : Monitor, optional
        Is told how the run goes on.
    **options
        As for `curate`: ``model``, ``pretrained``, ``columns``, ``caption``, ``image``, ``aesthetic_head``,
        ``nsfw_head``, ``weights_dir``, ``batch_size``, ``dtype``, ``backend``, ``storage_options``, ``out_options``.

    Returns
    -------
    RunResult
        With `kept` None.

    Raises
    ------
    JobError
        If the run could not finish. Finished shards are kept.
    """
    monitor = monitor or Monitor()
    begin = time.perf_counter()
    folder = os.fspath(out)
    result = RunResult(folder, notes=monitor.notes)
    given = ScoreOptions(**options)
    urls = shards.expand(urlpath, given.storage_options)
    plan = _plan(urls, given, None, monitor)
    with lend_client(client, scheduler, n_workers, plan.read.backend, [folder], monitor) as client:
        tables = _score(client, urls, folder, plan, resume, monitor, result)
        selection = _located(client, tables, None, _score_reader(tables, plan.read.backend, given.out_options))
    result.samples, result.by_status = selection.rows, selection.by_status
    result.seconds = time.perf_counter() - begin
    return result


def write_selection(
    scores: collection.URLPath,
    out: str | os.PathLike[str],
    where: str | None = None,
    *,
    max_count: int = 10_000,
    max_size: int | str = "1GB",
    resume: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    monitor: Monitor | None = None,
) -> tuple[Selection, list[dict[str, Any]]]:
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
        Whether curated shards that are there already and hold the same samples are taken over.
    storage_options, source_options : mapping, optional
        For the fsspec file systems of both folders, and of the source shards.
    backend : {"auto", "cudf", "pandas"}, optional
        Of the frames; by default `imgcurator.backend`.
    client, scheduler, n_workers
        Where to run, as for `score_shards`.
    monitor : Monitor, optional
        Is told how the run goes on.

    Returns
    -------
    (Selection, list of dict)
        What was kept, and ``_stats.json`` of each shard.
    """
    monitor = monitor or Monitor()
    folder = os.fspath(out)
    spec = write.WriteSpec(
        folder, max_count, write.parse_size(max_size), dict(storage_options or {}), dict(source_options or {})
    )
    urls, read = _open_scores(scores, where, storage_options, backend)
    with lend_client(client, scheduler, n_workers, read.backend, [folder], monitor) as client:
        selection = _located(client, urls, where, read)
        return selection, _write(client, selection, read, spec, resume, monitor)


def _open_scores(
    scores: collection.URLPath, where: str | None, storage_options: Mapping[str, Any] | None, backend: str | None
) -> tuple[list[str], score.ScoreFiles]:
    urls = collection.score_urls(scores, storage_options)
    read = _score_reader(urls, resolve_name(backend), storage_options)
    if where is not None:
        schema = score.file_schema(urls[0], storage_options)
        filters.parse_where(where, kinds_of_schema(schema))
    return urls, read


def curate(
    urlpath: collection.URLPath,
    out: str | os.PathLike[str],
    *,
    where: str | None = None,
    min_aesthetic: float | None = None,
    max_nsfw: float | None = None,
    max_count: int = 10_000,
    max_size: int | str = "1GB",
    resume: bool = True,
    client: Client | None = None,
    scheduler: str | None = None,
    n_workers: int | None = None,
    monitor: Monitor | None = None,
    **options: Any,
) -> RunResult:
    """Curate shards: score every image, keep those that an expression takes, write them as curated shards.

    The same as ``dask-imgcurator curate``.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Shards, as for `read_webdataset`.
    out : str or path
        Folder for ``scores/``, ``shards/``, ``report.html`` and ``run.json``.
    where : str, optional
        Expression on the columns, for example ``"aesthetic_score >= 5 and width >= 512"``. Rows whose ``status``
        is not ``ok`` are
        never kept.
    min_aesthetic, max_nsfw : float, optional
        Shorthands for ``aesthetic_score >= X`` and ``nsfw_score < X``.
    max_count, max_size : int, str
        Size of the curated shards, see `to_webdataset`.
    resume : bool
        Whether what an earlier run of the same provenance finished is taken over.
    client, scheduler, n_workers
        Where to run: a `distributed.Client`, the address of a scheduler, or a new cluster with so many workers.
    monitor : Monitor, optional
        Is told how the run goes on.
    **options
        ``model``, ``pretrained``, ``batch_size``, ``dtype``, ``measures`` (True here): see
        `embed`; by default ViT-L-14 of OpenAI, or the
        starter where its weights cannot be had. ``columns``, ``caption``, ``image``, ``backend``,
        ``storage_options``: see `read_webdataset`.
        ``aesthetic_head``, ``nsfw_head``: a head's name, ``auto`` (the one trained on the model) or ``none``.
        ``weights_dir``: folder
        with the heads. ``out_options``: for the fsspec file system of `out`.

    Returns
    -------
    RunResult
        Counts, timings and provenance; the same as in ``run.json``.

    Raises
    ------
    WhereError
        For a mistake in the expression, before anything is done.
    JobError
        If the run could not finish. What is finished is kept: the same call goes on from there.
    """
    from ..report import report

    monitor = monitor or Monitor()
    begin = time.perf_counter()
    folder = os.fspath(out)
    result = RunResult(folder, notes=monitor.notes)
    given = ScoreOptions(**options)
    where = filters.combine(where, min_aesthetic, max_nsfw)
    max_nbytes = write.parse_size(max_size)
    urls = shards.expand(urlpath, given.storage_options)
    plan = _plan(urls, given, where, monitor)
    scores, curated = files.join(folder, "scores"), files.join(folder, "shards")
    spec = write.WriteSpec(curated, max_count, max_nbytes, dict(plan.storage_options), dict(plan.read.storage_options))
    with lend_client(client, scheduler, n_workers, plan.read.backend, [scores, curated], monitor) as client:
        tables = _score(client, urls, scores, plan, resume, monitor, result)
        read = _score_reader(tables, plan.read.backend, plan.storage_options)
        selection = _located(client, tables, where, read)
        result.samples, result.by_status = selection.rows, selection.by_status
        result.kept, result.funnel = selection.kept, selection.funnel
        result.written = _write(client, selection, read, spec, resume, monitor)
    result.seconds = time.perf_counter() - begin
    arguments = {"shards": urls, "out": folder, "where": where, **asdict(given)}
    # Storage options may hold credentials.
    arguments = {k: v for k, v in arguments.items() if not k.endswith("_options")}
    _record(folder, arguments, result, plan.storage_options)
    report.write_run_report(folder, tables, where, result, plan.storage_options, plan.read.storage_options)
    return result


def _record(folder: str, arguments: dict[str, Any], result: RunResult, storage_options: Mapping[str, Any]) -> None:
    record = {
        "arguments": arguments,
        "python": platform.python_version(),
        "dask": version("dask"),
        **{k: v for k, v in asdict(result).items() if k != "out"},
    }
    with files.write_whole(files.join(folder, "run.json"), storage_options) as file:
        file.write(json.dumps(record, indent=1, ensure_ascii=False, default=str).encode() + b"\n")
