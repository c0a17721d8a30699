"""The HTTP side of the stand-in: reads requests, lets faults hit them, writes answers."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import sys
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from ckpt_callbacks_wandb.testing._faults import Kind
from ckpt_callbacks_wandb.testing._graphql import Query, Refused

__all__ = ["Answer", "Application", "HttpServer", "Request"]

_STREAM = re.compile(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream")
_STORAGE = "/storage/"


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    status: int
    body: bytes = b""
    kind: str = "application/json"

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Answer:
        """Return one that holds a value as JSON."""
        return cls(status, json.dumps(value).encode())


@dataclass
class Request:
    """What a client sent; `name` is what faults and tests call it."""

    method: str
    path: str
    body: bytes
    md5: str | None
    """The header `Content-MD5`."""
    writer: str
    """Which of several writes to a run; empty if there is one."""
    query: Query | None = field(default=None, init=False)
    name: str = field(default="other", init=False)
    problem: Refused | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.method == "POST" and self.path == "/graphql":
            try:
                self.query = Query(json.loads(self.body))
                self.name = self.query.name
            except (ValueError, Refused) as error:
                self.problem = error if isinstance(error, Refused) else Refused(str(error))
        elif self.run:
            self.name = "POST file_stream"
        elif self.key is not None and self.method in ("PUT", "GET"):
            self.name = f"{self.method} file"

    @property
    def run(self) -> tuple[str, str, str] | None:
        """Entity, project and id of the run that is streamed to."""
        match = _STREAM.fullmatch(self.path) if self.method == "POST" else None
        return (match[1], match[2], match[3]) if match else None

    @property
    def key(self) -> str | None:
        """Key of the stored bytes."""
        return self.path.removeprefix(_STORAGE) if self.path.startswith(_STORAGE) else None


class Application(Protocol):
    """What does the work that the requests ask for."""

    def arrived(self, request: Request) -> Kind | None:
        """Note a request, and return what goes wrong with it; if it hangs, when that has ended."""

    def failed(self, what: str) -> None:
        """Take note of an error of the server itself."""

    def answer(self, request: Request, *, damaged: bool) -> Answer | None:
        """Do what a request asks for; None closes the connection instead of an answer."""


class HttpServer(ThreadingHTTPServer):
    """Listens on the loopback interface until it is closed, which ends all connections.

    Args:
        application: that gets the requests.
        port: to listen on; a free one if 0.
    """

    daemon_threads = False  # so that `server_close` waits for them
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, application: Application, port: int) -> None:
        self.application = application
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections and threads, and return when they have ended."""
        self.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._connections:
                _hang_up(connection)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep an error for the tests; that a client has gone is none."""
        if not isinstance(sys.exception(), ConnectionError):
            self.application.failed(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HttpServer

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is that of the tests."""

    def _handle(self) -> None:
        # One request a connection: idle ones would outlive the test.
        self.close_connection = True
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        path = unquote(urlsplit(self.path).path)
        request = Request(
            self.command,
            path,
            body,
            md5=self.headers.get("Content-MD5"),
            writer=self.headers.get("X-Wandb-Async-Client-Id", ""),
        )
        application = self.server.application
        kind = application.arrived(request)
        answer: Answer | None = None
        if kind == "500":
            answer = Answer(500, b"a fault was asked for")
        elif kind == "403":
            answer = _forbidden()
        elif kind not in ("hang", "drop", "down"):
            answer = application.answer(request, damaged=kind == "digest")
        if answer is None or kind == "applied":
            _hang_up(self.connection)
        else:
            self._send(answer)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.body)


def _forbidden() -> Answer:
    return Answer.json({"errors": [{"message": "permission denied"}], "data": None}, 403)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the client may have gone first
        connection.shutdown(socket.SHUT_RDWR)
