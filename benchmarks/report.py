"""How long a report takes, how much memory, and how large the page is, by the rows of the score table.

    python benchmarks/report.py 1e3 1e6

Synthetic score files of n rows (those of selection.py), whose locators point into real sample shards, so that every
picture of the page is read, decoded and made small. Each page is written in a process of its own: a report with three
conditions, one of which ranks, and a comparison of two expressions. Reported are the seconds from the call to the file,
the peak memory of the process and what it takes when idle, the size of the page and the number of its pictures. The
files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from made_scores import ROWS, write_file

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import make_sample_shards

IMAGES = 640
WHERE = "aesthetic_score >= 5 and width >= 512"


def write_table(folder: Path, rows: int, pictures: pa.Table) -> None:
    """Write score files whose rows lie where the sample pictures do, again and again."""
    folder.mkdir()
    for part, first in enumerate(range(0, rows, ROWS)):
        n = min(ROWS, rows - first)
        write_file(folder, part, n)
        path = folder / f"{part:05d}.parquet"
        table = pq.read_table(path)
        chosen = pictures.take(np.random.default_rng([8, part]).integers(0, len(pictures), n))
        for name in ("shard", "offset", "nbytes"):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), chosen[name].cast(table.schema.field(at).type))
        pq.write_table(table, path, compression="zstd")


def ask(page: str, scores: str, out: str) -> dict[str, Any]:
    """Write one page; in a process of its own."""
    idle, begin = common.peak_mb(), time.perf_counter()
    if page == "report":
        dic.write_report(scores, out, [WHERE, "top 30% by clip_score"])
    else:
        dic.compare_selections("aesthetic_score >= 5", "clip_score >= 0.3", out, scores)
    seconds = round(time.perf_counter() - begin, 2)
    html = Path(out).read_text()
    return {"seconds": seconds, "peak_mb": common.peak_mb(), "idle_mb": idle, "bytes": len(html.encode())} | {
        "pictures": html.count("<img ")
    }


def main() -> None:
    """Write pages about tables of several sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=float, default=[1e3, 1e6], metavar="N", help="rows of a table")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(ask(*args.child)))
        return
    result: dict[str, Any] = {"machine": common.machine(), "versions": common.versions(), "sizes": []}
    with tempfile.TemporaryDirectory() as scratch:
        made = make_sample_shards(Path(scratch) / "samples", count=IMAGES)
        frame = dic.read_webdataset([str(p) for p in made.shards], backend="pandas").compute(scheduler="sync")
        pictures = pa.Table.from_pandas(frame[frame["status"] == "ok"], preserve_index=False)
        print(
            f"{'rows':>12} {'page':>12} {'seconds':>9} {'peak MB':>9} {'idle MB':>9} {'bytes':>9} {'pictures':>9}",
            file=sys.stderr,
        )
        for rows in map(int, args.rows):
            scores = Path(scratch) / str(rows)
            write_table(scores, rows, pictures)
            size: dict[str, Any] = {"rows": rows}
            for page in ("report", "comparison"):
                found = common.in_child("--child", page, str(scores), f"{scratch}/{page}.html")
                size[page] = found
                cells = [found[name] for name in ("seconds", "peak_mb", "idle_mb", "bytes", "pictures")]
                print(f"{rows:>12,} {page:>12} " + " ".join(f"{cell:>9,}" for cell in cells), file=sys.stderr)
            result["sizes"].append(size)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
