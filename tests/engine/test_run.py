"""How jobs run: as graphs of one task per partition."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import dask
import pandas as pd
import pytest
from distributed import Client, LocalCluster, get_worker
from distributed.diagnostics.plugin import SchedulerPlugin

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import make_sample_shards
from dask_imgcurator.engine.run import Wave, run, tasks
from dask_imgcurator.steps import embed
from dask_imgcurator.steps.embed import embed_partition


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


def test_only_what_is_wanted_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that make columns do not run where none of them is wanted; the whole frame still is a task per shard."""
    made = make_sample_shards(tmp_path / "shards", count=12, per_shard=6)
    decoded: list[str] = []

    def counted(frame: Any, spec: Any) -> Any:
        decoded.extend(frame["shard"].unique())
        return embed_partition(frame, spec)

    monkeypatch.setattr(embed, "embed_partition", counted)
    df = dic.read_webdataset([str(p) for p in made.shards], backend="pandas")
    df = dic.score_nsfw(dic.embed(df, model="starter"), "nsfw-starter")
    df = dic.caption_stats(df)
    with dask.config.set(scheduler="synchronous"):
        assert len(df) == 12
        assert set(df[["key", "caption_words"]].compute()["key"]) == set(made.manifest)
        assert decoded == []
        assert len(df.optimize().dask) == len(made.shards)
        whole = df.compute()
        assert sorted(decoded) == sorted(str(p) for p in made.shards)
    assert list(whole.columns) == list(df.columns)
    assert whole["nsfw_score"].notna().sum() == (whole["status"] == "ok").sum() > 0


#: Selections that read a column which is made from images, before their result is computed.
READING: dict[str, Any] = {
    "top_fraction": lambda df: dic.top_fraction(df, "aesthetic_score", 0.5),
    "top_count": lambda df: dic.top_count(df, "width", 2, where="status == 'ok'"),
    "sample": lambda df: dic.sample(df, 2, where="width > 9"),
    "quantile": lambda df: dic.quantile(df, "aesthetic_score", [0.2, 0.8]),
    "funnel": lambda df: dic.funnel(df, "width > 9 and height > 9"),
    "funnel of ranks": lambda df: dic.funnel(df, ["width > 9", "top 50% by width"]),
    "dedup": lambda df: dic.dedup(df, eps=0.05),
}


@pytest.mark.parametrize("name", READING)
def test_a_selection_that_decodes_warns(name: str, tmp_path: Path) -> None:
    """Once, at the caller's line, and not of a frame that has its columns already."""
    made = make_sample_shards(tmp_path / "shards", count=8, per_shard=4)
    df = dic.read_webdataset([str(p) for p in made.shards], backend="pandas")
    df = dic.score_aesthetic(dic.embed(df, model="starter"), "aesthetic-starter")
    with dask.config.set(scheduler="synchronous"):
        with pytest.warns(UserWarning, match=r"decodes and embeds the images .* take df.persist\(\)") as told:
            found = READING[name](df)
        assert [Path(w.filename).name for w in told] == [Path(__file__).name]
        # Errors here, as every warning is: these read no image, or have them in memory.
        dic.sample(df, 3)
        dic.apply_steps(df, "width > 9")
        dic.top_count(df, "sample_offset", 3)
        again = READING[name](df.persist())
        if name != "quantile":
            found, again = (getattr(x, "compute", lambda x=x: x)() for x in (found, again))
            pd.testing.assert_frame_equal(found, again)


def test_a_file_that_is_written_anew_is_read_anew(client: Client, tmp_path: Path) -> None:
    """A persisted frame of the old rows is not taken for the new one's."""
    made = make_sample_shards(tmp_path / "shards", count=12, per_shard=6)
    url, other = made.shards[0], made.shards[1]
    before = dic.read_webdataset(str(url), backend="pandas").persist()
    table = tmp_path / "scores.parquet"
    before.compute().to_parquet(table)
    scores = dic.read_scores(table, backend="pandas").persist()
    assert set(scores["key"].compute()) == set(before["key"].compute())
    url.write_bytes(other.read_bytes())
    after = dic.read_webdataset(str(url), backend="pandas").persist().compute()
    assert set(after["key"]) == {key for key, value in made.manifest.items() if value["shard"] == other.name}
    after.to_parquet(table)
    again = dic.read_scores(table, backend="pandas").persist()
    assert set(again["key"].compute()) == set(after["key"])


def _who(item: str) -> str:
    time.sleep(0.1)
    return str(get_worker().address)


def test_workers_that_join_get_work() -> None:
    """However few there were when the run began."""
    names = [str(i) for i in range(100)]
    at = []
    small = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0")
    with small as cluster, Client(cluster) as client:
        for _, worker in run(client, [Wave(names, tasks(names, _who, label="who"))], "asking"):
            at.append(worker)
            if len(at) == 5:
                cluster.scale(4)
                client.wait_for_workers(4)
    assert len(set(at)) == 4
    assert all(15 <= n <= 40 for n in Counter(at[20:]).values())
