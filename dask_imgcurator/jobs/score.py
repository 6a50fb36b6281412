"""Score shards into a score table: the expensive half. Each shard is one task of a Dask DataFrame's graph."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
from distributed import Client

from ..engine.backend import backend_of
from ..engine.frames import apply_step, from_map, host_column, objects_stay
from ..engine.run import JobError, Place, Wave, place, results, run, waves
from ..models import ModelError
from ..models.weights import WeightsError
from ..monitor import Monitor, Progress
from ..results import Counts, RunResult
from ..schema import arrow_schema, kind_of, unify_schemas
from ..select.settle import Settled, settled_where
from ..steps.embed import embed_partition
from ..steps.heads import score_partition
from ..steps.read import URLPath, read_groups
from ..steps.score_table import ScoreFiles, file_provenance, look_at_all, scores_from_files, write_score_file
from ..steps.write import Kept, measure_partition
from ..storage import files
from ..storage.curated import LOCATORS, WriteSpec
from ..storage.urls import expand, fingerprint
from .plan import ScoreOptions, ScorePlan, describe, make_plan, score_files

#: Shards whose version is asked for side by side.
_LOOKS = 16


@dataclass(frozen=True)
class Target:
    """A shard's score file and its provenance."""

    shard: str
    url: str
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """Totals of a score file: counts for the user, and numbers for whoever writes its kept samples."""

    counts: Counts
    kept: Kept | None = None
    notes: Mapping[str, Remark] = field(default_factory=dict)  # kinds of what the column ``note`` tells
    empty: frozenset[str] = frozenset()  # chosen columns in which no row has a value


@dataclass(frozen=True)
class Last:
    """What a partition's last step counts."""

    settled: Settled
    spec: WriteSpec | None = None
    chosen: tuple[str, ...] = ()  # columns that the user named

    def measure(self, frame: Any) -> Measured:
        """Count a partition's rows."""
        kept = None if self.spec is None else measure_partition(self.settled.filter(frame), self.spec)
        empty = frozenset(name for name in self.chosen if name in frame.columns and not frame[name].notna().any())
        return Measured(self.settled.count(frame), kept, _remarks(frame), empty)

    @property
    def columns(self) -> list[str]:
        """Columns needed to count."""
        locators = LOCATORS if self.spec is not None else ("key", "shard")
        return list(dict.fromkeys([*self.settled.columns, "status", "note", *locators, *self.chosen]))


@dataclass(frozen=True)
class Remark:
    """How many samples a kind of note stands on, and the first of them."""

    count: int
    example: str

    def __add__(self, other: Remark) -> Remark:
        return Remark(self.count + other.count, self.example)


def _remarks(frame: Any) -> dict[str, Remark]:
    """Count the notes of a partition by what stands before their colon."""
    found: dict[str, Remark] = {}
    if "note" not in frame.columns:
        return found
    table = backend_of(frame).to_host(frame[frame["note"].notna()], ["note", "key", "shard"])
    for row in table.to_pylist():
        for note in row["note"].split("; "):
            kind, _, detail = note.partition(": ")
            example = f"{row['key']} in {row['shard'].rpartition('/')[2]}" + (f": {detail}" if detail else "")
            found[kind] = found[kind] + Remark(1, "") if kind in found else Remark(1, example)
    return found


#: What to do about a kind of note.
_REMEDIES = {
    "several images": "; only one of them is scored (--image EXT names it)",
    "samples of more than 8 bits are clipped at 255": " (imgcurator.scale-high-bit-depth stretches them)",
}


def tell(parts: Sequence[Measured], schema: pa.Schema, plan: ScorePlan, monitor: Monitor) -> None:
    """Tell the user what was not taken as it is, or was asked for and not found."""
    total: dict[str, Remark] = {}
    for part in parts:
        for kind, remark in part.notes.items():
            total[kind] = total[kind] + remark if kind in total else remark
    for kind, remark in total.items():
        monitor.note(
            f"{remark.count:,} sample{'s' * (remark.count > 1)}: {kind}{_REMEDIES.get(kind, '')}; "
            f"for example {remark.example}."
        )
    for name in sorted(frozenset.intersection(*(part.empty for part in parts)) if parts else ()):
        monitor.note(f"No sample has a value for {name}.")
    for expected in plan.planned:
        type_ = schema.field(expected.name).type
        if kind_of(type_) not in ("unknown", kind_of(expected.type)):
            monitor.note(
                f"The JSON field {expected.name} is {expected.type} in the first samples, but {type_} in the table, "
                "which keeps all of its values. A condition on it takes those of another kind for missing."
            )


# --- the graph ------------------------------------------------------------------------------------


def score_graph(targets: Sequence[Target], plan: ScorePlan, last: Last) -> dd.DataFrame:
    """Make the graph that scores shards: index, embed, heads, write, count; one task per shard."""
    with objects_stay():
        df = read_groups([(target.shard,) for target in targets], plan.read)
    df = apply_step(df, embed_partition, plan.embed, plan.embed.schema)
    for use in plan.heads:
        df = apply_step(df, score_partition, use, arrow_schema([use.column]))
    return results(df, _write, plan, last, label="write-scores", each=targets)


def _write(frame: Any, target: Target, plan: ScorePlan, last: Last) -> tuple[Measured, pa.Schema]:
    # What a store failed to give may come the next time: such a file is not taken over by a later run.
    lost = {"unreached": n} if (n := _unreached(frame, target.shard)) else {}
    provenance = {**target.provenance, **lost}
    schema = write_score_file(frame, target.url, provenance, plan.read.backend, plan.storage_options)
    return last.measure(frame), schema


def _unreached(frame: Any, url: str) -> int:
    """Rows lost to a remote file system's errors, by the wording of `files.RemoteError`; not damaged tars."""
    if files.is_local(url):
        return 0
    messages = host_column(frame[frame["status"] == "read_error"], "error_message")
    return sum(str(message).startswith(f"{url}: ") for message in messages)


def measure_files(client: Client | None, urls: Sequence[str], last: Last, read: ScoreFiles) -> dict[str, Measured]:
    """Count score files, reading only the columns needed."""

    def build(names: Sequence[str]) -> dd.DataFrame:
        df = scores_from_files(names, read)
        return results(df[[name for name in last.columns if name in df.columns]], last.measure, label="count")

    return dict(run(client, waves(urls, build), "reading"))


# --- the job --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Score files in shard order, and their totals."""

    urls: list[str]
    measured: list[Measured]
    read: ScoreFiles  # how to read them

    @property
    def counts(self) -> Counts:
        """Counts of the whole table."""
        return Counts.sum(one.counts for one in self.measured)


def score_into(client: Client, urls: Sequence[str], folder: str, plan: ScorePlan, last: Last, run_of: Run) -> Scored:
    """Score what is not scored yet, and count everything."""
    begin = time.perf_counter()
    files.make_folder(folder)
    files.remove_partial(folder)
    result, monitor = run_of.result, run_of.monitor
    result.provenance = provenance = _load(client, plan)
    topic = f"imgcurator-{os.getpid()}-{time.time_ns()}"
    plan = plan.settled(provenance, topic)
    targets = _look(urls, folder, plan, provenance)
    todo = {url: target for url, (target, done) in targets.items() if not (done and run_of.resume)}
    result.shards_taken_over = len(targets) - len(todo)
    result.loading_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    monitor.scoring(len(urls), result.shards_taken_over)
    progress = _Progress(monitor, len(todo))

    def build(names: Sequence[str]) -> dd.DataFrame:
        return score_graph([todo[name] for name in names], plan, last)

    def again(names: Sequence[str]) -> Wave:
        for name in names:
            monitor.note(f"A worker died while it scored {name}: doing it again with its images decoded apart.")
        return Wave(names, score_graph([todo[name] for name in names], plan.isolated, last))

    found: dict[str, Measured] = {}
    schemas: dict[pa.Schema, str] = {}
    client.subscribe_topic(topic, lambda event: progress.update(event[1]))
    try:
        for url, (measured, schema) in run(client, waves(list(todo), build), "scoring", again):
            found[todo[url].url] = measured
            schemas.setdefault(schema, todo[url].url)
            progress.finish(url, measured.counts)
    finally:
        client.unsubscribe_topic(topic)
        files.remove_partial(folder)
        result.shards_scored = progress.state.shards
        result.images_scored = progress.state.decided
        result.scoring_seconds = time.perf_counter() - begin
    tables = [targets[url][0].url for url in urls]
    rest = [table for table in tables if table not in found]
    for file in look_at_all(rest, plan.storage_options):
        schemas.setdefault(file.schema, file.url)
    fields = [item.column for item in plan.read.fields if item.type is None]
    read = ScoreFiles(
        plan.read.backend, unify_schemas(((url, s) for s, url in schemas.items()), fields), plan.storage_options
    )
    found |= measure_files(client, rest, last, read)
    scored = Scored(tables, [found[table] for table in tables], read)
    tell(scored.measured, read.schema, plan, monitor)
    return scored


@dataclass(frozen=True)
class Run:
    """How a run goes: whether it resumes, its monitor, and its notes."""

    resume: bool
    monitor: Monitor
    result: RunResult


def _load(client: Client, plan: ScorePlan) -> dict[str, Any]:
    """Have all workers load the model concurrently, and return what the first one reports."""
    try:
        client.wait_for_workers(1, timeout=60)
    except TimeoutError:
        raise JobError(f"the scheduler at {client.scheduler_info()['address']} has no worker: start one") from None
    workers = [str(i) for i in range(len(client.nthreads()))]
    nothing = from_map(_nothing, workers, "workers", pd.DataFrame())
    graph = Wave(workers, results(nothing, _describe, plan, label="load-model"))
    try:
        with closing(run(client, [graph], "loading")) as loading:
            _, provenance = next(loading)
    except JobError as err:
        if isinstance(err.__cause__, ModelError | WeightsError):
            raise JobError(str(err.__cause__)) from err.__cause__
        if err.__cause__ is not None:
            raise
        raise JobError(
            "the worker died while it loaded the model: it probably needs more memory (fewer --n-workers)"
        ) from None
    return dict(provenance)


def _nothing(_: str) -> pd.DataFrame:
    return pd.DataFrame()


def _describe(_: Any, plan: ScorePlan) -> dict[str, Any]:
    return describe(plan)


def _look(
    urls: Sequence[str], folder: str, plan: ScorePlan, provenance: Mapping[str, Any]
) -> dict[str, tuple[Target, bool]]:
    """Find each shard's score file, and whether it exists with the same provenance."""
    names = score_files(urls, folder, plan.storage_options)

    def look(url: str) -> tuple[Target, bool]:
        full = {**provenance, "shard": url, "fingerprint": fingerprint(url, plan.read.storage_options)}
        before = file_provenance(names[url], plan.storage_options) or {}
        before.pop("added", None)  # columns that came later belong to none of its making
        return Target(url, names[url], full), before == json.loads(json.dumps(full))

    # Side by side, because each look at an object store takes a while.
    with ThreadPoolExecutor(_LOOKS) as pool:
        return dict(zip(names, pool.map(look, names), strict=True))


class _Progress:
    """Adds up events, which arrive in the client's event loop, and results, which arrive in the caller's thread."""

    def __init__(self, monitor: Monitor, total: int) -> None:
        self.state = Progress(total_shards=total)
        self._monitor = monitor
        self._seen: dict[str, Mapping[str, Any]] = {}
        self._totals: Counter[str] = Counter()
        self._lock = threading.Lock()

    def update(self, counts: Mapping[str, Any]) -> None:
        """Take in an event; a shard that is redone starts at 0."""
        with self._lock:
            before = self._seen.get(counts["shard"], {})
            if before.get("finished"):
                return
            self._seen[counts["shard"]] = counts
            for name in ("rows", "done", "errors"):
                self._totals[name] += counts[name] - before.get(name, 0)
            self.state.images, self.state.errors = self._totals["done"], self._totals["errors"]
            self.state.expected = round(self._totals["rows"] * self.state.total_shards / len(self._seen))
        self._monitor.progress(self.state)

    def finish(self, shard: str, counts: Counts) -> None:
        """Take in a finished shard."""
        self.state.shards += 1
        self.state.kept += counts.kept
        self.state.decided += counts.rows
        errors = counts.rows - counts.readable
        done = {"shard": shard, "rows": counts.rows, "done": counts.rows, "errors": errors, "finished": True}
        self.update(done)


def score_shards(
    urlpath: URLPath,
    out: str | os.PathLike[str],
    *,
    resume: bool = True,
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
        Folder for one Parquet file per shard.
    resume : bool
        Whether files of an earlier run with the same provenance are taken over.
    client : distributed.Client, str, or int, optional
        Where to run, as for `curate`.
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
    urls = expand(urlpath, given.storage_options)
    plan, _ = make_plan(urls, given, None, monitor)
    with place(client, plan.read.backend, monitor) as lent:
        assert lent is not None
        scored = score_into(
            lent, urls, folder, plan, Last(settled_where(None), chosen=plan.chosen), Run(resume, monitor, result)
        )
    counts = scored.counts
    result.samples, result.by_status = counts.rows, counts.by_status
    result.seconds = time.perf_counter() - begin
    return result
