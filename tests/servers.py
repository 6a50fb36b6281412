"""Real servers over HTTP for the tests: S3 (moto's), and a plain one without ranges; with faults on demand."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Of moto, which takes any key.
OPTIONS: dict[str, Any] = {"key": "test", "secret": "test"}


@dataclass
class Request:
    """One request that the server was sent."""

    method: str
    path: str
    query: str
    range: str
    time: float
    sent: int = 0


#: What is done to a request: None, "500", "403", "cut" (half of the answer, then the connection is closed) or "slow".
Fault = Callable[[Request], str | None]


@dataclass
class S3:
    """A running S3 server.

    Attributes
    ----------
    url : str
        Its address.
    requests : list of Request
        What it was sent, in order.
    fault : callable
        Is asked what to do to each request.
    """

    url: str
    requests: list[Request] = field(default_factory=list)
    fault: Fault = lambda _request: None

    @property
    def options(self) -> dict[str, Any]:
        """Storage options for s3fs, with botocore's own retries off: ours are tested."""
        retries = {"config_kwargs": {"retries": {"max_attempts": 1}}}
        return {**OPTIONS, "endpoint_url": self.url, **retries}

    def sent(self, suffix: str, since: int = 0) -> int:
        """Bytes that were sent in answers to GET, for paths that end so."""
        chosen = [r for r in self.requests[since:] if r.method == "GET" and r.path.endswith(suffix)]
        return sum(r.sent for r in chosen)

    def file_system(self) -> Any:
        """Return a file system of its own, which has nothing in a cache."""
        import fsspec

        return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, **self.options)


#: What S3 answers to a token that is too old.
_EXPIRED = (
    b'<?xml version="1.0"?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>'
)


class _Cut(Exception):
    """Ends an answer in the middle."""


@contextlib.contextmanager
def s3_server() -> Iterator[S3]:
    """Run moto's S3 server in threads of this process."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    app = DomainDispatcherApplication(create_backend_app)
    state = S3("")
    turn = threading.Lock()

    def faulty(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = Request(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            environ["QUERY_STRING"],
            environ.get("HTTP_RANGE", ""),
            time.monotonic(),
        )
        state.requests.append(request)
        fault = state.fault(request)
        if fault == "500":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("500 Internal Server Error", [("Content-Type", "text/plain"), ("Content-Length", "9")])
            return [b"injected!"]
        if fault == "403":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(
                "403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(_EXPIRED)))]
            )
            return [b"" if request.method == "HEAD" else _EXPIRED]
        with turn:  # moto is not safe for threads
            body = b"".join(app(environ, start_response))
        return _answer(request, body, fault)

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

        def run_wsgi(self) -> None:
            with contextlib.suppress(_Cut):
                super().run_wsgi()

    server = make_server("127.0.0.1", 0, faulty, threaded=True, request_handler=Quiet, passthrough_errors=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(request: Request, body: bytes, fault: str | None) -> Iterator[bytes]:
    step = 1 << 16
    end = len(body) // 2 if fault == "cut" else len(body)
    for start in range(0, end, step):
        if fault == "slow":
            time.sleep(0.02)
        chunk = body[start : min(start + step, end)]
        request.sent += len(chunk)
        yield chunk
    if fault == "cut":
        raise _Cut


@contextlib.contextmanager
def plain_server(folder: Path) -> Iterator[str]:
    """Serve a folder by Python's own web server, which knows no ranges; gives its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
