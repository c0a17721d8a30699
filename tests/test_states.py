"""Every kind of state goes on in another process as if nothing had happened, leaf by leaf."""

from pathlib import Path

import pytest

from states.both import save_and_resume

GROUPS = ["nnx", "linen", "equinox", "optax", "rl", "plain", "mixed"]


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_leaf_is_the_same_in_another_process(group: str, tmp_path: Path) -> None:
    save_and_resume(f"cases.{group}", tmp_path)
