"""What goes wrong with which request, as a test wants it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

__all__ = ["Fault", "Faults", "Kind"]

Kind = Literal["500", "403", "hang", "drop", "down", "digest", "applied"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    - `500`: the server answers 500 and does nothing;
    - `403`: it refuses the request and does nothing;
    - `hang`: it does nothing and does not answer, until `WandbServer.release` or its end;
    - `drop`: it does nothing and closes the connection;
    - `down`: as `drop`, and so are all later requests until `WandbServer.begin`;
    - `digest`: bytes of a file arrive damaged, in both directions; an answer to a GraphQL request
      has other values in all fields named `digest`; all else is dropped;
    - `applied`: it does what was asked and closes the connection without an answer.

    Args:
        kind: what goes wrong.
        at: with which request it begins, counted from 1 at `WandbServer.begin`.
        request: name of the requests that are counted and hit, such as `CreateArtifact`,
            `PUT file`, `GET file` or `POST file_stream`; all but `other` if not given.
        times: how many in a row are hit.
    """

    kind: Kind
    at: int = 1
    request: str | None = None
    times: int = 1

    def counts(self, name: str) -> bool:
        """Return whether requests of a name are counted and may be hit."""
        # What is `other`, such as telemetry, comes at times of its own.
        return name == self.request if self.request else name != "other"


class Faults:
    """The requests since the last `begin`, and what hits them. All threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._faults: tuple[Fault, ...] = ()
        self._down = False

    @property
    def names(self) -> list[str]:
        """The names of the requests since the last `begin`, in order of their arrival."""
        with self._lock:
            return list(self._names)

    def begin(self, *faults: Fault) -> None:
        """Forget the requests so far, and set what goes wrong from now on."""
        with self._lock:
            self._names.clear()
            self._faults = faults
            self._down = False

    def take(self, name: str) -> Kind | None:
        """Note a request, and return what goes wrong with it."""
        with self._lock:
            self._names.append(name)
            if self._down:
                return "down"
            for fault in self._faults:
                count = sum(map(fault.counts, self._names))
                if fault.counts(name) and fault.at <= count < fault.at + fault.times:
                    self._down = fault.kind == "down"
                    return fault.kind
        return None
