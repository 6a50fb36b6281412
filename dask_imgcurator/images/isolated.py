"""Decoding in a separate process, for shards on which a worker died.

A crashing native decoder takes its process down, and no check of the bytes finds every such file. So a shard whose
worker died is retried with its images decoded in a child process. If the child dies, the images of that batch are
decoded one by one, and the one that kills it is set aside. This is slower, but only for that shard.
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
from typing import IO, Any, cast

from .decoder import Batch, Decoder
from .formats import BadImage
from .preprocess import Preprocess

#: Seconds after which a batch still not decoded is given up.
PATIENCE = 600.0


class IsolatedDecoder:
    """A `Decoder` that works in a child process, which is started at the first batch and after each crash."""

    def __init__(self, preprocess: Preprocess, batch_size: int, device: str = "cpu", **options: Any) -> None:
        self.preprocess, self.device = preprocess, device
        self._arguments = {"preprocess": preprocess, "batch_size": batch_size, "device": device, **options}
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self, blobs: Sequence[bytes | BadImage]) -> Batch:
        """Decode a batch; an image that kills the child is a `BadImage`."""
        import torch

        try:
            return self._ask(blobs)
        except _Crash as crash:
            if len(blobs) == 1:
                # A batch of zeros; nothing is decoded.
                return Decoder(**self._arguments)([BadImage("decode_error", f"the decoder {crash} on this image")])
        batches = [self([blob]) for blob in blobs]
        tensors = map(torch.cat, zip(*(batch.tensors for batch in batches), strict=True))
        return Batch.of(tensors, [info for batch in batches for info in batch.infos])

    def _ask(self, blobs: Sequence[bytes | BadImage]) -> Batch:
        import torch

        if self._child is None:
            command = [sys.executable, "-m", __name__]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            with contextlib.suppress(OSError):  # the child may already be dead, as detected below
                _send(self._child.stdin, self._arguments)
        child = self._child
        watch = threading.Timer(PATIENCE, child.kill)
        watch.start()
        try:
            _send(child.stdin, list(blobs))
            infos, arrays = pickle.load(cast(IO[bytes], child.stdout))
        except (OSError, EOFError, pickle.UnpicklingError):
            self.close()
            raise _Crash(child.returncode) from None
        finally:
            watch.cancel()
        return Batch.of((torch.from_numpy(array).to(self.device) for array in arrays), infos)

    def close(self) -> None:
        """End the child."""
        if self._child is None:
            return
        child, self._child = self._child, None
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                cast(IO[bytes], pipe).close()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class _Crash(Exception):
    """The child ended unexpectedly."""

    def __init__(self, returncode: int) -> None:
        if returncode >= 0:
            super().__init__(f"ended with exit code {returncode}")
        else:
            super().__init__(f"crashed ({signal.Signals(-returncode).name})")


def _send(pipe: IO[bytes] | None, value: Any) -> None:
    assert pipe is not None
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _serve() -> None:
    """Decode incoming batches until the pipe is closed: the child's side."""
    # Output of native libraries must not get into the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # Ctrl-C in a terminal reaches the child too, but its parent ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError):
        decoder = Decoder(**pickle.load(sys.stdin.buffer))
        while True:
            batch = decoder(pickle.load(sys.stdin.buffer))
            _send(answers, (batch.infos, [tensor.cpu().numpy() for tensor in batch.tensors]))


if __name__ == "__main__":
    _serve()
