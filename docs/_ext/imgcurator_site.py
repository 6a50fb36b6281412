"""What the pages say of the code, made from the code: ``<!-- generated: NAME -->`` in a page becomes Markdown.

Each function of a generator's `MARKS` returns the Markdown of one such mark. Nothing is written into the sources.
"""

from __future__ import annotations

import re
from typing import Any

import site_commands
import site_python
import site_tables

MARKS = {**site_tables.MARKS, **site_python.MARKS, **site_commands.MARKS}

_MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)


def _fill_in(app: Any, docname: str, source: list[str]) -> None:
    source[0] = _MARK.sub(lambda match: MARKS[match[1]](), source[0])


def setup(app: Any) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("source-read", _fill_in)
    app.connect("sphinx-click-process-description", site_commands.plain_help)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
