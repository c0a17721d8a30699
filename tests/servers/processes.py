"""Servers that a test session starts on loopback and ends with it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

STARTS_WITHIN = 180.0  # seconds; `mlflow server` takes 30 on two idle cores
AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def program(name: str) -> str:
    """Return the path of a command of the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))


def answers(url: str) -> Callable[[], bool]:
    """Return a question: does the server answer there by now?"""

    def ask() -> bool:
        try:
            with urlopen(url, timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    return ask


@contextmanager
def running(
    command: Sequence[str],
    ready: Callable[[], bool],
    folder: Path,
    env: Mapping[str, str] | None = None,
    **popen: object,
) -> Iterator[None]:
    """Run a server while the body runs; one that does not get ready shows its output."""
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Nothing of the user's: no settings of MLflow or AWS, no home.
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **(env or {})},
            cwd=folder,
            start_new_session=True,  # so that all its workers end with it
            **popen,
        )
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not start:\n{output.read_text()}")
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        # It, if that was not enough, and any worker that it left behind.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def mlflow_server(
    folder: Path, store: str, artifacts: str, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run `mlflow server`, which passes on artifacts itself, and yield its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [
        program("mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", store, "--artifacts-destination", artifacts,
    ]  # fmt: skip
    # Its queue of jobs, which nothing here uses, takes as long to start as all the rest.
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running(command, answers(f"{address}/health"), folder, settings | dict(env or {})):
        yield address


@contextmanager
def postgres() -> Iterator[str]:
    """Run a PostgreSQL cluster of our own, and yield the address of its database."""
    # It refuses to run as root, and nobody else may enter the folders of the tests.
    folder = Path(tempfile.mkdtemp(prefix="ckpt-postgres-"))
    as_user: dict[str, object] = {}
    if os.geteuid() == 0:
        as_user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(folder, "nobody", "nogroup")
    port, data = free_port(), folder / "data"
    try:
        subprocess.run(
            [
                _postgres("initdb"), "--username=mlflow", "--auth=trust", "--encoding=UTF8",
                "--locale=C", "--no-sync", "-D", data,
            ],
            check=True,
            capture_output=True,
            cwd=folder,
            **as_user,
        )  # fmt: skip
        command = [
            _postgres("postgres"), "-D", str(data), "-p", str(port), "-c", "fsync=off",
            "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
        ]  # fmt: skip
        asked = [_postgres("pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-q"]
        with running(command, lambda: not subprocess.call(asked), folder, **as_user):
            yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder)


def _postgres(name: str) -> str:
    """Return the path of a program of PostgreSQL, which Debian keeps out of the way."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else name


@contextmanager
def s3(folder: Path) -> Iterator[str]:
    """Run moto's S3, and yield its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [program("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with running(command, answers(f"{address}/moto-api/"), folder, AWS):
        yield address
