"""What a machine has for the GPU path, and whether that fits together."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .finding import Finding, version_of

#: What the GPU path is made of, and under which names it is published for which CUDA (0: for any).
GPU_PACKAGES: Mapping[str, Mapping[int, str]] = {
    "cudf": {12: "cudf-cu12", 13: "cudf-cu13"},
    "dask-cudf": {12: "dask-cudf-cu12", 13: "dask-cudf-cu13"},
    "rmm": {12: "rmm-cu12", 13: "rmm-cu13"},
    "cupy": {12: "cupy-cuda12x", 13: "cupy-cuda13x"},
    "DALI": {12: "nvidia-dali-cuda120", 13: "nvidia-dali-cuda130"},
    "dask-cuda": {0: "dask-cuda"},
}

#: These are released together.
_RAPIDS = ("cudf-", "dask-cudf-", "rmm-", "dask-cuda")


@dataclass(frozen=True)
class Card:
    """One NVIDIA card; memory in bytes, `jpeg_engine` None where the driver was not asked."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    jpeg_engine: bool | None = None


@dataclass(frozen=True)
class GpuFacts:
    """What a machine has for the GPU path; `gpu_findings` judges it."""

    driver: str | None = None  # None: no driver, or not asked
    driver_cuda: tuple[int, int] | None = None  # the newest CUDA that the driver runs
    cards: tuple[Card, ...] = ()  # also those that this process may not use
    torch_cuda: str | None = None  # None: torch was built for the CPU
    torch_sees: int = 0  # cards that torch can use here
    packages: Mapping[str, str] = field(default_factory=dict)  # versions of the installed ones of `GPU_PACKAGES`
    visible: str | None = None  # the environment's CUDA_VISIBLE_DEVICES


def gpu_facts() -> GpuFacts:
    """Ask the driver (by NVML, where its Python package is installed), torch and the list of packages."""
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
    )


def _ask_nvml() -> dict[str, Any] | None:
    """Driver and cards by NVML; None without the package or the driver."""
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


# --- judging --------------------------------------------------------------------------------------


def gpu_findings(facts: GpuFacts, pool: float | int | str | None = None) -> Iterator[Finding]:
    """Judge the facts alone; `pool` is `imgcurator.rmm-pool`, of which a fraction is compared with the free memory."""
    if not facts.cards and not facts.torch_sees:
        yield Finding("GPU", "no NVIDIA card, or no driver for it: everything runs on the CPU")
        return
    yield _driver(facts)
    for number, card in enumerate(facts.cards):
        yield _card(number, card)
    yield _torch_build(facts)
    for library, wheels in GPU_PACKAGES.items():
        yield _library(library, wheels, facts)
    yield from _mismatches(facts)
    if facts.cards and facts.driver is not None:
        yield _pool(facts, pool)


def _driver(facts: GpuFacts) -> Finding:
    if facts.driver is None:
        return Finding("driver", "not asked", "note", "pip install nvidia-ml-py, to see driver and free memory here")
    newest = "unknown" if facts.driver_cuda is None else "{}.{}".format(*facts.driver_cuda)
    value = f"{facts.driver}, runs CUDA up to {newest}"
    wanted = max(_majors(facts).values(), default=0)
    if facts.driver_cuda is not None and wanted > facts.driver_cuda[0]:
        remedy = f"update the driver to one for CUDA {wanted}, or install the builds for CUDA {facts.driver_cuda[0]}"
        return Finding("driver", f"{value}; CUDA {wanted} is wanted", "problem", f"{remedy}: {_install(facts)}")
    return Finding("driver", value)


def _card(number: int, card: Card) -> Finding:
    major, minor = card.capability
    decoder = {True: "JPEG engine", False: "no JPEG engine: DALI decodes by kernels", None: "JPEG engine unknown"}
    value = (
        f"{card.name}, compute {major}.{minor}, {card.free / 2**30:.1f} of {card.total / 2**30:.1f} GiB free, "
        f"{'bfloat16' if major >= 8 else 'float16'}, {decoder[card.jpeg_engine]}"
    )
    if major < 7:
        return Finding(f"GPU {number}", value, "note", "RAPIDS wants compute capability 7.0: this card is left unused")
    return Finding(f"GPU {number}", value)


def _torch_build(facts: GpuFacts) -> Finding:
    topic = "torch's CUDA"
    if facts.torch_cuda is None:
        remedy = "install a build with CUDA: https://pytorch.org/get-started"
        return Finding(topic, "built for the CPU", "note", remedy)
    if facts.torch_sees:
        unseen = f"; {facts.torch_sees} of {len(facts.cards)} cards" if facts.torch_sees < len(facts.cards) else ""
        return Finding(topic, facts.torch_cuda + unseen)
    if facts.visible is not None and facts.visible.strip() in ("", "-1", "NoDevFiles"):
        value = f"{facts.torch_cuda}, but CUDA_VISIBLE_DEVICES={facts.visible!r} hides all cards"
        return Finding(topic, value, "note", "unset CUDA_VISIBLE_DEVICES")
    remedy = "a driver that is too old, or a container without the card (docker run --gpus all)"
    return Finding(topic, f"{facts.torch_cuda}, but torch sees no card", "note", remedy)


def _library(library: str, wheels: Mapping[int, str], facts: GpuFacts) -> Finding:
    found = [f"{name} {facts.packages[name]}" for name in wheels.values() if name in facts.packages]
    if not found:
        return Finding(library, "not installed", "note", f"without it the CPU is used: {_install(facts)}")
    if len(found) > 1:
        remedy = f"two builds share one folder: uninstall both, then {_install(facts)}"
        return Finding(library, " and ".join(found), "problem", remedy)
    return Finding(library, found[0])


def _mismatches(facts: GpuFacts) -> Iterator[Finding]:
    """Libraries for two CUDAs, or of two releases of RAPIDS."""
    majors = _majors(facts)
    if len(set(majors.values())) > 1:
        value = ", ".join(f"{library} for CUDA {major}" for library, major in majors.items())
        yield Finding("CUDA builds", value, "problem", f"install all for one CUDA: {_install(facts)}")
    releases = {m[0] for n, v in facts.packages.items() if n.startswith(_RAPIDS) and (m := re.match(r"\d+\.\d+", v))}
    if len(releases) > 1:
        remedy = f"install all of one release: {_install(facts)}"
        yield Finding("RAPIDS", f"releases {' and '.join(sorted(releases))}", "problem", remedy)


def _majors(facts: GpuFacts) -> dict[str, int]:
    """CUDA major of torch and of each installed library that is published for one."""
    found = {"torch": int(facts.torch_cuda.partition(".")[0])} if facts.torch_cuda else {}
    for library, wheels in GPU_PACKAGES.items():
        for major, name in wheels.items():
            if major and name in facts.packages:
                found[library] = major
    return found


def _install(facts: GpuFacts) -> str:
    """Command that makes the GPU path whole, for the CUDA that the driver (else torch) has."""
    newest = facts.driver_cuda[0] if facts.driver_cuda else int((facts.torch_cuda or "13").partition(".")[0])
    return f'pip install "dask-imgcurator[cu{12 if newest < 13 else 13}]"'


def _pool(facts: GpuFacts, pool: float | int | str | None) -> Finding:
    """Whether the memory pool that workers take at their start fits what is free on each card."""
    topic = "memory pool"
    if not isinstance(pool, float) or not 0 < pool <= 1:
        return Finding(topic, f"{pool}" if pool else "none (imgcurator.rmm-pool)")
    tight = min(facts.cards, key=lambda card: card.free / card.total)
    size = pool * tight.total
    value = f"{size / 2**30:.1f} GiB ({pool:g} of a card), {tight.free / 2**30:.1f} GiB free"
    if size <= tight.free:
        return Finding(topic, value)
    fits = max(0, int(100 * tight.free / tight.total) - 5) / 100
    return Finding(
        topic, value, "problem", f"end what else runs there, or DASK_IMGCURATOR__RMM_POOL={fits:g} (0: no pool)"
    )
