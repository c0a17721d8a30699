"""Importing an optional library beside a training loop."""

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_callbacks import extras
from ckpt_callbacks.extras import load

LIBRARY = "import gc\nmade = [[] for _ in range(10_000)]\nenabled = gc.isenabled()\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture
def young(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of all young objects at the moment from which on they are collected again."""
    found: list[int] = []
    enable = gc.enable

    def note() -> None:
        found.extend(id(o) for generation in (0, 1) for o in gc.get_objects(generation))
        enable()

    monkeypatch.setattr(gc, "enable", note)
    return found


def test_no_collection_of_young_objects_looks_at_what_an_import_made(
    folder: Path, young: list[int]
) -> None:
    folder.joinpath("large_library.py").write_text(LIBRARY)

    load("large_library")

    library = sys.modules["large_library"]
    assert not library.enabled
    assert gc.isenabled()
    assert young
    assert not {id(o) for o in library.made} & set(young)


def test_nor_at_what_an_import_made_that_failed(folder: Path, young: list[int]) -> None:
    folder.joinpath("made_before.py").write_text(LIBRARY)
    folder.joinpath("broken_library.py").write_text("import made_before, no_such_library")

    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        load("broken_library")

    assert gc.isenabled()
    assert young
    assert not {id(o) for o in sys.modules["made_before"].made} & set(young)


def test_what_a_user_has_frozen_stays_frozen(folder: Path) -> None:
    folder.joinpath("some_library.py").write_text(LIBRARY)
    gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        load("some_library")
        assert frozen / 2 < gc.get_freeze_count() <= frozen
    finally:
        gc.unfreeze()


def test_a_user_who_collects_by_hand_goes_on_to(folder: Path) -> None:
    folder.joinpath("other_library.py").write_text(LIBRARY)
    gc.disable()
    try:
        load("other_library")
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("loop", [True, False])
def test_orbax_is_there_before_the_library_beside_a_loop_only(folder: Path, loop: bool) -> None:
    folder.joinpath("library.py").write_text("import sys\nprint('orbax.checkpoint' in sys.modules)")
    code = "from ckpt_callbacks.extras import load; load('library')"

    done = subprocess.run(
        [sys.executable, "-c", f"import jax; {code}" if loop else code],
        cwd=folder, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.split() == [str(loop)]


class Capture(threading.Event):
    """What goes ahead of an import, and notes that it was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return True


def test_an_import_gives_way_to_a_capture_once_and_briefly(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for long, since the capture may wait for a module that is being imported."""
    folder.joinpath("two_modules.py").write_text("import another_module_of_it")
    folder.joinpath("another_module_of_it.py").write_text("")
    capture = Capture()
    monkeypatch.setattr(extras, "_ahead", [capture])
    finders = list(sys.meta_path)

    load("two_modules")

    assert capture.waits == [0.05]
    assert sys.meta_path == finders


def test_what_goes_ahead_ends_with_its_block() -> None:
    with extras.ahead():
        (event,) = extras._ahead
    assert event.is_set()
    assert not extras._ahead
