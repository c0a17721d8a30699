"""The fixture of pytest."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_callbacks_wandb.testing._server import WandbServer

__all__ = ["wandb_server"]


@pytest.fixture
def wandb_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """Start a server for one test, and lead the client there with folders of its own."""
    _forget_client()
    with WandbServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            folder = tmp_path / name.lower()
            folder.mkdir(exist_ok=True)
            monkeypatch.setenv(name, str(folder))
        yield server
        # The client's service ends when all is sent, so it must be able to.
        server.on_request = None
        server.begin()
        server.release()
        server.start()
        _forget_client()


def _forget_client() -> None:
    """End the client's service, which knows the server of another test."""
    # A test that does not import it needs no second for that.
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()
