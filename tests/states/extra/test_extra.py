"""The same for states of libraries that the other tests do without."""

from pathlib import Path

import pytest

from states.both import save_and_resume

GROUPS = ["flashbax", "grain", "haiku", "keras", "qwix"]


@pytest.mark.parametrize("group", GROUPS)
def test_every_leaf_is_the_same_in_another_process(group: str, tmp_path: Path) -> None:
    save_and_resume(f"extra.{group}", tmp_path)
