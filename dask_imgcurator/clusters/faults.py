"""Why a run could not finish."""

from __future__ import annotations

import os

from distributed import get_worker


class JobError(RuntimeError):
    """The run could not finish; what is finished is kept."""


class WorkersDied(JobError):
    """Workers that were doing something died more often than is tolerated; `why` is what is known of it."""

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
    """What a worker could not read or write, though others perhaps can; `worker` is its address."""

    def __init__(self, message: str, worker: str = "") -> None:
        super().__init__(message, worker)
        self.worker = worker

    def __str__(self) -> str:
        return str(self.args[0])


def worker_fault(err: OSError) -> WorkerFault:
    """Make an error of this machine, where it is one, tell where it happened."""
    try:
        worker = str(get_worker().address)
    except ValueError:  # not in a task
        worker = ""
    return WorkerFault(f"{os.uname().nodename}: {type(err).__name__}: {err}", worker)
