"""The other examples, in short: each ends with its table, and goes on as if it never stopped."""

import runpy
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_callbacks as cc
import digits_linen
import digits_nnx
import fine_tune
import rl
from ckpt_callbacks.state import leaves_of

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"


class _Silent:
    """Stands in for the progress bar, which writes to the terminal."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *error: object) -> None: ...

    def add_task(self, *arguments: Any, **options: Any) -> int:
        return 0

    def update(self, *arguments: Any, **options: Any) -> None: ...


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.progress.Progress", _Silent)
    monkeypatch.setattr(digits_linen, "Progress", _Silent)
    monkeypatch.setattr(rl, "Progress", _Silent)
    monkeypatch.setenv("COLUMNS", "140")


class Lost(Exception):
    """The end of a run in its midst."""


class Cut:
    """Ends a run at a step, as an error in the loop would."""

    def __init__(self, step: int) -> None:
        self.step = step

    @cc.hookimpl(critical=True)
    def on_step(self, event: cc.Step) -> None:
        if event.step == self.step:
            raise Lost


def every(directory: Path, steps: int, cut: int | None = None) -> cc.Callbacks:
    """Save every few steps, and be lost at one of them."""
    checkpoint = cc.OrbaxCheckpoint(directory, save=cc.EveryNSteps(steps), keep=cc.LatestN(1))
    return cc.Callbacks(checkpoint, *([] if cut is None else [Cut(cut)]))


def content(state: Any) -> dict[str, bytes]:
    """Return the bytes of every leaf by its path."""

    def bytes_of(leaf: Any) -> bytes:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    return {"/".join(path): bytes_of(leaf) for path, leaf in leaves_of(state).items()}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run an example as its command line does, and return what it printed."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_linen_ends_with_the_table(script: Any, tmp_path: Path) -> None:
    printed = script("digits_linen.py", "--directory", tmp_path, "--steps", 100)

    for word in ("val_accuracy", "best #1", "latest #1", "local, MLflow"):
        assert word in printed
    assert cc.find(tmp_path / "digits-linen", "last").step == 100
    assert cc.find(tmp_path / "digits-linen", "best").metrics["val_accuracy"] > 0.7


def test_linen_goes_on_as_if_it_never_stopped(tmp_path: Path) -> None:
    plain, _ = digits_linen.train(cc.Callbacks(), 40)

    with pytest.raises(Lost):
        digits_linen.train(every(tmp_path / "run", 10, cut=25), 40)
    resumed, _ = digits_linen.train(every(tmp_path / "run", 10), 40)

    assert content(resumed) == content(plain)
    assert any("batch_stats" in path for path in content(plain))
    assert any("dropout" in path for path in content(plain))


@pytest.fixture(scope="module")
def never_stopped() -> rl.State:
    state, _ = rl.train(cc.Callbacks(), 60, included=True, buffer_callbacks=cc.Callbacks())
    assert int(state.replay.size) == 61 * rl.ENVIRONMENTS  # so that it learned, and lost no row
    return state


def resumed(root: Path, *, included: bool, buffer_every: int | None, steps: int = 60) -> rl.State:
    """Train, be lost at step 45 when 40 is the newest that was saved, and train on."""

    def own() -> cc.Callbacks:
        return every(root / "buffer", buffer_every) if buffer_every else cc.Callbacks()

    with pytest.raises(Lost):
        rl.train(every(root, 20, cut=45), 60, included=included, buffer_callbacks=own())
    state, _ = rl.train(every(root, 20), steps, included=included, buffer_callbacks=own())
    return state


def test_with_the_buffer_in_the_state_it_goes_on_as_if_it_never_stopped(
    tmp_path: Path, never_stopped: rl.State
) -> None:
    state = resumed(tmp_path, included=True, buffer_every=None)

    assert content(state) == content(never_stopped)
    assert state.env_steps == 61 * rl.ENVIRONMENTS
    assert type(state.env_steps) is int


@pytest.mark.parametrize("buffer_every", [20, 44])
def test_a_buffer_of_its_own_that_is_not_older_loses_nothing(
    buffer_every: int, tmp_path: Path, never_stopped: rl.State
) -> None:
    """One that was saved at step 44 has rows that the run, which goes on from 40, is to collect."""
    state = resumed(tmp_path, included=False, buffer_every=buffer_every)

    assert cc.find(tmp_path / "buffer", "last").step == {20: 60, 44: 44}[buffer_every]
    assert content(state) == content(never_stopped)


def test_an_older_buffer_of_its_own_lacks_what_came_since(tmp_path: Path) -> None:
    state = resumed(tmp_path, included=False, buffer_every=30)

    assert int(state.replay.size) == (31 + 20) * rl.ENVIRONMENTS  # up to 30, and from 41
    assert cc.find(tmp_path / "buffer", "last").step == 60


def test_a_buffer_that_was_left_out_is_filled_again_before_it_learns(tmp_path: Path) -> None:
    saved = resumed(tmp_path, included=False, buffer_every=None, steps=40)

    def going_on(steps: int) -> rl.State:
        return rl.train(
            every(tmp_path, 20), steps, included=False, buffer_callbacks=cc.Callbacks()
        )[0]

    idle = rl.LEARN_FROM // rl.ENVIRONMENTS
    filling, learning = going_on(40 + idle), going_on(40 + idle + 1)
    assert int(filling.replay.size) == idle * rl.ENVIRONMENTS
    assert content(filling.params) == content(saved.params)
    assert content(learning.params) != content(saved.params)


def test_a_full_ring_forgets_the_oldest_and_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl, "CAPACITY", 4 * rl.ENVIRONMENTS)
    replay = rl.new_state().replay
    for number in range(6):
        rows = jax.tree.map(lambda x: x[: rl.ENVIRONMENTS], replay.rows)
        replay = rl.add(replay, rows._replace(action=jnp.full_like(rows.action, number)))

    sampled = rl.sample(rl.without_newest(replay, rl.ENVIRONMENTS), jax.random.key(0))

    assert set(np.asarray(sampled.action).tolist()) == {2, 3, 4}
    assert int(rl.without_newest(replay, 9 * rl.ENVIRONMENTS).size) == 0


@pytest.mark.parametrize("buffer", ["left-out", "included", "own"])
def test_rl_ends_with_the_table(buffer: str, script: Any, tmp_path: Path) -> None:
    printed = script("rl.py", "--directory", tmp_path, "--steps", 50, "--buffer", buffer)

    assert "mean_return" in printed
    assert printed.count("kept because") == 1 + (buffer == "own")
    newest = cc.find(tmp_path / f"rl-{buffer}", "last")
    assert newest.step == 50
    assert newest.metrics["mean_return"] > 0


def test_fine_tuning_begins_with_the_weights_of_the_best(script: Any, tmp_path: Path) -> None:
    printed = script("fine_tune.py", "--directory", tmp_path, "--steps", 200)

    assert printed.count("kept because") == 2
    rows = [line.split() for line in printed.split("from scratch\n")[1].splitlines()]
    assert [int(step) for step, _, _ in rows] == [0, 10, 20, 30, 40, 50]
    assert float(rows[-1][1]) > float(rows[-1][2])

    pretrained = digits_nnx.new_state(1e-3, classes=5)
    cc.restore(tmp_path / "digits-pretrained", like=pretrained, which="best")
    fresh = digits_nnx.new_state(1e-3)
    callbacks = every(tmp_path / "another", 10)
    with fine_tune.fine_tuning(callbacks, tmp_path / "digits-pretrained") as run:
        assert run.next_step == 0
        state = run.state
        first, last = state["model"].layers
        assert content(first) == content(pretrained["model"].layers[0])
        assert content(last) == content(fresh["model"].layers[1])
        assert content(state["optimizer"]) == content(fresh["optimizer"])


def test_stacked_layers_are_taken_apart_without_a_change(script: Any, tmp_path: Path) -> None:
    printed = script("stacked_layers.py", "--directory", tmp_path, "--steps", 100)

    best = cc.find(tmp_path / "stacked-layers", "best").metrics["val_accuracy"]
    accuracy = float(printed.partition("an accuracy of ")[2].split()[0])
    assert accuracy == pytest.approx(best, abs=0.003)  # scan rounds otherwise than a loop
    assert accuracy > 0.8
    assert "the next step is the same: True" in printed
