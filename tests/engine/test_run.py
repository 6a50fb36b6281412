"""How jobs run: as graphs of one task per partition."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import make_sample_shards


class Finished(SchedulerPlugin):
    """Counts finished tasks by the graph that they belong to."""

    def __init__(self) -> None:
        self.tasks: Counter[Any] = Counter()

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        if finish == "memory":
            self.tasks[key[0] if isinstance(key, tuple) else key] += 1


def test_a_shard_is_one_task(client: Client, tmp_path: Path) -> None:
    made = make_sample_shards(tmp_path / "shards", count=24, per_shard=6)
    finished = Finished()
    client.cluster.scheduler.add_plugin(finished)
    where = "aesthetic_score >= 0"
    dic.curate([str(p) for p in made.shards], tmp_path / "run", where=where, model="starter", client=client)
    # The workers load the model; then one graph scores, and one writes the only tar.
    assert sorted(finished.tasks.values()) == [1, 1, len(made.shards)]
