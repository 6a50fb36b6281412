"""Score files of made-up rows, for benchmarks of what comes after the scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dask_imgcurator.schema import COLUMNS, arrow_schema
from dask_imgcurator.steps.score_table import write_score_file

ROWS = 10_000  # a file
WIDTH = 512


def write_file(folder: Path, part: int, rows: int, vectors: np.ndarray | None = None) -> None:
    """Write the score file of one shard; 2 % of its images failed, and have no embedding."""
    rng = np.random.default_rng([7, part])
    failed = rng.random(rows) < 0.02
    offsets = np.arange(rows) * 65536

    def number(values: Any, type_: pa.DataType) -> pa.Array:
        return pa.array(values, mask=failed).cast(type_)

    digits = rng.bytes(32 * rows).hex()
    columns = {
        "key": [f"{part:05d}{i:05d}" for i in range(rows)],
        "shard": [f"s3://bucket/set/{part:05d}.tar"] * rows,
        "offset": offsets + 512,
        "nbytes": rng.integers(10_000, 60_000, rows),
        "sample_offset": offsets,
        "sample_nbytes": np.full(rows, 65536),
        "ext": ["jpg"] * rows,
        "caption": [f"picture {i} of shard {part} shows something that takes sixty characters" for i in range(rows)],
        "status": np.where(failed, "decode_error", "ok"),
        "error_message": pa.array(np.where(failed, "the data end early", ""), mask=~failed),
        "width": number(rng.choice([256, 384, 512, 640, 1024], rows), pa.int32()),
        "height": number(rng.choice([256, 384, 512, 640, 1024], rows), pa.int32()),
        "sha256": [digits[i : i + 64] for i in range(0, 64 * rows, 64)],
        "aesthetic_score": number(rng.normal(5, 0.8, rows), pa.float32()),
        "nsfw_score": number(rng.beta(0.3, 4, rows), pa.float32()),
        "clip_score": number(rng.normal(0.28, 0.05, rows), pa.float32()),
    }
    if vectors is not None:
        lengths = np.where(failed, 0, vectors.shape[1])
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        flat = pa.array(vectors[~failed].reshape(-1))
        columns["embedding"] = pa.ListArray.from_arrays(offsets, flat, mask=pa.array(failed))
    names = [name for name in COLUMNS if name in columns]
    arrays = [
        pa.array(columns[name], COLUMNS[name].type) if not isinstance(columns[name], pa.Array) else columns[name]
        for name in names
    ]
    table = pa.Table.from_arrays(arrays, schema=arrow_schema(names))
    write_score_file(table, str(folder / f"{part:05d}.parquet"), {}, "pandas", {})
