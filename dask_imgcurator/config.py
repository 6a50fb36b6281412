"""Settings: this library's defaults under Dask's own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import dask.config
import yaml

_DEFAULTS = Path(__file__).with_name("imgcurator.yaml")


def _load_defaults() -> None:
    defaults = yaml.safe_load(_DEFAULTS.read_text())
    dask.config.update_defaults(defaults)


_load_defaults()


def get(name: str, override: Any = None) -> Any:
    """Return `override` unless it is None, else the setting ``imgcurator.NAME``."""
    if override is not None:
        return override
    return dask.config.get(f"imgcurator.{name}")
