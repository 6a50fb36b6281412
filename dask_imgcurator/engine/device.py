"""A GPU's memory and queue as torch sees them: out of memory, asynchronous copies, CUDA graphs.

Everything that torch, cuDF and CuPy do here is queued on the legacy default stream, from every thread, so operations
run in order, and freed memory is reused in that order; only DALI has its own streams. The host waits only where it
needs a value.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: How torch, RMM (its ``std::bad_alloc`` reaches torch as a RuntimeError), cuBLAS, cuDNN and DALI report it.
_SAY_SO = re.compile(r"out[ _]of[ _]memory|bad_alloc|_ALLOC_FAILED|can't allocate memory", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, cuDF, RMM, CuPy or DALI means out of memory, in which case a smaller batch may fit."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # If it interrupts the recording of a CUDA graph, another error is raised from it.
    under = error.__cause__ or error.__context__
    return _SAY_SO.search(str(error)) is not None or (under is not None and is_out_of_memory(under))


def release(device: str) -> None:
    """Wait for a device's queue and free the memory that torch caches."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Copy a host tensor to a device without waiting for the device's queue."""
    # A plain copy from pageable memory would wait for the encoder's current batch. torch keeps the pinned memory until
    # the copy is done.
    if not device.startswith("cuda"):
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def default_batch(device: str) -> int:
    """Inputs per forward pass: larger batches exceed a CPU's caches, smaller ones leave a GPU idle."""
    return 16 if device == "cpu" else 512


def pass_size(waiting: int, batch_size: int) -> int:
    """Size of the next forward pass for the waiting inputs: a whole batch, or a power of two for the last ones.

    This gives few different sizes, and at most an eighth of a pass is padding.
    """
    if waiting >= batch_size:
        return batch_size
    size = 1 << waiting.bit_length() - 1
    return min(2 * size, batch_size) if 8 * (2 * size - waiting) <= 2 * size else size


@contextmanager
def full_float32(active: bool) -> Iterator[None]:
    """Keep float32 arithmetic in float32 if `active`: cuDNN's convolutions default to TF32 (10-bit mantissa)."""
    import torch

    if not active:
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def graphs_problem(device: str) -> str | None:
    """Say why CUDA graphs cannot be used in this process; None if they can."""
    import torch

    if not device.startswith("cuda"):
        return f"no CUDA graphs on {device!r}"
    allocator = torch.cuda.memory.get_allocator_backend()
    if allocator == "pluggable":
        # RMM cannot reserve memory for a graph: memory of the capture would be reused by others and written by both.
        return "torch takes its memory from RMM, which cannot reserve any for a graph"
    return None


class Graphed:
    """A forward pass on a GPU, recorded for whole batches (the largest shape) and replayed with one launch."""

    # `forward` must not make the host wait. The next call overwrites the result; to keep it, copy it (on the same
    # stream).

    #: Warm-up runs before the recording, in which cuBLAS and cuDNN choose kernels and allocate workspace.
    WARM_UP = 3

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._forward = forward
        self._recorded: tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor] | None = None
        self._plain = False
        self._turn = threading.Lock()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Run the forward pass."""
        with self._turn:
            if self._plain or (self._recorded is not None and len(pixels) < len(self._recorded[1])):
                return self._forward(pixels)  # a partition's last images are too rare to record
            if self._recorded is None or pixels.shape != self._recorded[1].shape:
                self._recorded = None  # frees its memory first
                try:
                    self._recorded = self._record(pixels)
                except RuntimeError as err:
                    if is_out_of_memory(err):
                        raise
                    warnings.warn(f"this model cannot be recorded as a CUDA graph: {err}", stacklevel=2)
                    self._plain = True
                    return self._forward(pixels)
            graph, source, result = self._recorded
            source.copy_(pixels)
            graph.replay()
            return result

    def forget(self) -> None:
        """Free a recording's memory after it proved too large."""
        with self._turn:
            self._recorded = None

    def _record(self, pixels: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        import torch

        source = pixels.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                self._forward(source)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The decoder's threads keep allocating; that is not part of the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self._forward(source)
        return graph, source, result
