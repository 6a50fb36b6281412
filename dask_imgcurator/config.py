"""Settings: this library's defaults under Dask's own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import dask.config
import yaml

__all__ = ["get"]

_DEFAULTS = Path(__file__).with_name("imgcurator.yaml")


def _load_defaults() -> None:
    defaults = yaml.safe_load(_DEFAULTS.read_text())
    dask.config.update_defaults(defaults)


_load_defaults()


def get(name: str, override: Any = None) -> Any:
    """Return a setting, unless the caller gave a value.

    Parameters
    ----------
    name : str
        Name below ``imgcurator``, for example ``"batch-size"``.
    override : object, optional
        What the caller passed; returned when it is not None.
    """
    if override is not None:
        return override
    return dask.config.get(f"imgcurator.{name}")
