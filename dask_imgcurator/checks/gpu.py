"""What a machine has for the GPU path."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: Libraries of the GPU path, and their package names per CUDA version (0: any).
GPU_PACKAGES: Mapping[str, Mapping[int, str]] = {
    "cudf": {12: "cudf-cu12", 13: "cudf-cu13"},
    "dask-cudf": {12: "dask-cudf-cu12", 13: "dask-cudf-cu13"},
    "rmm": {12: "rmm-cu12", 13: "rmm-cu13"},
    "cupy": {12: "cupy-cuda12x", 13: "cupy-cuda13x"},
    "DALI": {12: "nvidia-dali-cuda120", 13: "nvidia-dali-cuda130"},
    "dask-cuda": {0: "dask-cuda"},
}

#: Modules that the GPU path imports.
MODULES = ("cudf", "dask_cudf", "dask_cuda", "nvidia.dali")


@dataclass(frozen=True)
class Card:
    """An NVIDIA GPU; memory in bytes, `jpeg_engine` None if the driver was not asked."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    jpeg_engine: bool | None = None


@dataclass(frozen=True)
class GpuFacts:
    """What a machine has for the GPU path; `doctor` judges it."""

    driver: str | None = None  # None: no driver, or not asked
    driver_cuda: tuple[int, int] | None = None  # the newest CUDA that the driver supports
    cards: tuple[Card, ...] = ()  # including those that this process may not use
    torch_cuda: str | None = None  # None: torch was built for the CPU
    torch_sees: int = 0  # cards that torch can use here
    packages: Mapping[str, str] = field(default_factory=dict)  # versions of installed `GPU_PACKAGES`
    visible: str | None = None  # the environment's CUDA_VISIBLE_DEVICES
    broken: Mapping[str, str] = field(default_factory=dict)  # errors of installed modules that fail to import


def gpu_facts() -> GpuFacts:
    """Ask the driver (by NVML, if its Python package is installed), torch and the list of packages."""
    import torch

    sees = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [name for wheels in GPU_PACKAGES.values() for name in wheels.values()]
    driver = _ask_nvml() or {"cards": tuple(map(_card_by_torch, range(sees)))}
    return GpuFacts(
        **driver,
        torch_cuda=torch.version.cuda,
        torch_sees=sees,
        packages={name: found for name in names if (found := version_of(name))},
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        broken=broken_modules(MODULES) if sees else {},
    )


def broken_modules(names: Iterable[str]) -> dict[str, str]:
    """Import modules, and report installed ones that fail, for example because NumPy is too new."""
    failed = {}
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as err:
            if not (err.name and name.startswith(err.name)):
                failed[name] = f"{type(err).__name__}: {err}"
        except Exception as err:
            failed[name] = f"{type(err).__name__}: {err}"
    return failed


def _ask_nvml() -> dict[str, Any] | None:
    """Driver and cards from NVML; None without the package or the driver."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        newest = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "driver_cuda": (newest // 1000, newest % 1000 // 10),
            "cards": tuple(_card_by_nvml(pynvml, i) for i in range(pynvml.nvmlDeviceGetCount())),
        }
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _card_by_nvml(pynvml: Any, number: int) -> Card:
    handle = pynvml.nvmlDeviceGetHandleByIndex(number)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        pynvml.nvmlDeviceGetJpgUtilization(handle)
        engine: bool | None = True
    except pynvml.NVMLError_NotSupported:
        engine = False
    except (pynvml.NVMLError, AttributeError):
        engine = None
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    name = str(pynvml.nvmlDeviceGetName(handle))
    return Card(name, (major, minor), int(memory.total), int(memory.free), engine)


def _card_by_torch(number: int) -> Card:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    return Card(torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number), total, free)


def version_of(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
