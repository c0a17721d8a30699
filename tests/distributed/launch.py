"""Real processes of `jax.distributed` on this machine, with devices of the CPU."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE = 120.0
"""Seconds for a process to do what it is waited for."""


@dataclass
class Ended:
    """What a process left behind."""

    code: int
    told: list[dict[str, Any]]
    err: str
    seconds: float
    """Since `Job.end` was called, until it had ended."""

    def last(self, name: str) -> Any:
        """Return the last value that it told of a name."""
        assert self.code == 0, self.err
        return [told[name] for told in self.told if name in told][-1]


class Process:
    """One process of a job; it prints a JSON object a line."""

    def __init__(
        self, script: str, rank: int, options: Mapping[str, Any], env: Mapping[str, str]
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        self.told: list[dict[str, Any]] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._err: list[str] = []
        self.ended = 0.0
        self._threads = [
            threading.Thread(target=target, name=f"rank-{rank}", daemon=True)
            for target in (self._read, self._read_errors)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):  # Gloo prints there too
                self._lines.put(line)
        self._process.wait()
        self.ended = time.monotonic()
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr
        self._err += self._process.stderr

    def until(self, name: str) -> Any:
        """Return the next value that it tells of a name."""
        while (line := self._lines.get(timeout=PATIENCE)) is not None:
            self.told.append(json.loads(line))
            if name in self.told[-1]:
                return self.told[-1][name]
        raise AssertionError(f"it ended before it told {name}: {''.join(self._err)}")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def go_on(self) -> None:
        """Let it go on where it waits."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self, since: float) -> Ended:
        while (line := self._lines.get(timeout=PATIENCE)) is not None:
            self.told.append(json.loads(line))
        for thread in self._threads:
            thread.join(PATIENCE)
        code = self._process.wait(PATIENCE)
        return Ended(code, self.told, "".join(self._err), self.ended - since)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


class Job(list[Process]):
    """The processes of a job, by rank."""

    def end(self) -> list[Ended]:
        """Wait until all have ended."""
        since = time.monotonic()
        return [process.end(since) for process in self]

    def killed(self) -> None:
        """End all of them at once, as a power cut would."""
        for process in self:
            process.signal(signal.SIGKILL)
        self.end()


@contextmanager
def job(
    directory: Path,
    count: int = 2,
    *,
    script: str = "job.py",
    devices: int = 2,
    env: Mapping[str, str] | None = None,
    only: Mapping[int, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Iterator[Job]:
    """Run a job while the body runs.

    Args:
        directory: of the run.
        count: how many processes; `jax.distributed` runs if there are several.
        script: in this folder.
        devices: of each process.
        env: more of the environment.
        only: options that hold for one process, by rank.
        options: of the script.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    everywhere = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        **(env or {}),
    }
    common = {"directory": str(directory), "count": count, "address": address, **options}
    started = Job()
    try:
        for rank in range(count):
            own = {**common, "rank": rank, **(only or {}).get(rank, {})}
            started.append(Process(script, rank, own, {**everywhere, **own.pop("env", {})}))
        yield started
    finally:
        for process in started:
            process.kill()


def run(directory: Path, count: int = 2, **options: Any) -> list[Ended]:
    """Run a job to its end, which has to be a good one."""
    with job(directory, count, **options) as processes:
        ended = processes.end()
    for rank, process in enumerate(ended):
        assert process.code == 0, f"process {rank}: {process.err}"
    return ended
