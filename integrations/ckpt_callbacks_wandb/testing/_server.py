"""The stand-in itself: what tests start, ask and harm."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import quote

from ckpt_callbacks_wandb.testing._faults import Fault, Faults, Kind
from ckpt_callbacks_wandb.testing._graphql import Node, Refused, Unknown
from ckpt_callbacks_wandb.testing._http import Answer, HttpServer, Request
from ckpt_callbacks_wandb.testing._nodes import Nodes
from ckpt_callbacks_wandb.testing._operations import mutations, queries
from ckpt_callbacks_wandb.testing._runs import Runs
from ckpt_callbacks_wandb.testing._snapshots import (
    StoredRun,
    StoredVersion,
    run_of,
    version_of,
    versions_in,
)
from ckpt_callbacks_wandb.testing._store import ORG_ENTITY, USER, Store
from ckpt_callbacks_wandb.testing._uploads import md5_of

__all__ = ["WandbServer"]


class WandbServer:
    """A server on the loopback interface that the unmodified W&B client talks to.

    ::

        with WandbServer() as server:
            os.environ |= server.environment()
            with wandb.init(project="digits", id="a") as run:
                run.log({"loss": 0.5})
            assert server.run("digits", "a").history[0]["loss"] == 0.5

    There is one user, `me`, in one organization, whose registries are the projects
    `wandb-registry-…`. It listens from the start.

    Args:
        port: to listen on; a free one if 0.
    """

    on_request: Callable[[str], None] | None = None
    """Called with the name of each request before it is handled, in the handler's thread."""

    def __init__(self, *, port: int = 0) -> None:
        self._lock = threading.RLock()
        self._store = Store()
        self._faults = Faults()
        self._refusals: dict[str, tuple[str, int]] = {}
        self._unknown: list[str] = []
        self._released = threading.Event()
        self._runs = Runs(self._store)
        nodes = Nodes(self._store, self._url_of)
        self._queries, self._mutations = (
            queries(self._store, nodes),
            mutations(self._store, nodes),
        )
        self._http: HttpServer | None = HttpServer(self, port)
        self._port: int = self._http.server_address[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # how clients reach it ----------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        """Return the variables that lead a client here.

        The client reads them once a process, or once more after `wandb.teardown()`.
        """
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "local" + "0" * 35,  # the client wants 40 characters
            "WANDB_SILENT": "true",
        }

    def start(self) -> None:
        """Listen again after `stop`, on the same port and with the same data."""
        if self._http is None:
            self._released = threading.Event()
            self._http = HttpServer(self, self._port)

    def stop(self) -> None:
        """Be down: end all connections and refuse new ones."""
        if self._http is not None:
            self._released.set()
            self._http.close()
            self._http = None

    def close(self) -> None:
        """Stop for good; no thread or socket is left."""
        self.stop()

    # what goes wrong ---------------------------------------------------------------------------

    @property
    def requests(self) -> list[str]:
        """The names of the requests since the last `begin`, in order of their arrival."""
        return self._faults.names

    @property
    def unknown(self) -> list[str]:
        """What clients asked for and the stand-in does not know, and errors of its own."""
        with self._lock:
            return list(self._unknown)

    def begin(self, *faults: Fault) -> None:
        """Forget the requests so far, and set what goes wrong from now on."""
        self._faults.begin(*faults)

    def release(self) -> None:
        """Drop the connections that hang now; later faults hang again."""
        self._released.set()
        self._released = threading.Event()

    def refuse(self, operation: str, message: str, *, times: int = 1) -> None:
        """Answer the next operations of a name, such as `DeleteArtifact`, with an error."""
        with self._lock:
            self._refusals[operation] = (message, times)

    def protect(self, *aliases: str) -> None:
        """Let these aliases, in a registry, keep a version from being deleted."""
        with self._lock:
            self._store.protected |= set(aliases)

    # what it holds -----------------------------------------------------------------------------

    def run(self, project: str, run_id: str, *, entity: str = USER) -> StoredRun:
        """Return a run.

        Raises:
            KeyError: there is none.
        """
        with self._lock:
            return run_of(self._store.projects[entity, project].runs[run_id])

    def runs(self, project: str, *, entity: str = USER) -> tuple[StoredRun, ...]:
        """Return the runs of a project, oldest first."""
        with self._lock:
            found = self._store.projects.get((entity, project))
            return tuple(map(run_of, found.runs.values())) if found else ()

    def versions(
        self, project: str, collection: str | None = None, *, entity: str = USER
    ) -> tuple[StoredVersion, ...]:
        """Return the artifacts of a collection or project in all states, oldest first."""
        with self._lock:
            found = self._store.projects.get((entity, project))
            collections = list(found.collections.values()) if found else []
            chosen = [c for c in collections if collection in (None, c.name)]
            return tuple(v for c in chosen for v in versions_in(self._store, c))

    def linked(self, registry: str, collection: str) -> tuple[StoredVersion, ...]:
        """Return what is linked in a collection of a registry, such as `wandb-registry-model`."""
        return self.versions(registry, collection, entity=ORG_ENTITY)

    def version(self, version_id: str) -> StoredVersion:
        """Return an artifact by its id.

        Raises:
            KeyError: there is none.
        """
        with self._lock:
            return version_of(self._store, self._store.versions[version_id])

    # the application that the HTTP side calls --------------------------------------------------

    def arrived(self, request: Request) -> Kind | None:
        """Note a request, and return what goes wrong with it; if it hangs, when that has ended."""
        released = self._released
        kind = self._faults.take(request.name)
        if self.on_request is not None:
            self.on_request(request.name)
        if kind == "hang":
            released.wait()
        return kind

    def failed(self, what: str) -> None:
        """Keep what went wrong for the tests."""
        with self._lock:
            self._unknown.append(what)

    def answer(self, request: Request, *, damaged: bool) -> Answer | None:
        """Do what a request asks for."""
        try:
            with self._lock:
                return self._answer(request, damaged)
        except Refused as error:
            if isinstance(error, Unknown):
                self.failed(str(error))
            body = {"errors": [{"message": str(error)}], "data": None}
            return Answer.json(body, error.status)
        except Exception:  # ours; it must reach a test and not end in a thread
            self.failed(traceback.format_exc())
            return Answer(400, traceback.format_exc().encode(), "text/plain")

    def _answer(self, request: Request, damaged: bool) -> Answer | None:
        if request.problem:
            raise request.problem
        if request.query:
            return Answer.json({"data": self._execute(request, damaged)})
        match request.name:
            case "PUT file":
                return self._put(request, _damaged(request.body) if damaged else request.body)
            case "GET file":
                content = self._stored(request.key or "")
                return Answer(
                    200, _damaged(content) if damaged else content, "application/octet-stream"
                )
            case "POST file_stream" if not damaged and request.run:
                self._runs.stream(*request.run, request.writer, json.loads(request.body))
                return Answer.json({"limits": {}})
        return None if damaged else Answer(404)

    def _execute(self, request: Request, damaged: bool) -> Node:
        assert request.query  # noqa: S101 - the caller has seen it
        if refusal := self._refusals.pop(request.name, None):
            message, times = refusal
            if times > 1:
                self._refusals[request.name] = (message, times - 1)
            raise Refused(message, 403)
        data = request.query.execute(self._queries, self._mutations)
        return _with_other_digests(data) if damaged else data

    def _put(self, request: Request, content: bytes) -> Answer:
        key = request.key or ""
        named = request.md5 or self._store.expected.get(key)
        if named and md5_of(content) != named:
            return Answer(400, b"BadDigest: the bytes are not those of Content-MD5", "text/plain")
        if key.startswith("runs/"):
            _, entity, project, run, name = key.split("/", 4)
            self._store.projects[entity, project].runs[run].files[name] = content
        else:
            self._store.blobs[key] = content
        return Answer(200)

    def _stored(self, key: str) -> bytes:
        if key.startswith("runs/"):
            _, entity, project, run, name = key.split("/", 4)
            files = self._store.projects[entity, project].runs[run].files
            content = files.get(name)
        else:
            content = self._store.blobs.get(key)
        if content is None:
            raise Refused(f"no file {key}", 404)
        return content

    def _url_of(self, key: str) -> str:
        return f"{self.url}/storage/{quote(key)}"


def _damaged(content: bytes) -> bytes:
    """Return bytes of which one has changed."""
    return bytes([content[0] ^ 1]) + content[1:] if content else b"?"


def _with_other_digests(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_other_digests(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        k: v[::-1] if k == "digest" and isinstance(v, str) else _with_other_digests(v)
        for k, v in value.items()
    }
