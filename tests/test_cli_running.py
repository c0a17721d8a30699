"""A run is steered from the command line while it goes on, by another process."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import ckpt_callbacks as cc
from ckpt_callbacks.cli import main
from ckpt_callbacks.directory import RunDirectory
from folder_store import FolderStore
from loops import local_steps

HERE = Path(__file__).parent
TRAIN = """
import sys
from pathlib import Path
import ckpt_callbacks as cc
from folder_store import FolderStore
from loops import callbacks_in, new_state

class Tells:
    @cc.hookimpl
    def on_promoted(self, event: cc.Promoted) -> None:
        print("promoted", event.alias, event.step, flush=True)

    @cc.hookimpl
    def on_evicted(self, event: cc.Evicted) -> None:
        print("evicted", event.store, event.step, flush=True)

root, store = map(Path, sys.argv[1:])
with callbacks_in(root, FolderStore(store), Tells()).run(new_state()) as run:
    state = run.state
    step = run.next_step
    print("begins", step, flush=True)
    for line in sys.stdin:
        while step <= int(line):
            run.on_eval(step, {"score": 1.0 if step == 1 else 0.5})
            run.on_step(step, state)
            step += 1
        run.wait()
        print("saved", line.strip(), flush=True)
"""


class Training:
    """A process that trains as far as it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._told: set[str] = set()
        self.kill = process.kill

    def to(self, step: int) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{step}\n")
        self._process.stdin.flush()
        self.until(f"saved {step}")

    def until(self, *wanted: str) -> None:
        """Wait until it has told all of this."""
        assert self._process.stdout
        while not self._told >= {*wanted}:
            line = self._process.stdout.readline()
            assert line, f"it ended without { ({*wanted} - self._told) }"
            self._told.add(line.strip())


@contextmanager
def training(folder: Path) -> Iterator[Training]:
    command = [sys.executable, "-c", TRAIN, folder / "run", folder / "store"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=HERE) as process:
        try:
            yield Training(process)
            process.communicate(timeout=60)
        finally:
            process.kill()


def within_a_second(*arguments: object) -> str:
    begun = time.monotonic()
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    taken = time.monotonic() - begun
    assert result.exit_code == 0, result.output
    assert taken < 1, f"{arguments[0]} took {taken:.2f} s"
    return result.output


def test_a_running_run_is_steered_and_remembers_it_after_a_kill(tmp_path: Path) -> None:
    root, store = tmp_path / "run", FolderStore(tmp_path / "store")
    CliRunner().invoke(main, ["ls", str(tmp_path)])  # what it imports is not what is measured
    import ckpt_callbacks.requests  # noqa: F401

    with training(tmp_path) as process:
        process.until("begins 0")
        process.to(3)
        within_a_second("pin", root, 2)
        assert RunDirectory(root).open_run().pins == {2}
        within_a_second("promote", root, 3, "production")
        process.until("promoted production 3")
        process.to(7)
        process.until("evicted local 4", "evicted local 5")
        assert local_steps(root) == {1, 2, 3, 6, 7}

        shown = within_a_second("prune", root, "--keep", "latest:1", "--yes")
        assert "2 checkpoints" in shown
        process.until("evicted local 1", "evicted local 6", "evicted folder 6")
        assert local_steps(root) == {2, 3, 7}
        process.kill()

    with training(tmp_path) as process:
        process.until("begins 8")
        process.to(9)
        process.until("evicted local 7")
        assert local_steps(root) == {2, 3, 8, 9}
        assert cc.find(root, "production").step == 3
        within_a_second("unpin", root, 2)
        process.until("evicted local 2", "evicted folder 2")
        within_a_second("promote", root, 8, "production")
        process.until("promoted production 8", "evicted local 3", "evicted folder 3")
        process.to(12)

    assert local_steps(root) == {8, 11, 12}
    listing = store.listing()
    assert listing
    assert set(listing.copies) == {8, 11, 12}
    assert dict(listing.aliases)["production"] == 8


def test_an_agreed_prune_keeps_what_has_become_worth_it(tmp_path: Path) -> None:
    """What is shown is what goes, but nothing that was pinned meanwhile."""
    from ckpt_callbacks.requests import carry_out, plan_prune

    with training(tmp_path) as process:
        process.until("begins 0")
        process.to(3)
        root = tmp_path / "run"
        plan = plan_prune(root, cc.LatestN(1))
        assert [gone.step for gone in plan.goes] == [1, 2]
        assert cc.pin(root, 2)
        process.to(4)
        assert carry_out(root, plan)
        process.until("evicted local 1")

    assert local_steps(root) == {2, 3, 4}


def test_watch_tells_each_change(tmp_path: Path) -> None:
    """In a process of its own, which reads the files of a run that goes on."""
    with training(tmp_path) as process:
        process.until("begins 0")
        process.to(1)
        code = "from ckpt_callbacks.cli import main; main()"
        command = [sys.executable, "-c", code, "watch", tmp_path / "run", "--json"]
        pipe: Any = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, text=True) as watch:
            try:
                assert '"step": 1' in watch.stdout.readline()
                process.to(2)
                while '"step": 2' not in (line := watch.stdout.readline()):
                    assert line
            finally:
                watch.kill()
