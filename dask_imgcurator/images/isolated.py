"""Decoding in a process of its own, for shards on which a worker died.

A native decoder that crashes takes its process with it, and no test of the bytes finds every file that does that. So
a shard whose worker died is done once more with its images decoded by a child process. Where the child dies, the images
of that batch go one by one, and the one that kills it is set aside. This is slower, and no other shard pays for it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from .decode import BadImage, Batch, Decoder, Preprocess

if TYPE_CHECKING:
    import torch

__all__ = ["IsolatedDecoder"]

#: Seconds after which a batch that is still not decoded counts as one that never will be.
PATIENCE = 600.0


class IsolatedDecoder:
    """A `Decoder` whose work is done by a child process; takes the same arguments.

    Notes
    -----
    The child is started at the first batch, and after each crash. Not safe for use by several threads at once.
    """

    def __init__(self, preprocess: Preprocess, batch_size: int, device: str = "cpu", **options: Any) -> None:
        self.preprocess, self.device = preprocess, device
        self._arguments = {"preprocess": preprocess, "batch_size": batch_size, "device": device, **options}
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self, blobs: Sequence[bytes | BadImage]) -> Batch:
        """Decode a batch; see `Decoder`. An image that kills the child is a `BadImage`."""
        import torch

        try:
            return self._ask(blobs)
        except _Crash as crash:
            if len(blobs) == 1:
                # What takes no image to decode: the zeros of one that failed.
                return Decoder(**self._arguments)([BadImage("decode_error", f"the decoder {crash} on this image")])
        batches = [self([blob]) for blob in blobs]
        return Batch(
            torch.cat([b.pixels for b in batches]),
            [info for b in batches for info in b.infos],
            _cat([b.small for b in batches]),
            _cat([b.gray for b in batches]),
        )

    def _ask(self, blobs: Sequence[bytes | BadImage]) -> Batch:
        import torch

        if self._child is None:
            command = [sys.executable, "-m", __name__]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            with contextlib.suppress(OSError):  # of a child that is dead already: told below
                _send(self._child.stdin, self._arguments)
        child = self._child
        watch = threading.Timer(PATIENCE, child.kill)
        watch.start()
        try:
            _send(child.stdin, list(blobs))
            infos, *arrays = pickle.load(_pipe(child.stdout))
        except (OSError, EOFError, pickle.UnpicklingError):
            self.close()
            raise _Crash(child.returncode) from None
        finally:
            watch.cancel()
        pixels, small, gray = (None if a is None else torch.from_numpy(a).to(self.device) for a in arrays)
        assert pixels is not None
        return Batch(pixels, infos, small, gray)

    def close(self) -> None:
        """End the child."""
        if self._child is None:
            return
        child, self._child = self._child, None
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                _pipe(pipe).close()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class _Crash(Exception):
    def __init__(self, returncode: int) -> None:
        if returncode >= 0:
            super().__init__(f"ended with exit code {returncode}")
        else:
            super().__init__(f"crashed ({signal.Signals(-returncode).name})")


def _cat(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    import torch

    present = [t for t in tensors if t is not None]
    return torch.cat(present) if present else None


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _send(pipe: IO[bytes] | None, value: Any) -> None:
    pickle.dump(value, _pipe(pipe), protocol=pickle.HIGHEST_PROTOCOL)
    _pipe(pipe).flush()


def _serve() -> None:
    """Be the child: decode what comes in until the pipe is closed."""
    # Native libraries that print would write into the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # The terminal sends Ctrl-C to the child too; its parent ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError):
        decoder = Decoder(**pickle.load(sys.stdin.buffer))
        while True:
            batch = decoder(pickle.load(sys.stdin.buffer))
            arrays = (None if t is None else t.cpu().numpy() for t in (batch.pixels, batch.small, batch.gray))
            _send(answers, (batch.infos, *arrays))


if __name__ == "__main__":
    _serve()
