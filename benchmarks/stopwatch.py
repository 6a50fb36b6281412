"""How long a job scores, without the loading of its model."""

from __future__ import annotations

import time

from dask_imgcurator.monitor import Monitor, Progress


class Stopwatch(Monitor):
    """Notes when the first shard was handed out and when the last one was finished."""

    def scoring(self, total: int, taken_over: int) -> None:
        """See `Monitor.scoring`."""
        self._begin = self._end = time.perf_counter()

    def progress(self, state: Progress) -> None:
        """See `Monitor.progress`."""
        self._end = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Between the two."""
        return self._end - self._begin
