"""Shared fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module", autouse=True)
def _own_scheduler() -> None:
    """Forget the clients of other modules: where two did not close in reverse order, Dask brings the first one back."""
    dask.config.config.pop("scheduler", None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real weights, reference outputs and pictures; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside the project")
    return SHARED


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A cluster of two threads of this process."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no card, unless REQUIRE_GPU=1 says that there must be one."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted or os.environ.get("REQUIRE_GPU") == "1":
        return
    from dask_imgcurator.engine.backend import gpu_problem

    problem = gpu_problem()
    if problem:
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason=problem))
