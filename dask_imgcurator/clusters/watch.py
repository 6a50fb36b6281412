"""Watch a run: report what has stalled and where, and stop a run that makes no progress or has no workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

from dask.utils import format_bytes, parse_timedelta
from distributed import Client

from .. import config
from .faults import JobError

T = TypeVar("T")

#: Seconds after which a run without results checks its workers; after which it reports that it has none; after which it
#: reports a stall; and to wait for a scheduler's answer.
LOOK, _NO_WORKER, _STALLED, _PATIENCE = 10, 30, 60, 30

#: How many workers a message names, and how many parts on each.
_NAMED = 5

_log = logging.getLogger(__name__)


class Watch:
    """Watches a run that does `what`; `pulse` returns when a part last did something (`time.monotonic`)."""

    def __init__(self, client: Client, what: str, pulse: Callable[[], float]) -> None:
        self._client, self._what, self._pulse = client, what, pulse
        self._limit = parse_timedelta(config.get("stall-timeout"))
        self.wait = min(LOOK, self._limit / 4)  # seconds between checks
        self.moved()

    def moved(self) -> None:
        """Something finished or began."""
        self._since, self._told = time.monotonic(), False

    def look(self, running: Mapping[Any, str]) -> None:
        """Find out why nothing finishes; `running`: readable names of the parts, by their keys."""
        workers = ask(self._client.nthreads)
        if workers is not None and not workers:
            require_workers(self._client, self._what)
            self.moved()
            return
        self._since = max(self._since, self._pulse())
        idle = time.monotonic() - self._since
        if idle >= self._limit:
            raise JobError(
                f"nothing moved for {idle:.0f} s (imgcurator.stall-timeout) while {self._what} {self._where(running)}: "
                "a native library may hang, or a file system; restart these workers"
            )
        if idle >= min(_STALLED, self._limit / 2) and not self._told:
            self._told = True
            doing = f"{self._what} {self._where(running)}"
            _log.warning("Nothing moved for %.0f s while %s; waiting up to %.0f s", idle, doing, self._limit)

    def _where(self, running: Mapping[Any, str]) -> str:
        """The stalled parts, and the workers that have them."""
        at = ask(self._client.processing)
        if at is None:
            return f"{_first([*running.values()])} (the scheduler does not answer)"
        places = [
            f"{_first([running[key] for key in keys if key in running])} on {worker}"
            for worker, keys in at.items()
            if any(key in running for key in keys)
        ]
        return _first(places) if places else f"{_first([*running.values()])}, which no worker has"


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def ask(question: Callable[[], T]) -> T | None:
    """Ask the scheduler; None if it does not answer now."""
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except Exception as err:
            answer.set_exception(err)

    Thread(target=ask, daemon=True).start()
    try:
        return answer.result(_PATIENCE)
    except (OSError, RuntimeError):  # no answer in time, or a connection that is closed
        return None


def why_they_died(client: Client, since: float, limits: Collection[int]) -> str:
    """Say what is known about why workers with these memory limits died since a time (`time.time`)."""
    events = [event for at, event in ask(lambda: client.get_events("worker-restart-memory")) or () if at >= since]
    if not events:
        return "out of memory, or a crash in a native library"
    peak = max(event["rss"] for event in events)
    limit = f" of {format_bytes(max(limits))}" if any(limits) else ""
    last = events[-1]["worker"]
    return f"ended by Dask at their memory limit{limit}, with up to {format_bytes(peak)}; the last was {last}"


def require_workers(client: Client, what: str) -> None:
    """Wait for a worker, as long as the settings say, then raise `JobError`."""
    limit, address = parse_timedelta(config.get("worker-timeout")), client.scheduler_info()["address"]
    patience = min(_NO_WORKER, limit)
    try:
        return client.wait_for_workers(1, timeout=patience)
    except TimeoutError:
        if limit > patience:
            _log.warning("No worker for %s at %s: waiting %.0f s for one", what, address, limit - patience)
    try:
        return client.wait_for_workers(1, timeout=max(limit - patience, 0.1))  # 0 would wait forever
    except TimeoutError:
        raise JobError(
            f"no worker for {what} at {address} for {limit:.0f} s (imgcurator.worker-timeout): start one"
        ) from None
