"""Heads and encoders of other packages, found by name through Python's entry points.

A package registers them in its ``pyproject.toml``; ``docs/own_heads.md`` shows how::

    [project.entry-points."dask_imgcurator.heads"]
    my-head = "my_package:head"

    [project.entry-points."dask_imgcurator.encoders"]
    my-encoder = "my_package:load"
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from .images.preprocess import Preprocess

#: Entry-point groups.
HEADS, ENCODERS = "dask_imgcurator.heads", "dask_imgcurator.encoders"


class PluginError(ValueError):
    """A registered head or encoder cannot be found or used."""


class OwnEncoder(Protocol):
    """What an entry point of the group ``dask_imgcurator.encoders`` returns when it is called.

    The entry point is a callable ``(spec: EncoderSpec, device: str) -> OwnEncoder``. It is called once in each process;
    ``spec.dtype`` is resolved by then, and the weights must have it.

    Attributes
    ----------
    preprocess : Preprocess
        How to prepare its images; `Preprocess.from_open_clip` makes one from open_clip's configuration.
    width : int
        Length of its embeddings.
    forward : callable
        From pixels, ``spec.dtype`` (n, 3, height, width) on the device, to embeddings, floating (n, `width`), on the
        device; they are normalised afterwards. One image's embedding must not depend on the others of its batch.
    provenance : mapping, optional
        What else identifies its output, besides the spec and the package's version: text and numbers, such as the
        weights' sha256.
    """

    preprocess: Preprocess
    width: int
    forward: Callable[[torch.Tensor], torch.Tensor]
    provenance: Mapping[str, Any]


def registered(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group (`HEADS` or `ENCODERS`) by name; PluginError if two packages registered one name."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise PluginError(
                f"{point.name!r} is registered twice for {group}: by {package_of(other)} ({other.value}) and "
                f"{package_of(point)} ({point.value}); uninstall one of them"
            )
    return found


def load(group: str, name: str) -> Any:
    """Import the object registered under a name; PluginError if there is none or it cannot be imported."""
    known = registered(group)
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise PluginError(
            f"nothing is registered as {name!r} for {group}{hint} (available: {', '.join(known) or 'none'})"
        )
    point = known[name]
    try:
        return point.load()
    # Whatever fails while a third-party package is imported is reported with its name.
    except Exception as err:
        raise PluginError(
            f"{name!r} ({point.value} of {package_of(point)}) cannot be imported: {type(err).__name__}: {err}"
        ) from err


def package_of(point: EntryPoint) -> str:
    """Name and version of the package that registered an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
