"""What importing costs, and which modules are pure."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ckpt_callbacks

PURE = [
    "errors", "events", "files", "history", "plan", "policy", "record", "retention", "schedule",
    "situation", "stores",
]  # fmt: skip

MEASURE = """
import re, sys, time
def memory():  # bytes; peak resident set, which only grows; getrusage begins at the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before, cpu = memory(), time.process_time()
import ckpt_callbacks
print(time.process_time() - cpu, memory() - before)
print(*sorted({m.partition(".")[0] for m in sys.modules}))
"""


def test_importing_is_cheap_and_brings_no_heavy_library() -> None:
    # The first may have to compile, which later ones are to find, and the machine be busy.
    keeping = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", MEASURE]
    runs = [
        subprocess.run(
            command, env=keeping, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for _ in range(6)
    ]
    cpu = min(float(run[0].split()[0]) for run in runs)
    memory = min(int(run[0].split()[1]) for run in runs)

    assert cpu <= 0.1
    assert memory <= 12e6
    heavy = {"jax", "numpy", "orbax", "mlflow", "wandb", "flax", "equinox", "rich", "click"}
    assert not heavy & set(runs[0][1].split())


@pytest.mark.parametrize("module", PURE)
def test_the_core_is_pure(module: str) -> None:
    """It imports the standard library and itself only, and nothing with a clock or files."""
    package = Path(ckpt_callbacks.__file__).parent
    allowed = {f"ckpt_callbacks.{m}" for m in PURE} | {
        "__future__", "abc", "collections.abc", "dataclasses", "json", "math", "pathlib", "typing",
        "functools", "heapq", "operator", "re", "zlib",
    }  # fmt: skip
    assert imports_of(package / f"{module}.py") <= allowed


def test_only_one_module_imports_orbax() -> None:
    package = Path(ckpt_callbacks.__file__).parent
    importers = {
        path.name
        for path in package.rglob("*.py")
        for name in imports_of(path)
        if name.partition(".")[0] == "orbax"
    }

    assert importers == {"orbax_io.py"}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found
