"""What the benchmarks share: their options, what they say of the machine, how they time, how they print."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = [
    *("dask-imgcurator", "dask", "pandas", "pyarrow", "torch", "open_clip_torch", "pillow"),
    *("nvidia-dali-cuda130", "nvidia-dali-cuda120", "cudf-cu13", "cudf-cu12"),
]


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options of the benchmarks on shards; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="webdataset tars: paths, globs, folders, braces")
    parser.add_argument("--model", default="starter", help="open_clip's name, or starter (default: %(default)s)")
    parser.add_argument("--pretrained", metavar="TAG|PATH", help="open_clip's tag, a checkpoint, or random:SEED")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 16 on a CPU, 512 on a GPU")
    parser.add_argument("--backend", default="auto", choices=["auto", "cudf", "pandas"])
    return parser


def settle_options(args: argparse.Namespace) -> tuple[list[str], Any, Any, int]:
    """Turn options into shard URLs, encoder spec, backend and batch size; a typing mistake ends the benchmark here."""
    from dask_imgcurator.engine.backend import get_backend, resolve_name
    from dask_imgcurator.engine.device import default_batch
    from dask_imgcurator.models.encoders import resolve_encoder
    from dask_imgcurator.storage.urls import expand

    backend = get_backend(resolve_name(args.backend))
    batch_size = args.batch_size or default_batch(backend.device)
    return expand(args.shards), resolve_encoder(args.model, args.pretrained, args.dtype), backend, batch_size


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """End the script with a line instead of a traceback, where the user can mend it."""
    from dask_imgcurator.clusters.faults import JobError
    from dask_imgcurator.engine.backend import BackendError
    from dask_imgcurator.models import ModelError

    try:
        yield
    except (BackendError, FileNotFoundError, JobError, ModelError) as err:
        sys.exit(f"{Path(sys.argv[0]).name}: {err}")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and card of this machine, and the date."""
    import torch
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = next(iter(names), processor)
    features = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "processor": processor,
        "features": [name for name in features if "bf16" in name or name in ("avx2", "avx512_f")],
        "cores": CPU_COUNT,  # those that this process may use
        "load_before": round(os.getloadavg()[0], 2),
        "memory_bytes": MEMORY_LIMIT,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def images_of(url: str) -> list[bytes]:
    """Read the image member of every sample of a shard."""
    from dask_imgcurator.storage.tar_index import index_shard
    from dask_imgcurator.storage.tar_read import read_extents

    members = [image for sample in index_shard(url).samples if (image := sample.image()) is not None]
    return list(read_extents(url, [(m.offset, m.nbytes) for m in members]))


def rate(work: Callable[[], float], seconds: float, device: str = "cpu") -> float:
    """Amount a second of a piece of work, whole rounds of which are done for so long; one round before is not timed.

    What was queued on a card is waited for.
    """
    import torch

    def settle() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    work()
    settle()
    begin, amount = time.perf_counter(), 0.0
    while (passed := time.perf_counter() - begin) < seconds or not amount:
        amount += work()
        settle()
    return amount / passed


def gflop_per_image(encoder: Any) -> float:
    """Count the operations of an encoder's forward pass for one image, in units of 10^9."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not see into the fused attention of nn.MultiheadAttention.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            encoder(torch.zeros((1, 3, *encoder.preprocess.size), device=encoder.device))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return float(counter.get_total_flops() / 1e9)


def matmul_rates(device: str, seconds: float) -> dict[str, float]:
    """GFLOP/s of a large matrix product by dtype, with the threads that torch has in this process: a yardstick."""
    import torch

    n = 1024 if device == "cpu" else 8192
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones((n, n), dtype=dtype, device=device)

        def work(x: torch.Tensor = x) -> float:
            torch.mm(x, x)
            return 2 * n**3 / 1e9

        found[str(dtype).removeprefix("torch.")] = rate(work, seconds, device)
    return found


def peak_mb() -> float:
    """Peak memory of this process so far, MB (not that of its parent, which `getrusage` may tell)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return round(int(line.split()[1]) / 1024, 1)


def in_child(*arguments: str, env: dict[str, str] | None = None) -> Any:
    """Run the calling script with other arguments in a process of its own, and return the JSON that it prints."""
    command = [sys.executable, sys.argv[0], *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    return json.loads(done.stdout)


def show(result: dict[str, Any], rows: Iterable[tuple[str, str]]) -> None:
    """Print the whole result as one line of JSON on stdout, and a few of its figures as a table on stderr."""
    lines = list(rows)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}", file=sys.stderr)
    print(json.dumps(result))
