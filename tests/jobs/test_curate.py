"""The whole job: results, resume, provenance, naming, interruption; on real worker processes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from trees import contents

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import SampleShards, make_sample_shards
from dask_imgcurator.cli.main import cli
from dask_imgcurator.clusters.faults import JobError
from dask_imgcurator.models.heads import HeadError
from dask_imgcurator.models.weights import WeightsError
from dask_imgcurator.monitor import Monitor, Progress
from dask_imgcurator.results import RunResult
from dask_imgcurator.runs import plan as planning
from dask_imgcurator.steps import write
from dask_imgcurator.steps.score_table import file_provenance
from dask_imgcurator.storage.tar_index import index_shard

WHERE = "aesthetic_score >= 5 and width >= 160"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SampleShards:
    return make_sample_shards(tmp_path_factory.mktemp("samples"), count=72, per_shard=24)


@pytest.fixture(scope="module")
def client() -> Any:
    with dic.start_client(n_workers=2, backend="pandas") as client:
        yield client


@pytest.fixture(scope="module")
def finished(made: SampleShards, client: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    out = tmp_path_factory.mktemp("run")
    result = dic.curate([str(p) for p in made.shards], out, where=WHERE, model="starter", client=client, max_count=10)
    return out, result


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file in a folder."""
    paths = [p for p in sorted(folder.iterdir()) if p.name not in (".files.json", ".written.json")]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def score_tables(folder: Path) -> pd.DataFrame:
    return dic.read_scores(folder, backend="pandas").compute(scheduler="synchronous")


def source_members(paths: list[Path]) -> dict[str, dict[str, bytes]]:
    """Every sample's members by name, read with Python's tarfile alone."""
    out: dict[str, dict[str, bytes]] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for info in tar:
                if info.isfile():
                    key = info.name.partition(".")[0]
                    out.setdefault(key, {})[info.name] = tar.extractfile(info).read()  # type: ignore[union-attr]
    return out


def test_every_sample_is_accounted_for_once(finished: tuple[Path, RunResult], made: SampleShards) -> None:
    out, result = finished
    table = score_tables(out / "scores")
    assert sorted(table["key"]) == sorted(made.manifest)
    expected = {key: entry["decodable"] for key, entry in made.manifest.items()}
    assert {k: s == "ok" for k, s in zip(table["key"], table["status"], strict=True)} == expected
    assert result.samples == len(made.manifest)
    assert sum(result.by_status.values()) == result.samples


def test_kept_samples_are_those_of_the_expression_byte_for_byte(
    finished: tuple[Path, RunResult], made: SampleShards
) -> None:
    out, result = finished
    table = score_tables(out / "scores")
    keep = (table["status"] == "ok") & (table["aesthetic_score"] >= 5) & (table["width"] >= 160).fillna(False)
    expected = table["key"][keep].tolist()
    assert 0 < len(expected) < len(table)
    source = source_members(list(made.shards))
    written: list[str] = []
    for path in sorted((out / "shards").glob("*.tar")):
        for key, members in source_members([path]).items():
            written.append(key)
            assert members == source[key]
    # In input order.
    assert written == expected
    assert result.kept == len(expected)
    # Each source shard keeps more than ten: it is cut by itself.
    of_shards = [sum(table["shard"][keep] == str(path)) for path in made.shards]
    assert all(n > 10 for n in of_shards)
    counts = [min(10, n - start) for n in of_shards for start in range(0, n, 10)]
    assert [s["count"] for s in result.written] == counts


def test_funnel_counts_each_condition_alone_and_in_sequence(finished: tuple[Path, RunResult]) -> None:
    out, result = finished
    table = score_tables(out / "scores")
    ok = table[table["status"] == "ok"]
    good, wide = ok["aesthetic_score"] >= 5, ok["width"] >= 160
    assert [(s.condition, s.alone, s.left) for s in result.funnel] == [
        ("aesthetic_score >= 5", good.sum(), good.sum()),
        ("width >= 160", wide.sum(), (good & wide).sum()),
    ]


def test_record_says_what_was_run(finished: tuple[Path, RunResult]) -> None:
    out, result = finished
    record = json.loads((out / "run.json").read_text())
    assert record["arguments"]["where"] == WHERE
    assert record["kept"] == result.kept
    assert any("preview" in note for note in record["notes"])
    assert record["provenance"]["encoder"]["model"] == "starter"
    assert len(record["provenance"]["encoder"]["backbone_sha256"]) == 64


def test_provenance_stands_in_the_parquet_footer(finished: tuple[Path, RunResult], made: SampleShards) -> None:
    out, _ = finished
    schema = pq.read_schema(out / "scores" / "00000.parquet")
    provenance = json.loads(schema.metadata[b"imgcurator"])
    assert provenance["shard"] == str(made.shards[0])
    assert set(provenance["heads"]) == {"aesthetic_score", "nsfw_score"}
    assert {"dask_imgcurator", "torch"} <= set(provenance["versions"])


def test_second_run_takes_everything_over(finished: tuple[Path, RunResult], made: SampleShards, client: Any) -> None:
    out, first = finished
    before = {p: p.stat().st_mtime_ns for p in (out / "scores").iterdir()} | {
        p: p.stat().st_mtime_ns for p in (out / "shards").iterdir()
    }
    again = dic.curate([str(p) for p in made.shards], out, where=WHERE, model="starter", client=client, max_count=10)
    assert (again.shards_scored, again.shards_taken_over) == (0, len(made.shards))
    assert all(s["resumed"] for s in again.written)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert again.kept == first.kept


@pytest.fixture
def copy(finished: tuple[Path, RunResult], tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoiled."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    return out


def test_missing_and_damaged_score_files_are_made_again(
    copy: Path, finished: Any, made: SampleShards, client: Any
) -> None:
    (copy / "scores" / "00000.parquet").unlink()
    damaged = copy / "scores" / "00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    result = dic.curate([str(p) for p in made.shards], copy, where=WHERE, model="starter", client=client, max_count=10)
    assert (result.shards_scored, result.shards_taken_over) == (2, 1)
    assert tree(copy / "scores") == tree(finished[0] / "scores")
    assert tree(copy / "shards") == tree(finished[0] / "shards")


def test_another_dtype_recomputes(copy: Path, made: SampleShards, client: Any) -> None:
    options: dict[str, Any] = {"model": "starter", "dtype": "bfloat16", "client": client, "overwrite": True}
    result = dic.score_shards(str(made.shards[0]), copy / "scores", **options)
    assert (result.shards_scored, result.shards_taken_over) == (1, 0)
    assert file_provenance(str(copy / "scores" / "00000.parquet"))["encoder"]["dtype"] == "bfloat16"  # type: ignore[index]


def test_changed_shard_is_scored_again(made: SampleShards, client: Any, tmp_path: Path) -> None:
    shard = tmp_path / "00000.tar"
    shutil.copy(made.shards[0], shard)
    first = dic.score_shards(shard, tmp_path / "scores", model="starter", client=client)
    shutil.copy(made.shards[1], shard)
    second = dic.score_shards(shard, tmp_path / "scores", model="starter", client=client)
    assert (first.shards_scored, second.shards_scored) == (1, 1)
    index = index_shard(str(made.shards[1]))
    assert score_tables(tmp_path / "scores")["key"].tolist() == [s.key for s in index.samples]


def test_no_resume_recomputes(copy: Path, made: SampleShards, client: Any) -> None:
    result = dic.score_shards(str(made.shards[0]), copy / "scores", model="starter", client=client, resume=False)
    assert (result.shards_scored, result.shards_taken_over) == (1, 0)


def test_shards_of_one_stem_do_not_collide(made: SampleShards, client: Any, tmp_path: Path) -> None:
    for folder, source in (("a", made.shards[0]), ("b", made.shards[1])):
        (tmp_path / folder).mkdir()
        shutil.copy(source, tmp_path / folder / "00000.tar")
    urls = [str(tmp_path / f / "00000.tar") for f in "ab"]
    out = tmp_path / "run"
    result = dic.curate(urls, out, model="starter", client=client)
    assert result.samples == 48
    files = sorted((out / "scores").glob("*.parquet"))
    assert len(files) == 2
    assert {file_provenance(str(f))["shard"] for f in files} == set(urls)  # type: ignore[index]
    # The names stay when the order changes or a shard joins later: nothing is computed twice.
    assert dic.score_shards(urls[::-1], out / "scores", model="starter", client=client).shards_taken_over == 2
    alone = tmp_path / "alone"
    dic.score_shards(urls[1], alone, model="starter", client=client)
    both = dic.score_shards(urls, alone, model="starter", client=client)
    assert (both.shards_scored, both.shards_taken_over) == (1, 1)
    assert len(list(alone.glob("*.parquet"))) == 2


def test_damaged_and_missing_shards_are_reported_and_the_rest_goes_on(
    made: SampleShards, client: Any, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(made.shards[0].read_bytes()[:200_000])
    urls = [str(cut), str(tmp_path / "missing.tar"), str(made.shards[1])]
    result = dic.curate(urls, tmp_path / "run", model="starter", client=client, allow_missing=True)
    assert result.by_status["read_error"] == 1
    assert result.shards_missing == [urls[1]]
    table = score_tables(tmp_path / "run" / "scores")
    whole = [s.key for s in index_shard(str(cut)).samples]
    assert table["key"][(table["shard"] == str(cut)) & (table["status"] != "read_error")].tolist() == whole
    assert result.kept == (table["status"] == "ok").sum()


def test_another_selection_replaces_the_curated_shards(copy: Path, made: SampleShards, client: Any) -> None:
    before = len(list((copy / "shards").glob("*.tar")))
    urls = [str(p) for p in made.shards]
    result = dic.curate(urls, copy, where="aesthetic_score >= 6.5", model="starter", client=client, max_count=10)
    assert result.shards_scored == 0
    names = sorted(p.name for p in (copy / "shards").glob("*.tar"))
    assert names == [s["shard"] for s in result.written]
    assert len(names) < before


def test_select_then_write_equals_curate(finished: tuple[Path, RunResult], client: Any, tmp_path: Path) -> None:
    out, result = finished
    selection = dic.select_rows(out / "scores", tmp_path / "selected", WHERE, client=client)
    assert selection.kept == result.kept
    assert score_tables(tmp_path / "selected")["aesthetic_score"].min() >= 5
    _, written = dic.write_selection(tmp_path / "selected", tmp_path / "shards", max_count=10, client=client)
    assert contents(tmp_path / "shards") == contents(out / "shards")
    assert [s["sha256"] for s in written] == [s["sha256"] for s in result.written]


def groups_of(rows: pd.DataFrame, same: Any) -> list[list[int]]:
    """Connected rows, by comparing all pairs."""
    groups: list[list[int]] = []
    for i in range(len(rows)):
        near = [group for group in groups if any(same(rows.iloc[i], rows.iloc[j]) for j in group)]
        groups = [group for group in groups if group not in near] + [[*itertools.chain(*near), i]]
    return groups


def test_duplicates_are_dropped_last(copy: Path, made: SampleShards, client: Any) -> None:
    """As by hand: of all pairs of the selected rows; the best of each group stays."""
    shards = [str(p) for p in made.shards]
    asked = {"tiers": ["exact", "perceptual"], "keep": "blur", "lowest": True}
    result = dic.curate(shards, copy, where="width >= 100", dedup=asked, model="starter", client=client)

    rows = score_tables(copy / "scores").query("status == 'ok' and width >= 100")
    rows = rows.sort_values(["blur", "shard", "key"], kind="stable")  # the best of a group first
    plain = {key for key, entry in made.manifest.items() if entry["kind"] in ("flat", "tiny")}  # hashes say nothing
    for same in (
        lambda a, b: a["sha256"] == b["sha256"],
        lambda a, b: not {a["key"], b["key"]} & plain and (int(a["phash"], 16) ^ int(b["phash"], 16)).bit_count() <= 4,
    ):
        rows = rows.iloc[sorted(min(group) for group in groups_of(rows, same))]
    written = [key for path in sorted((copy / "shards").glob("*.tar")) for key in source_members([path])]
    assert sorted(written) == sorted(rows["key"])
    selected = result.funnel[0].left
    assert (result.funnel[-1].condition, result.funnel[-1].left) == (
        "dedup exact, perceptual keep blur lowest True",
        len(rows),
    )
    assert len(rows) < selected < result.by_status["ok"]

    again = dic.curate(shards, copy, where="width >= 100", dedup=asked, model="starter", client=client)
    assert [one["sha256"] for one in again.written] == [one["sha256"] for one in result.written]
    assert again.funnel == result.funnel
    record = json.loads((copy / "run.json").read_text())
    assert record["arguments"]["dedup"] == {**asked, "tiers": ["exact", "perceptual"]}
    with pytest.raises(ValueError, match="keep='beauty': no such column"):
        dic.curate(shards, copy, dedup={"tiers": ["exact"], "keep": "beauty"}, model="starter", client=client)
    with pytest.raises(ValueError, match="perceptual needs the column phash"):
        dic.curate(shards, copy, dedup="perceptual", measures=False, model="starter", client=client)


def test_curated_shards_are_a_score_table_of_their_own(
    finished: tuple[Path, RunResult], client: Any, tmp_path: Path
) -> None:
    """Every command works on them where the source shards are gone."""
    shards, away = tmp_path / "shards", tmp_path / "away"
    samples = Path(json.loads((finished[0] / "run.json").read_text())["arguments"]["shards"][0]).parent

    def command(*arguments: Any) -> str:
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    workers = ["--scheduler", client.scheduler.address]
    command("write", finished[0] / "scores", "--out", shards, "--where", WHERE, "--max-count", 10, *workers)
    samples.rename(away)
    try:
        command("select", shards, "--out", tmp_path / "best", "--top", "50% by aesthetic_score")
        command("write", tmp_path / "best", "--out", tmp_path / "again", *workers)
        command("report", shards, "--out", tmp_path / "report.html")
        command("score", shards / "*.tar", "--out", tmp_path / "scores", "--model", "starter", *workers)
    finally:
        away.rename(samples)
    curated, again = score_tables(shards), score_tables(tmp_path / "scores")
    best = set(curated.nlargest(len(curated) // 2, "aesthetic_score")["key"])
    assert len(best) > 3
    members = source_members(sorted(shards.glob("*.tar")))
    assert source_members(sorted((tmp_path / "again").glob("*.tar"))) == {k: members[k] for k in members if k in best}
    names = ["key", "shard", "offset", "nbytes", "sample_offset", "sample_nbytes", "sha256", "status"]
    pd.testing.assert_frame_equal(again[names], curated[names])
    assert (tmp_path / "report.html").read_text().count("data:image/") > 3
    (table,) = {json.dumps(file_provenance(str(path))["encoder"]) for path in shards.glob("*.parquet")}  # type: ignore[index]
    assert json.loads(table) == finished[1].provenance["encoder"]


def test_the_sources_are_never_written_over(made: SampleShards, client: Any, tmp_path: Path) -> None:
    """Refining a folder in place would write over the shards that are still to be read."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in made.shards:
        shutil.copy(path, folder)
    before = tree(folder)
    dic.score_shards(folder, tmp_path / "scores", model="starter", client=client)
    with pytest.raises(write.WriteError, match="choose another folder"):
        dic.write_selection(tmp_path / "scores", folder, client=client)
    assert tree(folder) == before


def test_a_mistake_in_the_expression_is_told_before_anything_is_done(made: SampleShards, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="aesthetic_score"):
        dic.curate(str(made.shards[0]), tmp_path / "run", where="aesthetic_scor > 5", model="starter")
    assert not (tmp_path / "run").exists()


def test_missing_head_weights_stop_the_run_with_a_remedy(made: SampleShards, client: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wrong = tmp_path / "empty" / "sa_0_4_vit_b_32_linear.pth"
    wrong.write_bytes(b"not the published file")
    with pytest.raises(JobError, match="sha256"):
        dic.score_shards(
            str(made.shards[0]), tmp_path / "scores", model="starter", aesthetic_head="aesthetic-v1-b32",
            weights_dir=tmp_path / "empty", client=client,
        )  # fmt: skip


class NoCluster(Monitor):
    """Fails once a cluster is there."""

    def started(self, client: Any) -> None:
        pytest.fail("a cluster was started")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "starter", "aesthetic_head": "aesthetic-v2-l14"},
            "width 768 .*, these have 512",
        ),
        ({"model": "ViT-L-14", "pretrained": "random:0", "nsfw_head": "nsfw-b32"}, "width 512 .*, these have 768"),
        ({"model": "ViT-B-32", "pretrained": "random:0", "weights_dir": "/nowhere"}, "/nowhere is not a folder"),
        ({"model": "ViT-B-32", "pretrained": "random:0", "weights_dir": "wrong"}, "is not the published"),
    ],
)
def test_wrong_heads_and_weights_are_told_before_the_cluster_starts(
    options: dict[str, str], message: str, made: SampleShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong").mkdir()
    Path("wrong/sa_0_4_vit_b_32_linear.pth").write_bytes(b"not the published file")
    with pytest.raises((WeightsError, HeadError), match=message):
        dic.score_shards(str(made.shards[0]), "scores", client=1, monitor=NoCluster(), **options)  # type: ignore[arg-type]
    assert not Path("scores").exists()


def test_choose_heads_by_model() -> None:
    monitor = Monitor()
    names = {
        model: [u.head for u in planning.choose_heads(model, "openai", planning.ScoreOptions(), monitor)]
        for model in ("ViT-L-14", "ViT-B-32", "ViT-B-16", "starter")
    }
    assert names == {
        "ViT-L-14": ["aesthetic-v2-l14", "nsfw-l14"],
        "ViT-B-32": ["aesthetic-v1-b32", "nsfw-b32"],
        "ViT-B-16": ["aesthetic-v1-b16"],
        "starter": ["aesthetic-starter", "nsfw-starter"],
    }
    assert any("ViT-B-16" in note for note in monitor.notes)
    none = planning.ScoreOptions(aesthetic_head="none", nsfw_head="none")
    assert planning.choose_heads("ViT-L-14", "openai", none, monitor) == ()


# --- interruption -----------------------------------------------------------------------------------------------------


def start(arguments: list[str], **kwargs: Any) -> subprocess.Popen[str]:
    code = "from dask_imgcurator.cli.main import main; main()"
    # A session of its own stands for the terminal: Ctrl-C goes to all of its processes.
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **kwargs,
    )  # fmt: skip


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize("signal_", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_run_leaves_nothing_half_and_goes_on(signal_: int, client: Any, tmp_path: Path) -> None:
    made = make_sample_shards(tmp_path / "samples", count=160, per_shard=16)
    whole, out = tmp_path / "whole", tmp_path / "out"
    # As many workers as the client below has: the number of threads may change a score's last bits.
    arguments = ["curate", str(made.folder / "*.tar"), "--model", "starter", "--where", WHERE, "--n-workers", "2"]
    process = start([*arguments, "--out", str(out)])
    wait_for(lambda: any(out.glob("scores/*.parquet")))
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    if signal_ == signal.SIGINT:
        os.killpg(process.pid, signal_)
    else:
        process.send_signal(signal_)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rerun the same command to resume" in errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    names = list(tree(out / "scores"))
    assert [name.partition("-")[0] for name in names[:2]] == [".table.json", ".unfinished"]
    done = names[2:]
    assert 1 <= len(done) < 10
    assert all(name.endswith(".parquet") and not name.startswith(".") for name in done)
    for name in done:
        pq.read_table(out / "scores" / name)

    again = dic.curate(str(made.folder / "*.tar"), out, where=WHERE, model="starter", client=client)
    straight = dic.curate(str(made.folder / "*.tar"), whole, where=WHERE, model="starter", client=client)
    assert again.shards_taken_over == len(done)
    assert straight.shards_taken_over == 0
    assert tree(out / "scores") == tree(whole / "scores")
    assert contents(out / "shards") == contents(whole / "shards")


def test_killed_worker_costs_no_finished_work(made: SampleShards, tmp_path: Path) -> None:
    """A worker process that dies is replaced, its shard is done again, and every sample is there once."""
    with dic.start_client(n_workers=1, backend="pandas") as client:
        (pid,) = client.run(os.getpid).values()

        class Killer(Monitor):
            killed = False

            def progress(self, state: Progress) -> None:
                if state.images and not self.killed:
                    self.killed = True
                    os.kill(pid, signal.SIGKILL)

        monitor = Killer()
        urls = [str(p) for p in made.shards]
        result = dic.score_shards(urls, tmp_path / "scores", model="starter", client=client, monitor=monitor)
    assert monitor.killed
    assert result.shards_scored == len(made.shards)
    assert sorted(score_tables(tmp_path / "scores")["key"]) == sorted(made.manifest)
