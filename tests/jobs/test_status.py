"""How far a run is, told from its files; and the log of a run."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import SampleShards, make_sample_shards
from dask_imgcurator.cli.live import display
from dask_imgcurator.clusters.faults import JobError
from dask_imgcurator.monitor import Monitor, Progress
from dask_imgcurator.runs import marks
from dask_imgcurator.runs.marks import find_status

CODE = "from dask_imgcurator.cli.main import main; main()"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SampleShards:
    return make_sample_shards(tmp_path_factory.mktemp("samples"), count=16, per_shard=2)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-c", CODE, *arguments]
    return subprocess.run(given, capture_output=True, text=True, timeout=120, check=False)


def test_the_status_of_a_run_comes_from_its_files(
    made: SampleShards, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "_EVERY", 0)
    out, options = tmp_path / "run", {"model": "starter", "measures": False, "backend": "pandas"}
    seen: list[str] = []

    class Looks(Monitor):
        def progress(self, state: Progress) -> None:
            if state.shards in (3, 4):
                seen.append(command("status", str(out)).stdout)
                if state.shards == 4:
                    raise RuntimeError("the run ends here")

    with pytest.raises(RuntimeError):
        dic.curate(made.folder.as_posix(), out, monitor=Looks(), client=client, **options)
    assert f"on {os.uname().nodename} (process {os.getpid()}), since 20" in seen[-1]
    assert re.search(r"3 of 8 shards, ([6-9]|1\d) images, 0 errors", seen[-1])  # of shards at work, too
    assert "images/s, about " in seen[-1]
    # The same as it was left by another machine, an hour ago; and by a process of this one that is gone.
    (path,) = (out / "scores").glob(".unfinished-*.json")
    mark = json.loads(path.read_text())
    path.write_text(json.dumps({**mark, "host": "elsewhere", "told": time.time() - 3600}))
    assert "on elsewhere" in find_status(str(out))[0].jobs[0]
    assert "no word for 60 minutes" in find_status(str(out))[0].jobs[0]
    gone = subprocess.run(["true"], check=True) and subprocess.Popen(["true"])
    gone.wait()
    path.write_text(json.dumps({**mark, "pid": gone.pid}))
    assert "its process is gone" in find_status(str(out))[0].jobs[0]
    dic.curate(made.folder.as_posix(), out, client=client, **options)
    scores, shards = find_status(str(out))
    assert (scores.command, scores.files, scores.jobs) == ("score", 8, ())
    assert (shards.command, shards.files, shards.jobs) == ("write", 1, ())
    none = command("status", str(tmp_path))
    assert (none.returncode, none.stderr.count("\n")) == (2, 1)


def test_a_log_tells_what_happened(made: SampleShards, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ["--model", "starter", "--no-measures", "--n-workers", "1", "--quiet", "--log", str(log)]
    options += ["--storage-options", '{"auto_mkdir": false}', "--out", str(tmp_path / "run")]
    done = command("curate", str(made.folder), *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    events = [line["event"] for line in lines]
    assert events[0] == "begin" and events[-1] == "end"
    assert {"started", "scoring", "progress", "writing", "wrote", "note"} <= set(events)
    last = [line for line in lines if line["event"] == "progress"][-1]
    assert (last["shards"], last["images"]) == (8, 16)
    with pytest.raises(JobError), display(quiet=True, log=str(log)):
        logging.getLogger("dask_imgcurator.some.module").warning("%s hangs", "it")
        raise JobError("two lines\nof text")
    *_, note, last = map(json.loads, log.read_text().splitlines())
    assert (note["event"], note["text"]) == ("note", "it hangs")
    assert (last["event"], last["error"], last["text"]) == ("failed", "JobError", "two lines\nof text")
