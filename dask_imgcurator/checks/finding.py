"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `problem`: the main job does not work; `note`: something is left out."""

    topic: str
    value: str
    state: Literal["ok", "note", "problem"] = "ok"
    remedy: str = ""


def version_of(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
