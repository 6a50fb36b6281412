"""Markdown, as the generators write it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Make a table; cells are Markdown."""
    lines = [list(header)]
    lines.append(["---"] * len(lines[0]))
    lines += [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Text of the code as Markdown: code marks are meant, everything else is plain."""
    return re.sub(r"([\\*_<>#\[\]])", r"\\\1", text) if "`" not in text else text
