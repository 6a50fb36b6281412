"""A process's cache between tasks: models, heads, decoders, turns."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

#: How many of each kind a process keeps; the least recently used is dropped first.
LIMITS = {
    "encoder": 2,
    "text tower": 2,
    "prompts": 16,
    "head": 32,
    "decoder": 8,
    "language": 1,
    "turn": 64,
    "differs": 4,
    "duplicates": 1,
}


class ProcessCache:
    """Things that are expensive to make, by kind and key."""

    # A key must hold everything that affects what is made. Making is serialized: the libraries underneath (open_clip,
    # timm) cannot safely load two models at once.

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kept: dict[str, OrderedDict[Hashable, Any]] = {kind: OrderedDict() for kind in LIMITS}

    def get(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """Return the entry for a key, making it if needed."""
        with self._lock:
            kept = self._kept[kind]
            if key not in kept:
                kept[key] = make()
            kept.move_to_end(key)
            self._bound(kind)
            return kept[key]

    @contextmanager
    def lend(self, kind: str, key: Hashable, make: Callable[[], T]) -> Iterator[T]:
        """Lend something that only one thread can use at a time; another thread gets its own."""
        with self._lock:
            free = self._kept[kind].pop(key, [])
            thing = free.pop() if free else None
            if free:
                self._kept[kind][key] = free
        if thing is None:
            thing = make()
        try:
            yield thing
        finally:
            with self._lock:
                self._kept[kind].setdefault(key, []).append(thing)
                self._kept[kind].move_to_end(key)
                self._bound(kind)

    def kept(self, kind: str) -> dict[Hashable, Any]:
        """Entries of a kind."""
        with self._lock:
            return dict(self._kept[kind])

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            for kept in self._kept.values():
                kept.clear()

    def _bound(self, kind: str) -> None:
        while len(self._kept[kind]) > LIMITS[kind]:
            self._kept[kind].popitem(last=False)


#: This process's cache.
cache = ProcessCache()
