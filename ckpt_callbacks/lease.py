"""Who owns a run directory in object storage: an object that is renewed as long as its owner lives.

There is no advisory lock there, and nothing that goes when a process is killed. So the owner writes
down that it is there, again and again, and another one may take over once that has stopped::

    lease/00000007.json     the owner of the highest number owns the directory

Each number is created by one process only, which a store sees to (`If-None-Match: *`): whoever
takes over creates the next one. The owner renews its own, and looks whether there is a higher one.
It stops writing `HELD` seconds after it last could renew, and others wait for `SLACK` more: as long
as the clocks of two machines agree that far, two never write at once.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckpt_callbacks.bucket import Bucket
from ckpt_callbacks.clock import Clock
from ckpt_callbacks.errors import DirectoryLocked

__all__ = ["HELD", "SLACK", "Lease"]

logger = logging.getLogger("ckpt_callbacks")

HELD = 60.0
"""Seconds for which a lease that is not renewed holds."""
SLACK = 30.0
"""Seconds after that before another one may take over: the clocks may differ by so much."""
_EVERY = 15.0
"""Seconds between two renewals."""

Card = Mapping[str, Any]
"""What an owner says of itself."""


class Lease:
    """The lease of one directory, as one process sees it.

    Args:
        bucket: where the directory is.
        folder: the folder for it there.
        clock: the clocks.
    """

    def __init__(self, bucket: Bucket, folder: str, clock: Clock) -> None:
        self._bucket = bucket
        self._folder = folder
        self._clock = clock
        self._number = 0
        self._card: dict[str, Any] = {}
        self._renewed = 0.0
        self._lost = ""
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-lease", daemon=True)

    def holder(self) -> Card:
        """Return what the owner says of itself, or nothing where there is none."""
        card = self._highest()[1]
        return {} if self._is_over(card) else card

    def take(self, *, brief: bool, cache: Callable[[Card], str]) -> None:
        """Become the owner.

        Args:
            brief: for a moment only.
            cache: gets the card of the last owner, empty for none, and returns the id of what
                this machine has of the directory.

        Raises:
            DirectoryLocked: somebody else is; the message says who and since when.
            OSError: it cannot be known.
        """
        number, before = self._highest()
        if not self._is_over(before):
            raise DirectoryLocked(self._in_use(before))
        now = self._clock.time()
        self._card = {
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "machine": _machine(),
            "token": os.urandom(16).hex(),
            "since": now,
            "renewed": now,
            "brief": brief,
            "cache": cache(before),
            "released": False,
        }
        self._number, self._renewed = number + 1, self._clock.monotonic()
        try:
            created = self._bucket.create(self._name(self._number), self._content())
            highest = self._highest()
        except BaseException:
            with suppress(OSError):
                self.release()  # else nobody could take it as long as this process lives
            raise
        if not (self._is_mine(*highest) and created):
            raise DirectoryLocked(self._in_use(highest[1]))
        with suppress(OSError):  # the next owner removes them
            self._bucket.remove(self._name(old) for old in self._numbers() if old < self._number)

    def start(self) -> None:
        """Renew it from now on, on a thread of its own."""
        self._thread.start()

    def renew(self) -> None:
        """Say that the owner is still there.

        Raises:
            DirectoryLocked: somebody else has taken over.
            OSError: it could not be said.
        """
        with self._mutex:
            self._renew()

    def _renew(self) -> None:
        if not self._lost:
            began = self._clock.monotonic()
            if self._is_mine(*(highest := self._highest())):
                self._card["renewed"] = self._clock.time()
                self._bucket.write(self._name(self._number), self._content())
                self._renewed = began
                return
            self._lost = self._in_use(highest[1])
        raise DirectoryLocked(
            f"this run lost {self._bucket.address}, since it could not renew its lease in time: "
            f"{self._lost}"
        )

    def check(self) -> None:
        """Make sure that it is held, before something is written or removed.

        Raises:
            DirectoryLocked, OSError: as `renew` has it.
        """
        with self._mutex:
            # By both clocks, since a machine that slept has stopped one of them, and a person may
            # set the other. Half of the time is for what is written next.
            passed = (
                self._clock.monotonic() - self._renewed,
                self._clock.time() - self._card["renewed"],
            )
            if self._lost or max(passed) > HELD / 2:
                self._renew()

    def release(self) -> None:
        """Let go of it."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        with self._mutex:
            if not self._lost and self._is_mine(*self._highest()):
                # It stays, so that its number is never taken again.
                self._card["released"] = True
                self._bucket.write(self._name(self._number), self._content())
            self._lost = self._lost or "it was released"

    def _run(self) -> None:
        while not self._stop.wait(_EVERY):
            try:
                self.renew()
            except OSError as error:
                logger.warning(
                    "the lease of %s can not be renewed: %s", self._bucket.address, error
                )
            except DirectoryLocked as error:
                logger.error("%s", error)
                return

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:08d}.json"

    def _content(self) -> bytes:
        return json.dumps(self._card, indent=1).encode()

    def _numbers(self) -> list[int]:
        names = [found.name.partition(".")[0] for found in self._bucket.listing(self._folder)[0]]
        return sorted(int(name) for name in names if name.isdecimal())

    def _highest(self) -> tuple[int, Card]:
        while numbers := self._numbers():
            content = self._bucket.read(self._name(numbers[-1]))
            if content is not None:  # else its owner has just removed it
                try:
                    return numbers[-1], dict(json.loads(content))
                except (ValueError, TypeError):
                    # Whoever wrote it, it is there: its time cannot be told, so it counts as now.
                    return numbers[-1], {"renewed": self._clock.time()}
        return 0, {}

    def _is_mine(self, number: int, card: Card) -> bool:
        return number == self._number and card.get("token") == self._card["token"]

    def _is_over(self, card: Card) -> bool:
        """Return whether a lease holds no longer."""
        if not card or card.get("released"):
            return True
        pid = card.get("pid")
        # The process ids of another container or another machine say nothing here.
        here = isinstance(pid, int) and card.get("machine") == _machine() != ""
        if here and pid != os.getpid() and not Path(f"/proc/{pid}").exists():
            return True
        return self._clock.time() > float(card.get("renewed", 0.0)) + HELD + SLACK

    def _in_use(self, card: Card) -> str:
        def shown(at: object) -> str:
            known = isinstance(at, float | int)
            return time.strftime("%F %T", time.localtime(float(at))) if known else "?"  # type: ignore[arg-type]

        left = float(card.get("renewed", 0.0)) + HELD + SLACK - self._clock.time()
        return (
            f"{self._bucket.address} is in use by process {card.get('pid', '?')} on "
            f"{card.get('host', 'another machine')}, since {shown(card.get('since'))}, last seen "
            f"at {shown(card.get('renewed'))}: wait until it ends, or choose another directory. If "
            f"it was killed, another run can take over in {max(0.0, left):.0f} s"
        )


def _machine() -> str:
    """Return what is the same for two processes only if they see the same process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
