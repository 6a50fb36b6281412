"""What is installed, what is visible, what would be used, and why not."""

from __future__ import annotations

import importlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import config

__all__ = ["Card", "Finding", "GpuFacts", "examine", "gpu_facts", "gpu_findings"]


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

    from ..models.encoders import best_dtype

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


# --- the card ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """One NVIDIA card, as its driver describes it.

    Attributes
    ----------
    name : str
        Of the product.
    capability : (int, int)
        CUDA compute capability.
    total, free : int
        Memory, bytes.
    jpeg_engine : bool or None
        Whether it has hardware for JPEG; None where the driver was not asked.
    """

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    jpeg_engine: bool | None = None


@dataclass(frozen=True)
class GpuFacts:
    """What a machine has for the GPU path; `gpu_findings` judges it.

    Attributes
    ----------
    driver : str or None
        Version of the NVIDIA driver; None where there is none, or it was not asked.
    driver_cuda : (int, int) or None
        Newest CUDA that the driver runs.
    cards : tuple of Card
        All cards of the machine, also those that this process may not use.
    torch_cuda : str or None
        CUDA that torch was built for; None: a build for the CPU.
    torch_sees : int
        Cards that torch can use here.
    packages : mapping of str to str
        Versions of the installed packages of `GPU_PACKAGES`.
    visible : str or None
        The environment's ``CUDA_VISIBLE_DEVICES``.
    """

    driver: str | None = None
    driver_cuda: tuple[int, int] | None = None
    cards: tuple[Card, ...] = ()
    torch_cuda: str | None = None
    torch_sees: int = 0
    packages: Mapping[str, str] = field(default_factory=dict)
    visible: str | None = None


#: What the GPU path is made of, and under which names it is published for which CUDA.
GPU_PACKAGES: Mapping[str, Mapping[int, str]] = {
    "cudf": {12: "cudf-cu12", 13: "cudf-cu13"},
    "dask-cudf": {12: "dask-cudf-cu12", 13: "dask-cudf-cu13"},
    "rmm": {12: "rmm-cu12", 13: "rmm-cu13"},
    "cupy": {12: "cupy-cuda12x", 13: "cupy-cuda13x"},
    "DALI": {12: "nvidia-dali-cuda120", 13: "nvidia-dali-cuda130"},
    "dask-cuda": {0: "dask-cuda"},
}


def gpu_facts() -> GpuFacts:
    """Ask the driver (by NVML, where its Python package is installed), torch and the list of packages."""
    import torch

    sees = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [name for wheels in GPU_PACKAGES.values() for name in wheels.values()]
    facts: dict[str, Any] = {
        "torch_cuda": torch.version.cuda,
        "torch_sees": sees,
        "packages": {name: found for name in names if (found := _version(name))},
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    driver = _ask_nvml()
    if driver is None and sees:
        driver = {"cards": tuple(_card_by_torch(i) for i in range(sees))}
    return GpuFacts(**facts, **(driver or {}))


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
        count = pynvml.nvmlDeviceGetCount()
        return {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "driver_cuda": (newest // 1000, newest % 1000 // 10),
            "cards": tuple(_card_by_nvml(pynvml, i) for i in range(count)),
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


def gpu_findings(facts: GpuFacts, pool: Any = None) -> Iterator[Finding]:
    """Judge what there is for the GPU path; nothing is looked at but the facts.

    Parameters
    ----------
    facts : GpuFacts
        Of `gpu_facts`, or of another machine.
    pool : float, int or str, optional
        `imgcurator.rmm-pool`; only a fraction is compared with the memory there is.
    """
    if not facts.cards and not facts.torch_sees:
        yield Finding("GPU", "no NVIDIA card, or no driver for it: everything runs on the CPU")
        return
    yield _driver(facts)
    for number, card in enumerate(facts.cards):
        yield _card(number, card)
    yield _torch_build(facts)
    yield from _libraries(facts)
    yield from _pool(facts, pool)


def _driver(facts: GpuFacts) -> Finding:
    if facts.driver is None:
        return Finding("driver", "not asked", "note", "pip install nvidia-ml-py, to see driver and free memory here")
    newest = f"{facts.driver_cuda[0]}.{facts.driver_cuda[1]}" if facts.driver_cuda else "unknown"
    value = f"{facts.driver}, runs CUDA up to {newest}"
    wanted = max([*_majors(facts).values()], default=0)
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
    if facts.torch_cuda is None:
        index = "https://pytorch.org/get-started"
        return Finding("torch's CUDA", "built for the CPU", "note", f"install a build with CUDA: {index}")
    if not facts.torch_sees:
        if facts.visible is not None and facts.visible.strip() in ("", "-1", "NoDevFiles"):
            value = f"{facts.torch_cuda}, but CUDA_VISIBLE_DEVICES={facts.visible!r} hides all cards"
            return Finding("torch's CUDA", value, "note", "unset CUDA_VISIBLE_DEVICES")
        remedy = "a driver that is too old, or a container without the card (docker run --gpus all)"
        return Finding("torch's CUDA", f"{facts.torch_cuda}, but torch sees no card", "note", remedy)
    unseen = f"; {facts.torch_sees} of {len(facts.cards)} cards" if facts.torch_sees < len(facts.cards) else ""
    return Finding("torch's CUDA", facts.torch_cuda + unseen)


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


def _libraries(facts: GpuFacts) -> Iterator[Finding]:
    """One line for each library; then whether all are for one CUDA."""
    for library, wheels in GPU_PACKAGES.items():
        found = [f"{name} {facts.packages[name]}" for name in wheels.values() if name in facts.packages]
        if not found:
            remedy = f"without it the CPU is used: {_install(facts)}"
            yield Finding(library, "not installed", "note", remedy)
        elif len(found) > 1:
            remedy = f"two builds share one folder: uninstall both, then {_install(facts)}"
            yield Finding(library, " and ".join(found), "problem", remedy)
        else:
            yield Finding(library, found[0])
    majors = _majors(facts)
    if len(set(majors.values())) > 1:
        value = ", ".join(f"{library} for CUDA {major}" for library, major in majors.items())
        yield Finding("CUDA builds", value, "problem", f"install all for one CUDA: {_install(facts)}")
    releases = {m[0] for n, v in facts.packages.items() if n.startswith(_RAPIDS) and (m := re.match(r"\d+\.\d+", v))}
    if len(releases) > 1:
        remedy = f"install all of one release: {_install(facts)}"
        yield Finding("RAPIDS", f"releases {' and '.join(sorted(releases))}", "problem", remedy)


_RAPIDS = ("cudf-", "dask-cudf-", "rmm-", "dask-cuda")


def _pool(facts: GpuFacts, pool: Any) -> Iterator[Finding]:
    """Whether the memory pool that workers take at their start fits what is free on each card."""
    if not facts.cards or facts.driver is None:
        return
    if isinstance(pool, float) and 0 < pool <= 1:
        tight = min(facts.cards, key=lambda card: card.free / card.total)
        size = pool * tight.total
        value = f"{size / 2**30:.1f} GiB ({pool:g} of a card), {tight.free / 2**30:.1f} GiB free"
        if size > tight.free:
            fits = max(0, int(100 * tight.free / tight.total) - 5) / 100
            remedy = f"end what else runs there, or DASK_IMGCURATOR__RMM_POOL={fits:g} (0: no pool)"
            yield Finding("memory pool", value, "problem", remedy)
        else:
            yield Finding("memory pool", value)
    else:
        yield Finding("memory pool", f"{pool}" if pool else "none (imgcurator.rmm-pool)")


def _gpu() -> Iterator[Finding]:
    from ..engine.backend import gpu_problem, resolve_name

    facts = gpu_facts()
    yield from gpu_findings(facts, config.get("rmm-pool"))
    problem = gpu_problem()
    state = "note" if problem and (facts.torch_sees or facts.cards) else "ok"
    chosen = "pandas" if problem else resolve_name("auto")
    asked = config.get("backend")
    yield Finding(
        "backend", f"{chosen} (imgcurator.backend: {asked})", state, f"not cudf, because {problem}" if problem else ""
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _decoder() -> Iterator[Finding]:
    from ..images.decode import dali_problem

    problem = dali_problem()
    if problem:
        yield Finding("decoder", "Pillow, open_clip's own pixels; DALI decodes on cards", "ok", problem)
        return
    found = next((f"{p} {v}" for p in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if (v := _version(p))), "DALI")
    from ..engine.backend import gpu_problem

    if gpu_problem():
        yield Finding("decoder", f"Pillow, open_clip's own pixels; {found} is there for decoder: dali and for parity")
    else:
        yield Finding("decoder", f"DALI ({found}) on the card (mixed) for JPEG, Pillow for everything else")


def _models() -> Iterator[Finding]:
    from ..models import starter

    try:
        starter.provenance()
    except (OSError, ValueError, ModuleNotFoundError) as err:
        yield Finding("starter model", str(err), "problem")
    else:
        yield Finding("starter model", "present; a preview, needs no download")


def _heads() -> Iterator[Finding]:
    from ..models import heads, weights

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
