"""The one seam between CPU and GPU: frame, devices, cluster. All other code is written against `Backend`.

A frame's type decides which backend serves a call; a name decides only where no frame exists yet (`read_webdataset`,
`start_client`).
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import dask
import numpy as np
import pyarrow as pa

from .. import config

if TYPE_CHECKING:
    import torch


class BackendError(RuntimeError):
    """The requested backend cannot work here."""


class Backend(Protocol):
    """What differs between pandas on a CPU and cuDF on a GPU."""

    name: str
    device: str
    decoder_device: str
    decoders: int
    overlaps: bool

    def from_arrow(self, table: pa.Table) -> Any:
        """Make a frame with this library's dtypes from an Arrow table."""
        ...

    def to_arrow(self, frame: Any) -> pa.Table:
        """Copy a frame into an Arrow table in host memory."""
        ...

    def to_host(self, frame: Any, columns: list[str]) -> pa.Table:
        """Copy a few columns (usually locators) into host memory."""
        ...

    def matrix_column(self, values: torch.Tensor, rows: np.ndarray, index: Any) -> Any:
        """Make a ``list<float32>`` column with the rows of a (m, d) tensor at the given rows, null elsewhere."""
        ...

    def matrix(self, column: Any) -> tuple[torch.Tensor, np.ndarray]:
        """Return a list column's non-null rows as a (m, d) float32 tensor on `device`, and their row numbers."""
        # A null within a vector becomes NaN. TypeError if these are not vectors of numbers; ValueError if lengths
        # differ.
        ...

    def float_column(self, values: torch.Tensor, rows: np.ndarray, index: Any) -> Any:
        """Make a float32 column with the values of a (m,) tensor at the given rows, null elsewhere and for NaN."""
        ...

    def kmeans(self, values: torch.Tensor, n_cells: int, seed: int) -> np.ndarray:
        """Return the (n_cells, d) float32 centroids of k-means on a (m, d) float32 tensor on `device`."""
        ...

    def make_cluster(self, n_workers: int | None, **kwargs: Any) -> Any:
        """Start a Dask cluster of processes on this machine."""
        ...


@cache
def gpu_problem() -> str | None:
    """Say why the GPU path cannot be used here and how to fix it; None if it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    visible = torch.cuda.is_available()
    seen = "a CUDA card is visible, but" if visible else "torch sees no CUDA device"
    remedy = f'pip install "dask-imgcurator[cu{(torch.version.cuda or "13").partition(".")[0]}]"'
    modules = "cudf", "dask_cudf", "dask_cuda", "nvidia.dali"
    if missing := next((module for module in modules if not _installed(module)), None):
        return f"{seen}{'' if visible else ', and'} {missing} is not installed: {remedy}"
    for module in modules if visible else ():
        try:
            importlib.import_module(module)
        except Exception as err:  # even a dependency that is one release too new
            return f"{seen} {module} cannot be imported ({type(err).__name__}: {err}): {remedy} brings one that fits"
    return None if visible else seen


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def resolve_name(name: str | None = None) -> str:
    """Resolve a name, ``auto`` or None (the setting) to ``"pandas"`` or ``"cudf"``; BackendError if unusable."""
    # On ``auto``, Dask's own `dataframe.backend` counts if it says cudf.
    name = config.get("backend", name)
    if name not in ("auto", "pandas", "cudf"):
        raise ValueError(f"unknown backend {name!r}: use auto, pandas or cudf")
    if name == "auto" and dask.config.get("dataframe.backend", None) == "cudf":
        name = "cudf"
    if name == "pandas":
        return name
    problem = gpu_problem()
    if problem is None:
        return "cudf"
    if name == "cudf":
        raise BackendError(f"backend 'cudf' cannot be used here: {problem}. Or use backend='pandas'.")
    if "visible, but" in problem:
        # A silent fallback would leave a GPU idle unnoticed.
        warnings.warn(f"using the CPU: {problem}", stacklevel=2)
    return "pandas"


def get_backend(name: str) -> Backend:
    """Return the backend of a resolved name."""
    if name == "pandas":
        from .pandas import PandasBackend

        return PandasBackend()
    if name == "cudf":
        from .cudf import CudfBackend

        return CudfBackend()
    raise ValueError(f"unknown backend {name!r}: use pandas or cudf")


def empty_frame(name: str, schema: pa.Schema) -> Any:
    """Make the ``meta`` of a graph whose partitions are of a backend."""
    # cuDF cannot make columns in a process without a GPU. If only the workers have GPUs, pandas describes the columns.
    here = name if name == "pandas" or gpu_problem() is None else "pandas"
    return get_backend(here).from_arrow(schema.empty_table())


def is_dask(frame: Any) -> bool:
    """Whether a frame is a Dask collection."""
    return dask.is_dask_collection(frame)


def backend_of(frame: Any) -> Backend:
    """Return the backend of a frame or column (pandas, cuDF, or Dask over either); TypeError for anything else."""
    found = frame
    if is_dask(frame):
        import dask.dataframe as dd
        from dask.dataframe.utils import make_meta

        found = make_meta(frame) if isinstance(frame, dd.DataFrame | dd.Series) else frame
    for kind in type(found).__mro__:  # subclasses count
        module = kind.__module__.partition(".")[0]
        if module in ("pandas", "cudf") and kind.__name__ in ("DataFrame", "Series"):
            return get_backend(module)
    raise TypeError(f"expected a Dask, pandas or cuDF frame, got {type(frame).__module__}.{type(frame).__qualname__}")
