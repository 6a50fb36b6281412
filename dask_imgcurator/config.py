"""Settings: this library's defaults under Dask's own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import dask.config
import yaml

_DEFAULTS = yaml.safe_load(Path(__file__).with_name("imgcurator.yaml").read_text())

dask.config.update_defaults(_DEFAULTS)


def get(name: str, override: Any = None) -> Any:
    """Return `override` unless it is None, else the setting ``imgcurator.NAME``."""
    if override is not None:
        return override
    # If they were registered within a `dask.config.set`, its end has removed them.
    return dask.config.get(f"imgcurator.{name}", _DEFAULTS["imgcurator"][name])
