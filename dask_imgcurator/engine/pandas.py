"""The CPU half of the seam: pandas frames, host tensors, a LocalCluster of processes."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa

from ..schema import COLUMNS, is_list, is_ours, plain_type

if TYPE_CHECKING:
    import torch


@pd.api.extensions.register_extension_dtype
class _ListDtype(pd.api.extensions.ExtensionDtype):
    """Lets pandas resolve the dtype of Arrow lists by name, as Parquet files and Dask's shuffles write it."""

    type, name = list, "list"

    @classmethod
    def construct_from_string(cls, string: str) -> Any:
        match = re.fullmatch(r"((?:list<\w+: )+)(\w+)(>+)\[pyarrow\]", string)
        if match is None:
            raise TypeError(f"{string!r} is not an Arrow list")
        type_ = pa.type_for_alias(match[2])
        for _ in match[3]:
            type_ = pa.list_(type_)
        return pd.ArrowDtype(type_)


def _pandas_dtype(field: pa.Field) -> Any:
    """Dtype of a column, chosen so that null stays null and numbers keep their width."""
    type_ = field.type
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return pd.StringDtype("pyarrow")
    if field.nullable and (pa.types.is_integer(type_) or pa.types.is_boolean(type_)):
        return pd.ArrowDtype(type_)  # Dask's quantiles accept these, but not pandas' nullable types
    if any(getattr(pa.types, f"is_{kind}")(type_) for kind in ("nested", "decimal", "date", "time", "binary")):
        return pd.ArrowDtype(plain_type(type_))  # otherwise objects, which Dask converts to text
    return None


def from_arrow(table: pa.Table) -> pd.DataFrame:
    """Make a pandas frame; a field's nullability decides between ``int32`` and ``int32[pyarrow]``."""
    columns = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        dtype = _pandas_dtype(field)
        mapper = (lambda _type, d=dtype: d) if dtype is not None else None
        columns[field.name] = column.to_pandas(types_mapper=mapper)
    frame = pd.DataFrame(columns, index=pd.RangeIndex(table.num_rows), copy=False)
    return frame[list(table.schema.names)]


def _arrow(column: pd.Series) -> pa.Array:
    """Any pandas column as one Arrow array; missing values become null."""
    array = pa.array(column, from_pandas=True)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    return array


def _holds_vectors(type_: pa.DataType) -> bool:
    return is_list(type_) and (pa.types.is_floating(type_.value_type) or pa.types.is_integer(type_.value_type))


class PandasBackend:
    """pandas frames and host memory."""

    name = "pandas"
    device = "cpu"
    decoder_device = "cpu"
    decoders = 1  # it uses all threads
    overlaps = False  # the encoder keeps all cores busy

    def from_arrow(self, table: pa.Table) -> pd.DataFrame:
        return from_arrow(table)

    def to_arrow(self, frame: pd.DataFrame) -> pa.Table:
        """See `Backend.to_arrow`; known columns get their type and nullability from the column table."""
        arrays, fields = [], []
        for name in frame.columns:
            array = _arrow(frame[name])
            if is_ours(name, array.type):
                known = COLUMNS[name]
                array = array.cast(known.type)
                fields.append(pa.field(name, known.type, nullable=known.nullable))
            else:
                if pa.types.is_large_string(array.type):
                    array = array.cast(pa.string())
                fields.append(pa.field(name, array.type))
            arrays.append(array)
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def to_host(self, frame: pd.DataFrame, columns: list[str]) -> pa.Table:
        return self.to_arrow(frame[columns])

    def matrix_column(self, values: torch.Tensor, rows: np.ndarray, index: pd.Index) -> pd.Series:
        n, width = len(index), values.shape[1]
        data = np.ascontiguousarray(values.float().numpy())  # NumPy has no bfloat16
        present = np.zeros(n, bool)
        present[rows] = True
        order = np.argsort(rows, kind="stable")
        if len(order) and not np.array_equal(order, np.arange(len(order))):
            data = data[order]
        offsets = np.zeros(n + 1, np.int64)
        np.cumsum(present * width, out=offsets[1:])
        array = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()),  # raises if a partition is too large for it
            pa.array(data.reshape(-1)),
            mask=pa.array(~present) if not present.all() else None,
        )
        return pd.Series(pd.array(array, dtype=pd.ArrowDtype(array.type)), index=index)

    def matrix(self, column: pd.Series) -> tuple[torch.Tensor, np.ndarray]:
        import torch

        try:
            array = _arrow(column)
        except pa.ArrowException as err:  # objects of several kinds, or of one without an Arrow type
            raise TypeError(f"column {column.name!r} cannot be read as vectors of numbers: {err}") from err
        rows = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
        if not len(rows):
            # Whatever its type: a column of missing objects has none.
            return torch.empty((0, 0)), rows
        if not _holds_vectors(array.type):
            raise TypeError(
                f"column {column.name!r} holds {array.type}, not vectors of numbers: it cannot be an embedding"
            )
        array = array.drop_null()
        if pa.types.is_fixed_size_list(array.type):
            width = array.type.list_size
        else:
            lengths = np.unique(array.value_lengths().to_numpy())
            if len(lengths) != 1:
                raise ValueError(f"column {column.name!r} holds vectors of different lengths: {lengths.tolist()[:5]}")
            width = int(lengths[0])
        # A copy, because Arrow's memory must not be written to; a null within a vector becomes NaN.
        values = np.array(array.flatten().to_numpy(zero_copy_only=False), np.float32)
        return torch.from_numpy(values.reshape(len(rows), width)), rows

    def float_column(self, values: torch.Tensor, rows: np.ndarray, index: pd.Index) -> pd.Series:
        out = np.full(len(index), np.nan, np.float32)
        out[rows] = values.float().numpy()
        return pd.Series(out, index=index)

    def kmeans(self, values: torch.Tensor, n_cells: int, seed: int) -> np.ndarray:
        """See `Backend.kmeans`; by FAISS, on one thread, because with several, sums differ in their last digits."""
        try:
            faiss: Any = importlib.import_module("faiss")  # it has no type hints
        except ImportError as err:
            raise ModuleNotFoundError(
                f'k-means, for more than 20,000 rows, needs FAISS ({err}): pip install "dask-imgcurator[search]"'
            ) from err
        settings = faiss.ClusteringParameters()
        settings.niter, settings.seed = 10, seed
        # Use the whole sample, and do not warn if it is small.
        settings.min_points_per_centroid, settings.max_points_per_centroid = 1, len(values)
        # k-means++ by a Markov chain gives cells of similar size; with random rows, some are ten times larger than
        # others.
        settings.init_method = faiss.ClusteringInitMethod_AFK_MC2
        clustering = faiss.Clustering(values.shape[1], n_cells, settings)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            clustering.train(np.ascontiguousarray(values.numpy()), faiss.IndexFlatL2(values.shape[1]))
        finally:
            faiss.omp_set_num_threads(threads)
        return np.array(faiss.vector_float_to_array(clustering.centroids), np.float32).reshape(n_cells, -1)

    def make_cluster(self, n_workers: int | None = None, **kwargs: Any) -> Any:
        """See `Backend.make_cluster`; workers x threads = cores."""
        # One task at a time per worker: a task keeps all its threads busy (decoder and encoder).
        from dask.system import CPU_COUNT
        from distributed import LocalCluster
        from distributed.system import MEMORY_LIMIT

        if n_workers is None:
            # A process with torch, a model and its buffers needs a few GB; more workers would be killed.
            n_workers = max(1, min(CPU_COUNT, int(MEMORY_LIMIT // (4 << 30))))
        threads = str(max(1, CPU_COUNT // n_workers))
        # Dask's own default is one thread for BLAS and OpenMP in each worker.
        env = {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        env.update(kwargs.pop("env", {}))
        options: dict[str, Any] = {"threads_per_worker": 1, "processes": True, "env": env}
        options["dashboard_address"] = "127.0.0.1:0"  # the page shows data without a password
        # Dask makes workers return memory to the system at once. An encoder's buffers are then remapped for every
        # batch, which takes as long as the arithmetic; keeping them costs about 0.3 GB.
        keep = {"MALLOC_TRIM_THRESHOLD_": 1 << 30, "MALLOC_MMAP_THRESHOLD_": 32 << 20}
        name = "distributed.nanny.pre-spawn-environ"
        # Python 3.11 can deadlock in Dask's profiler (python/cpython#106883), which is not needed here.
        with dask.config.set(
            {name: {**dask.config.get(name, {}), **keep}, "distributed.worker.profile.enabled": False}
        ):
            return LocalCluster(n_workers=n_workers, **{**options, **kwargs})
