"""The tests that want a card, file by file, each in a process of its own; failures are printed as they happen.

REQUIRE_GPU=1 python benchmarks/gpu_tests.py tests/test_gpu.py    # one file, as `gpu.py` runs it
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: Seconds for all files, and for one.
LIMIT, FILE_LIMIT = 170, 90


def files() -> list[Path]:
    """Test files with tests for a card, those of the card alone first."""
    found = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    return sorted(found, key=lambda path: path.name != "test_gpu.py")


def run_tests(settings: Any) -> Iterator[tuple[str, Any]]:
    """Outcomes by file; without a card, those of the first file are only collected."""
    env, chosen = {**os.environ, "REQUIRE_GPU": "1"}, files()
    if settings.backend == "pandas":
        del env["REQUIRE_GPU"]
        chosen = chosen[:1]
    end = time.perf_counter() + LIMIT - 5
    for path in chosen:
        begin = time.perf_counter()
        limit = max(1.0, min(FILE_LIMIT, end - begin))
        record = Path(settings.out) / f"{path.stem}.json"
        command = [sys.executable, __file__, str(path), "--record", str(record)]
        error = None
        try:
            code = subprocess.run(command, cwd=ROOT, env=env, timeout=limit).returncode
            if code not in (0, 1, 5):  # 1: some failed; 5: none is there
                error = f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            error = f"stopped after {limit:.0f} s"
        found = json.loads(record.read_text()) if record.is_file() else {}
        record.unlink(missing_ok=True)
        yield path.name, {**found, "seconds": time.perf_counter() - begin, **({"error": error} if error else {})}


class Reporter:
    """Prints what fails at once, and keeps a record of all outcomes in a file."""

    def __init__(self, record: Path | None) -> None:
        self.record = record
        self.found: dict[str, Any] = {"collected": 0, "passed": 0, "skipped": {}, "failed": {}}

    def pytest_collection_finish(self, session: Any) -> None:
        self.found["collected"] = len(session.items)
        self._write()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report)
        elif report.skipped:
            self.found["skipped"][report.nodeid] = str(report.longrepr[-1])
        elif report.when == "call":
            self.found["passed"] += 1
        self._write()

    def _failed(self, report: Any) -> None:
        print(f"\n--- {report.nodeid} ({report.when})\n{report.longreprtext}\n", file=sys.stderr, flush=True)
        crash = getattr(report.longrepr, "reprcrash", None)
        self.found["failed"][report.nodeid] = (crash.message if crash else report.longreprtext)[-300:]
        self._write()

    def _write(self) -> None:
        if self.record is not None:
            self.record.write_text(json.dumps(self.found))


def main() -> int:
    """Run one file."""
    import pytest

    path, record = sys.argv[1], Path(sys.argv[3]) if len(sys.argv) > 3 else None
    # Nothing of the project's own options: no parallel runs, and a warning of RAPIDS is no failure.
    options = ["-q", "-m", "gpu", "-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    if os.environ.get("REQUIRE_GPU") != "1":
        options += ["--collect-only", "-q"]
    return int(pytest.main([path, *options, "--tb=short", "--no-summary"], plugins=[Reporter(record)]))


if __name__ == "__main__":
    sys.exit(main())
