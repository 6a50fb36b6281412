"""What is written agrees with what is: docstrings, README, help texts. And no file tells where it was made."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import dask_imgcurator as dic
from dask_imgcurator.cli.main import cli
from dask_imgcurator.schema import COLUMNS

ROOT = Path(__file__).resolve().parents[1]


# --- docstrings -----------------------------------------------------------------------------------

SECTIONS = ("Parameters", "Returns", "Yields", "Raises", "Attributes", "Notes", "Examples", "See Also", "References")


def sections(doc: str) -> dict[str, list[str]]:
    """Split a numpydoc docstring at its underlined titles; what stands before the first has the title ''."""
    found: dict[str, list[str]] = {"": []}
    title = ""
    lines = inspect.cleandoc(doc).splitlines()
    for number, line in enumerate(lines):
        below = lines[number + 1] if number + 1 < len(lines) else ""
        if line and re.fullmatch("-+", below):
            title = line
            assert title not in found, f"section {title} stands twice"
            assert len(below) == len(line), f"section {title} is underlined by {len(below)} dashes"
            found[title] = []
        elif not re.fullmatch("-{3,}", line):
            found[title].append(line)
    return found


def entries(lines: list[str]) -> dict[str, str]:
    """Names and descriptions of a Parameters section; `a, b : type` gives two names."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        if line and not line.startswith(" "):
            names = [name.strip().lstrip("*") for name in line.partition(" :")[0].split(",")]
            found.update(dict.fromkeys(names, ""))
        else:
            for name in names:
                found[name] += line
    return found


def test_the_parser_sees_what_is_wrong() -> None:
    good = "One line.\n\n    Parameters\n    ----------\n    a, b : int\n        Two.\n    **rest\n        More.\n"
    assert entries(sections(good)["Parameters"]) == {"a": "    Two.", "b": "    Two.", "rest": "    More."}
    with pytest.raises(AssertionError, match="underlined"):
        sections("One line.\n\nReturns\n---\nint\n")


@pytest.mark.parametrize("name", dic.__all__)
def test_docstring_names_exactly_the_parameters(name: str) -> None:
    function = getattr(dic, name)
    doc = inspect.getdoc(function)
    assert doc, f"{name} has no docstring"
    found = sections(doc)
    assert not found.keys() - {"", *SECTIONS}, f"unknown sections in the docstring of {name}"
    assert found[""][0].endswith((".", ":")), "the first line is a sentence of its own"

    described = entries(found.get("Parameters", []))
    assert list(described) == list(inspect.signature(function).parameters)
    empty = [parameter for parameter, text in described.items() if not text.strip()]
    assert not empty, f"{name}: parameters without a description"
    assert "Returns" in found or "Yields" in found
    assert any(line.startswith("    ") for line in found.get("Returns", found.get("Yields", [])))


# --- README ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(text: str) -> Iterator[tuple[str, int, str]]:
    """Language, first line number and text of each fenced block."""
    language, start, block = None, 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            if language is None:
                language, start, block = line.strip("` ").split(" ")[0], number + 1, []
            else:
                yield language, start, inspect.cleandoc("\n".join(block))
                language = None
        elif language is not None:
            block.append(line)
    assert language is None, f"the block that begins in line {start} is never closed"


def test_readme_python_blocks_compile(readme: str) -> None:
    blocks = [(start, block) for language, start, block in fenced(readme) if language in ("python", "py")]
    assert blocks
    for start, block in blocks:
        compile(block, f"README.md, block in line {start}", "exec")


def test_readme_uses_names_that_exist(readme: str) -> None:
    blocks = "\n".join(block for language, _, block in fenced(readme) if language in ("python", "py"))
    used = set(re.findall(r"\bdic\.(\w+)", blocks))
    assert used
    assert not [name for name in used if not hasattr(dic, name)]


def test_readme_links_lead_somewhere(readme: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert len(targets) > 20
    assert not [target for target in targets if not (ROOT / target).is_file()]


# --- command line ---------------------------------------------------------------------------------


def commands(command: click.Command, path: str = "dask-imgcurator") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, f"{path} {name}")


@pytest.mark.parametrize(("path", "command"), list(commands(cli)), ids=lambda value: str(value))
def test_every_command_and_option_has_help(path: str, command: click.Command) -> None:
    assert command.help
    assert command.get_short_help_str(200).endswith("."), f"{path}: the first line of its help is a sentence"
    silent = [p.name for p in command.params if isinstance(p, click.Option) and not (p.help or "").strip()]
    assert not silent, f"{path}: options without help"


# --- generated tables -----------------------------------------------------------------------------


def test_generated_tables_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    import imgcurator_site as site

    pages = [ROOT / "README.md", *(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
    texts = {path.name: path.read_text(encoding="utf-8") for path in pages}
    outdated = [name for name, text in texts.items() if site.current(text) != text]
    assert not outdated, "run: python docs/_ext/imgcurator_site.py"
    # As GitHub shows it: a row for every column, and nothing that only Sphinx understands.
    for name in COLUMNS:
        assert f"\n| `{name}` | " in texts["columns.md"]
    assert [name for name, text in texts.items() if re.search(r"^\|.*(\{#|\]\(#dask)", text, re.MULTILINE)] == []
    assert site.current("<!-- generated: statuses -->\n\nold\n\n<!-- end -->\nrest") in (
        site.current("<!-- generated: statuses -->\nrest")
    )


# --- the repository -------------------------------------------------------------------------------

# Put together here, so that this file holds none of them.
FORBIDDEN = [
    ("/" + "work" + "/").encode(),
    ("/" + "tmp" + "/w/").encode(),
    *(
        f"{name}.{domain}".encode()
        for name, domain in [
            ("pypi", "org"),
            ("files.pythonhosted", "org"),
            ("registry.npmjs", "org"),
            ("deb.debian", "org"),
        ]
    ),
]


def test_no_file_names_this_machine_or_a_package_registry() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert Path(__file__) in paths
    found = [
        f"{path.relative_to(ROOT)}: {word.decode()}"
        for path in paths
        if path.is_file()
        for content in [path.read_bytes()]
        for word in FORBIDDEN
        if word in content
    ]
    assert not found


# --- benchmarks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["score.py", "parity.py"])
def test_benchmarks_tell_their_options(script: str) -> None:
    path = ROOT / "benchmarks" / script
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for option in ("SHARDS", "--model", "--pretrained", "--dtype", "--batch-size"):
        assert option in done.stdout
