"""Run many tasks on a cluster: a window of them at a time, with dead workers survived and nothing left behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, as_completed
from distributed.scheduler import KilledWorker

from ..monitor import Monitor
from ..storage import files
from .cluster import start_client

__all__ = ["JobError", "lend_client", "run_tasks"]


class JobError(RuntimeError):
    """The run could not finish; what is finished is kept."""


def run_tasks(
    client: Client,
    jobs: Iterable[tuple[str, tuple[Any, ...]]],
    function: Callable[..., Any],
    what: str,
    retry: Callable[..., tuple[Any, ...]] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Run tasks, a window of them at a time, and yield name and result as each is done.

    A task whose worker died more often than Dask allows is set aside, and the others go on; any other error of a task
    stops the run, since it would meet the others too (a full disk, a missing file).

    Parameters
    ----------
    client : distributed.Client
        Where to run.
    jobs : iterable of (str, tuple)
        Name and arguments of each task.
    function : callable
        What runs on the workers.
    what : str
        What a task does to what its name says, for messages.
    retry : callable, optional
        Turns a task's name and arguments into those for one more try, after its workers died.

    Raises
    ------
    JobError
        After the last task, if some were set aside; at once for other errors.
    """
    waiting = iter(jobs)
    jobs_of: dict[str, tuple[str, tuple[Any, ...]]] = {}
    running = as_completed()
    tried: set[str] = set()
    lost: list[str] = []

    def submit(job: tuple[str, tuple[Any, ...]] | None) -> None:
        if job is not None:
            future = client.submit(function, *job[1], pure=False)
            jobs_of[future.key] = job
            running.add(future)

    # Enough in the queue to keep all workers busy, few enough that 100,000 shards do not sit in the scheduler.
    window = 2 * max(1, sum(client.nthreads().values())) + 2
    for _ in range(window):
        submit(next(waiting, None))
    try:
        for future in running:
            name, arguments = jobs_of.pop(future.key)
            error = future.exception() if future.status == "error" else None
            if future.status == "cancelled":
                raise JobError(f"the cluster went away while {what} {name}")
            if isinstance(error, KilledWorker) and retry is not None and name not in tried:
                tried.add(name)
                submit((name, retry(name, *arguments)))
                continue
            if isinstance(error, KilledWorker):
                lost.append(name)
            elif error is not None:
                raise JobError(f"{what} {name}: {type(error).__name__}: {error}") from error
            else:
                yield name, future.result()
            submit(next(waiting, None))
    finally:
        client.cancel(list(running.futures), force=True)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise JobError(
            f"the workers that were {what} {lost[0]}{more} died again and again (out of memory, or a crash in a native "
            "library); all others are finished. A smaller --batch-size or fewer --n-workers may help."
        )


@contextmanager
def lend_client(
    client: Client | None,
    scheduler: str | None,
    n_workers: int | None,
    backend: str,
    folders: Sequence[str],
    monitor: Monitor,
    light: bool = False,
) -> Iterator[Client]:
    """Lend a client: the caller's, the scheduler's, or that of a new cluster, which is ended afterwards.

    A new one for work that is `light` has threads of this process, unless worker processes are asked for.
    """
    if client is not None:
        monitor.started(client)
        yield client
        return
    own = scheduler is None
    if own:
        # With a cluster of our own, nobody else is writing here.
        for folder in folders:
            files.remove_partial(folder)
    # Dask would print the traceback of every failed task; what went wrong is told by `JobError`.
    options: dict[str, Any] = {"backend": backend, "silence_logs": logging.CRITICAL} if own else {}
    if own and light and n_workers is None:
        threads = 1 if backend == "cudf" else CPU_COUNT
        with (
            LocalCluster(
                n_workers=1,
                threads_per_worker=threads,
                processes=False,
                dashboard_address=":0",
                silence_logs=logging.CRITICAL,
            ) as cluster,
            Client(cluster) as inside,
        ):
            yield inside
        return
    # A task whose workers died twice is done in another way; Dask would try four times.
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        started = start_client(n_workers, scheduler=scheduler, **options)
    try:
        monitor.started(started)
        yield started
    finally:
        started.close()
        if own:
            for folder in folders:
                files.remove_partial(folder)
