"""The command line: exit codes, messages, summaries; run as a user runs it."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster

import dask_imgcurator
from dask_imgcurator.checks.samples import make_sample_shards
from dask_imgcurator.cli import live
from dask_imgcurator.cli.main import cli
from dask_imgcurator.engine.frames import from_map
from dask_imgcurator.engine.run import Wave, results
from dask_imgcurator.engine.run import run as engine_run
from dask_imgcurator.schema import STATUSES


def run(
    *arguments: str, module: str = "dask_imgcurator.cli.main:main", **kwargs: object
) -> subprocess.CompletedProcess[str]:
    name, _, function = module.partition(":")
    code = f"import sys; from {name} import {function}; sys.argv[0] = 'dask-imgcurator'; {function}()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, **kwargs
    )  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sample_shards(tmp_path_factory.mktemp("cli"), count=32, per_shard=16).folder


@pytest.fixture(scope="module")
def scores(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "scores"
    done = run("score", str(samples), "--out", str(out), "--model", "starter", "--n-workers", "1", "--column", "kind")
    assert done.returncode == 0, done.stderr
    assert "32" in done.stdout
    assert "images/s" in done.stdout
    assert "preview" in done.stderr
    assert "\r" not in done.stderr and "\x1b" not in done.stderr  # no live line where stderr is no terminal
    told = re.findall(r"^scoring: ([0-9]+)/~32 images · .* · [0-9]+ errors · shard ([0-2])/2", done.stderr, re.M)
    assert told[-1][0] == "32"
    assert len(told) <= 21
    return out


def test_select_and_write(scores: Path, tmp_path: Path) -> None:
    selected = run(
        "select", str(scores), "--out", str(tmp_path / "sel"), "--where", "aesthetic_score >= 5 and kind == 'crop'"
    )
    assert selected.returncode == 0, selected.stderr
    assert "and kind == 'crop'" in selected.stdout
    written = run("write", str(tmp_path / "sel"), "--out", str(tmp_path / "shards"))
    assert written.returncode == 0, written.stderr
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        kinds = [json.loads(tar.extractfile(m).read())["kind"] for m in tar if m.name.endswith(".json")]  # type: ignore[union-attr]
    assert kinds
    assert set(kinds) == {"crop"}


def test_quiet_prints_nothing(scores: Path, tmp_path: Path) -> None:
    done = run("select", str(scores), "--out", str(tmp_path / "sel"), "--min-aesthetic", "5", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_through_dask(scores: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "sel")
    done = run("imgcurator", "select", str(scores), "--out", out, "--where", "nope > 1", module="dask.__main__:main")
    assert done.returncode == 2
    assert "unknown column 'nope'" in done.stderr
    done = run("imgcurator", "--help", module="dask.__main__:main")
    assert done.returncode == 0
    assert "curate" in done.stdout


WRONG = {
    ("curate",): "Missing argument",
    ("curate", "x.tar"): "Missing option '--out'",
    ("curate", "/does/not/exist.tar", "--out", "o"): "no such shard: /does/not/exist.tar",
    ("curate", "/does/not/*.tar", "--out", "o"): "no file matches '/does/not/*.tar'",
    ("curate", "{samples}", "--out", "o", "--model", "ViT-L14", "--pretrained", "openai"): "did you mean 'ViT-L-14",
    ("curate", "{samples}", "--out", "o", "--model", "ViT-B-32", "--pretrained", "opnai"): "neither a file nor a tag",
    ("curate", "{samples}", "--out", "o", "--model", "ViT-B-32"): "random:SEED",
    ("curate", "{samples}", "--out", "o", "--model", "starter", "--where", "width >"): "width >",
    ("curate", "{samples}", "--out", "o", "--model", "starter", "--where", "a.b > 1"): "^",
    ("curate", "{samples}", "--out", "o", "--model", "starter", "--max-size", "big"): "500MB",
    ("curate", "{samples}", "--out", "o", "--model", "starter", "--aesthetic-head", "v3"): "aesthetic-v2-l14",
    ("curate", "{samples}", "--out", "o", "--model", "starter", "--column", "status"): "status",
    ("curate", "{samples}", "--out", "o", "--batch-size", "0"): "--batch-size",
    ("curate", "{samples}", "--out", "o", "--keep", "blur"): "--keep is for --dedup TIER",
    ("curate", "{samples}", "--out", "o", "--model", "starter", "--backend", "cudf"): "pip install",
    ("write", "/nowhere", "--out", "o"): "no score table at '/nowhere'",
    ("export", "{samples}", "--out", "o", "--format", "list", "--arch", "b32"): "--arch is for the format datacomp",
    (
        "export",
        "{samples}",
        "--out",
        "o",
        "--format",
        "laion",
        "--repeat",
        "n",
    ): "the format datacomp-subset or list, not",
    ("select", "{samples}/..", "--out", "o"): "/scores?",
    ("select", "{scores}", "5", "--out", "o"): "put the expression in quotes",
    ("select", "{scores}", "--where", "clip_score > 0.2", "--out", "o"): "`dask-imgcurator add --clip-score` makes it",
    ("select", "{scores}", "--where", "caption_chars > 9", "--out", "o"): "add --caption-stats",
    ("select", "{scores}", "--top", "5 by aesthetic_scor", "--out", "o"): "did you mean 'aesthetic_score'?",
    ("select", "{scores}", "--sample", "5 by kinds", "--out", "o"): "did you mean 'kind'?",
    ("nonsense",): "No such command",
    ("--nonsense",): "No such option",
}


@pytest.mark.parametrize("arguments", WRONG, ids=lambda a: " ".join(a)[:60])
def test_wrong_usage_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...], samples: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dask_imgcurator.engine.backend import gpu_problem

    if "cudf" in arguments and gpu_problem() is None:
        pytest.skip("cudf works here")
    monkeypatch.chdir(tmp_path)
    beside = scores if "{samples}/.." in arguments else samples / "x"
    given = [a.format(samples=samples, scores=scores).replace(f"{samples}/..", str(beside.parent)) for a in arguments]
    result = CliRunner().invoke(cli, given)
    assert result.exit_code == 2, result.output
    assert WRONG[arguments] in result.stderr
    assert result.stderr.startswith("dask-imgcurator: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["curate", "score", "parity"])
def test_shards_that_are_no_tars(command: str, tmp_path: Path) -> None:
    pointer = tmp_path / "00000.tar"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    out = ["--out", str(tmp_path / "out")] if command != "parity" else []
    result = CliRunner().invoke(cli, [command, str(tmp_path), "--model", "starter", *out])
    assert result.exit_code == 2
    assert result.stderr == (
        f"dask-imgcurator: {pointer} is not a tar; it is a Git LFS pointer, not the file itself: "
        "fetch it with git lfs pull\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["~a.tar", "a [v1].tar", "~a/{0..1}.tar"])
def test_odd_names_that_are_not_there(name: str) -> None:
    result = CliRunner().invoke(cli, ["score", name, "--out", "o", "--model", "starter"])
    assert result.exit_code == 2
    assert result.stderr.startswith("dask-imgcurator: no ")
    assert len(result.stderr.splitlines()) == 1


def test_address_that_is_none(scores: Path) -> None:
    result = CliRunner().invoke(cli, ["dedup", str(scores), "--scheduler", "nonsense"])
    assert result.exit_code == 2
    assert "scheduler='nonsense': missing port number" in result.stderr
    assert "tcp://" in result.stderr


@pytest.mark.parametrize("columns", [200, 80, 40])
def test_doctor_names_what_would_be_used(columns: int) -> None:
    result = CliRunner().invoke(cli, ["doctor"], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    for text in ("torch", "backend", "decoder", "default model", "starter model", "aesthetic-v2-l14", "extra formats"):
        assert text in result.stdout
    words = {word for line in result.stdout.splitlines() if len(line) > columns for word in [line.split()[-1]]}
    assert all(len(word) > columns - 22 - 20 for word in words)  # only what cannot be broken sticks out


def test_without_a_command_there_is_help() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("--help").stdout


def test_a_first_look_is_taken_over(samples: Path, scores: Path, tmp_path: Path) -> None:
    """The first shard alone, then all: as if they had been scored at once."""
    out = tmp_path / "scores"
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        common = [str(samples), "--out", str(out), "--model", "starter", "--column", "kind", "--scheduler"]
        first = CliRunner().invoke(cli, ["score", *common, cluster.scheduler_address, "--limit", "1"])
        assert first.exit_code == 0, first.output
        assert [p.name for p in sorted(out.glob("*.parquet"))] == ["00000.parquet"]
        kept = (out / "00000.parquet").stat().st_mtime_ns
        whole = CliRunner().invoke(cli, ["score", *common, cluster.scheduler_address])
    assert whole.exit_code == 0, whole.output
    assert "reused from an earlier run: 1 shard" in whole.stdout
    assert (out / "00000.parquet").stat().st_mtime_ns == kept
    for path in scores.glob("*.parquet"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_nothing_kept_is_said(scores: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["select", str(scores), "--where", "aesthetic_score > 99", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "Nothing is kept" in done.stdout


def test_help_teaches() -> None:
    text = CliRunner().invoke(cli, ["--help"]).stdout
    # Examples stand on lines of their own.
    assert "  Try it on sample images:     dask-imgcurator demo" in text.splitlines()
    assert "\\b" not in text
    for command in ("curate", "score", "select", "write", "demo", "doctor"):
        assert command in text
        page = CliRunner().invoke(cli, [command, "--help"]).stdout
        assert f"imgcurator {command}" in page
        assert len(page.splitlines()) > 4
        assert "\\b" not in page


def test_demo(tmp_path: Path) -> None:
    done = run("demo", "--out", str(tmp_path / "demo"), "--count", "64")
    assert done.returncode == 0, done.stderr
    assert "preview" in done.stderr
    for text in ("what was planted", "truncated", "kept", "report"):
        assert text in done.stdout
    for path in ("report.html", "run.json", "scores/00000.parquet", "shards/00000.tar", "samples/manifest.json"):
        assert (tmp_path / "demo" / path).is_file()


# --- what is printed, as it is --------------------------------------------------------------------

ODD = "[blink] :dog: [x] [/x] [link=http://x]"


def test_names_and_expressions_are_printed_as_they_are(scores: Path, tmp_path: Path) -> None:
    out, where = tmp_path / ODD / "sel", f"kind != '{ODD}'"
    done = CliRunner().invoke(cli, ["select", str(scores), "--out", str(out), "--where", where])
    assert done.exit_code == 0, done.stderr
    assert where in done.stdout
    assert f"in {out}\n" in done.stdout
    done = CliRunner().invoke(cli, ["add", str(out), "--caption-stats", "--out", str(tmp_path / ODD / "added")])
    assert (done.exit_code, done.stdout) == (0, f"added caption_words, caption_chars: {tmp_path / ODD / 'added'}\n")


def test_progress_shows_names_as_they_are() -> None:
    file = io.StringIO()
    console = live.make_console()
    console.file, console._force_terminal = file, True
    with live.make_monitor(console) as monitor:
        monitor.note(ODD)
        monitor.writing(1)
        monitor.wrote({"shard": ODD})
        assert isinstance(monitor, live._Live)
        console.print(monitor._progress.get_renderable())
    assert file.getvalue().count(ODD) == 2


def test_one_function_makes_consoles() -> None:
    folder = Path(dask_imgcurator.__file__).parent
    trees = {path.name: ast.parse(path.read_text()) for path in folder.rglob("*.py")}
    calls = [
        (n, c.func.id)
        for n, t in trees.items()
        for c in ast.walk(t)
        if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)
    ]
    assert [name for name, function in calls if function in ("Console", "Plain")] == ["live.py"]
    columns = [c for c in ast.walk(trees["live.py"]) if isinstance(c, ast.Call) and ast.unparse(c.func) == "TextColumn"]
    assert columns
    assert all("markup=False" in ast.unparse(column) for column in columns)


def test_names_that_no_terminal_shows(scores: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["select", str(scores), "--out", str(tmp_path / "odd\udcff")])
    assert done.exit_code == 0, done.stderr
    assert "odd\\udcff" in done.stdout


@pytest.mark.parametrize("there", [True, False])
def test_dashboard_is_named_where_there_is_one(there: bool) -> None:
    if there:
        pytest.importorskip("bokeh")
    file = io.StringIO()
    console = live.make_console()
    console.file = file
    options = {"scheduler_kwargs": {"dashboard": there}, "dashboard_address": ":0"}
    with LocalCluster(n_workers=0, processes=False, **options) as cluster, Client(cluster) as client:
        with live.make_monitor(console) as monitor:
            monitor.started(client)
        assert client.dashboard_link  # whether there is one or not
        assert file.getvalue() == (f"dashboard: {client.dashboard_link}\n" if there else "")


# --- bugs -----------------------------------------------------------------------------------------


def fail(where: str) -> int:
    return int({}[where])  # a KeyError


def broken(*_: object, client: Client | None = None, **__: object) -> None:
    frame = from_map(lambda name: pd.DataFrame({"name": [name]}), ["here"], "names", pd.DataFrame({"name": ["a"]}))
    graph = Wave(["here"], results(frame, lambda frame: fail(frame["name"].iat[0]), label="fail"))
    list(engine_run(client, [graph], "reading"))


@pytest.mark.parametrize("where", ["client", "threads", "worker"])
def test_a_bug_is_a_line_and_its_traceback_is_saved(
    where: str, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bug = {
        "client": lambda *_, **__: fail("here"),
        "threads": broken,
        "worker": lambda *_, **__: broken(client=client),
    }[where]
    monkeypatch.setattr("dask_imgcurator.jobs.tables.select_rows", bug)
    result = CliRunner().invoke(cli, ["select", "scores", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1, result.output
    found = re.fullmatch(
        r"dask-imgcurator: (reading.*: )?KeyError: 'here'; this is unexpected: please report it with (.*), "
        r"which contains the traceback\n",
        result.stderr,
    )
    assert found, result.stderr
    saved = Path(found[2]).read_text()
    assert saved.startswith(f"dask_imgcurator {dask_imgcurator.__version__}, Python ")
    assert "return int({}[where])" in saved


def test_arrow_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    result = CliRunner().invoke(cli, ["select", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_steps_are_applied_in_the_order_given(scores: Path, tmp_path: Path) -> None:
    frame = pd.concat(pd.read_parquet(path) for path in sorted(scores.glob("*.parquet")))
    ok = frame[frame["status"] == "ok"]
    best, wide = ["--top", "50% by aesthetic_score"], ["--where", "contains(kind, 'crop')"]
    crops = ok["kind"].str.contains("crop")
    first = ok.nlargest(len(ok) // 2, "aesthetic_score")
    expected = {
        "top, where": (best + wide, first[first["kind"].str.contains("crop")]),
        "where, top": (wide + best, ok[crops].nlargest(crops.sum() // 2, "aesthetic_score")),
    }
    assert {*expected["top, where"][1]["key"]} != {*expected["where, top"][1]["key"]}
    for name, (options, kept) in expected.items():
        out = tmp_path / name
        done = CliRunner().invoke(cli, ["select", str(scores), *options, "--out", str(out)])
        assert done.exit_code == 0, done.output
        found = pd.concat(pd.read_parquet(path) for path in out.glob("*.parquet"))
        assert {*found["key"]} == {*kept["key"]}, name


def test_curate_with_steps_that_rank(samples: Path, tmp_path: Path) -> None:
    """As score, select and write one after another."""
    steps = ["--top", "60% by aesthetic_score", "--where", "width >= 100", "--sample", "9 seed 2"]
    common = ["--model", "starter", "--column", "kind", "--n-workers", "1"]
    done = run("curate", str(samples), "--out", str(tmp_path / "run"), *steps, *common)
    assert done.returncode == 0, done.stderr
    assert "dropped by top 60% by aesthetic_score" in done.stdout
    selected = CliRunner().invoke(
        cli, ["select", str(tmp_path / "run/scores"), *steps, "--out", str(tmp_path / "selected")]
    )
    assert selected.exit_code == 0, selected.output
    written = CliRunner().invoke(cli, ["write", str(tmp_path / "selected"), "--out", str(tmp_path / "shards")])
    assert written.exit_code == 0, written.output
    assert (tmp_path / "shards/00000.tar").read_bytes() == (tmp_path / "run/shards/00000.tar").read_bytes()
    assert "top 60% by aesthetic_score" in (tmp_path / "run/report.html").read_text()
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["kept"] == 9
    assert record["arguments"]["steps"] == ["top 60% by aesthetic_score", "width >= 100", "sample 9 seed 2"]
    wrong = run("curate", str(samples), "--out", str(tmp_path / "no"), "--top", "3 by beauty", *common)
    assert (wrong.returncode, "no column 'beauty'" in wrong.stderr) == (2, True)
    assert not (tmp_path / "no").exists()


def test_cheap_commands_import_no_torch(scores: Path, tmp_path: Path) -> None:
    for command in (
        ["select", str(scores), "--min-aesthetic", "5", "--out", str(tmp_path / "selected")],
        ["report", str(scores), "--out", str(tmp_path / "look.html")],
        ["export", str(scores), "--format", "list", "--out", str(tmp_path / "keys.txt")],
    ):
        code = (
            "import sys; from dask_imgcurator.cli.main import cli\n"
            f"cli({command}, standalone_mode=False)\n"
            "print(sorted({'torch', 'open_clip', 'transformers', 'faiss'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("[]\n"), command


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sel", "select"),
        ("", "curate"),
        ("select --ove", "--overwrite"),
        ("export --format dat", "datacomp"),
        ("curate --dedup ", "exact"),
    ],
)
def test_a_shell_completes_commands_and_options(words: str, expected: str) -> None:
    line = f"dask-imgcurator {words}"
    shell = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = run(env={**os.environ, **shell, "_DASK_IMGCURATOR_COMPLETE": "bash_complete"})
    assert (done.returncode, done.stderr) == (0, "")
    assert f"plain,{expected}" in done.stdout.splitlines()


def test_the_summary_says_each_status_on_a_line_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dask_imgcurator.cli import summary
    from dask_imgcurator.results import RunResult

    monkeypatch.setenv("COLUMNS", "80")
    summary.print_run(RunResult("out", samples=50_000, by_status=dict.fromkeys(STATUSES, 10_000)))
    lines = capsys.readouterr().out.splitlines()
    for status, meaning in STATUSES.items():
        if status != "ok":
            assert sum(f"{status}: {meaning} " in line and "10,000" in line for line in lines) == 1, lines
