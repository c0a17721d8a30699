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
import re, sys
there = {*sys.modules}
def memory():  # bytes; peak resident set, which only grows; getrusage begins at the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = memory()
import ckpt_callbacks
print(memory() - before)
print(*{*sys.modules} - there)
"""

COUNT = """
import sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
sys.setprofile(count)
import ckpt_callbacks
sys.setprofile(None)
print(calls)
"""

# Of the standard library, what takes long to import and only some runs need.
SLOW = {
    "asyncio", "concurrent", "ctypes", "email", "http", "multiprocessing", "socket", "sqlite3",
    "ssl", "subprocess", "urllib.request", "uuid", "xml",
}  # fmt: skip


def test_importing_is_cheap() -> None:
    """By what it loads and calls; how long it takes is measured in `benchmarks/hot_path.py`."""
    # The first may have to compile, which takes memory and which the others are to find.
    keeping = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", MEASURE]
    memory, brought = zip(
        *(
            subprocess.run(
                command, env=keeping, capture_output=True, text=True, check=True
            ).stdout.splitlines()
            for _ in range(3)
        ),
        strict=True,
    )
    modules = set(brought[0].split())

    assert min(map(int, memory)) <= 12e6
    assert {m.partition(".")[0] for m in modules} <= {
        "ckpt_callbacks", "pluggy", *sys.stdlib_module_names,
    }  # fmt: skip
    assert not modules & SLOW
    own = {m for m in modules if m.startswith("ckpt_callbacks")}
    assert len(own) <= 32  # the others when they are used
    counted = subprocess.run(
        [sys.executable, "-c", COUNT], env=keeping, capture_output=True, text=True, check=True
    )
    assert int(counted.stdout) <= 85_000  # 73,000 to 77,000 with all of Python's own modules


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
