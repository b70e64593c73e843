"""A web server on 127.0.0.1 that serves a folder, counts requests and fails on demand."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Server(ThreadingHTTPServer):
    """Serves the files of ``folder``.

    Requests are counted by file name in ``requests``. A file in ``cut`` is announced whole, and
    only so many bytes of it are sent; one in ``status`` is answered with that status.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.cut: dict[str, int] = {}
        self.status: dict[str, int] = {}

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent where a client leaves early."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.requests[name] += 1
        path = self.server.folder / name
        status = self.server.status.get(name, 200 if path.is_file() else 404)
        body = path.read_bytes() if status == 200 else b"an error page"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut.get(name, len(body))])

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Run a server until the block ends; a proxy of the environment is not asked for it."""
    with pytest.MonkeyPatch.context() as patch, Server(folder) as server:
        patch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
