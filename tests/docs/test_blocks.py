"""Each block of Python in the documentation runs: all those of a page in order, by themselves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
ALONE = Path(__file__).with_name("alone.py")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if BLOCK.search(page.read_text())]


def code_of(page: Path) -> str:
    """Return the blocks of a page, each at the lines where it is there."""
    text = page.read_text(encoding="utf-8")
    code, end = "", 0
    for block in BLOCK.finditer(text):
        code += "\n" * text.count("\n", end, block.start(1)) + block[1]
        end = block.end(1)
    return code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    script = tmp_path / f"{page.stem.replace('-', '_')}.py"
    script.write_text(code_of(page), encoding="utf-8")

    done = subprocess.run(
        [sys.executable, ALONE, script],
        check=False,
        cwd=folder,
        env={**os.environ, "WANDB_MODE": "offline", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, f"{page}\n{done.stdout}\n{done.stderr}"


def test_a_page_reaches_no_network(tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)")

    done = subprocess.run(
        [sys.executable, ALONE, script], check=False, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 1
    assert "must not reach 192.0.2.1" in done.stderr
