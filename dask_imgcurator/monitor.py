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
        Rows done, and failed ones among them.
    kept, decided : int
        Rows that the filter keeps, and rows of finished shards that it was applied to.
    expected : int
        Estimated total of rows: those of the opened shards, and their mean for each other shard.
    shards, total_shards : int
        Finished, and in total.
    """

    images: int = 0
    errors: int = 0
    kept: int = 0
    decided: int = 0
    expected: int = 0
    shards: int = 0
    total_shards: int = 0


class Monitor:
    """Receives what a running job reports; the command line shows it. Every method may be overridden.

    `progress` is also called from the client's event loop: it must be quick, and must not wait for the cluster.

    Attributes
    ----------
    notes : list of str
        The notes so far; they go into the run's record.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Take a note for the user."""
        self.notes.append(text)

    def started(self, client: Client) -> None:
        """The cluster has started."""

    def scoring(self, total: int, taken_over: int) -> None:
        """Scoring begins: number of shards, and how many of them an earlier run has finished."""

    def progress(self, state: Progress) -> None:
        """Images were scored."""

    def packing(self, total: int) -> None:
        """Packing begins: number of shards."""

    def writing(self, total: int) -> None:
        """Writing begins: number of curated shards."""

    def wrote(self, shard: Mapping[str, Any]) -> None:
        """A shard was packed, written or reused: its ``shard``, ``count``, ``nbytes``."""


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
        """Add an event; a retried shard starts at 0."""
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
        """Add a finished shard."""
        self.state.shards += 1
        self.state.kept += counts.kept
        self.state.decided += counts.rows
        errors = counts.rows - counts.readable
        done = {"shard": shard, "rows": counts.rows, "done": counts.rows, "errors": errors, "finished": True}
        self.update(done)

    def values(self) -> dict[str, Any]:
        """The progress so far, as plain values."""
        with self._lock:
            running = [url.rpartition("/")[2].partition("?")[0] for url in list(self._running)[:8]]
        state = self.state
        found = {"shards": state.total_shards, "finished": state.shards, "images": state.images, "errors": state.errors}
        return {**found, "running": running}
