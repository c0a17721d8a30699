"""The example: two processes are told to end, and one goes on."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

import ckpt_callbacks as cc
from distributed.launch import PATIENCE
from loops import local_steps

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"


@contextmanager
def started(script: str, directory: Path, steps: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, EXAMPLES / script, "--directory", directory, "--steps", str(steps)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:  # else they hold its pipes open, and it is waited for
                for each in psutil.Process(process.pid).children(recursive=True):
                    each.kill()
                process.kill()


def test_two_processes_stop_and_one_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with started("two_local_processes.py", directory, 1_000_000) as both:
        deadline = time.monotonic() + PATIENCE
        while not (directory / "0" / "_CHECKPOINT_METADATA").exists():
            assert time.monotonic() < deadline
            assert both.poll() is None, both.communicate()[1]
            time.sleep(0.1)
        both.send_signal(signal.SIGTERM)
        out, err = both.communicate(timeout=PATIENCE)
    assert both.returncode == 0, err
    assert "2 processes, 4 devices" in out
    last = cc.find(directory, "last").step
    assert f"told to end: step {last} is the last one that is saved" in err

    with started("train.py", directory, last + 4) as one:
        out, err = one.communicate(timeout=PATIENCE)
    assert one.returncode == 0, err
    assert "1 processes, 1 devices" in out
    assert last + 3 in local_steps(directory)
