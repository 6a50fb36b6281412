"""Score shards into a score table: the expensive half. Each shard is one task of a Dask DataFrame's graph."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import dask.dataframe as dd
import pyarrow as pa
from distributed import Client

from ..clusters.faults import JobError, WorkersDied, worker_fault
from ..clusters.watch import require_workers
from ..engine.cache import cache
from ..engine.run import Place, Wave, place, results, run, tasks, waves
from ..models import ModelError
from ..models.weights import WeightsError
from ..monitor import Monitor, ShardProgress
from ..results import Counts, RunResult, count
from ..runs.manifest import write_manifest
from ..runs.marks import Mark
from ..runs.measured import Last, Measured, tell
from ..runs.plan import ScoreOptions, ScorePlan, Target, describe, make_plan
from ..runs.records import Found, Run, Work, as_read, check_dataset, difference, filling, look, settle_work
from ..schema import unify_schemas
from ..select.settle import settled_where
from ..steps.embed import embed_partition
from ..steps.heads import score_partition
from ..steps.read import URLPath, index_partition
from ..steps.score_table import ScoreFile, ScoreFiles, file_provenance, scores_from_files, write_score_file
from ..storage import files
from ..storage.urls import expand, fingerprint, marks_changes

# --- the graph ------------------------------------------------------------------------------------


def score_graph(targets: Sequence[Target], plan: ScorePlan, last: Last) -> dd.DataFrame:
    """Make the graph that scores shards, one task each."""
    return tasks(targets, _score_shard, plan, last, label="write-scores")


def _score_shard(target: Target, plan: ScorePlan, last: Last) -> Written:
    """Index, embed, score, write, count."""
    # Equivalent to `read_webdataset` and the same steps on a frame, which would cost the client three times as much.
    frame = embed_partition(index_partition([target.shard], plan.read), plan.embed)
    for use in plan.heads:
        frame = score_partition(frame, use)
    return _write(frame, target, plan, last)


@dataclass(frozen=True)
class Written:
    """A written score file: its version, schema and content."""

    version: str
    schema: pa.Schema
    measured: Measured


def _write(frame: Any, target: Target, plan: ScorePlan, last: Last) -> Written:
    if differs := cache.get("differs", plan.embed.topic, lambda: _differs(plan)):
        raise JobError(f"the worker on {_process()} would score differently from the others: {differs}")
    there = file_provenance(target.url, plan.storage_options) or {}
    if there.get("shard", target.shard) != target.shard:
        raise JobError(f"another run, at the same time, wrote the scores of {there['shard']} to {target.url}")
    if (seen := _seen(target, plan.read.storage_options)) != target.version:
        words = f"{target.shard} is another file than the client sees: {seen}, not {target.version}"
        raise worker_fault(OSError(words))
    schema = write_score_file(frame, target.url, plan.provenance_of(target), plan.read.backend, plan.storage_options)
    return Written(fingerprint(target.url, plan.storage_options), schema, last.measure(frame))


def _differs(plan: ScorePlan) -> str:
    """How this process differs from the provenance of the run's score files; empty if it does not."""
    return difference(as_read({**plan.provenance, **describe(plan)}), plan.provenance)


def _seen(target: Target, storage_options: Mapping[str, Any]) -> str:
    """The version of a shard on this machine; modification times of local copies may differ."""
    here, there = fingerprint(target.shard, storage_options), target.version
    return there if files.is_local(target.shard) and here.split()[0] == there.split()[0] else here


def measure_files(client: Client | None, urls: Sequence[str], last: Last, read: ScoreFiles) -> dict[str, Measured]:
    """Count score files, reading only the columns needed."""

    def build(names: Sequence[str]) -> dd.DataFrame:
        df = scores_from_files(names, read)
        return results(df[[name for name in last.columns if name in df.columns]], last.measure, label="count")

    return dict(run(client, waves(urls, build), "reading"))


# --- the job --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Score files in shard order, and their totals; `lost` are those whose shard cannot be read now, `why` of one."""

    urls: list[str]
    measured: list[Measured]
    read: ScoreFiles  # how to read them
    versions: Mapping[str, str]  # of these files and of their shards
    lost: Collection[str] = ()
    why: str = ""

    @property
    def counts(self) -> Counts:
        """Counts of the whole table."""
        return Counts.sum(one.counts for one in self.measured)

    @property
    def readable(self) -> Scored:
        """The files whose samples can be copied."""
        pairs = [(url, one) for url, one in zip(self.urls, self.measured, strict=True) if url not in self.lost]
        return replace(self, urls=[url for url, _ in pairs], measured=[one for _, one in pairs], lost=())

    def decides(self, kind: str) -> str:
        """Hash of everything that decides what is written; empty if some of it is unknown."""
        if not all(map(marks_changes, self.versions.values())):
            return ""
        return hashlib.sha256(json.dumps([kind, self.urls, sorted(self.versions.items())]).encode()).hexdigest()


def score_into(client: Client, urls: Sequence[str], folder: str, plan: ScorePlan, last: Last, run_of: Run) -> Scored:
    """Score the remaining shards, and count everything."""
    begin = time.perf_counter()
    there = look(folder, plan.storage_options)
    if not run_of.overwrite:
        check_dataset(there, urls)
    result, monitor = run_of.result, run_of.monitor
    result.provenance = provenance = _load(client, plan)
    plan = plan.settled(as_read(provenance), _topic())
    work = settle_work(there, urls, plan, run_of)
    result.shards_missing = list(work.missing)
    result.shards_taken_over = len(work.targets) - len(work.todo)
    result.loading_seconds = time.perf_counter() - begin
    monitor.scoring(len(work.targets), result.shards_taken_over)
    tables = [target.url for target in work.targets.values()]
    done: dict[str, Written] = {}
    found: dict[str, Measured] = {}
    with _remembering(there, last.kind, plan, work, done, found):
        with filling(there, urls, provenance, run_of.overwrite, bool(work.todo)) as mark:
            if mark is not None:
                _score(client, work.todo, plan, last, run_of, done, mark)
        rest = [table for table in tables if table not in done]
        read = ScoreFiles(plan.read.backend, _whole(plan, done, there, rest), plan.storage_options)
        known = {table: there.counted(last.kind, table) for table in rest}
        found |= measure_files(client, [table for table, one in known.items() if one is None], last, read)
    measured = {table: one.measured for table, one in done.items()} | found
    measured |= {table: Measured.from_record(one) for table, one in known.items() if one is not None}
    lost = {work.targets[url].url for url in work.missing if url in work.targets}
    versions = {target.shard: target.version for target in work.targets.values()}
    versions |= {table: done[table].version if table in done else there.versions[table] for table in tables}
    why = next(iter(work.missing.values()), "")
    scored = Scored(tables, [measured[table] for table in tables], read, versions, lost, why)
    tell(scored.measured, read.schema, plan, monitor)
    return scored


def _whole(plan: ScorePlan, done: Mapping[str, Written], there: Found, rest: Sequence[str]) -> pa.Schema:
    """Common schema of the written files and of existing ones."""
    schemas = {one.schema: table for table, one in reversed(list(done.items()))}
    schemas |= {there.looks[table].schema: table for table in rest}
    fields = [item.column for item in plan.read.fields if item.type is None]
    return unify_schemas(((url, schema) for schema, url in schemas.items()), fields)


@contextmanager
def _remembering(
    there: Found, kind: str, plan: ScorePlan, work: Work, done: Mapping[str, Written], found: Mapping[str, Measured]
) -> Iterator[None]:
    """Save what this run learns about its files for the next one, even if it fails."""
    try:
        yield
    finally:
        manifest = there.manifest
        for target in work.targets.values():
            if target.url in done:
                one = done[target.url]
                file = ScoreFile(target.url, one.schema, plan.provenance_of(target), one.measured.counts.rows)
                manifest.learn(kind, one.version, file, one.measured.record)
        for url, measured in found.items():
            manifest.learn(kind, there.versions[url], there.looks[url], measured.record)
        if done or found:
            manifest.keep(kind, {*there.looks, *done})
            with suppress(OSError):  # it only saves time
                write_manifest(manifest, there.folder, there.options)


def _topic() -> str:
    return f"imgcurator-{os.getpid()}-{time.time_ns()}"


def _score(
    client: Client,
    todo: Mapping[str, Target],
    plan: ScorePlan,
    last: Last,
    run_of: Run,
    done: dict[str, Written],
    mark: Mark,
) -> None:
    """Score shards into files, and add them to `done`."""
    result, monitor = run_of.result, run_of.monitor
    begin = time.perf_counter()
    progress = ShardProgress(monitor, len(todo))

    def build(names: Sequence[str]) -> dd.DataFrame:
        return score_graph([todo[name] for name in names], plan, last)

    def again(names: Sequence[str]) -> Wave:
        for name in names:
            monitor.note(f"A worker died while scoring {name}: retrying with its images decoded in a separate process.")
        return Wave(names, score_graph([todo[name] for name in names], plan.isolated, last))

    mark.tell(now=True, **progress.values())
    client.subscribe_topic(plan.embed.topic, lambda event: progress.update(event[1]))
    try:
        graphs, pulse = waves(list(todo), build), lambda: progress.last
        for url, written in run(client, graphs, "scoring", again, build=build, pulse=pulse):
            done[todo[url].url] = written
            progress.finish(url, written.measured.counts)
            mark.tell(**progress.values())
    except JobError as err:
        mark.tell(now=True, stopped=str(err))
        if type(err.__cause__) is JobError:  # from a worker, already complete
            raise JobError(str(err.__cause__)) from None
        raise
    finally:
        client.unsubscribe_topic(plan.embed.topic)
        result.shards_scored = progress.state.shards
        result.images_scored = progress.state.decided
        result.scoring_seconds = time.perf_counter() - begin


def _load(client: Client, plan: ScorePlan) -> dict[str, Any]:
    """Have all workers load the model concurrently, and return the first one's report; all must agree."""
    require_workers(client, "loading the model")
    workers = [str(i) for i in range(len(client.nthreads()))]
    graph = Wave(workers, tasks(workers, _describe, plan, label="load-model"))
    answers: list[tuple[str, dict[str, Any]]] = []
    try:
        for _, answer in run(client, [graph], "loading"):
            answers.append(answer)
    except WorkersDied as err:
        if not answers:  # the others may continue without those that died
            why = f"the worker died while loading the model ({err.why}): fewer --n-workers may help"
            raise JobError(why) from None
    except JobError as err:
        if isinstance(err.__cause__, ModelError | WeightsError):
            raise JobError(str(err.__cause__)) from err.__cause__
        raise
    (first, provenance), *others = answers
    for where, other in others:
        if differs := difference(_fixed(other), _fixed(provenance)):
            raise JobError(
                f"the workers on {where} and on {first} would score differently: {differs.replace('there', where)}"
                ": install the same versions and files on all machines"
            )
    return dict(provenance)


def _fixed(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Entries that each worker determines itself, instead of taking them from the first."""
    encoder = {k: v for k, v in provenance["encoder"].items() if k != "dtype"}
    versions = {k: v for k, v in provenance["versions"].items() if k != "dali"}
    return {"encoder": encoder, "heads": provenance["heads"], "versions": versions}


def _process() -> str:
    return f"{os.uname().nodename} (process {os.getpid()})"


def _describe(_: Any, plan: ScorePlan) -> tuple[str, dict[str, Any]]:
    return _process(), describe(plan)


class MissingShardsError(JobError):
    """Shards could not be read; everything else is done, see `result`."""

    def __init__(self, result: RunResult, why: str, then: str = "") -> None:
        names = result.shards_missing
        more = f", and {len(names) - 1:,} more" if len(names) > 1 else ""
        super().__init__(
            f"{count(len(names), 'shard')} cannot be read now: {why}{more}. Their finished "
            f"scores are kept, all others are scored{then}. --allow-missing (allow_missing=True) continues without them"
        )
        self.result = result


def score_shards(
    urlpath: URLPath,
    out: str | os.PathLike[str],
    *,
    resume: bool = True,
    overwrite: bool = False,
    allow_missing: bool = False,
    limit: int | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
    **options: Any,
) -> RunResult:
    """Score shards into a score table: the expensive half of `curate`.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Shards, as for `read_webdataset`.
    out : str or path
        Folder for one Parquet file per shard. Several runs may fill it with parts of a dataset, even at the same time.
    resume : bool
        Whether files of an earlier run with the same provenance are reused.
    overwrite : bool
        Whether scores in `out` by another model, with other settings or of other shards are replaced completely.
    allow_missing : bool
        Whether to only note shards that cannot be read now, instead of raising an error at the end.
    limit : int, optional
        Only score the first `limit` shards, for a first look; a later run without it reuses them.
    client : distributed.Client, str, or int, optional
        Where to run, as for `curate`.
    monitor : Monitor, optional
        Receives progress and notes.
    **options
        As for `curate`: ``model``, ``pretrained``, ``columns``, ``caption``, ``image``, ``aesthetic_head``,
        ``nsfw_head``, ``weights_dir``, ``batch_size``, ``dtype``, ``backend``, ``storage_options``, ``out_options``.

    Returns
    -------
    RunResult
        With `kept` None.

    Raises
    ------
    FileExistsError
        If `out` holds something else and `overwrite` is False, or files that this library did not write.
    JobError
        If the run could not finish, or shards are missing. Finished scores are kept, even those of missing shards.
    """
    monitor = monitor or Monitor()
    begin = time.perf_counter()
    folder = os.fspath(out)
    result = RunResult(folder, notes=monitor.notes)
    given = ScoreOptions(**options)
    urls = expand(urlpath, given.storage_options)[:limit]
    plan, _ = make_plan(urls, given, None, monitor, client)
    run_of = Run(resume, overwrite, monitor, result)
    with files.no_partial(folder), place(client, plan.read.backend, monitor) as lent:
        assert lent is not None
        scored = score_into(lent, urls, folder, plan, Last(settled_where(None), chosen=plan.chosen), run_of)
    counts = scored.counts
    result.samples, result.by_status = counts.rows, counts.by_status
    result.seconds = time.perf_counter() - begin
    if result.shards_missing and not allow_missing:
        raise MissingShardsError(result, scored.why)
    return result
