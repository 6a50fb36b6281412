"""Parts of the pages that are generated from the code, between ``<!-- generated: NAME -->`` and ``<!-- end -->``.

``python docs/_ext/imgcurator_site.py`` writes them into the pages, so that the pages can be read in the repository. The
site's build makes them again, with the anchors that only the site has. A test checks that the pages are current.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import site_commands
import site_python
import site_tables

DOCS = Path(__file__).resolve().parents[1]

#: Each function returns the Markdown of one mark.
MARKS = {**site_tables.MARKS, **site_python.MARKS, **site_commands.MARKS}

_MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$(?:.*?^<!-- end -->$)?", re.MULTILINE | re.DOTALL)


def current(page: str) -> str:
    """Return a page with what is generated in it brought up to date; what only Sphinx understands stays a mark."""

    def written(match: re.Match[str]) -> str:
        text = MARKS[match[1]]()
        if "```{eval-rst}" in text:
            return f"<!-- generated: {match[1]} -->"
        text = re.sub(r"\{#[\w-]+\}|^\([\w-]+\)=\n", "", text, flags=re.MULTILINE)  # anchors
        text = re.sub(r"\[([^]]*)\]\(#dask_imgcurator\.\w+\)", r"\1", text)
        return f"<!-- generated: {match[1]} -->\n\n{text}\n\n<!-- end -->"

    return _MARK.sub(written, page)


def _fill_in(app: Any, docname: str, source: list[str]) -> None:
    source[0] = _MARK.sub(lambda match: MARKS[match[1]](), source[0])


def setup(app: Any) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("source-read", _fill_in)
    app.connect("sphinx-click-process-description", site_commands.plain_help)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    for path in [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]:
        if "_build" not in path.parts:
            path.write_text(current(path.read_text(encoding="utf-8")), encoding="utf-8")
