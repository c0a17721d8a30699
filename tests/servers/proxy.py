"""A proxy on loopback that does harm to one request of many; mitmproxy could, but is heavy."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, TypeVar, get_args
from urllib.parse import urlsplit

Kind = Literal[
    "reset",  # the connection is cut before the request is read
    "dropped",  # the request is read and not passed on, and the connection closed
    "applied",  # the request is passed on, and the connection closed without an answer
    "half",  # half of the answer comes
    "stalled",  # no answer comes until the client gives up
    "401", "429", "500", "503",  # the answer, and nothing is passed on
    "applied 503",  # the answer, and the request is passed on
    "down",  # this request and all later ones of the run are reset
    "applied down",  # the same, but this one is applied
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
P = TypeVar("P", bound="Proxy")


@dataclass(frozen=True)
class Fault:
    kind: Kind
    at: int
    """Which request it is done to; the first is 1."""

    def of(self, number: int) -> str | None:
        """Return what happens to a request of this number."""
        if number > self.at:
            return "reset" if self.kind.endswith("down") else None
        if number < self.at:
            return None
        return {"down": "reset", "applied down": "applied"}.get(self.kind, self.kind)


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the server at `upstream`, but for the one that `fault` names."""

    daemon_threads = True

    def __init__(self, upstream: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.fault: Fault | None = None
        self.requests: list[str] = []
        """Method and path of every request since `begin`."""
        self._mutex = threading.Lock()

    def begin(self, fault: Fault | None = None) -> None:
        """Count from 1 again, and do this harm."""
        with self._mutex:
            self.fault, self.requests = fault, []

    def harm(self, request: str) -> str | None:
        """Count a request and return what happens to it."""
        with self._mutex:
            self.requests.append(request)
            return self.fault and self.fault.of(len(self.requests))

    def handle_error(self, *_: object) -> None:
        """Say nothing of a client that has gone; of anything else the test tells more."""


def proxied(upstream: str, port: int = 0) -> AbstractContextManager[Proxy]:
    """Run a proxy while the body runs, on any port if none is given."""
    return serving(Proxy(upstream, port))


@contextmanager
def serving(proxy: P) -> Iterator[P]:
    """Run this proxy while the body runs."""
    with proxy:
        thread = threading.Thread(target=proxy.serve_forever, name="proxy")
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go in two pieces
    timeout = 60
    server: Proxy

    def handle_request(self) -> None:
        harm = self.server.harm(f"{self.command} {urlsplit(self.path).path}")
        if harm == "reset":
            # So closing it is a reset, which the client may get at any moment.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        body = self._body()
        if harm is None:
            self._answer(*self._passed_on(body))
        elif harm == "stalled":
            self.connection.recv(1)  # nothing, once the client has gone
            self.close_connection = True
        elif harm == "half":
            reply, content = self._passed_on(body)
            self._answer(reply, content, send=len(content) // 2)
            self.close_connection = True
        else:
            if harm.startswith("applied"):
                self._passed_on(body)
            if harm[-3:].isdecimal():
                self.send_error(int(harm[-3:]), "the proxy says so")
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""  # so comes an empty file
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _passed_on(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        """Return the server's answer."""
        skipped = ("connection", "transfer-encoding", "content-length", "host")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in skipped}
        upstream = HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, body, headers)
            reply = upstream.getresponse()
            return reply, reply.read()
        finally:
            upstream.close()

    def _answer(self, reply: HTTPResponse, content: bytes, send: int | None = None) -> None:
        self.send_response_only(reply.status, reply.reason)
        for name, value in reply.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:send])

    def log_message(self, *_: object) -> None:
        """The server behind it writes down what came."""
