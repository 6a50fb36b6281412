"""The GPU half of the seam: cuDF frames, device tensors, LocalCUDACluster. The only module that imports RAPIDS.

Written for RAPIDS 26.10. torch, CuPy, RMM and pylibcudf (without CUDF_PER_THREAD_STREAM) all queue on the legacy
default stream, from any thread, so they run in order. That matters because pylibcudf reads a tensor through its
``__cuda_array_interface__`` and ignores the stream in it. Only DALI has its own streams; see `decode.Decoder`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cudf
import cupy
import dask
import numpy as np
import pyarrow as pa
import pylibcudf as plc

from ..schema import COLUMNS, is_ours, plain_type

if TYPE_CHECKING:
    import torch


def arrow_field(field: pa.Field, dtype: Any) -> pa.Field:
    """Arrow field for a column with a given dtype, based on cuDF's own field."""
    # cuDF reports no element type if all lists are null or empty.
    type_ = plain_type(dtype.to_arrow()) if isinstance(dtype, cudf.ListDtype) else field.type
    if is_ours(field.name, type_):
        known = COLUMNS[field.name]
        return pa.field(known.name, known.type, nullable=known.nullable)
    return pa.field(field.name, type_)


def holds_vectors(dtype: Any) -> bool:
    """Whether a column of a dtype holds lists of numbers."""
    return isinstance(dtype, cudf.ListDtype) and getattr(dtype.element_type, "kind", None) in ("f", "i", "u")


class CudfBackend:
    """cuDF frames and device memory."""

    name = "cudf"
    device = "cuda"
    decoder_device = "mixed"
    # While one batch is on the GPU, the next one's headers are read and its JPEGs' Huffman codes decoded.
    decoders = 2
    # The GPU would wait while a shard is indexed and written. Meanwhile, three decoded batches of the next take 0.9 GB.
    overlaps = True

    def from_arrow(self, table: pa.Table) -> Any:
        return cudf.DataFrame.from_arrow(table.replace_schema_metadata(None))

    def to_arrow(self, frame: Any) -> pa.Table:
        table = frame.to_arrow(preserve_index=False).replace_schema_metadata(None)
        return table.cast(pa.schema([arrow_field(f, frame.dtypes[f.name]) for f in table.schema]))

    def to_host(self, frame: Any, columns: list[str]) -> pa.Table:
        return self.to_arrow(frame[columns])

    def matrix_column(self, values: torch.Tensor, rows: np.ndarray, index: Any) -> Any:
        """See `Backend.matrix_column`; the tensor's memory becomes the column's."""
        if not len(rows):
            empty = pa.nulls(len(index), pa.list_(pa.float32()))
            return self._series(cudf.Series.from_arrow(empty), index)
        column = plc.Column.from_cuda_array_interface(values.float().contiguous())
        return self._spread(column, rows, index)

    def matrix(self, column: Any) -> tuple[torch.Tensor, np.ndarray]:
        """See `Backend.matrix`; the column's memory becomes the tensor's."""
        import torch

        # Only row numbers reach the host, and only if rows are missing.
        if column.null_count == 0:
            rows = np.arange(len(column))
        else:
            present = column.notna()
            rows = cupy.asnumpy(cupy.flatnonzero(present.values))
        if not len(rows):
            return torch.empty((0, 0), device=self.device), rows
        if not holds_vectors(column.dtype):
            raise TypeError(
                f"column {column.name!r} holds {column.dtype}, not vectors of numbers: it cannot be an embedding"
            )
        if len(rows) < len(column):
            column = column[present]
        lengths = column.list.len()
        if int(lengths.min()) != int(lengths.max()):
            found = f"{int(lengths.min())} to {int(lengths.max())}"
            raise ValueError(f"column {column.name!r} holds vectors of different lengths: {found}")
        leaves = column.list.leaves
        if leaves.null_count:
            leaves = leaves.astype("float32").fillna(float("nan"))
        values = torch.utils.dlpack.from_dlpack(leaves.values)
        return values.float().reshape(len(rows), int(lengths.min())), rows

    def float_column(self, values: torch.Tensor, rows: np.ndarray, index: Any) -> Any:
        if not len(rows):
            return self._series(cudf.Series.from_arrow(pa.nulls(len(index), pa.float32())), index)
        column = plc.Column.from_cuda_array_interface(values.float().contiguous())
        # As in pandas: a NaN score is null.
        return self._spread(column, rows, index).nans_to_nulls()

    @staticmethod
    def _series(series: Any, index: Any) -> Any:
        series.index = index
        return series

    def _spread(self, column: Any, rows: np.ndarray, index: Any) -> Any:
        """Put row i of a column at `rows[i]` of a longer one; the rest is null."""
        n = len(index)
        if len(rows) != n or not np.array_equal(rows, np.arange(n)):
            # A gather yields null where its map points outside the source.
            take = np.full(n, len(rows), np.int32)
            take[rows] = np.arange(len(rows), dtype=np.int32)
            taken = plc.copying.gather(
                plc.Table([column]),
                plc.Column.from_array(take),
                plc.copying.OutOfBoundsPolicy.NULLIFY,
            )
            (column,) = taken.columns()
        return cudf.Series.from_pylibcudf(column, metadata={"name": None, "index": index})

    def kmeans(self, values: torch.Tensor, n_cells: int, seed: int) -> np.ndarray:
        """See `Backend.kmeans`; cuVS's, hierarchical and balanced, without a seed."""
        import torch

        try:
            from cuvs.cluster import kmeans
        except ImportError as err:
            cuda = (torch.version.cuda or "13").partition(".")[0]
            raise ModuleNotFoundError(
                f'k-means, for more than 20,000 rows, needs cuVS ({err}): pip install "dask-imgcurator[cu{cuda}]"'
            ) from err
        torch.cuda.synchronize()  # cuVS may use its own stream
        settings = kmeans.KMeansParams(n_clusters=n_cells, hierarchical=True, hierarchical_n_iters=20)
        centroids = kmeans.fit(settings, values.contiguous())[0]
        return cupy.asnumpy(cupy.asarray(centroids))

    def make_cluster(self, n_workers: int | None = None, **kwargs: Any) -> Any:
        """See `Backend.make_cluster`: one worker process per GPU, sharing the cores; `kwargs` override the settings."""
        import torch
        from dask.system import CPU_COUNT
        from dask_cuda import LocalCUDACluster

        options: dict[str, Any] = {"threads_per_worker": 1}
        if not {"rmm_async", "rmm_pool_size", "rmm_managed_memory"} & kwargs.keys():
            # The driver's pool for cuDF and CuPy; torch and DALI have their own. A shard's frame is small.
            options |= {"rmm_async": True, "rmm_allocator_external_lib_list": ["cupy"]}
        options["dashboard_address"] = "127.0.0.1:0"
        workers = n_workers or max(1, torch.cuda.device_count())
        # Dask's own default is one thread, also for DALI's pipeline. LocalCUDACluster overwrites `env=`, so the
        # variables are set this way.
        threads = str(max(1, CPU_COUNT // workers))
        env = {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        name = "distributed.nanny.pre-spawn-environ"
        with dask.config.set({name: {**dask.config.get(name, {}), **env, **kwargs.pop("env", {})}}):
            return LocalCUDACluster(n_workers=n_workers, **{**options, **kwargs})
