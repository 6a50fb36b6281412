"""The documentation site builds without a warning, is complete, and says nothing that is not so."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pandas as pd
import pytest

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import make_sample_shards
from dask_imgcurator.cli.main import cli
from dask_imgcurator.schema import COLUMNS, STATUSES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
QUICKSTART = DOCS / "quickstart.md"

_NEEDED = ("sphinx", "myst_parser", "numpydoc", "sphinx_click", "furo")
needs_sphinx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in _NEEDED), reason="the docs extra is missing"
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- pages as they are built ----------------------------------------------------------------------


@dataclass
class Page(HTMLParser):
    """What the checks want to know of a page."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Page:
        page = cls()
        page.feed(path.read_text(encoding="utf-8"))
        return page

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag != "a":
            for name in ("src", "href", "srcset", "data", "poster"):
                if given.get(name):
                    self.loaded.append(given[name])


def broken_links(folder: Path) -> list[str]:
    """Links within a folder of pages that lead nowhere."""
    pages = {path: Page.read(path) for path in folder.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = target.exists() and (
                not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].ids
            )
            if not found:
                broken.append(f"{path.relative_to(folder)}: {link}")
    return broken


def loaded_from_outside(folder: Path) -> list[str]:
    """What pages and style sheets load from elsewhere."""
    found = []
    for path in folder.rglob("*.html"):
        page = Page.read(path)
        found += [f"{path.relative_to(folder)}: {url}" for url in page.loaded if re.match(r"(https?:)?//", url)]
    for path in folder.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        outside = re.findall(r"(?:url\(|@import)\s*['\"]?\s*(?:https?:)?//[^'\")\s]*", text)
        found += [f"{path.relative_to(folder)}: {url}" for url in outside]
    return found


def test_the_checks_of_pages_see_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="#top"></a><a href="#gone"></a><a href="b.html#x"></a><a href="b.html#y"></a>'
        '<a href="c.html"></a><a href="https://example.org"></a><img src="//cdn.example/x.png"><script src="b.js">'
    )
    (tmp_path / "b.html").write_text('<p id="x"></p><link rel="stylesheet" href="https://example.org/x.css">')
    (tmp_path / "s.css").write_text("@import 'https://example.org/y.css'; p { background: url(data:x) }")
    assert broken_links(tmp_path) == ["a.html: #gone", "a.html: b.html#y", "a.html: c.html"]
    outside = loaded_from_outside(tmp_path)
    assert len(outside) == 3
    assert {line.partition(":")[0] for line in outside} == {"a.html", "b.html", "s.css"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of Sphinx is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-E"]
    command += ["-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@needs_sphinx
def test_the_build_leaves_nothing_in_the_sources(site: Path) -> None:
    kinds = {
        path.suffix for path in DOCS.rglob("*") if path.is_file() and not {"_build", "__pycache__"} & set(path.parts)
    }
    assert kinds == {".md", ".py", ".png"}
    assert len(list(site.rglob("*.html"))) >= len(PAGES)


@needs_sphinx
def test_every_name_command_option_column_and_status_has_an_entry(site: Path) -> None:
    reference = site / "reference"
    names = Page.read(reference / "python.html").ids
    assert [name for name in dic.__all__ if f"dask_imgcurator.{name}" not in names] == []

    anchors = Page.read(reference / "command_line.html").ids
    assert [name for name in cli.commands if f"dask-imgcurator-{name}" not in anchors] == []
    options = [
        (name, option.opts[-1])
        for name, command in cli.commands.items()
        for option in command.params
        if isinstance(option, click.Option)
    ]
    assert len(options) > 50
    missing = [
        (name, option)
        for name, option in options
        if f"cmdoption-dask-imgcurator-{name}-{option.lstrip('-')}" not in anchors
    ]
    assert missing == []

    table = Page.read(reference / "columns.html").ids
    assert [name for name in COLUMNS if f"column-{name.replace('_', '-')}" not in table] == []
    assert [name for name in STATUSES if f"status-{name.replace('_', '-')}" not in table] == []


@needs_sphinx
def test_no_link_is_broken_and_nothing_is_loaded_from_outside(site: Path) -> None:
    assert broken_links(site) == []
    assert loaded_from_outside(site) == []


@needs_sphinx
def test_every_mark_was_filled_in(site: Path) -> None:
    left = [path.name for path in site.rglob("*.html") if "generated:" in path.read_text(encoding="utf-8")]
    assert left == []


# --- what the pages tell people to type -----------------------------------------------------------

_SHELLS = ("sh", "bash", "shell", "console")


def blocks(path: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """Line and text of the fenced blocks of some languages."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            yield text.count("\n", 0, match.start()) + 2, match[2]


def command_lines(text: str) -> Iterator[list[str]]:
    """Arguments of each ``dask-imgcurator`` (or ``dask imgcurator``) of a shell block."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                starts = [at for at, w in enumerate(words) if w.rpartition("/")[2] == "dask-imgcurator"]
                starts += [at + 1 for at in range(len(words) - 1) if words[at : at + 2] == ["dask", "imgcurator"]]
                yield from (words[at + 1 :] for at in starts)
                words = []
            else:
                words.append(word)


def check(arguments: list[str]) -> None:
    """Parse a command line as click does, without running anything."""
    name, *rest = arguments
    if name not in cli.commands:
        raise click.UsageError(f"no command {name!r}")
    with cli.commands[name].make_context(name, list(rest)):
        pass


def test_the_check_of_command_lines_sees_what_is_wrong() -> None:
    text = "A=1 dask-imgcurator verify x # --no\n"
    text += ".venv/bin/dask-imgcurator select a \\\n  --out b && dask imgcurator doctor\n"
    assert list(command_lines(text)) == [["verify", "x"], ["select", "a", "--out", "b"], ["doctor"]]
    check(["select", "a", "--out", "b", "--top", "30% by clip_score"])
    for wrong in (["selekt", "a"], ["select", "a", "--out", "b", "--bottom", "3"], ["select", "a"]):
        with pytest.raises(click.UsageError):
            check(wrong)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=name_of)
def test_command_lines_are_those_of_the_commands(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in.json", "out.json", "ca.pem", "client.pem", "client.key"):  # which options read when parsed
        Path(name).write_text("{}")
    wrong = []
    for number, text in blocks(path, *_SHELLS):
        for arguments in command_lines(text):
            try:
                check(arguments)
            except click.ClickException as err:
                wrong.append(
                    f"{name_of(path)}, block in line {number}: {shlex.join(arguments)}: {err.format_message()}"
                )
    assert wrong == []


def test_the_pages_show_every_command() -> None:
    shown = {arguments[0] for path in PAGES for _, text in blocks(path, *_SHELLS) for arguments in command_lines(text)}
    assert set(cli.commands) - shown == set()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_python_compiles_and_uses_names_that_exist(path: Path) -> None:
    wrong = []
    for number, text in blocks(path, "python", "py"):
        compile(text, f"{name_of(path)}, block in line {number}", "exec")
        wrong += [name for name in re.findall(r"\bdic\.(\w+)", text) if name not in dic.__all__]
    inline = re.findall(r"`dic\.(\w+)", path.read_text(encoding="utf-8"))
    assert [name for name in [*wrong, *inline] if name not in dic.__all__] == []


def test_settings_that_pages_name_exist() -> None:
    import yaml

    known = set(yaml.safe_load((ROOT / "dask_imgcurator" / "imgcurator.yaml").read_text())["imgcurator"])
    named = {
        found for path in PAGES for found in re.findall(r"`imgcurator\.([a-z-]+)", path.read_text(encoding="utf-8"))
    }
    variables = {
        found.lower().replace("_", "-")
        for path in PAGES
        for found in re.findall(r"DASK_IMGCURATOR__([A-Z_]+)", path.read_text(encoding="utf-8"))
    }
    assert named
    assert variables
    assert (named | variables) - known == set()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="the demo extra is missing")
def test_the_quickstart_runs(tmp_path: Path) -> None:
    """Every block of the page, one after the other, as a reader would run them."""
    text = QUICKSTART.read_text(encoding="utf-8")
    found = re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) >= 10
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for number, (language, code) in enumerate(found):
        if language == "python":
            (tmp_path / f"block{number}.py").write_text(code, encoding="utf-8")
            command = [sys.executable, f"block{number}.py"]
        else:
            command = ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    for name in ("demo/report.html", "run/scores.html", "run/groups.parquet", "run/shards/00000.tar"):
        assert (tmp_path / name).stat().st_size > 1000
    # Both ways lead to the same shard.
    one, other = (tmp_path / "run" / folder / "00000.tar" for folder in ("shards", "shards-py"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="the demo extra is missing")
def test_the_scripts_of_the_slurm_array_run(tmp_path: Path) -> None:
    """As Slurm would start them: each job of the array, then the other script; the table is that of one run."""
    scripts = [code for _, code in blocks(DOCS / "howto/slurm.md", "bash") if code.startswith("#!")]
    array, then = (code for code in scripts if "srun" not in code)
    assert "#SBATCH --array" in array and "#SBATCH --array" not in then
    shards = make_sample_shards(tmp_path / "shards", count=72, per_shard=24).shards
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    starter = re.sub(r"--model \S+ --pretrained \S+", "--model starter", array)
    jobs = [(starter, {"SLURM_ARRAY_TASK_ID": f"{i}", "SLURM_ARRAY_TASK_COUNT": "2"}) for i in (0, 1)]
    for code, env in [*jobs, (then, {})]:
        subprocess.run(["bash", "-c", code], cwd=tmp_path, env={**os.environ, **env}, check=True, timeout=300)
    found = dic.read_scores(tmp_path / "run/scores", backend="pandas").compute()
    with dic.start_client(n_workers=1) as client:
        dic.score_shards([str(shard) for shard in shards], tmp_path / "whole", model="starter", client=client)
    pd.testing.assert_frame_equal(found, dic.read_scores(tmp_path / "whole", backend="pandas").compute())
    kept = found[(found["status"] == "ok") & (found["aesthetic_score"] >= 5)]
    with tarfile.open(tmp_path / "run/shards/00000.tar") as tar:
        assert [n.partition(".")[0] for n in tar.getnames() if n.endswith(".txt")] == kept["key"].tolist()
