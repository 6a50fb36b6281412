"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real weights, reference outputs and pictures; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside the project")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no card, unless REQUIRE_GPU=1 says that there must be one."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted or os.environ.get("REQUIRE_GPU") == "1":
        return
    from dask_imgcurator.backend import gpu_problem

    problem = gpu_problem()
    if problem:
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason=problem))
