"""Everything that wants a card, in one command: does it work, are the tests green, how fast is it.

    python benchmarks/gpu.py --out results

First a smoke section of under a minute, then the GPU tests file by file, then speed, from the card's own ceiling to a
profile. Makes its own shards (JPEGs of about 500 x 400 and of 1 to 2 megapixels) where none are given, and writes
gpu.json, gpu.md and profile.txt. Each section runs in a process of its own with a time limit, and what it found until
then is kept: one that fails is written down with its error, and the others go on. All together stay below ten minutes.
With --cpu the same sections run small, on the CPU, to see that the script works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import gpu_smoke
import gpu_speed
import gpu_tests
from made_shards import make_shards

Found = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What a section needs to know."""

    backend: str
    sets: dict[str, list[str]]  # shards, by the kind of pictures in them
    model: str
    pretrained: str | None
    dtype: str
    batch_sizes: list[int]  # of the encoder; everything else takes the last one, up to 512
    matmul_sizes: list[int]
    seconds: float  # for each figure
    out: str
    weights_dir: str | None = None

    @property
    def seam(self) -> Any:
        """The backend."""
        from dask_imgcurator.engine.backend import get_backend

        return get_backend(self.backend)

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


def run_machine(settings: Settings) -> Found:
    """What this is measured on."""
    from dask_imgcurator.checks.gpu import gpu_facts

    yield "versions", common.versions()
    yield "gpu", asdict(gpu_facts())
    yield "machine", common.machine()


@dataclass(frozen=True)
class Section:
    """A part of the run, and its limit in seconds."""

    run: Callable[[Any], Found]
    limit: float


#: In their order. Limits add up to less than `LIMIT`, so that every section has its time.
SECTIONS = {
    "smoke": Section(gpu_smoke.run_smoke, 60),
    "machine": Section(run_machine, 20),
    "tests": Section(gpu_tests.run_tests, gpu_tests.LIMIT),
    "matmul": Section(gpu_speed.run_matmul, 30),
    "encoder": Section(gpu_speed.run_encoder, 65),
    "end_to_end": Section(gpu_speed.run_end_to_end, 70),
    "cluster": Section(gpu_speed.run_cluster, 60),
    "decode": Section(gpu_speed.run_decode, 50),
    "profile": Section(gpu_speed.run_profile, 25),
}

#: Seconds for everything.
LIMIT = 570


# --- running them ---------------------------------------------------------------------------------


def child(name: str, settings: Settings, path: Path) -> None:
    """Run one section in this process; what was found so far is in the file at any time."""
    found: dict[str, Any] = {}
    try:
        for key, value in SECTIONS[name].run(settings):
            found[key] = value
            path.write_text(json.dumps(found))
    except Exception:
        found["error"] = traceback.format_exc()
    path.write_text(json.dumps(found))


def run_section(name: str, settings: Settings, path: Path, limit: float) -> dict[str, Any]:
    """Run one section in a process of its own, which writes to `path`."""
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


# --- what is told of them -------------------------------------------------------------------------


def shares(result: dict[str, Any]) -> dict[str, float]:
    """Shares of the ceiling of all rates with which the encoder has to do."""
    ceiling = result.get("matmul", {}).get("best")
    gflop = result.get("encoder", {}).get("gflop_per_image")
    if not ceiling or not gflop:
        return {}
    return {
        f"{section}, {name}": rate * gflop / 1e3 / ceiling
        for section in ("encoder", "end_to_end", "cluster")
        for name, rate in result.get(section, {}).get("images_per_s", {}).items()
    }


def lines_of(result: dict[str, Any]) -> list[str]:
    """Lines of the table in Markdown."""
    lines = ["| section | what | found | share of the ceiling |", "|---|---|---|---|"]

    def add(section: str, what: str, found: str, share: float | None = None) -> None:
        lines.append(f"| {section} | {what} | {found} | {'' if share is None else f'{share:.1%}'} |")

    for name in gpu_smoke.STEPS:
        if step := result.get("smoke", {}).get(name):
            add("smoke", name, f"ok, {step['seconds']:.1f} s" if step["ok"] else f"failed: {_last_line(step)}")
    for name, file in result.get("tests", {}).items():
        if isinstance(file, dict):
            failed = file.get("failed", {})
            error = f"; {file['error']}" if "error" in file else ""
            add("tests", name, f"{file.get('passed', 0)} of {file.get('collected', 0)} passed{error}")
            for test, reason in failed.items():
                add("tests", test.rpartition("::")[2], f"failed: {_plain(reason)}")
    for shape, rate in result.get("matmul", {}).get("tflops", {}).items():
        add("matmul", shape, f"{rate:.1f} TFLOP/s")
    for section in ("encoder", "end_to_end", "cluster", "decode"):
        for name, rate in result.get(section, {}).get("images_per_s", {}).items():
            add(section, name, f"{rate:.0f} images/s", result["shares"].get(f"{section}, {name}"))
    if busy := result.get("profile", {}).get("busy_share"):
        add("profile", "busy, all streams together", f"{busy:.1%} of the time")
    for section in SECTIONS:
        if "error" in result.get(section, {}):
            add(section, "failed", _last_line(result[section]))
    return lines


def _last_line(found: dict[str, Any]) -> str:
    return _plain(str(found.get("error", found.get("failed"))).strip().splitlines()[-1])


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:200]


def write_down(result: dict[str, Any], out: Path) -> None:
    """Write gpu.json and gpu.md; after each section, so that a machine that is taken away costs only what is left."""
    result["shares"] = shares(result)
    (out / "gpu.json").write_text(json.dumps(result, indent=1))
    (out / "gpu.md").write_text("\n".join(lines_of(result)) + "\n")


# --- the command line -----------------------------------------------------------------------------


def make_settings(args: argparse.Namespace, folder: Path) -> Settings:
    """Settle what is measured."""
    if args.shards:
        from dask_imgcurator.storage.urls import expand

        sets = {"given": expand(args.shards)}
    else:
        sets = make_shards(folder, *((1, 12, 4) if args.cpu else (4, args.images // 4, 96)))
    out, weights_dir = str(args.out.resolve()), args.weights_dir and str(args.weights_dir.resolve())
    if args.cpu:
        return Settings(
            "pandas", sets, args.model or "starter", args.pretrained, "float32", [2, 4], [256], 0.05, out, weights_dir
        )
    return Settings(
        backend="cudf",
        sets=sets,
        model=args.model or "ViT-L-14",
        pretrained=args.pretrained or "random:0",
        dtype="bfloat16",
        batch_sizes=[64, 128, 256, 512, 1024],
        matmul_sizes=[4096, 8192, 16384],
        seconds=args.seconds,
        out=out,
        weights_dir=weights_dir,
    )


def make_options() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for what is found")
    parser.add_argument("--shards", nargs="+", metavar="SHARDS", help="webdataset tars; default: made here")
    parser.add_argument("--images", type=int, default=8192, metavar="N", help="in each set made here (default: 8192)")
    parser.add_argument("--model", help="open_clip's name (default: ViT-L-14)")
    parser.add_argument("--pretrained", metavar="TAG|PATH", help="default: random:0")
    parser.add_argument("--weights-dir", type=Path, metavar="DIR", help="folder with the published heads, to use them")
    parser.add_argument("--sections", metavar="A,B", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--seconds", type=float, default=1.5, metavar="S", help="for each figure (default: 1.5)")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="S", help="for everything (default: %(default)s)")
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
    slowness = 5 if args.cpu else 1
    end = time.perf_counter() + slowness * args.limit
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
            if left > 5:
                path = args.out / f"{name}.json"
                result[name] = run_section(name, settings, path, min(slowness * SECTIONS[name].limit, left))
                path.unlink()
                print(f"{name}: {result[name]['wall_s']:.0f} s", file=sys.stderr)
            else:
                result[name] = {"error": "no time left"}
            write_down(result, args.out)
    print((args.out / "gpu.md").read_text())


if __name__ == "__main__":
    main()
