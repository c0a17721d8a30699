"""Run the two processes of a group and show what they say."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def save_and_resume(group: str, root: Path) -> None:
    """Raise AssertionError unless every leaf of every case is the same."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    said, failed = "", False
    for mode in ("save", "resume"):
        done = subprocess.run(
            [sys.executable, "-m", "states.process", mode, group, root],
            env=os.environ | {"PYTHONPATH": path, "KERAS_BACKEND": "jax"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        said += done.stdout
        failed |= done.returncode != 0
    print(said)
    assert not failed, "a leaf differs or a case failed: see the output"
