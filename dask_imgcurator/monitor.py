"""Progress of a run."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .results import Counts

if TYPE_CHECKING:
    from distributed import Client


@dataclass
class Progress:
    """Counts of the shards that this run scores.

    Attributes
    ----------
    images, errors : int
        Rows done, and of these failed.
    kept, decided : int
        Rows that the filter keeps, and rows of the finished shards that it has seen.
    expected : int
        Estimate of all rows: those of the shards that were opened, and their mean for the others.
    shards, total_shards : int
        Finished, and in all.
    """

    images: int = 0
    errors: int = 0
    kept: int = 0
    decided: int = 0
    expected: int = 0
    shards: int = 0
    total_shards: int = 0


class Monitor:
    """What a run tells while it goes on; the command line shows it. Every method may be overridden.

    `progress` is also called from the client's event loop: it must be quick, and must not wait for the cluster.

    Attributes
    ----------
    notes : list of str
        What the user was told; goes into the run's record.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Something that the user should know."""
        self.notes.append(text)

    def started(self, client: Client) -> None:
        """The cluster is there."""

    def scoring(self, total: int, taken_over: int) -> None:
        """Scoring begins: shards in all, and those that an earlier run has finished."""

    def progress(self, state: Progress) -> None:
        """Images were done."""

    def packing(self, total: int) -> None:
        """Pictures are packed: shards in all."""

    def writing(self, total: int) -> None:
        """Writing begins: curated shards in all."""

    def wrote(self, shard: Mapping[str, Any]) -> None:
        """A shard was packed, or a curated one written or taken over: its ``shard``, ``count``, ``nbytes``."""


class ShardProgress:
    """Adds up events, which arrive in the client's event loop, and results, which arrive in the caller's thread."""

    def __init__(self, monitor: Monitor, total: int) -> None:
        self.state, self.last = Progress(total_shards=total), time.monotonic()
        self._monitor = monitor
        self._seen: dict[str, Mapping[str, Any]] = {}
        self._running: dict[str, None] = {}
        self._totals: Counter[str] = Counter()
        self._lock = threading.Lock()

    def update(self, counts: Mapping[str, Any]) -> None:
        """Take in an event; a shard that is redone starts at 0."""
        with self._lock:
            before = self._seen.get(counts["shard"], {})
            if before.get("finished"):
                return
            self._seen[counts["shard"]], self.last = counts, time.monotonic()
            if counts.get("finished"):
                self._running.pop(counts["shard"], None)
            else:
                self._running[counts["shard"]] = None
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

    def told(self) -> dict[str, Any]:
        """How far the run is, in plain values."""
        with self._lock:
            running = [url.rpartition("/")[2].partition("?")[0] for url in list(self._running)[:8]]
        state = self.state
        told = {"shards": state.total_shards, "finished": state.shards, "images": state.images, "errors": state.errors}
        return {**told, "running": running}
