"""Why a run could not finish."""

from __future__ import annotations

import os

from distributed import get_worker


class JobError(RuntimeError):
    """The run could not finish; completed work is kept."""


class WorkersDied(JobError):
    """The workers at some task died more often than is tolerated; `why` is what is known about it."""

    def __init__(self, doing: str, why: str) -> None:
        super().__init__(doing, why)
        self.why = why

    def __str__(self) -> str:
        doing, why = self.args
        return (
            f"the workers that were {doing} died repeatedly ({why}); all others are complete. A smaller "
            "--batch-size or fewer --n-workers may help."
        )


class WorkerFault(JobError):
    """A worker could not read or write something that others perhaps can; `worker` is its address."""

    def __init__(self, message: str, worker: str = "") -> None:
        super().__init__(message, worker)
        self.worker = worker

    def __str__(self) -> str:
        return str(self.args[0])


def worker_fault(err: OSError) -> WorkerFault:
    """Add to an error where it happened, if on a worker."""
    try:
        worker = str(get_worker().address)
    except ValueError:  # not in a task
        worker = ""
    return WorkerFault(f"{os.uname().nodename}: {type(err).__name__}: {err}", worker)
