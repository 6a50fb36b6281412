"""Everything that wants a card, in one command: tests, decoding, encoder, the whole way, and the card's own ceiling.

    python benchmarks/gpu.py --out results

Makes its own shards (JPEGs of about 500 x 400 and of 1 to 2 megapixels) where none are given, and writes gpu.json,
gpu.md, pytest.log and profile.txt there. Each section runs in a process of its own with a time limit, and what
it found until then is kept: one that fails is written down with its error, and the others go on. All together stay
below ten minutes on an H100. With --cpu the same sections run small, on the CPU, to see that the script works.

Shares are of the best bfloat16 matrix product of this card in this run. Random weights cost as much as trained ones.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common

__all__: list[str] = []

Found = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What a section needs to know.

    Attributes
    ----------
    backend : {"cudf", "pandas"}
        Which path is measured.
    sets : dict of str to list of str
        Shards, by the name of the kind of pictures in them.
    model, pretrained, dtype : str
        Of the encoder.
    batch_sizes, matmul_sizes : list of int
        What is tried; the last batch size is the one of everything but the encoder alone.
    seconds : float
        For each figure.
    out : str
        Folder.
    """

    backend: str
    sets: dict[str, list[str]]
    model: str
    pretrained: str | None
    dtype: str
    batch_sizes: list[int]
    matmul_sizes: list[int]
    seconds: float
    out: str

    @property
    def device(self) -> str:
        """Torch's name of the device."""
        return "cuda" if self.backend == "cudf" else "cpu"

    @property
    def batch_size(self) -> int:
        """Images a batch, for the whole way."""
        return min(512, self.batch_sizes[-1])

    def encoder(self, graphs: bool = False) -> Any:
        """Load the encoder."""
        from dataclasses import replace

        from dask_imgcurator.models.encoders import load_encoder, resolve_encoder

        spec = resolve_encoder(self.model, self.pretrained, self.dtype)
        return load_encoder(replace(spec, graphs=graphs), self.device)


# --- pictures -------------------------------------------------------------------------------------

#: Name of the set and the range of its pictures' sizes, pixels.
SIZES = {"500x400": (0.15e6, 0.25e6), "1-2 MP": (1e6, 2e6)}


def make_picture(rng: Any, pixels: float) -> bytes:
    """Make a JPEG of waves and grain, about 2 bits a pixel as photographs have at this quality."""
    import numpy as np
    from PIL import Image

    ratio = rng.choice([4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3])
    width, height = int((pixels * ratio) ** 0.5), int((pixels / ratio) ** 0.5)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x * rng.uniform(0, 0.05) + y * rng.uniform(0, 0.05) + rng.uniform(0, 6)) for _ in range(3)]
    picture = 127.5 + 100 * np.stack(waves, -1) + rng.normal(0, 4, (height, width, 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_shards(folder: Path, shards: int, per_shard: int, distinct: int) -> dict[str, list[str]]:
    """Write the sets of `SIZES`; pictures are repeated under other keys, which costs the decoder no less."""
    import numpy as np

    sets: dict[str, list[str]] = {}
    for number, (name, sizes) in enumerate(SIZES.items()):
        seeds = np.random.SeedSequence(number).spawn(distinct)

        def make(seed: Any, sizes: tuple[float, float] = sizes) -> bytes:
            rng = np.random.default_rng(seed)
            return make_picture(rng, rng.uniform(*sizes))

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            pictures = list(pool.map(make, seeds))
        sets[name] = []
        for shard in range(shards):
            path = folder / f"{number}{shard:04}.tar"
            with tarfile.open(path, "w") as tar:
                for i in range(per_shard):
                    info = tarfile.TarInfo(f"{shard:04}{i:05}.jpg")
                    info.size = len(pictures[i % distinct])
                    tar.addfile(info, io.BytesIO(pictures[i % distinct]))
            sets[name].append(str(path))
    return sets


# --- sections; each yields names and figures ------------------------------------------------------


def run_machine(settings: Settings) -> Found:
    """What this is measured on."""
    from dask_imgcurator.checks.gpu import gpu_facts

    yield "versions", common.versions()
    yield "gpu", asdict(gpu_facts())
    yield "machine", common.machine()


def run_tests(settings: Settings) -> Found:
    """The tests that want a card."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", "-rfEs"]
    env = {**os.environ, "REQUIRE_GPU": "1"}
    if settings.backend == "pandas":
        env.pop("REQUIRE_GPU")
        command.append("--collect-only")
    begin = time.perf_counter()
    with (Path(settings.out) / "pytest.log").open("w") as log:
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, cwd=root, env=env, stdout=log, stderr=subprocess.STDOUT)
    lines = (Path(settings.out) / "pytest.log").read_text().splitlines()
    yield "seconds", time.perf_counter() - begin
    yield "exit_code", done.returncode
    yield "last_line", lines[-1] if lines else ""
    yield "failed", [line for line in lines if line.startswith(("FAILED", "ERROR"))][:60]


def run_matmul(settings: Settings) -> Found:
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


def run_decode(settings: Settings) -> Found:
    """Bytes in memory to pixels, images a second: DALI on the card by the share of its JPEG engines, and on the CPU."""
    import torch

    from dask_imgcurator.images import dali as dali_module
    from dask_imgcurator.images.decoder import Decoder
    from dask_imgcurator.images.pillow import inspect

    preprocess = settings.encoder().preprocess
    threads = len(os.sched_getaffinity(0))
    for name, urls in settings.sets.items():
        images = common.images_of(urls[0])[: 2 * settings.batch_size]
        sizes = {"bytes_per_image": sum(map(len, images)) / len(images)}
        yield name, sizes
        tries: list[tuple[str, str, str | None, float]] = [("DALI, CPU", "cpu", "cpu", 0.0)]
        if settings.device != "cpu":
            tries = [(f"DALI mixed, engines {load:g}", "cuda", "mixed", load) for load in (0.9, 0.0, 0.5, 1.0)] + tries
        for label, device, dali, load in tries:
            dali_module.HW_DECODER_LOAD = load
            decoder = Decoder(preprocess, settings.batch_size, device, dali, threads)

            def work(decoder: Any = decoder, images: list[bytes] = images) -> float:
                for start in range(0, len(images), settings.batch_size):
                    decoder(images[start : start + settings.batch_size])
                return len(images)

            sizes[label] = common.rate(work, settings.seconds, device)
            yield name, sizes
            del decoder
        if settings.device != "cpu":
            torch.cuda.empty_cache()
        sizes["header check alone"] = common.rate(
            lambda images=images: sum(1 for i in images if inspect(i)), settings.seconds / 2
        )
        yield name, sizes


def run_encoder(settings: Settings) -> Found:
    """Pixels to embeddings by batch size, with and without CUDA graphs, images a second."""
    import torch

    encoder = settings.encoder()
    yield "dtype", encoder.spec.dtype
    yield "gflop_per_image", common.gflop_per_image(encoder)
    rates: dict[str, dict[str, float]] = {}
    for graphs in (False, True) if settings.device != "cpu" else (False,):
        encoder = settings.encoder(graphs)
        kind = "graph" if graphs else "plain"
        rates[kind] = {}
        for size in settings.batch_sizes:
            pixels = torch.randn((size, 3, *encoder.preprocess.size), device=settings.device)

            def work(encoder: Any = encoder, pixels: Any = pixels) -> float:
                for _ in range(4):
                    encoder(pixels)
                return 4 * len(pixels)

            try:
                rates[kind][str(size)] = common.rate(work, settings.seconds, settings.device)
            except Exception as err:  # The other sizes are worth knowing all the same.
                rates[kind][str(size)] = 0.0
                yield f"error {kind} {size}", f"{type(err).__name__}: {str(err)[:300]}"
            yield "images_per_s", rates
    if settings.device != "cpu":
        yield "peak_torch_bytes", torch.cuda.max_memory_allocated()


def run_end_to_end(settings: Settings) -> Found:
    """Index, read, hash, decode, encode in this process, images a second, by decoders side by side and graphs."""
    import torch

    from dask_imgcurator.engine import backend as seam
    from dask_imgcurator.models.encoders import resolve_encoder
    from dask_imgcurator.steps.score import EmbedSpec, ReadSpec, embed_partition, index_partition

    kind = type(seam.get_backend(settings.backend))
    tries = [(kind.decoders, False)]
    if settings.device != "cpu":
        tries = [(2, False), (1, False), (3, False), (2, True)]
    for name, urls in settings.sets.items():
        frame = index_partition(urls, ReadSpec(backend=settings.backend))
        rates: dict[str, float] = {}
        for decoders, graphs in tries:
            kind.decoders = decoders
            from dataclasses import replace

            encoder = replace(resolve_encoder(settings.model, settings.pretrained, settings.dtype), graphs=graphs)
            spec = EmbedSpec(encoder, settings.batch_size)
            embed_partition(frame.iloc[: (decoders + 1) * settings.batch_size], spec)  # builds and warms up
            begin = time.perf_counter()
            out = embed_partition(frame, spec)
            if settings.device != "cpu":
                torch.cuda.synchronize()
            rates[f"{decoders} decoders{', graph' if graphs else ''}"] = len(frame) / (time.perf_counter() - begin)
            yield name, rates
            assert int((out["status"] == "ok").sum()) == len(frame)
    if settings.device != "cpu":
        free, total = torch.cuda.mem_get_info()
        yield "used_bytes_at_the_end", total - free
        yield "peak_torch_bytes", torch.cuda.max_memory_allocated()


def run_cluster(settings: Settings) -> Found:
    """Shards to score tables on the workers of `start_client`, with the memory pool that all libraries share."""
    import dask_imgcurator as dic
    from dask_imgcurator.jobs.job import Monitor, Progress

    class Stopwatch(Monitor):
        def scoring(self, total: int, taken_over: int) -> None:
            self.begin = self.end = time.perf_counter()

        def progress(self, state: Progress) -> None:
            self.end = time.perf_counter()

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
                    aesthetic_head="none",
                    nsfw_head="none",
                )
                yield f"{name}, {turn}", result.images_scored / (watch.end - watch.begin)


def run_profile(settings: Settings) -> Found:
    """Where the time on the card goes, over the whole way; the table is in profile.txt."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from dask_imgcurator.models.encoders import resolve_encoder
    from dask_imgcurator.steps.score import EmbedSpec, ReadSpec, embed_partition, index_partition

    spec = EmbedSpec(resolve_encoder(settings.model, settings.pretrained, settings.dtype), settings.batch_size)
    name, urls = next(iter(settings.sets.items()))
    frame = index_partition(urls[:1], ReadSpec(backend=settings.backend))
    frame = frame.iloc[: 4 * settings.batch_size]
    embed_partition(frame, spec)
    on_card = settings.device != "cpu"
    activity = ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        begin = time.perf_counter()
        embed_partition(frame, spec)
        if on_card:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    averages = profiler.key_averages()
    key = "self_device_time_total" if on_card else "self_cpu_time_total"
    (Path(settings.out) / "profile.txt").write_text(
        averages.table(sort_by="self_cuda_time_total" if on_card else "self_cpu_time_total", row_limit=60)
    )
    rows = sorted(averages, key=lambda row: getattr(row, key), reverse=True)
    busy = sum(getattr(row, key) for row in rows) / 1e6
    yield "set", name
    yield "seconds", seconds
    yield "busy_seconds", busy  # of all streams together: above 1 of the seconds, streams overlap
    yield "top", [{"name": r.key[:120], "ms": getattr(r, key) / 1e3, "count": r.count} for r in rows[:25]]


def run_compile(settings: Settings) -> Found:
    """Whether torch.compile pays, for one batch size."""
    import torch

    encoder = settings.encoder()
    pixels = torch.randn((settings.batch_size, 3, *encoder.preprocess.size), device=settings.device)

    def work() -> float:
        encoder(pixels)
        return len(pixels)

    yield "plain", common.rate(work, settings.seconds, settings.device)
    if settings.device == "cpu":
        yield "compiled", None
        return
    begin = time.perf_counter()
    encoder._forward = torch.compile(encoder._forward)
    work()
    torch.cuda.synchronize()
    yield "compile_seconds", time.perf_counter() - begin
    yield "compiled", common.rate(work, settings.seconds, settings.device)


#: Sections, in their order, with their limits in seconds.
SECTIONS: dict[str, tuple[Callable[[Settings], Found], float]] = {
    "machine": (run_machine, 40),
    "matmul": (run_matmul, 40),
    "encoder": (run_encoder, 80),
    "end_to_end": (run_end_to_end, 110),
    "decode": (run_decode, 90),
    "tests": (run_tests, 170),
    "cluster": (run_cluster, 90),
    "profile": (run_profile, 50),
    "compile": (run_compile, 80),
}


# --- running them ---------------------------------------------------------------------------------


def child(name: str, settings: Settings, path: Path) -> None:
    """Run one section in this process; what was found so far is in the file at any time."""
    found: dict[str, Any] = {}
    try:
        for key, value in SECTIONS[name][0](settings):
            found[key] = value
            path.write_text(json.dumps(found))
    except Exception:
        found["error"] = traceback.format_exc()
    path.write_text(json.dumps(found))


def run_section(name: str, settings: Settings, folder: Path, limit: float) -> dict[str, Any]:
    """Run one section in a process of its own."""
    path = folder / f"{name}.json"
    path.write_text("{}")
    command = [sys.executable, __file__, "--child", name, "--settings", json.dumps(asdict(settings))]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, "--out", str(path)], start_new_session=True)
    error = None
    try:
        code = process.wait(limit)
        error = f"ended with exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        error = f"stopped after {limit:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # with the workers that it may have started
        process.wait()
    found: dict[str, Any] = json.loads(path.read_text())
    if error:
        found.setdefault("error", error)
    found["wall_s"] = time.perf_counter() - begin
    return found


def shares(result: dict[str, Any]) -> dict[str, float]:
    """Shares of the ceiling, of all rates that have one."""
    ceiling = result.get("matmul", {}).get("best")
    gflop = result.get("encoder", {}).get("gflop_per_image")
    if not ceiling or not gflop:
        return {}
    found = {}
    for kind, rates in result["encoder"].get("images_per_s", {}).items():
        for size, rate in rates.items():
            found[f"encoder, {kind}, batch {size}"] = rate * gflop / 1e3 / ceiling
    for section in ("end_to_end", "cluster"):
        for name, value in result.get(section, {}).items():
            rates = value if isinstance(value, dict) else {"": value} if isinstance(value, float) else {}
            if section == "cluster" and "," not in name:
                continue
            for label, rate in rates.items():
                found[", ".join(filter(None, [section, name, label]))] = rate * gflop / 1e3 / ceiling
    found.pop("cluster, wall_s", None)
    found.pop("end_to_end, wall_s", None)
    return found


def lines_of(result: dict[str, Any]) -> list[str]:
    """Lines of the table in Markdown."""
    lines = ["| section | what | figure | share of the ceiling |", "|---|---|---|---|"]
    of_ceiling = result["shares"]

    def add(section: str, what: str, figure: str, key: str = "") -> None:
        share = f"{of_ceiling[key]:.1%}" if key in of_ceiling else ""
        lines.append(f"| {section} | {what} | {figure} | {share} |")

    for shape, rate in result.get("matmul", {}).get("tflops", {}).items():
        add("matmul", shape, f"{rate:.1f} TFLOP/s")
    for kind, rates in result.get("encoder", {}).get("images_per_s", {}).items():
        for size, rate in rates.items():
            add("encoder", f"{kind}, batch {size}", f"{rate:.0f} images/s", f"encoder, {kind}, batch {size}")
    for section in ("decode", "end_to_end"):
        for name, rates in result.get(section, {}).items():
            for label, rate in rates.items() if isinstance(rates, dict) else ():
                unit = "bytes" if label.startswith("bytes") else "images/s"
                add(section, f"{name}, {label}", f"{rate:.0f} {unit}", f"{section}, {name}, {label}")
    for name, rate in result.get("cluster", {}).items():
        if "," in name:
            add("cluster", name, f"{rate:.0f} images/s", f"cluster, {name}")
    for name in ("plain", "compiled"):
        if rate := result.get("compile", {}).get(name):
            add("torch.compile", name, f"{rate:.0f} images/s")
    tests = result.get("tests", {})
    add("tests", "pytest -m gpu", f"exit code {tests.get('exit_code')}: {tests.get('last_line', '')}")
    for section in SECTIONS:
        if error := result.get(section, {}).get("error"):
            add(section, "failed", error.strip().splitlines()[-1].replace("|", "/")[:200])
    return lines


def write_down(result: dict[str, Any], out: Path) -> None:
    """Write gpu.json and gpu.md; after each section, so that a machine that is taken away costs only what is left."""
    result["shares"] = shares(result)
    (out / "gpu.json").write_text(json.dumps(result, indent=1))
    (out / "gpu.md").write_text("\n".join(lines_of(result)) + "\n")


def make_settings(args: argparse.Namespace, folder: Path) -> Settings:
    """Settle what is measured."""
    if args.shards:
        from dask_imgcurator.storage.shards import expand

        sets = {"given": expand(args.shards)}
    else:
        sets = make_shards(folder, *((1, 12, 4) if args.cpu else (4, args.images // 4, 96)))
    small = {
        "backend": "pandas",
        "model": args.model or "starter",
        "pretrained": args.pretrained,
        "dtype": "float32",
        "batch_sizes": [2, 4],
        "matmul_sizes": [256],
        "seconds": 0.05,
    }
    whole = {
        "backend": "cudf",
        "model": args.model or "ViT-L-14",
        "pretrained": args.pretrained or "random:0",
        "dtype": "bfloat16",
        "batch_sizes": [64, 128, 256, 512, 1024],
        "matmul_sizes": [4096, 8192, 16384],
        "seconds": args.seconds,
    }
    return Settings(sets=sets, out=str(args.out.resolve()), **(small if args.cpu else whole))  # type: ignore[arg-type]


def make_options() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for what is found")
    parser.add_argument("--shards", nargs="+", metavar="SHARDS", help="webdataset tars; default: made here")
    parser.add_argument("--images", type=int, default=8192, metavar="N", help="in each set made here (default: 8192)")
    parser.add_argument("--model", help="open_clip's name (default: ViT-L-14)")
    parser.add_argument("--pretrained", metavar="TAG|PATH", help="default: random:0")
    parser.add_argument("--sections", metavar="A,B", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for each figure (default: 2)")
    parser.add_argument("--limit", type=float, default=570, metavar="S", help="for everything (default: 570)")
    parser.add_argument("--cpu", action="store_true", help="everything small, on the CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run as a script."""
    parser = make_options()
    args = parser.parse_args()
    if args.child:
        child(args.child, Settings(**json.loads(args.settings)), args.out)
        return
    end = time.perf_counter() + args.limit
    names = args.sections.split(",") if args.sections else list(SECTIONS)
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        settings = make_settings(args, Path(folder))
        result: dict[str, Any] = {"benchmark": "gpu", "settings": asdict(settings)}
        result["settings"]["seconds_for_making_shards"] = time.perf_counter() - begin
        for name in names:
            left = end - time.perf_counter()
            limit = min(SECTIONS[name][1], left)
            result[name] = run_section(name, settings, Path(folder), limit) if left > 5 else {"error": "no time left"}
            write_down(result, args.out)
            print(f"{name}: {result[name]['wall_s']:.0f} s" if left > 5 else f"{name}: left out", file=sys.stderr)
    print((args.out / "gpu.md").read_text())


if __name__ == "__main__":
    main()
