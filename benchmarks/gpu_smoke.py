"""Whether the GPU path works at all: one small thing after the other, in under a minute.

Each step is written down as it ends, so that a crash costs only what comes after it. Every answer is compared with
one that the card had no part in.
"""

from __future__ import annotations

import importlib
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

REQUIREMENTS = Path(__file__).with_name("gpu_requirements.txt")


def run_smoke(settings: Any) -> Iterator[tuple[str, Any]]:
    """What became of each step."""
    for name, step in STEPS.items():
        yield "running", name  # so that a crash leaves the name of its step
        begin = time.perf_counter()
        found: Figures = {"ok": True}
        try:
            found |= step(settings)
        except Exception:
            found = {"ok": False, "error": traceback.format_exc()}
        yield name, {**found, "seconds": time.perf_counter() - begin}
    yield "running", None


def needed_modules() -> list[str]:
    """Modules that the machine must have."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [name for line in lines if not line.startswith("#") for name in line.partition("  # ")[2].split()]


def imports(settings: Any) -> Figures:
    """Import all that is needed: a module that is there may still not import beside its neighbours."""
    failed = {}
    for name in needed_modules():
        try:
            importlib.import_module(name)
        except Exception as err:
            failed[name] = f"{type(err).__name__}: {err}"[:300]
    return {"ok": not failed or settings.backend == "pandas", "failed": failed}


def device(settings: Any) -> Figures:
    """Multiply on the card."""
    import torch

    x = torch.arange(12.0).reshape(3, 4)
    torch.testing.assert_close((x.to(settings.device) @ x.T.to(settings.device)).cpu(), x @ x.T)
    return {"name": torch.cuda.get_device_name() if settings.device == "cuda" else "cpu"}


def make_table() -> Any:
    """Nulls, empty lists, and a column in which there is nothing else."""
    import pyarrow as pa

    vectors = pa.list_(pa.float32())
    return pa.table(
        {
            "key": pa.array(["a", None, "ü", ""], pa.string()),
            "width": pa.array([640, None, 3, 2**31 - 1], pa.int32()),
            "offset": pa.array([0, 1, 2**53 + 1, 3], pa.int64()),
            "aesthetic_score": pa.array([5.25, None, -1.0, 0.0], pa.float32()),
            "embedding": pa.array([[1.0, 2.0], None, [], [3.0, 4.0]], vectors),
            "text_embedding": pa.array([None] * 4, vectors),
            "mine": pa.array([[], None, [], None], vectors),
        }
    )


def frames(settings: Any) -> Figures:
    """From Arrow to a frame and back."""
    from dask_imgcurator.schema import kind_of

    backend = settings.seam
    for table in (make_table(), make_table().slice(0, 0)):
        back = backend.to_arrow(backend.from_arrow(table))
        assert back.to_pydict() == table.to_pydict()
        for name in table.schema.names:
            assert kind_of(back.schema.field(name).type) == kind_of(table.schema.field(name).type), name
    return {}


def matrix(settings: Any) -> Figures:
    """From a tensor to a column of lists and back, with rows left out."""
    import numpy as np
    import torch

    backend = settings.seam
    values = torch.randn((3, 5), generator=torch.manual_seed(0)).to(backend.device)
    frame = backend.from_arrow(make_table())
    rows = np.array([0, 2, 3])
    back, found = backend.matrix(backend.matrix_column(values, rows, frame.index))
    torch.testing.assert_close(back, values)
    assert found.tolist() == rows.tolist()
    return {}


def parquet(settings: Any) -> Figures:
    """Write a file and read it, here and with pyarrow."""
    import pyarrow.parquet as pq

    from dask_imgcurator.steps.score_table import ScoreFiles, write_score_file

    backend, table = settings.seam, make_table()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.parquet"
        write_score_file(backend.from_arrow(table), path, {}, backend.name, {})
        assert pq.read_table(path).to_pydict() == table.to_pydict()
        assert pq.read_schema(path).metadata[b"imgcurator"] == b"{}"
        back = backend.to_arrow(ScoreFiles(backend.name, table.schema)([path], ["key", "embedding"]))
    assert back.to_pydict() == table.select(["key", "embedding"]).to_pydict()
    return {}


def decoding(settings: Any) -> Figures:
    """DALI on a batch with one bad image, beside Pillow."""
    import common
    import torch

    from dask_imgcurator.images.decoder import Decoder

    preprocess, backend = settings.encoder().preprocess, settings.seam
    blobs: list[Any] = common.images_of(next(iter(settings.sets.values()))[0])[:7]
    broken = bytearray(blobs[3])
    at = broken.find(b"\xff\xc4")
    broken[at + 5 : at + 21] = b"\xff" * 16  # a Huffman table of nothing: only a decoder finds out
    blobs.insert(3, bytes(broken))
    by_dali = Decoder(preprocess, len(blobs), backend.device, backend.decoder_device, 4)(blobs)
    by_pillow = Decoder(preprocess, len(blobs), "cpu", None, 4)(blobs)
    assert by_dali.good == by_pillow.good == [i for i in range(len(blobs)) if i != 3]
    std = torch.tensor(preprocess.std).reshape(3, 1, 1)
    difference = ((by_dali.pixels.cpu() - by_pillow.pixels) * std * 255).abs().mean((1, 2, 3)).max().item()
    assert difference < 1.5  # an image that is off by one pixel differs by 3.5
    return {
        "largest_mean_difference": difference,
        "by": [by_dali.infos[i].decoder for i in by_dali.good],  # type: ignore[union-attr]
    }


def partition(settings: Any) -> Figures:
    """One partition from bytes to scores, beside the CPU."""
    import numpy as np

    from dask_imgcurator.engine.backend import get_backend
    from dask_imgcurator.models.encoders import resolve_encoder
    from dask_imgcurator.steps.embed import EmbedSpec, embed_partition
    from dask_imgcurator.steps.heads import HeadUse, score_partition
    from dask_imgcurator.steps.read import ReadSpec, index_partition

    url = next(iter(settings.sets.values()))[0]
    tables = []
    for name in (settings.backend, "pandas"):
        frame = index_partition([url], ReadSpec(backend=name)).iloc[:24]
        frame = embed_partition(frame, EmbedSpec(resolve_encoder("starter", None, "float32"), 8))
        for kind in ("aesthetic", "nsfw"):
            frame = score_partition(frame, HeadUse(kind, f"{kind}-starter"))
        tables.append(get_backend(name).to_arrow(frame))
    for column in ("key", "status", "width", "height", "sha256"):
        assert tables[0][column].to_pylist() == tables[1][column].to_pylist(), column
    ours, theirs = (np.array(t["embedding"].to_pylist()) for t in tables)
    cosine = float((ours * theirs).sum(1).min())
    scores = [np.array(t["aesthetic_score"].to_pylist()) for t in tables]
    assert cosine > 0.9995
    return {"least_cosine": cosine, "largest_score_difference": float(np.abs(scores[0] - scores[1]).max())}


def cluster(settings: Any) -> Figures:
    """A shard to a score table, on a cluster of one worker."""
    import dask_imgcurator as dic

    url = next(iter(settings.sets.values()))[0]
    with dic.start_client(1, backend=settings.backend) as client, tempfile.TemporaryDirectory() as folder:
        result = dic.score_shards(url, folder, model="starter", backend=settings.backend, client=client)
        rows = len(dic.read_scores(folder, backend="pandas"))
        assert result.by_status == {"ok": rows}
        return {"workers": len(client.nthreads()), "rows": rows}


STEPS: dict[str, Callable[[Any], Figures]] = {
    "import": imports,
    "device": device,
    "frames": frames,
    "matrix": matrix,
    "parquet": parquet,
    "decoding": decoding,
    "partition": partition,
    "cluster": cluster,
}
