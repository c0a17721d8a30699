"""Run the code of a page, with loopback as the only network: `python alone.py PAGE.py`.

A page that defines tests is given to pytest, which imports it and runs them.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

HERE = {"127.0.0.1", "::1", "localhost", "", None}


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if (host.decode() if isinstance(host, bytes) else host) not in HERE:
        raise PermissionError(f"a page of the documentation must not reach {host}")


if __name__ == "__main__":
    sys.addaudithook(refuse)
    page = sys.argv[1]
    if "class Test" in Path(page).read_text(encoding="utf-8"):
        import pytest

        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", page]))
    runpy.run_path(page, run_name="__main__")
