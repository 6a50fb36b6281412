"""What folders hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def contents(folder: Path) -> dict[str, Any]:
    """Every file that is a result, and of Parquet files what they hold wherever their folder lies: rows name it."""

    def table(path: Path) -> str:
        found = pq.read_table(path)
        return f"{found.schema.metadata} {found.schema.remove_metadata()} {found.to_pylist()}".replace(str(folder), "")

    found = tree(folder) | {str(path.relative_to(folder)): table(path) for path in folder.rglob("*.parquet")}
    return {name: held for name, held in found.items() if not Path(name).name.startswith(".")}
