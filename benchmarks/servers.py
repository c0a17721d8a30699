"""An `mlflow server` on loopback for as long as a benchmark needs one, and ports without one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

__all__ = ["closed_port", "deaf_port", "mlflow_server", "quiet"]

_STARTS_WITHIN = 240.0
"""Seconds; it takes 30 on two idle cores."""


def quiet() -> None:
    """Let MLflow tell nothing to its makers and little to us; before it is imported."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_CONFIGURE_LOGGING"] = "false"
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Run `mlflow server` on a sqlite file and a local folder; gives its address."""
    folder.mkdir(parents=True, exist_ok=True)
    port = closed_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603  # the command is ours
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,  # its workers end with it
        )
    try:
        deadline = time.monotonic() + _STARTS_WITHIN
        while not _answers(f"{uri}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"mlflow server does not start:\n{output.read_text()}")
            time.sleep(0.5)
        yield uri
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def closed_port() -> int:
    """Return a port that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def deaf_port() -> Iterator[int]:
    """Listen on a port whose connections are made, by the kernel, and never answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield listener.getsockname()[1]


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as reply:  # noqa: S310  # our own server
            return bool(reply.status == 200)
    except OSError:
        return False
