"""What is installed, what is visible, what would be used, and why not."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from . import config

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    topic, value : str
        What, and what was found.
    state : {"ok", "note", "problem"}
        ``problem``: the main job does not work; ``note``: something is left out.
    remedy : str
        What to do.
    """

    topic: str
    value: str
    state: str = "ok"
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Look at this machine; slow parts (torch) are imported on the way."""
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in (
        "dask-imgcurator",
        "dask",
        "distributed",
        "pandas",
        "pyarrow",
        "torch",
        "open_clip_torch",
        "pillow",
    ):
        yield _package(package)
    yield from _torch()
    yield from _cpu()
    yield from _gpu()
    yield from _decoder()
    yield from _models()
    yield from _heads()


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, "not installed", "problem", f"pip install {name}")


def _torch() -> Iterator[Finding]:
    try:
        import open_clip  # noqa: F401
        import torchvision
    except Exception as err:  # A torchvision made for another torch fails with a RuntimeError.
        remedy = "install torch and torchvision of one release: pip install -U torch torchvision"
        yield Finding("torchvision", f"{type(err).__name__}: {err}", "problem", remedy)
        return
    yield Finding("torchvision", torchvision.__version__)


def _cpu() -> Iterator[Finding]:
    import torch
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    from .models import best_dtype

    name = str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())
    yield Finding("processor", f"{name}, {CPU_COUNT} cores, {MEMORY_LIMIT / 2**30:.0f} GiB for workers")
    dtype = best_dtype("cpu")
    if dtype == "bfloat16":
        yield Finding("encoder on the CPU", "bfloat16")
    else:
        yield Finding(
            "encoder on the CPU",
            "float32",
            "note",
            "no AMX, and no AVX512-BF16 that is faster: large models are slow here",
        )


def _gpu() -> Iterator[Finding]:
    import torch

    from .backend import gpu_problem, resolve_name

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("CUDA", f"torch for CUDA {torch.version.cuda}; " + ", ".join(cards))
        for package in ("cudf", "dask_cudf", "dask_cuda"):
            found = next((f"{p} {v}" for p in _wheels(package) if (v := _version(p))), None)
            yield Finding(package, found or "not installed", "ok" if found else "note")
    problem = gpu_problem()
    state = "note" if problem and torch.cuda.is_available() else "ok"
    chosen = "pandas" if problem else resolve_name("auto")
    asked = config.get("backend")
    yield Finding(
        "backend", f"{chosen} (imgcurator.backend: {asked})", state, f"not cudf, because {problem}" if problem else ""
    )


def _wheels(package: str) -> list[str]:
    base = package.replace("_", "-")
    return [base, f"{base}-cu13", f"{base}-cu12"]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _decoder() -> Iterator[Finding]:
    from .decode import dali_problem

    problem = dali_problem()
    if problem:
        yield Finding("decoder", "Pillow", "note", problem)
        return
    found = next((f"{p} {v}" for p in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if (v := _version(p))), "DALI")
    yield Finding("decoder", f"DALI ({found}) for JPEG, Pillow for everything else")


def _models() -> Iterator[Finding]:
    from . import starter

    try:
        starter.provenance()
    except (OSError, ValueError, ModuleNotFoundError) as err:
        yield Finding("starter model", str(err), "problem")
    else:
        yield Finding("starter model", "present; a preview, needs no download")


def _heads() -> Iterator[Finding]:
    from . import heads, weights

    try:
        folder = weights.resolve_dir(None)
    except weights.WeightsError as err:
        yield Finding("heads", str(err), "problem")
        return
    for spec in heads.HEADS.values():
        if spec.weights is None:
            continue
        try:
            path = weights.find(spec.weights, folder, download=False)
        except weights.WeightsError as err:
            missing = "sha256" not in str(err)
            remedy = "downloaded when first used, or put it into --weights-dir" if missing else str(err)
            yield Finding(spec.name, "not on this machine" if missing else "wrong file", "note", remedy)
        else:
            yield Finding(spec.name, str(path))
