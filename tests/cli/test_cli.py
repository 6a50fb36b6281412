"""The command line: exit codes, messages, summaries; run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from dask_imgcurator.checks.samples import make_sample_shards
from dask_imgcurator.cli.main import cli


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
    ("curate", "{samples}", "--out", "o", "--model", "starter", "--backend", "cudf"): "pip install",
    ("write", "/nowhere", "--out", "o"): "no score table at '/nowhere'",
    ("nonsense",): "No such command",
    ("--nonsense",): "No such option",
}


@pytest.mark.parametrize("arguments", WRONG, ids=lambda a: " ".join(a)[:60])
def test_wrong_usage_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...], samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dask_imgcurator.engine.backend import gpu_problem

    if "cudf" in arguments and gpu_problem() is None:
        pytest.skip("cudf works here")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, [a.format(samples=samples) for a in arguments])
    assert result.exit_code == 2, result.output
    assert WRONG[arguments] in result.stderr
    assert result.stderr.startswith("dask-imgcurator: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_doctor_names_what_would_be_used() -> None:
    result = CliRunner().invoke(cli, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for text in ("torch", "backend", "decoder", "starter model", "aesthetic-v2-l14"):
        assert text in result.stdout


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
