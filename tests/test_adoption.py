"""Checkpoints of Orbax alone are taken into a run directory, and a run goes on from them."""

import os
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import orbax.checkpoint as v0
import pytest
from click.testing import CliRunner
from orbax.checkpoint import v1

import ckpt_callbacks as cc
from ckpt_callbacks import adoption, manifest
from ckpt_callbacks.cli import main
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.failpoints import arm
from ckpt_callbacks.payload import WEIGHTS
from ckpt_callbacks.reading import read_alone
from ckpt_callbacks.testing import MemoryStore, Recorder
from ckpt_callbacks_mlflow import MLflowTracker
from foreign import managed
from loops import callbacks_in, local_steps, new_state, train, weight

SCORES = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.2}


def with_v0(root: Path) -> None:
    args = {step: v0.args.StandardSave(new_state(step + 1.0)) for step in SCORES}
    managed(root, args, lambda step: {"score": SCORES[step], "by": "us"})


def with_v1(root: Path) -> None:
    with v1.training.Checkpointer(root) as checkpointer:
        for step, score in SCORES.items():
            checkpointer.save(step, new_state(step + 1.0), metrics={"score": score})


@pytest.fixture(params=[with_v0, with_v1])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    request.param(tmp_path / "orbax")
    return tmp_path / "orbax"


def seen(root: Path) -> dict[str, tuple[int, int, bytes | None]]:
    """Return mode, time of change, and content of everything below `root`, and of itself."""
    return {
        str(p): (p.stat().st_mode, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in [root, *root.rglob("*")]
    }


def test_a_run_goes_on_from_what_was_adopted(source: Path, tmp_path: Path) -> None:
    root, store, recorder = tmp_path / "run", MemoryStore(), Recorder()
    before = seen(source)

    assert cc.adopt(source, root) == [1, 2, 3, 4]
    assert local_steps(root) == {1, 2, 3, 4}
    assert cc.find(root, 2).metrics == {"score": 0.9}
    assert cc.find(root, 2).time == pytest.approx((source / "2").stat().st_mtime)
    assert [weight(root, which) for which in (1, "last")] == [2.0, 5.0]
    with callbacks_in(root, store, recorder).run(new_state()) as run:
        assert (run.next_step, run.unmeasured) == (5, [])
        assert float(run.state["model"]["w"][0, 0]) == 5.0

    assert local_steps(root) == set(store.copies) == {2, 3, 4}
    assert store.aliases == {"best": 2, "last": 4}
    assert {e.step for e in recorder.events if isinstance(e, cc.Evicted)} == {1}
    state = train(callbacks_in(root, store), 7)
    assert float(state["model"]["w"][0, 0]) == 7.0
    assert local_steps(root) == set(store.copies) == {2, 5, 6}
    assert weight(root, "best") == 3.0
    assert cc.verify(root) == []
    assert cc.adopt(source, root) == []  # nor is what was evicted taken again
    assert seen(source) == before


def test_what_was_adopted_is_loaded_from_a_tracker(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    cc.adopt(source, tmp_path / "run")
    tracker = MLflowTracker(experiment="digits", register_as="digits")
    with callbacks_in(tmp_path / "run", tracker, drain_limit=60).run(new_state()):
        pass
    alone = read_alone(tmp_path / "run" / "2", None, {}, WEIGHTS)  # as a model of MLflow does
    assert float(alone["model"]["w"][0, 0]) == 3.0
    shutil.rmtree(tmp_path / "run")

    state = cc.restore("mlflow:/digits@best", like=new_state(), only="params")
    assert float(state["model"]["w"][0, 0]) == 3.0


def test_what_was_adopted_is_verified(source: Path, tmp_path: Path) -> None:
    cc.adopt(source, tmp_path / "run")
    name = next((tmp_path / "run" / "4").rglob("_METADATA"))
    name.unlink()
    name.write_bytes(b"damage")

    with pytest.raises(cc.CorruptCheckpoint, match=str(name)):
        weight(tmp_path / "run")
    with callbacks_in(tmp_path / "run").run(new_state()) as run:
        assert run.next_step == 4


def test_the_bytes_are_shared_or_else_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = Path("1", "_CHECKPOINT_METADATA")
    cc.adopt(source, tmp_path / "linked", steps=[1])
    assert (tmp_path / "linked" / name).samefile(source / name)

    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    cc.adopt(source, tmp_path / "copied")
    assert not (tmp_path / "copied" / name).samefile(source / name)
    shutil.rmtree(source)
    assert weight(tmp_path / "linked") == 2.0
    assert weight(tmp_path / "copied") == 5.0


def test_steps_are_chosen_and_later_ones_follow(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert cc.adopt(source, root, steps=[2, 1]) == [1, 2]
    assert cc.adopt(source, root, steps=[3]) == [3]
    train(callbacks_in(root), 5)
    assert local_steps(root) == {2, 3, 4}

    with pytest.raises(cc.UsageError, match=r"step 4 that is not the one in .*orbax/4"):
        cc.adopt(source, root)
    with pytest.raises(cc.CheckpointNotFound, match="has no step 7; it has 1, 2, 3, 4"):
        cc.adopt(source, root, steps=[7])


def test_a_policy_holds_from_the_first_run_on(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    cc.adopt(source, root, steps=[1, 2, 3])
    cc.report_metrics(root, 1, {"score": 0.95})
    cc.pin(root, 3)
    cc.adopt(source, root)
    assert local_steps(root) == {1, 2, 3, 4}  # so far there is none

    with callbacks_in(root, keep=cc.LatestN(1) | cc.BestN(1, "score", mode="max")).run(new_state()):
        pass

    assert local_steps(root) == {1, 3, 4}
    assert cc.find(root, "best").step == 1


def test_what_the_run_has_is_not_replaced(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(callbacks_in(root), 2)
    with pytest.raises(cc.UsageError, match=r"step 1 that is not the one in .*orbax/1"):
        cc.adopt(source, root)
    assert cc.adopt(source, root, steps=[3]) == [3]
    with pytest.raises(cc.UsageError, match=r"has step 3, which is newer than step 2 of .*orbax"):
        cc.adopt(source, root, steps=[2])

    assert local_steps(root) == {0, 1, 3}
    assert weight(root, 1) == 2.0


def adopt_and_kill(source: Path, root: Path, at: int) -> bool:
    """Stop at a write of a small file, as a kill would; return whether there was one."""
    left = at

    def kill(name: str) -> None:
        nonlocal left
        left -= name in ("file-written", "file-replaced")
        if not left:
            arm(None)
            raise KeyboardInterrupt

    arm(kill)
    try:
        cc.adopt(source, root)
    except KeyboardInterrupt:
        return True
    finally:
        arm(None)
    return False


def test_killed_and_repeated_it_ends_as_if_it_never_was(source: Path, tmp_path: Path) -> None:
    before = seen(source)
    for at in count(1):
        root = tmp_path / f"run-{at}"
        if not adopt_and_kill(source, root, at):
            break
        cc.adopt(source, root)

        assert local_steps(root) == {1, 2, 3, 4}
        assert [c.metrics["score"] for c in cc.checkpoints(root)] == list(SCORES.values())
        assert cc.verify(root) == []
        assert list(RunDirectory(root).trash.iterdir()) == []
    assert at > 2 * len(SCORES)  # each record was written
    assert seen(source) == before


def test_a_process_that_was_killed_is_made_good(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from ckpt_callbacks.cli import main; main()", "adopt"]
    environment = os.environ | {"CKPT_CALLBACKS_FAILPOINT": "file-written:5"}
    done = subprocess.run([*command, source, tmp_path / "run"], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert 0 < len(local_steps(tmp_path / "run")) < len(SCORES)

    assert cc.adopt(source, tmp_path / "run")

    assert local_steps(tmp_path / "run") == SCORES.keys()
    assert cc.verify(tmp_path / "run") == []


def test_killed_and_not_repeated_a_run_goes_on_from_what_is_whole(
    source: Path, tmp_path: Path
) -> None:
    newest: list[int] = []
    for at in count(1):
        root = tmp_path / f"run-{at}"
        if not adopt_and_kill(source, root, at):
            break
        with callbacks_in(root).run(new_state()) as run:
            newest.append(run.next_step - 1)
            assert float(run.state["model"]["w"][0, 0]) == run.next_step
        assert cc.verify(root) == []
    assert sorted(newest) == newest
    assert set(newest) == {-1, 1, 2, 3, 4}


@pytest.mark.parametrize("harm", ["removed", "link"])
def test_what_changes_while_it_is_taken_is_refused(
    harm: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = manifest.link_tree

    def link_tree(path: Path, target: Path) -> bool:
        if harm == "link" and path.name == "3":
            (path / "metrics" / "more").symlink_to(path / "metrics" / "metrics")
        linked = real(path, target)
        if harm == "removed" and path.name == "3":
            (path / "_CHECKPOINT_METADATA").unlink()
        return linked

    monkeypatch.setattr(adoption, "link_tree", link_tree)

    with pytest.raises(cc.CheckpointNotFound, match=r"orbax/3 holds links, or was changed"):
        cc.adopt(source, tmp_path / "run")

    assert local_steps(tmp_path / "run") == {1, 2}
    with callbacks_in(tmp_path / "run").run(new_state()) as run:
        assert run.next_step == 3


def test_a_source_that_is_none_is_refused(source: Path, tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 1)

    for wrong, target, why in (
        (tmp_path / "run", tmp_path / "new", "is a run directory itself"),
        (tmp_path / "absent", tmp_path / "new", "holds no checkpoints of Orbax by step"),
        (source / "1", tmp_path / "new", "holds no checkpoints of Orbax by step"),
        (source, source, "must not be changed"),
        (source, source / "run", "must not be changed"),
    ):
        with pytest.raises(cc.ConfigError, match=why):
            cc.adopt(wrong, target)
    assert not (tmp_path / "new").exists()
    with callbacks_in(tmp_path / "run").run(new_state()) as run:
        assert run.state
        with pytest.raises(cc.DirectoryLocked):
            cc.adopt(source, tmp_path / "run")


def test_the_command_line_adopts(source: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "run")

    def said(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["adopt", str(source), *arguments])
        return result.exit_code, result.output

    assert said(root, "--step", "1", "--step", "2") == (0, "took 1, 2\n")
    assert said(root) == (0, "took 3, 4\n")
    assert said(root) == (0, "took nothing, since all is there\n")
    code, output = said(root, "--step", "9")
    assert code == 2
    assert "has no step 9" in output
