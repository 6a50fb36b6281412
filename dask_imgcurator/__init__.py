"""Curate image datasets with Dask: a shard is a partition, an image is a row, curation is a DataFrame query.

Importing this package loads next to nothing: each public name is imported on first use (``__init__.pyi`` says from
where).
"""

from importlib.metadata import version as _version

import lazy_loader as _lazy

from . import config as _config  # noqa: F401  (registers the defaults)

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)

__version__ = _version("dask-imgcurator")
