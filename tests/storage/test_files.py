"""Small file operations on local files."""

import itertools
import shutil
import threading

import pyarrow as pa
import pyarrow.parquet as pq

from dask_imgcurator.storage import files


def test_a_parquet_file_that_is_replaced_again_and_again_is_read_whole(tmp_path):
    tables = [pa.table({"n": [1] * 1000, "a": ["x"] * 1000}), pa.table({"n": [2.5] * 7})]
    for i, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"{i}.parquet")
    target, stop = tmp_path / "target.parquet", threading.Event()
    shutil.copy(tmp_path / "0.parquet", target)

    def replace():
        for i in itertools.cycle((1, 0)):
            if stop.is_set():
                return
            shutil.copy(tmp_path / f"{i}.parquet", tmp_path / "new")
            (tmp_path / "new").replace(target)

    writer = threading.Thread(target=replace)
    writer.start()
    seen = set()
    try:
        for _ in range(500):
            with files.opened_parquet(str(target)) as parquet:
                table = parquet.read()
            assert any(table.equals(whole) for whole in tables)
            seen.add(len(table))
    finally:
        stop.set()
        writer.join()
    assert seen == {1000, 7}
