"""Curate image datasets with Dask: a shard is a partition, an image is a row, curation is a DataFrame query.

Importing this package loads next to nothing, not even Dask: each public name is imported on first use (``__init__.pyi``
says from where).
"""

import sys as _sys

import lazy_loader as _lazy

_public, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("dask-imgcurator")
    return _public(name)


if "dask" in _sys.modules:  # otherwise with the first module that reads a setting
    from . import config as _config  # noqa: F401  (registers the defaults)
