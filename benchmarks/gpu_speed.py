"""How fast a card scores, and which part sets the pace. Each section yields names and figures.

`images_per_s` of a section are rates by what was measured; shares are of the best matrix product of this card in this
run. Random weights cost as much as trained ones.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import common

Found = Iterator[tuple[str, Any]]


def run_matmul(settings: Any) -> Found:
    """The card's ceiling: square products and those of a ViT-L's layers, of random numbers, TFLOP/s."""
    import torch

    shapes = [(n, n, n) for n in settings.matmul_sizes]
    tokens = 257 * settings.batch_size
    if settings.device != "cpu":
        shapes += [(tokens, 1024, 4096), (tokens, 4096, 1024), (tokens, 1024, 3072)]
    rates = {}
    for m, k, n in shapes:
        a = torch.randn((m, k), dtype=torch.bfloat16, device=settings.device)
        b = torch.randn((k, n), dtype=torch.bfloat16, device=settings.device)
        rounds = max(1, int(2e13 / (2 * m * k * n))) if settings.device != "cpu" else 1

        def work(a: Any = a, b: Any = b, rounds: int = rounds, flop: float = 2.0 * m * k * n) -> float:
            for _ in range(rounds):
                a @ b
            return rounds * flop / 1e12

        rates[f"{m}x{k}x{n}"] = common.rate(work, settings.seconds, settings.device)
        yield "tflops", dict(rates)
    yield "best", max(rates.values())


def run_encoder(settings: Any) -> Found:
    """Pixels to embeddings by batch size, with and without CUDA graphs."""
    import torch

    encoder = settings.encoder()
    yield "dtype", encoder.spec.dtype
    yield "gflop_per_image", common.gflop_per_image(encoder)
    rates: dict[str, float] = {}
    for graphs in (False, True) if settings.device != "cpu" else (False,):
        encoder = settings.encoder(graphs)
        for size in settings.batch_sizes:
            pixels = torch.randn((size, 3, *encoder.preprocess.size), device=settings.device)

            def work(encoder: Any = encoder, pixels: Any = pixels) -> float:
                for _ in range(4):
                    encoder(pixels)
                return 4 * len(pixels)

            name = f"{'graph' if graphs else 'plain'}, batch {size}"
            try:
                rates[name] = common.rate(work, settings.seconds, settings.device)
            except Exception as err:  # The other sizes are worth knowing all the same.
                yield f"error in {name}", f"{type(err).__name__}: {str(err)[:300]}"
            yield "images_per_s", rates
    if settings.device != "cpu":
        yield "peak_torch_bytes", torch.cuda.max_memory_allocated()


def run_decode(settings: Any) -> Found:
    """Bytes in memory to pixels: DALI on the card by the share of its JPEG engines, and on the CPU."""
    from dask_imgcurator.images import dali
    from dask_imgcurator.images.decoder import Decoder
    from dask_imgcurator.images.pillow import inspect

    preprocess = settings.encoder().preprocess
    rates: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for name, urls in settings.sets.items():
        images = common.images_of(urls[0])[: 2 * settings.batch_size]
        sizes[name] = sum(map(len, images)) / len(images)
        yield "bytes_per_image", sizes
        tries: list[tuple[str, str, float]] = [("DALI, CPU", "cpu", 0.0)]
        if settings.device != "cpu":
            tries = [(f"DALI mixed, engines {load:g}", "mixed", load) for load in (0.9, 0.0, 0.5, 1.0)] + tries
        for label, where, load in tries:
            dali.HW_DECODER_LOAD = load
            device = "cpu" if where == "cpu" else settings.device
            decoder = Decoder(preprocess, settings.batch_size, device, where, len(os.sched_getaffinity(0)))

            def work(decoder: Any = decoder, images: list[bytes] = images) -> float:
                for start in range(0, len(images), settings.batch_size):
                    decoder(images[start : start + settings.batch_size])
                return len(images)

            rates[f"{name}, {label}"] = common.rate(work, settings.seconds, device)
            yield "images_per_s", rates

        def look(images: list[bytes] = images) -> int:
            return len([inspect(image) for image in images])

        rates[f"{name}, header check alone"] = common.rate(look, settings.seconds / 2)
        yield "images_per_s", rates


def _embed_spec(settings: Any, graphs: bool = False) -> Any:
    from dask_imgcurator.models.encoders import resolve_encoder
    from dask_imgcurator.steps.embed import EmbedSpec

    encoder = resolve_encoder(settings.model, settings.pretrained, settings.dtype)
    return EmbedSpec(replace(encoder, graphs=graphs), settings.batch_size)


def run_end_to_end(settings: Any) -> Found:
    """Index, read, hash, decode and encode in this process, with and without CUDA graphs."""
    import torch

    from dask_imgcurator.steps.embed import embed_partition
    from dask_imgcurator.steps.read import ReadSpec, index_partition

    rates: dict[str, float] = {}
    for name, urls in settings.sets.items():
        frame = index_partition(urls, ReadSpec(backend=settings.backend))
        for graphs in (False, True) if settings.device != "cpu" else (False,):
            spec = _embed_spec(settings, graphs)
            embed_partition(frame.iloc[: 3 * settings.batch_size], spec)  # builds and warms up
            begin = time.perf_counter()
            out = embed_partition(frame, spec)
            if settings.device != "cpu":
                torch.cuda.synchronize()
            rates[f"{name}, {'graph' if graphs else 'plain'}"] = len(frame) / (time.perf_counter() - begin)
            yield "images_per_s", rates
            assert int((out["status"] == "ok").sum()) == len(frame)
    if settings.device != "cpu":
        free, total = torch.cuda.mem_get_info()
        yield "used_bytes_at_the_end", total - free
        yield "peak_torch_bytes", torch.cuda.max_memory_allocated()


def run_cluster(settings: Any) -> Found:
    """Shards to score tables on the workers of `start_client`; with the published heads where there are weights."""
    from stopwatch import Stopwatch

    import dask_imgcurator as dic

    head = "auto" if settings.weights_dir else "none"
    rates: dict[str, float] = {}
    workers = None if settings.device != "cpu" else 1
    with dic.start_client(workers, backend=settings.backend) as client, tempfile.TemporaryDirectory() as folder:
        yield "workers", len(client.nthreads())
        for number, (name, urls) in enumerate(settings.sets.items()):
            for turn in ("first", "second"):  # the first loads the model
                watch = Stopwatch()
                result = dic.score_shards(
                    urls,
                    Path(folder) / f"{number}{turn}",
                    model=settings.model,
                    pretrained=settings.pretrained,
                    dtype=settings.dtype,
                    batch_size=settings.batch_size,
                    backend=settings.backend,
                    client=client,
                    monitor=watch,
                    aesthetic_head=head,
                    nsfw_head=head,
                    weights_dir=settings.weights_dir,
                )
                rates[f"{name}, {turn}"] = result.images_scored / watch.seconds
                yield "images_per_s", rates
        yield "heads", sorted(result.provenance["heads"])


def run_profile(settings: Any) -> Found:
    """Where the time on the card goes over the whole way, and its idle share; the table is in profile.txt."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from dask_imgcurator.steps.embed import embed_partition
    from dask_imgcurator.steps.read import ReadSpec, index_partition

    spec = _embed_spec(settings)
    name, urls = next(iter(settings.sets.items()))
    frame = index_partition(urls[:1], ReadSpec(backend=settings.backend)).iloc[: 4 * settings.batch_size]
    embed_partition(frame, spec)
    on_card = settings.device != "cpu"
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        embed_partition(frame, spec)
        if on_card:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    averages = profiler.key_averages()
    key = "self_device_time_total" if on_card else "self_cpu_time_total"
    (Path(settings.out) / "profile.txt").write_text(averages.table(sort_by=key, row_limit=60))
    rows = sorted(averages, key=lambda row: getattr(row, key), reverse=True)
    yield "set", name
    yield "seconds", seconds
    # Of all streams together: above 1 of the seconds, streams overlap.
    yield "busy_share", sum(getattr(row, key) for row in rows) / 1e6 / seconds
    yield "top", [{"name": r.key[:120], "ms": getattr(r, key) / 1e3, "count": r.count} for r in rows[:25]]
