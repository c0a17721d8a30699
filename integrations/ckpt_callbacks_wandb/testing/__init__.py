"""A stand-in for the W&B server, for tests: that server is not free software.

The real W&B client talks to it over loopback, so a test shows what the client sends, and how the
client and a tracker react to answers and to faults. It shows nothing of what wandb.ai does:
protected aliases (but for one rule), garbage collection, the enforcement of TTLs, rate limits,
what an object store does, or how late a listing knows of a change. What it answers is a model,
made of what the client asks for and of W&B's documentation.

::

    # conftest.py
    pytest_plugins = ["ckpt_callbacks_wandb.testing"]

    # test_it.py
    def test_a_refused_upload_is_told(wandb_server: WandbServer) -> None:
        wandb_server.begin(Fault("403", request="PUT file"))
        ...

Without pytest, `WandbServer` is a context manager. It needs `graphql-core`.
"""

from importlib.util import find_spec

from ckpt_callbacks_wandb.testing._faults import Fault
from ckpt_callbacks_wandb.testing._server import WandbServer
from ckpt_callbacks_wandb.testing._snapshots import StoredRun, StoredVersion

__all__ = ["Fault", "StoredRun", "StoredVersion", "WandbServer"]

if find_spec("pytest"):
    from ckpt_callbacks_wandb.testing._fixture import wandb_server as wandb_server

    __all__ += ["wandb_server"]
