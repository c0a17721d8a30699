"""What people who wait are shown, and that it costs the loop nothing."""

import io
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_callbacks as cc
from ckpt_callbacks import progress
from ckpt_callbacks.progress import growing, transfer, watched
from loops import advance, callbacks_in, new_state
from test_costs import Waits


class Terminal(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self._written = threading.Condition()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._written:
            count = super().write(text)
            self._written.notify_all()
        return count

    def wait_for(self, text: str) -> None:
        with self._written:
            assert self._written.wait_for(lambda: text in self.getvalue(), 20)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    screen = Terminal()
    # Not that of `sys` itself, which pytest replaces before each test.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "_AFTER", 0.0)
    monkeypatch.setattr(progress, "_LOOK", 0.01)
    yield screen
    assert progress._display is None


def loop(bar: cc.ProgressBar, directory: Path, steps: int = 30) -> None:
    with callbacks_in(directory, bar, every=10).run(new_state()) as run:
        state = run.state
        for step in range(run.next_step, steps):
            state = advance(state)
            if step % 10 == 0:
                run.on_eval(step, {"score": step / 100})
            run.on_step(step, state, {"loss": jnp.float32(step), "rate": np.float32(0.5)})


def test_where_nobody_watches_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert not watched()
    with transfer("verifying", 100) as moved, growing("saving", Path()):
        moved(50)

    assert progress._display is None
    assert capsys.readouterr().err == ""


def test_a_transfer_shows_bytes_and_rate(terminal: Terminal) -> None:
    with transfer("verifying", 4 << 20) as moved:
        moved(1 << 20)
        terminal.wait_for("1.0 MiB of 4.0 MiB")

    assert "verifying" in terminal.getvalue()
    assert "/s" in terminal.getvalue()


def test_before_anything_has_moved_no_bytes_are_shown(terminal: Terminal) -> None:
    with transfer("fetching") as moved:
        terminal.wait_for("fetching")
        assert "0 B" not in terminal.getvalue()
        moved(1 << 20)
        terminal.wait_for("1.0 MiB, ")


def test_what_is_done_at_once_shows_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_AFTER", 60.0)

    with transfer("verifying", 100) as moved:
        moved(100)

    assert terminal.getvalue() == ""


def test_a_folder_that_grows_is_followed(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(b"x" * 5000)

    with growing("fetching", tmp_path, tmp_path / "none", total=4096):
        (tmp_path / "file").write_bytes(b"x" * 2048)
        terminal.wait_for("2.0 KiB of 4.0 KiB")


def test_it_may_be_hidden(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_hidden", threading.Event())
    assert watched()
    progress.hide()

    assert not watched()


def test_a_terminal_without_cursor_has_no_bars(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")

    assert not watched()


def test_two_bars_share_one_display(terminal: Terminal) -> None:
    with transfer("one", 10) as first, transfer("two", 10) as second:
        first(1)
        second(1)
        terminal.wait_for("two")

    assert "one" in terminal.getvalue()


def test_a_bar_shows_where_the_loop_is(terminal: Terminal, tmp_path: Path) -> None:
    bar = cc.ProgressBar(29, every=1)
    seen: list[str] = []

    class Reader:
        @cc.hookimpl
        def on_saved(self, event: cc.Saved) -> None:
            seen.append(bar._text())

    with cc.Callbacks(
        cc.OrbaxCheckpoint(tmp_path / "run", save=cc.EveryNSteps(10), keep=cc.LatestN(1)),
        bar,
        Reader(),
    ).run(new_state()) as run:
        state = run.state
        for step in range(30):
            state = advance(state)
            run.on_step(step, state, {"loss": jnp.float32(step), "rate": np.float32(0.5)})
            if step == 20:
                run.wait()
        assert "step 29 of 29 (100 %)" in bar._text()

    assert "training" in terminal.getvalue()
    assert "rate 0.5" in bar._text()
    assert "loss 20" in bar._text()  # of the last save, since that one is on the host
    assert "saved 20" in bar._text()
    assert len(seen) == 3


def test_elsewhere_it_is_a_line_now_and_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ckpt_callbacks")

    loop(cc.ProgressBar(29, every=5, interval=1e-9), tmp_path / "run")

    lines = [r.message for r in caplog.records if r.message.startswith(("step", "finished"))]
    assert [line.partition(",")[0] for line in lines] == [
        *(f"step {step} of 29 ({100 * step / 29:.0f} %)" for step in range(0, 30, 5)),
        "finished",
    ]
    assert {r.levelno for r in caplog.records if r.message in lines} == {logging.INFO}
    assert "score 0.2" in lines[-1]
    assert "saved 20" in lines[-1]
    assert re.search(r", [\d.e+]+ (steps/s|s/step), ", lines[-1])


def test_who_did_not_set_logging_up_sees_the_lines_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="ckpt_callbacks")

    loop(cc.ProgressBar(interval=3600), tmp_path / "run")

    (line,) = [r for r in caplog.records if "finished, last looked at step 20" in r.message]
    assert line.levelno == logging.WARNING


def test_it_never_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = cc.ProgressBar(every=1, interval=1e-9)
    waits = Waits(monkeypatch)

    bar.on_run_started(cc.RunStarted(None, None, 0))
    for step in range(5):
        bar.on_step(cc.Step(step, None, {"loss": jnp.float32(step), "rate": 0.5}))
    bar.on_run_ended(cc.RunEnded("finished", {}))

    assert waits.here() == 0
    assert "loss" not in bar._text()
    assert "rate 0.5" in bar._text()


def test_it_takes_only_the_steps_it_asked_for(tmp_path: Path) -> None:
    bar = cc.ProgressBar(every=10)
    taken: list[int] = []
    take = bar._take
    bar._take = lambda event: (taken.append(event.step), take(event))[1]  # type: ignore[method-assign]

    loop(bar, tmp_path / "run")

    assert taken == [0, 10, 20]


def test_a_profile_and_a_bar_go_together(terminal: Terminal, tmp_path: Path) -> None:
    checkpoint = cc.OrbaxCheckpoint(tmp_path / "run", save=cc.EveryNSteps(2), keep=cc.LatestN(1))
    with cc.Callbacks(checkpoint, cc.ProgressBar(every=1), profile=True).run(new_state()) as run:
        state = run.state
        for step in range(3):
            run.on_step(step, state)

    assert any("ProgressBar" in row.name for row in run.profile.rows)  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [{"every": 0}, {"total": -1}, {"every": True}, {"interval": 0}])
def test_wrong_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(cc.ConfigError, match="ProgressBar"):
        cc.ProgressBar(**wrong)


def test_waits_of_people_have_bars(terminal: Terminal, tmp_path: Path) -> None:
    """Saves at the end, verification, exports: with a screen they work as without."""
    loop(cc.ProgressBar(every=1), tmp_path / "run")

    assert cc.verify(tmp_path / "run") == []
    assert cc.export(tmp_path / "run", tmp_path / "a.npz").exists()
    assert "training" in terminal.getvalue()
