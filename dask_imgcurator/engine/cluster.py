"""Start a cluster of processes on this machine, or connect to one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import BoundedSemaphore
from typing import Any

import dask
from distributed import Client, Worker, WorkerPlugin, get_client, get_worker, secede

from .. import config
from ..clusters.connect import connect
from .backend import BackendError, get_backend, gpu_problem, resolve_name
from .cache import cache


class _NoInterrupt(WorkerPlugin):
    """Leaves Ctrl-C to the client: a terminal also sends it to the workers, each of which would print a traceback."""

    def setup(self, worker: Worker) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _ListColumns(WorkerPlugin):
    """Registers the dtype of embeddings with pandas on a worker, for shuffles that call no function of this library."""

    def setup(self, worker: Worker) -> None:
        from . import pandas as _  # noqa: F401


class _OwnerClient(Client):
    """A client that closes the cluster started for it."""

    def __init__(self, cluster: Any, **kwargs: Any) -> None:
        self._started_cluster = cluster
        super().__init__(cluster, **kwargs)
        self.register_plugin(_NoInterrupt())
        self.register_plugin(_ListColumns())

    def close(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().close(*args, **kwargs)
        finally:
            self._started_cluster.close()


#: A cluster closes a worker for good if it is away 15 s after it died, though its nanny restarts it: a worker that died
#: again just then, or starts slowly, would be lost.
_LOST, _GIVEN_UP = "distributed.deploy.lost-worker-timeout", "15s"


def start_client(
    n_workers: int | None = None, *, scheduler: str | None = None, backend: str | None = None, **kwargs: Any
) -> Client:
    """Start worker processes on this machine, or connect to a scheduler.

    Parameters
    ----------
    n_workers : int, optional
        Worker processes. By default one per GPU; on a CPU one per core, but each with at least 4 GB of memory. Workers
        share the cores for the threads of torch and DALI: workers x threads = cores.
    scheduler : str, optional
        Address of a running scheduler (``tcp://host:8786``), or the file that it wrote (``dask scheduler
        --scheduler-file``); then no process is started. The default is Dask's setting ``scheduler-address``
        (``DASK_SCHEDULER_ADDRESS``), if set. For ``tls://``, certificates come from Dask's settings
        ``distributed.comm.tls``.
    backend : {"auto", "cudf", "pandas"}, optional
        ``cudf`` starts a `dask_cuda.LocalCUDACluster`, ``pandas`` a `distributed.LocalCluster`; the default is
        `imgcurator.backend`.
    **kwargs
        Passed to the cluster's class (``memory_limit=``, ``rmm_pool_size=``, ``dashboard_address=`` …). On a GPU, cuDF
        and CuPy share the driver's pool (``rmm_async=True``) unless you choose another; torch and DALI keep their own.

    Returns
    -------
    distributed.Client
        The default client from now on. Closing it (or leaving its ``with`` block) also ends the processes it started.

    Raises
    ------
    OSError
        If no scheduler answers at the address.
    JobError
        If the scheduler or a worker lacks this package.
    ValueError
        If `scheduler` is not an address, or needs certificates that are not set.

    Examples
    --------
    >>> with start_client(n_workers=2) as client:  # doctest: +SKIP
    ...     df = read_webdataset("laion/*.tar")
    """
    if scheduler is None and n_workers is None and not kwargs:
        scheduler = dask.config.get("scheduler-address", None)
    if scheduler is not None:
        if n_workers is not None or kwargs:
            given = ", ".join(["n_workers"] * (n_workers is not None) + list(kwargs))
            raise ValueError(f"{given}: these are for a new cluster; the scheduler at {scheduler} has its own workers")
        client = connect(scheduler)
        client.register_plugin(_ListColumns())
        return client
    if n_workers is not None and n_workers < 1:
        raise ValueError(f"n_workers={n_workers}: it must be at least 1")
    if dask.config.get(_LOST, _GIVEN_UP) == _GIVEN_UP:
        dask.config.set({_LOST: "1 day"})
    return _OwnerClient(get_backend(resolve_name(backend)).make_cluster(n_workers, **kwargs))


def backend_for(name: str | None, where: Client | str | int | None = None, *, cheap: bool = False) -> str:
    """Resolve the name of a backend for frames at a place; BackendError if it is unusable there.

    Workers may have packages that this process lacks. `cheap` work uses pandas unless cuDF is requested by name.
    """
    name = config.get("backend", name)
    if cheap and name == "auto" and dask.config.get("dataframe.backend", None) != "cudf":
        return "pandas"
    try:
        return resolve_name(name)
    except BackendError as err:
        if isinstance(where, str):  # a scheduler: ask its workers
            return "cudf"
        try:
            client = get_client() if where is None else where
        except ValueError:  # no default client
            client = None
        if not isinstance(client, Client):
            raise err
    workers = list(client.nthreads())[:1]
    problem = client.run(gpu_problem, workers=workers)[workers[0]] if workers else None
    if problem is not None:
        raise BackendError(f"backend 'cudf' cannot be used by the workers: {problem}. Or use backend='pandas'.")
    return "cudf"


def _worker() -> Worker | None:
    try:
        return get_worker()
    except ValueError:  # not in a task of a cluster
        return None


def log_event(topic: str, message: Mapping[str, Any]) -> None:
    """Send an event to the clients subscribed to a topic."""
    if (worker := _worker()) is not None:
        worker.log_event(topic, dict(message))


def share_of_cores() -> int:
    """Return how many cores this worker has to itself, as `Backend.make_cluster` sets it; 1 if that is unknown."""
    return int(os.environ.get("OMP_NUM_THREADS") or 1)


#: Whether a task's thread gave up its slot; no other task gets the thread.
_seceded = threading.local()


@contextmanager
def turn(needed: bool, at_once: int = 1) -> Iterator[None]:
    """Let `at_once` tasks compute per thread of the worker, while as many as it has threads prepare and wait here."""
    # A computing task gives up its slot on the worker, which then receives the next task; that one reads its shard in
    # the meantime and waits here.
    worker = _worker() if needed else None
    if worker is None:
        yield
        return
    places = at_once * worker.state.nthreads
    with cache.get("turn", (worker.address, places), lambda: BoundedSemaphore(places)):
        if not getattr(_seceded, "done", False):  # a task may take several turns
            _seceded.done = True
            secede()
        yield
