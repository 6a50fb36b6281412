"""Where work runs, and the one way to run it: a Dask DataFrame whose partitions are small results.

A job is a frame whose last step has side effects (writing a file) and small results (a row of counts). `run` computes
such frames, yields each partition's result as soon as it is ready, and survives dying workers; `reduce` merges all
partitions' results on the workers; `stream` fetches larger ones one by one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

import dask
import dask.dataframe as dd
import pandas as pd
from dask.system import CPU_COUNT
from distributed import Client, Future, futures_of, get_client
from distributed.scheduler import KilledWorker

from ..clusters.connect import lacking, require_package
from ..clusters.faults import JobError, WorkerFault, WorkersDied
from ..clusters.watch import Watch, why_they_died
from ..monitor import Monitor
from ..storage import files
from .backend import is_dask
from .cluster import start_client
from .frames import boxed, from_map, map_tables, objects_of, objects_stay, to_arrow

#: Where a job runs: a client, the address of a scheduler, a number of new worker processes, or None (a job's default).
Place: TypeAlias = Client | str | int | None

#: Shards in one graph. Larger graphs gain nothing; with two in flight, scheduler and client hold a few thousand tasks.
WAVE = 1000

_FAN_IN = 16

#: From this many failures on, a run is stopped if nearly everything fails.
_MOST_FAULTS = 8


# --- where ----------------------------------------------------------------------------------------


def starts_here(where: Place) -> bool:
    """Whether a place means new processes on this machine."""
    if where is None:
        return dask.config.get("scheduler-address", None) is None
    return isinstance(where, int)


@contextmanager
def place(where: Place, backend: str, monitor: Monitor, light: bool = False) -> Iterator[Client | None]:
    """Open the place where a job runs, and make it Dask's default; None means threads of this process."""
    # By default, a `light` job (no model to load, little Python that holds the GIL) runs in threads and any other on a
    # new cluster of processes, unless Dask's settings name a scheduler.
    if where is None:
        where = dask.config.get("scheduler-address", None)
    if isinstance(where, Client):
        require_package(where)
        _started(where, monitor)
        with where.as_current():
            yield where
        return
    if where is None and light:
        threads = 1 if backend == "cudf" else CPU_COUNT
        with dask.config.set(scheduler="threads", num_workers=threads):
            yield None
        return
    if isinstance(where, str):
        client = start_client(scheduler=where)
    else:
        # A shard whose workers died twice is retried in another way; Dask would try four times. And Dask would print
        # the traceback of every failed task, although `JobError` reports it.
        with dask.config.set({"distributed.scheduler.allowed-failures": 1}):
            client = start_client(where, backend=backend, silence_logs=logging.CRITICAL)
    try:
        _started(client, monitor)
        yield client
    finally:
        client.close()


def _started(client: Client, monitor: Monitor) -> None:
    monitor.started(client)
    for note in lacking(client):
        monitor.note(note)


# --- run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wave:
    """A graph: one named partition per result, as made by `results`."""

    names: Sequence[str]
    frame: dd.DataFrame


def waves(names: Sequence[str], build: Callable[[Sequence[str]], dd.DataFrame]) -> Iterator[Wave]:
    """Split a job into graphs of `WAVE` partitions."""
    for start in range(0, len(names), WAVE):
        part = names[start : start + WAVE]
        yield Wave(part, build(part))


def tasks(items: Sequence[Any], function: Callable[..., Any], *args: Any, label: str) -> dd.DataFrame:
    """Call a function (item, *args) lazily: one row with one object per item, for `run`."""
    meta, writer = boxed(None).iloc[:0], files.this_writer()
    with objects_stay():
        return from_map(_item_row, items, label, meta, writer=writer, call=(function, *args))


def results(
    df: dd.DataFrame, function: Callable[..., Any], *args: Any, label: str, each: Sequence[Any] | None = None
) -> dd.DataFrame:
    """Apply a function (partition, its item of `each` if given, *args) lazily: one row with one object, for `run`."""
    meta, writer = boxed(None).iloc[:0], files.this_writer()
    if each is None:
        return df.map_partitions(_to_row, writer, function, *args, meta=meta, enforce_metadata=False, token=label)
    own = objects_of(each, f"{label}-items")
    return df.map_partitions(
        _to_own_row,
        own,
        writer,
        function,
        *args,
        meta=meta,
        enforce_metadata=False,
        token=label,
        align_dataframes=False,
    )


def _item_row(item: Any, writer: str, call: tuple[Any, ...]) -> pd.DataFrame:
    function, *args = call
    with files.writing_for(writer):
        return boxed(function(item, *args))


def _to_row(frame: Any, writer: str, function: Callable[..., Any], *args: Any) -> pd.DataFrame:
    with files.writing_for(writer):
        return boxed(function(frame, *args))


def _to_own_row(frame: Any, own: pd.DataFrame, writer: str, function: Callable[..., Any], *args: Any) -> pd.DataFrame:
    with files.writing_for(writer):
        return boxed(function(frame, own["object"].iat[0], *args))


@dataclass(frozen=True)
class _Aside:
    """Partitions set aside while others continue, because their workers died or reported a fault."""

    pulse: Callable[[], float]  # when a partition last did something
    lost: list[str] = field(default_factory=list)
    limits: set[int] = field(default_factory=set)  # memory limits of the workers that died
    faults: dict[str, WorkerFault] = field(default_factory=dict)

    def hosts(self) -> set[str]:
        """Machines on which something failed."""
        return {_host(fault.worker) for fault in self.faults.values()}


def _host(worker: str) -> str:
    return worker.rpartition(":")[0]


def run(
    client: Client | None,
    waves: Iterable[Wave],
    what: str,
    again: Callable[[Sequence[str]], Wave] | None = None,
    label: Callable[[str], str] = str,
    build: Callable[[Sequence[str]], dd.DataFrame] | None = None,
    pulse: Callable[[], float] = float,
) -> Generator[tuple[str, Any], None, None]:
    """Compute graphs, two at a time, and yield the name and result of each partition as it is done."""
    # A partition whose workers died more often than Dask allows is set aside while the others continue, then retried
    # once with the graph that `again` makes. One that its worker could not read is retried on another machine, with the
    # graph that `build` makes. Any other error (such as a full disk) would affect the other partitions too and stops
    # the run with a `JobError`. `what` and `label` describe the work and the partition; `pulse` returns the time of
    # last progress.
    if client is None:
        yield from _run_in_threads(waves, what)
        return
    aside, since = _Aside(pulse), time.time()
    yield from _run_on(client, waves, what, label, aside)
    if aside.lost and again is not None:
        retried = list(aside.lost)
        aside.lost.clear()
        yield from _run_on(client, [again(retried)], what, label, aside)
    if aside.faults and build is not None:
        yield from _run_elsewhere(client, build, what, label, aside)
    if aside.faults:
        name, fault = next(iter(aside.faults.items()))
        raise JobError(f"{what} {label(name)}{_more(aside.faults)} failed: {fault}; all others are complete") from fault
    if aside.lost:
        doing = f"{what} {label(aside.lost[0])}{_more(aside.lost)}"
        raise WorkersDied(doing, why_they_died(client, since, aside.limits))


def _more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _run_elsewhere(
    client: Client,
    build: Callable[[Sequence[str]], dd.DataFrame],
    what: str,
    label: Callable[[str], str],
    aside: _Aside,
) -> Iterator[tuple[str, Any]]:
    """Retry partitions that one machine could not read on the others."""
    for host in aside.hosts():
        others = [worker for worker in client.nthreads() if _host(worker) != host]
        names = [name for name, fault in aside.faults.items() if _host(fault.worker) == host]
        if not others:
            continue
        for name in names:
            del aside.faults[name]
        yield from _run_on(client, waves(names, build), what, label, aside, others)


def _run_on(
    client: Client,
    waves: Iterable[Wave],
    what: str,
    label: Callable[[str], str],
    aside: _Aside,
    workers: list[str] | None = None,
) -> Iterator[tuple[str, Any]]:
    done: SimpleQueue[Future] = SimpleQueue()
    running: dict[Any, tuple[str, Future]] = {}
    watch, waiting = Watch(client, what, aside.pulse), iter(waves)
    finished = 0

    def submit() -> bool:
        wave = next(waiting, None)
        if wave is None:
            return False
        # A partition's key consists of the graph's name and the partition's number.
        graph = client.persist(wave.frame.optimize(), workers=workers)
        futures = sorted(futures_of(graph), key=lambda future: future.key[1])
        running.update({f.key: (name, f) for name, f in zip(wave.names, futures, strict=True)})
        for future in futures:
            future.add_done_callback(done.put)
        return True

    more = submit()
    try:
        while running:
            if more and len(running) <= WAVE:
                more = submit()
            ready = [_next(done, watch, lambda: {key: label(name) for key, (name, _) in running.items()})]
            while not done.empty():
                ready.append(done.get())
            for name, future in [running.pop(future.key) for future in ready]:
                error = future.exception() if future.status == "error" else None
                if future.status == "cancelled":
                    raise JobError(f"lost the cluster while {what} {label(name)}")
                if isinstance(error, KilledWorker):
                    aside.lost.append(name)
                    aside.limits.add(error.last_worker.memory_limit)
                elif isinstance(error, WorkerFault):
                    aside.faults[name] = error
                    if len(aside.faults) >= _MOST_FAULTS and len(aside.faults) > 9 * finished:
                        _stop_if_all_fail(client, aside, f"{what} {label(name)}")
                elif error is not None:
                    raise JobError(f"{what} {label(name)}: {type(error).__name__}: {error}") from error
                else:
                    finished += 1
                    yield name, future.result()["object"].iat[0]
            del ready, future  # lets the scheduler forget the result
    finally:
        if running:
            client.cancel([future for _, future in running.values()], force=True)


def _next(done: SimpleQueue[Future], watch: Watch, running: Callable[[], dict[Any, str]]) -> Future:
    """Wait for a partition to be done, as long as there is progress or hope of it."""
    watch.moved()
    while True:
        try:
            return done.get(timeout=watch.wait)
        except Empty:
            watch.look(running())


def _stop_if_all_fail(client: Client, aside: _Aside, doing: str) -> None:
    """Stop a run if nearly everything fails, unless some machine has had no failure."""
    if all(_host(worker) in aside.hosts() for worker in client.nthreads()):
        fault = list(aside.faults.values())[-1]
        raise JobError(f"{doing} failed, as did {len(aside.faults) - 1} more, nearly all: {fault}") from fault


def _run_in_threads(waves: Iterable[Wave], what: str) -> Iterator[tuple[str, Any]]:
    for wave in waves:
        try:
            found = wave.frame.compute()
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as err:
            raise JobError(f"{what}: {type(err).__name__}: {err}") from err
        yield from zip(wave.names, found["object"], strict=True)


def current_client() -> Client | None:
    """Dask's default client, if there is one."""
    try:
        return get_client()
    except ValueError:
        return None


# --- reduce ---------------------------------------------------------------------------------------


def reduce(
    df: Any,
    function: Callable[..., Any],
    merge: Callable[[list[Any]], Any],
    *args: Any,
    columns: Sequence[str] | None = None,
) -> Any:
    """Apply a function to each partition of any frame, and merge the results in place, a few at a time."""
    # `merge` must be associative. With `columns`, the function gets Arrow tables of these, with any split of rows.
    # Partitions already in this process come as a list.
    if isinstance(df, list):
        return merge([function(part, *args) for part in df])
    if not is_dask(df):
        return merge([function(df if columns is None else to_arrow(df, columns), *args)])
    if columns is None:
        parts = results(df, function, *args, label="reduce")
    else:
        row = boxed(None).iloc[:0]
        parts = map_tables(df, columns, _to_row, files.this_writer(), function, *args, meta=row, label="reduce")
    merged = parts.reduction(
        _merge_results,
        aggregate=_merge_results,
        combine=_merge_results,
        meta=boxed(None).iloc[:0],
        split_every=_FAN_IN,
        chunk_kwargs={"merge": merge},
        aggregate_kwargs={"merge": merge},
        combine_kwargs={"merge": merge},
    )
    return merged.compute()["object"].iat[0]


def stream(df: Any, function: Callable[..., Any], *args: Any, each: Sequence[Any] | None = None) -> Iterator[Any]:
    """Like `results`, but yields in order, a few partitions at a time, for results too large to hold together."""
    if not is_dask(df):
        yield function(df, *([] if each is None else each), *args)
        return
    parts = results(df, function, *args, label="stream", each=each).to_delayed()
    client = current_client()
    at_once = 2 * (sum(client.nthreads().values()) if client else CPU_COUNT)
    for start in range(0, len(parts), at_once):
        yield from (row["object"].iat[0] for row in dask.compute(*parts[start : start + at_once]))


def _merge_results(frame: pd.DataFrame, merge: Callable[[list[Any]], Any]) -> pd.DataFrame:
    # To learn the type of the result, Dask tries an empty frame.
    return boxed(merge(list(frame["object"]))) if len(frame) else frame
