"""A real HTTP server in a thread, which answers what a test tells it to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """seen: paths that were asked for, in order. answers: path without its query -> what writes the answer."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.seen: list[str] = []
        own = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                own.seen.append(self.path)
                self.close_connection = True
                try:
                    own.answers.get(self.path.partition("?")[0], lambda handler: reply(handler, b"", status=404))(self)
                except (BrokenPipeError, ConnectionResetError):
                    own.hung_up.set()

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.hung_up = threading.Event()  # a client closed the connection while it was being answered
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.port = int(self._http.server_address[1])
        self.host = f"127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


def reply(
    handler: BaseHTTPRequestHandler, body: bytes, *, status: int = 200, kind: str | None = "text/html", **headers: str | None
) -> None:
    """Headers by keyword, with _ for -; None leaves one out that would be sent."""
    fields: Mapping[str, str | None] = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
    handler.send_response(status)
    for name, value in {**fields, **{name.replace("_", "-"): value for name, value in headers.items()}}.items():
        if value is not None:
            handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def page(body: str | bytes, **more: str | None) -> Answer:
    return lambda handler: reply(handler, body if isinstance(body, bytes) else body.encode(), **more)  # type: ignore[arg-type]


def redirect(to: str, status: int = 302) -> Answer:
    return lambda handler: reply(handler, b"", status=status, Location=to)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
