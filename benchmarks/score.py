"""How fast shards are scored here, and which part of the work sets the pace.

    python benchmarks/score.py SHARDS --model ViT-B-32 --pretrained random:0

Scores the shards into a temporary folder, on a cluster of this machine. Then the same workers, all at once and with the
same threads, only decode, only encode and only multiply matrices, so that every share is one within this run. The model
is loaded before anything is timed. Random weights cost as much as trained ones.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import common
from distributed import Client
from stopwatch import Stopwatch

import dask_imgcurator as dic
from dask_imgcurator import config
from dask_imgcurator.images.decoder import Decoder
from dask_imgcurator.models.encoders import EncoderSpec, load_encoder
from dask_imgcurator.steps.stream import settle_decoder

# --- on the workers -------------------------------------------------------------------------------


def load(spec: EncoderSpec, device: str) -> dict[str, Any]:
    """Load the model; say how long it took, what it costs an image, and what it runs with."""
    import torch

    begin = time.perf_counter()
    encoder = load_encoder(spec, device)
    return {
        "seconds": time.perf_counter() - begin,
        "dtype": encoder.spec.dtype,
        "threads": torch.get_num_threads(),
        "gflop_per_image": common.gflop_per_image(encoder),
    }


def decode_only(
    url: str, spec: EncoderSpec, device: str, dali_device: str | None, batch_size: int, seconds: float
) -> float:
    """Images a second from bytes in memory to pixels."""
    import torch

    images = common.images_of(url)
    decoder = Decoder(
        load_encoder(spec, device).preprocess,
        batch_size,
        device,
        dali_device,
        torch.get_num_threads(),
        config.get("max-pixels"),
    )

    def work() -> float:
        for start in range(0, len(images), batch_size):
            decoder(images[start : start + batch_size])
        return len(images)

    return common.rate(work, seconds, device)


def encode_only(spec: EncoderSpec, device: str, batch_size: int, seconds: float) -> float:
    """Images a second from pixels to embeddings."""
    import torch

    encoder = load_encoder(spec, device)
    pixels = torch.randn((batch_size, 3, *encoder.preprocess.size), device=device)

    def work() -> float:
        encoder(pixels)
        return batch_size

    return common.rate(work, seconds, device)


def peak_memory() -> dict[str, int]:
    """Largest resident memory of this process so far, and memory in use on its card now, bytes."""
    import torch

    # What the whole card has in use: torch keeps no account of memory that it takes from RMM's pool.
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    return {"rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "gpu_bytes": total - free}


# --- here -----------------------------------------------------------------------------------------


def on_all(client: Client, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run a function on all workers at once; an argument that is a list of that length is dealt out."""
    workers = list(client.nthreads())
    dealt = [[a[i] if isinstance(a, list) else a for a in arguments] for i in range(len(workers))]
    return client.gather(
        [client.submit(function, *given, workers=[w], pure=False) for w, given in zip(workers, dealt, strict=True)]
    )


def sums(rates: list[dict[str, float]]) -> dict[str, float]:
    """Add up what the workers did side by side."""
    return {name: sum(r[name] for r in rates) for name in rates[0]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark."""
    urls, spec, backend, batch_size = common.settle_options(args)
    about = common.machine()
    decoder = settle_decoder(config.get("decoder"), backend.decoder_device)
    heads = {"aesthetic_head": "none", "nsfw_head": "none"} if args.no_heads else {"weights_dir": args.weights_dir}
    with dic.start_client(args.n_workers, backend=backend.name) as client, tempfile.TemporaryDirectory() as folder:
        loaded = on_all(client, load, spec, backend.device)
        workers = len(loaded)
        before = sums(on_all(client, common.matmul_rates, backend.device, args.seconds / 5))
        watch = Stopwatch()
        result = dic.score_shards(
            urls,
            folder,
            model=args.model,
            pretrained=args.pretrained,
            dtype=args.dtype,
            batch_size=batch_size,
            backend=backend.name,
            client=client,
            monitor=watch,
            **heads,
        )
        memory = list(client.run(peak_memory).values())
        dali_device = backend.decoder_device if decoder == "dali" else None
        own = [urls[i % len(urls)] for i in range(workers)]
        settings = (spec, backend.device)
        decode = sum(on_all(client, decode_only, own, *settings, dali_device, batch_size, args.seconds))
        encode = sum(on_all(client, encode_only, *settings, batch_size, args.seconds))
        after = sums(on_all(client, common.matmul_rates, backend.device, args.seconds / 5))

    dtype, gflop = loaded[0]["dtype"], loaded[0]["gflop_per_image"]
    seconds = watch.seconds
    images_per_s = result.images_scored / seconds
    shares = {
        "of_decode_only": images_per_s / decode,
        "of_encode_only": images_per_s / encode,
        "of_one_after_the_other": images_per_s * (1 / decode + 1 / encode),
    }
    if dtype in before:
        shares["encoder_of_matmul"] = encode * gflop * 2 / (before[dtype] + after[dtype])
    return {
        "benchmark": "score",
        "machine": about,
        "versions": common.versions(),
        "settings": {
            "shards": len(urls),
            "model": args.model,
            "pretrained": args.pretrained,
            "dtype": dtype,
            "batch_size": batch_size,
            "backend": backend.name,
            "decoder": decoder,
            "heads": sorted(result.provenance["heads"]),
            "workers": workers,
            "threads_per_worker": loaded[0]["threads"],
        },
        "images": result.images_scored,
        "by_status": result.by_status,
        "seconds": {"load_model": max(one["seconds"] for one in loaded), "score": seconds},
        "images_per_s": images_per_s,
        "decode_only_images_per_s": decode,
        "encode_only_images_per_s": encode,
        "gflop_per_image": gflop,
        "matmul_gflops": {name: [before[name], after[name]] for name in before},
        "shares": shares,
        "peak_memory": memory,
    }


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table."""
    settings, shares, about = result["settings"], result["shares"], result["machine"]
    lines = [
        ("machine", f"{about['processor']}, {about['cores']} cores, GPU: {about['gpu']}"),
        ("model", f"{settings['model']} ({settings['dtype']}), {result['gflop_per_image']:.1f} GFLOP an image"),
        ("workers x threads", f"{settings['workers']} x {settings['threads_per_worker']}, {settings['backend']}"),
        ("images", f"{result['images']:,} in {settings['shards']:,} shards: {result['by_status']}"),
        ("loading the model", f"{result['seconds']['load_model']:.1f} s (not in what follows)"),
        ("scoring", f"{result['seconds']['score']:.1f} s, {result['images_per_s']:.1f} images/s"),
        ("decode only", f"{result['decode_only_images_per_s']:.1f} images/s"),
        ("encode only", f"{result['encode_only_images_per_s']:.1f} images/s"),
        ("scoring / decode only", f"{shares['of_decode_only']:.2f}"),
        ("scoring / encode only", f"{shares['of_encode_only']:.2f}"),
        ("scoring / one after the other", f"{shares['of_one_after_the_other']:.2f}"),
    ]
    for name, (before, after) in result["matmul_gflops"].items():
        lines.append((f"matmul {name}", f"{before:.0f} GFLOP/s before, {after:.0f} after"))
    if "encoder_of_matmul" in shares:
        lines.append((f"encoder / matmul {settings['dtype']}", f"{shares['encoder_of_matmul']:.2f}"))
    peak = max(one["rss_bytes"] for one in result["peak_memory"])
    return [*lines, ("peak memory of a worker", f"{peak / 1e9:.2f} GB")]


def main() -> None:
    """Run as a script."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--n-workers", type=int, metavar="N", help="default: as start_client")
    parser.add_argument("--weights-dir", metavar="DIR", help="folder with the heads' published files")
    parser.add_argument("--no-heads", action="store_true", help="embeddings only")
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="for each part alone (default: 5)")
    args = parser.parse_args()
    with common.plain_errors():
        result = measure(args)
    common.show(result, rows(result))


if __name__ == "__main__":
    main()
