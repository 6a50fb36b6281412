"""What is installed, what is visible, what would be used, and why not."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .. import config
from .gpu import GPU_PACKAGES, Card, GpuFacts, gpu_facts, version_of

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """A finding; `problem`: the main job does not work; `note`: something is unavailable."""

    topic: str
    value: str
    state: State = "ok"
    remedy: str = ""


#: Extras for users: their packages and purposes.
EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "remote": (("s3fs", "aiohttp"), "shards and tables on s3:// and https://"),
    "formats": (("pillow-heif", "pillow-jxl-plugin"), "HEIC and JPEG XL"),
    "text": (("py3langid",), "language of captions (add --language)"),
    "search": (("faiss-cpu",), "duplicates among, or an index of, more than 20,000 rows"),
    "dashboard": (("bokeh",), "Dask's page of a running job"),
    "notebook": (("jupyterlab", "ipywidgets"), "the notebooks, explore()"),
    "demo": (("scikit-image", "scikit-learn"), "sample pictures for `demo`"),
}

PACKAGES = ("dask-imgcurator", "dask", "distributed", "pandas", "pyarrow", "torch", "open_clip_torch", "pillow")


def examine() -> Iterator[Finding]:
    """Examine this machine; slow parts (torch) are imported on the way."""
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        found = version_of(name)
        yield Finding(name, found) if found else Finding(name, "not installed", "problem", f"pip install {name}")
    for look in (_torchvision, _cpu, _gpu, _decoder, _model, _starter, _heads, _extras):
        yield from look()


def _torchvision() -> Iterator[Finding]:
    try:
        import torchvision
    except Exception as err:  # A torchvision built for another torch raises a RuntimeError.
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
    yield from gpu_findings(facts)
    problem = gpu_problem()
    chosen = "pandas" if problem else resolve_name("auto")
    state: State = "note" if problem and (facts.torch_sees or facts.cards) else "ok"
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
        yield Finding("decoder", f"{pillow}; {dali} is available for decoder: dali and for parity")
    else:
        yield Finding("decoder", f"DALI ({dali}) on the card (mixed) for JPEG, Pillow for everything else")


def _model() -> Iterator[Finding]:
    from ..models import open_clip
    from ..runs.plan import DEFAULT_MODEL

    name, tag = DEFAULT_MODEL
    if open_clip.can_have(name, tag):
        yield Finding("default model", f"{name} ({tag})")
    else:
        remedy = "copy them here (docs/howto/air_gapped.md), or name a checkpoint: --model ViT-L-14 --pretrained FILE"
        yield Finding("default model", f"starter: the weights of {name} ({tag}) are not available here", "note", remedy)


def _extras() -> Iterator[Finding]:
    """Installed and missing extras."""
    for extra, (names, purpose) in EXTRAS.items():
        missing = [name for name in names if version_of(name) is None]
        if missing:
            yield Finding(f"extra {extra}", f"missing: {purpose}", "note", f'pip install "dask-imgcurator[{extra}]"')
        else:
            yield Finding(f"extra {extra}", f"present: {purpose}")


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
        except weights.WrongWeights as err:
            yield Finding(spec.name, "wrong file", "note", str(err))
        except weights.WeightsError:
            remedy = "downloaded when first used, or put it into --weights-dir"
            yield Finding(spec.name, "not on this machine", "note", remedy)
        else:
            yield Finding(spec.name, str(path))


# --- the GPU path ---------------------------------------------------------------------------------

#: These are released together.
_RAPIDS = ("cudf-", "dask-cudf-", "rmm-", "dask-cuda")


def gpu_findings(facts: GpuFacts) -> Iterator[Finding]:
    """Judge the facts alone."""
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
        return Finding(f"GPU {number}", value, "note", "RAPIDS needs compute capability 7.0: this GPU is not used")
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
    """Libraries for two CUDAs, of two RAPIDS releases, or that fail to import."""
    majors = _majors(facts)
    if len(set(majors.values())) > 1:
        value = ", ".join(f"{library} for CUDA {major}" for library, major in majors.items())
        yield Finding("CUDA builds", value, "problem", f"install all for one CUDA: {_install(facts)}")
    releases = {m[0] for n, v in facts.packages.items() if n.startswith(_RAPIDS) and (m := re.match(r"\d+\.\d+", v))}
    if len(releases) > 1:
        remedy = f"install all of one release: {_install(facts)}"
        yield Finding("RAPIDS", f"releases {' and '.join(sorted(releases))}", "problem", remedy)
    for module, error in facts.broken.items():
        yield Finding(f"import {module}", error, "problem", f"bring its dependencies to one release: {_install(facts)}")


def _majors(facts: GpuFacts) -> dict[str, int]:
    """CUDA major version of torch and of each installed library published for one."""
    found = {"torch": int(facts.torch_cuda.partition(".")[0])} if facts.torch_cuda else {}
    for library, wheels in GPU_PACKAGES.items():
        for major, name in wheels.items():
            if major and name in facts.packages:
                found[library] = major
    return found


def _install(facts: GpuFacts) -> str:
    """Command that completes the GPU path, for the CUDA of the driver (else torch)."""
    newest = facts.driver_cuda[0] if facts.driver_cuda else int((facts.torch_cuda or "13").partition(".")[0])
    return f'pip install "dask-imgcurator[cu{12 if newest < 13 else 13}]"'
