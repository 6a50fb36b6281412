"""What is installed, what is visible, what would be used, and why not."""

from __future__ import annotations

import platform
from collections.abc import Iterator

from .. import config
from .finding import Finding, version_of
from .gpu import GPU_PACKAGES, gpu_facts, gpu_findings

PACKAGES = ("dask-imgcurator", "dask", "distributed", "pandas", "pyarrow", "torch", "open_clip_torch", "pillow")


def examine() -> Iterator[Finding]:
    """Look at this machine; slow parts (torch) are imported on the way."""
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        found = version_of(name)
        yield Finding(name, found) if found else Finding(name, "not installed", "problem", f"pip install {name}")
    for look in (_torchvision, _cpu, _gpu, _decoder, _starter, _heads):
        yield from look()


def _torchvision() -> Iterator[Finding]:
    try:
        import open_clip  # noqa: F401
        import torchvision
    except Exception as err:  # A torchvision made for another torch fails with a RuntimeError.
        remedy = "install torch and torchvision of one release: pip install -U torch torchvision"
        yield Finding("torchvision", f"{type(err).__name__}: {err}", "problem", remedy)
    else:
        yield Finding("torchvision", torchvision.__version__)


def _cpu() -> Iterator[Finding]:
    import torch
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    from ..models.encoders import best_dtype

    name = str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())
    yield Finding("processor", f"{name}, {CPU_COUNT} cores, {MEMORY_LIMIT / 2**30:.0f} GiB for workers")
    if best_dtype("cpu") == "bfloat16":
        yield Finding("encoder on the CPU", "bfloat16")
    else:
        slow = "no AMX, and no AVX512-BF16 that is faster: large models are slow here"
        yield Finding("encoder on the CPU", "float32", "note", slow)


def _gpu() -> Iterator[Finding]:
    from ..engine.backend import gpu_problem, resolve_name

    facts = gpu_facts()
    yield from gpu_findings(facts, config.get("rmm-pool"))
    problem = gpu_problem()
    chosen = "pandas" if problem else resolve_name("auto")
    state = "note" if problem and (facts.torch_sees or facts.cards) else "ok"
    value = f"{chosen} (imgcurator.backend: {config.get('backend')})"
    yield Finding("backend", value, state, f"not cudf, because {problem}" if problem else "")


def _decoder() -> Iterator[Finding]:
    from ..engine.backend import gpu_problem
    from ..images.dali import dali_problem

    pillow = "Pillow, open_clip's own pixels"
    if problem := dali_problem():
        yield Finding("decoder", f"{pillow}; DALI decodes on cards", "ok", problem)
        return
    names = GPU_PACKAGES["DALI"].values()
    dali = next((f"{name} {found}" for name in names if (found := version_of(name))), "DALI")
    if gpu_problem():
        yield Finding("decoder", f"{pillow}; {dali} is there for decoder: dali and for parity")
    else:
        yield Finding("decoder", f"DALI ({dali}) on the card (mixed) for JPEG, Pillow for everything else")


def _starter() -> Iterator[Finding]:
    from ..models import starter

    try:
        starter.provenance()
    except (OSError, ValueError, ModuleNotFoundError) as err:
        yield Finding("starter model", str(err), "problem")
    else:
        yield Finding("starter model", "present; a preview, needs no download")


def _heads() -> Iterator[Finding]:
    from ..models import heads, weights

    folder = weights.resolve_dir(None)
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
