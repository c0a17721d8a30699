"""The notice that a process is about to go, Ctrl-C, and the last save: real processes and signals.

The loops print a line when they are where a signal is to meet them, so nothing waits by the clock.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.testing import MemoryStore, Recorder
from loops import advance, callbacks_in, local_steps, new_state, train, weight

LOOP = """
import itertools, os, signal, sys, threading
import numpy as np
import ckpt_callbacks as cc

never = threading.Event()
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
{before}
callbacks = cc.Callbacks(
    cc.OrbaxCheckpoint(sys.argv[1], save=cc.EveryNSteps(10**9) | cc.AtEnd(), keep=cc.LatestN(2)),
    {store}
    grace={grace},
)
with callbacks.run({{"w": np.zeros(1000)}}) as run:
    state = run.state
    for step in itertools.count(run.next_step):
        state = {{"w": state["w"] + 1}}
        run.on_step(step, state)
        if step == 5:
            run.wait()
            print("at step 5", flush=True)
        if step >= 5:
            {wait}
        if run.should_stop and {obey}:
            break
print("last", step, flush=True)
{after}
"""
# Not `signal.pause`: the signal may come just before it.
WAIT_FOR_SIGNAL = "[never.wait(0.01) for _ in iter(lambda: run.should_stop, True)]"


@contextmanager
def loop(
    directory: Path,
    wait: str = WAIT_FOR_SIGNAL,
    obey: bool = True,
    before: str = "",
    after: str = "",
    grace: float = 30,
    store: str = "",
) -> Iterator[subprocess.Popen[str]]:
    code = LOOP.format(wait=wait, obey=obey, before=before, after=after, grace=grace, store=store)
    process = subprocess.Popen(
        [sys.executable, "-c", code, directory],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    with process:
        try:
            assert process.stdout.readline() == "at step 5\n"
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_sigterm_saves_one_last_step_and_the_loop_ends_by_itself(tmp_path: Path) -> None:
    with loop(tmp_path / "run") as process:
        process.send_signal(signal.SIGTERM)
        code, out, err = end(process)

    assert (code, out) == (0, "last 5\n"), err
    assert "told to end: step 5 is the last one that is saved" in err
    assert local_steps(tmp_path / "run") == {0, 5}
    assert cc.verify(tmp_path / "run") == []


def test_a_second_sigterm_ends_the_process_at_once(tmp_path: Path) -> None:
    wait = f"{WAIT_FOR_SIGNAL}; print('stopping', flush=True); never.wait()"
    with loop(tmp_path / "run", wait=wait, obey=False) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGTERM)
        code, _, _ = end(process)

    assert code == -signal.SIGTERM
    train_on(tmp_path / "run")


def train_on(directory: Path) -> None:
    """What the process left can be gone on from."""
    with cc.Callbacks(
        cc.OrbaxCheckpoint(directory, save=cc.EveryNSteps(1000), keep=cc.LatestN(2))
    ).run({"w": jnp.zeros(1000)}) as run:
        assert float(run.state["w"][0]) == run.next_step


def test_a_loop_that_does_not_stop_ends_with_the_grace_time(tmp_path: Path) -> None:
    with loop(tmp_path / "run", wait="pass", obey=False, grace=3) as process:
        process.send_signal(signal.SIGTERM)
        code, _, err = end(process)

    assert code == -signal.SIGTERM
    assert "told to end" in err
    steps = local_steps(tmp_path / "run")
    assert len(steps) == 2, "the step after the notice was not saved"
    assert f"told to end: step {max(steps)} is the last one that is saved" in err


def test_a_tracker_that_is_down_does_not_take_all_of_the_grace_time(tmp_path: Path) -> None:
    before = "from ckpt_callbacks.testing import MemoryStore as M; down = M(); down.down = True"
    with loop(tmp_path / "run", before=before, store="down,", grace=3) as process:
        process.send_signal(signal.SIGTERM)
        code, out, err = end(process)

    assert (code, out) == (0, "last 5\n"), err
    assert "Memory does not have everything yet" in err
    run = RunDirectory(tmp_path / "run").read_run()
    assert run
    assert run.status == "preempted"


def test_a_run_that_is_entered_after_the_notice_stops_at_once(tmp_path: Path) -> None:
    after = """
with callbacks.run({"w": np.zeros(1000)}) as run:
    state = run.state
    print(run.should_stop, run.next_step)
    run.on_step(run.next_step, state)
print(len(store.copies))
"""
    slow = """
from ckpt_callbacks.testing import MemoryStore

class Slow(MemoryStore):
    def put(self, checkpoint, aliases):
        never.wait(0.3)
        return super().put(checkpoint, aliases)

store = Slow()
"""
    with loop(tmp_path / "run", before=slow, store="store,", after=after) as process:
        process.send_signal(signal.SIGTERM)
        code, out, err = end(process)

    # What is left of the grace time is for trackers, too.
    assert (code, out) == (0, "last 5\nTrue 6\n2\n"), err
    assert local_steps(tmp_path / "run") == {5, 6}


def test_without_checkpoints_the_signal_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with cc.Callbacks().run(new_state()):
        assert signal.getsignal(signal.SIGTERM) == before


def test_the_handler_that_was_there_is_called_and_put_back(tmp_path: Path) -> None:
    # Not `print`, which the signal may have interrupted.
    before = "signal.signal(signal.SIGTERM, lambda number, frame: os.write(1, b'mine\\n'))"
    after = "os.kill(os.getpid(), signal.SIGTERM); print('end', flush=True)"
    with loop(tmp_path / "run", before=before, after=after) as process:
        process.send_signal(signal.SIGTERM)
        code, out, err = end(process)

    assert (code, out) == (0, "mine\nlast 5\nmine\nend\n"), err


def test_a_forked_child_is_ended_by_sigterm(tmp_path: Path) -> None:
    wait = """
            ready, tell = os.pipe()
            child = os.fork()
            if child == 0:  # a signal before this would be lost: Python clears what is pending
                os.write(tell, b"x")
                never.wait()
            os.read(ready, 1)
            os.kill(child, signal.SIGTERM)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), run.should_stop, flush=True)
            break
    """
    with loop(tmp_path / "run", wait=wait.strip()) as process:
        code, out, err = end(process)

    assert (code, out) == (0, f"{-signal.SIGTERM} False\nlast 5\n"), err


def test_ctrl_c_saves_the_last_step_when_asked_to(tmp_path: Path) -> None:
    with loop(tmp_path / "run") as process:
        process.send_signal(signal.SIGINT)
        code, _, err = end(process)

    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in err
    assert local_steps(tmp_path / "run") == {0, 5}
    train_on(tmp_path / "run")


def test_a_second_ctrl_c_while_a_tracker_is_waited_for_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, interrupt = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupted = threading.Event()

    def hang(call: str) -> None:
        if call == "close":
            main = threading.main_thread().ident
            assert main
            signal.pthread_kill(main, signal.SIGINT)
            interrupted.wait(60)

    def interrupted_loop() -> None:
        with callbacks_in(tmp_path / "run", MemoryStore(before=hang)).run(new_state()) as run:
            run.on_step(0, new_state())
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted_loop()
    finally:
        interrupted.set()
        signal.signal(signal.SIGINT, interrupt)

    assert signal.getsignal(signal.SIGTERM) == before
    train(callbacks_in(tmp_path / "run"), 2)  # it has no owner any more


NESTED = """
import os, signal, sys, threading
import numpy as np
import ckpt_callbacks as cc

def enter(name):
    keep = cc.LatestN(2)
    checkpoint = cc.OrbaxCheckpoint(f"{sys.argv[1]}/{name}", save=cc.EveryNSteps(10**9), keep=keep)
    run = cc.Callbacks(checkpoint).run({"w": np.zeros(1000)})
    run.__enter__()
    return run

first, second = enter("first"), enter("second")
first.__exit__(None, None, None)
second.__exit__(None, None, None)
print("left", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
threading.Event().wait()
"""


def test_two_runs_that_are_left_in_the_order_they_were_entered_leave_the_signal_as_it_was(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", NESTED, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "left\n"), done.stderr


INNER = NESTED.replace(
    "second.__exit__(None, None, None)\n", "second.on_step(0, {'w': np.ones(1000)})\n"
).replace(
    "threading.Event().wait()",
    """second.on_step(1, {'w': np.ones(1000)})
second.__exit__(None, None, None)
print(second.should_stop, sorted(os.listdir(f"{sys.argv[1]}/second")), flush=True)""",
)


def test_a_run_is_told_though_the_one_around_it_was_left_before(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INNER, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    told = "left\nTrue ['.ckpt_callbacks', '0', '1']\n"
    assert (done.returncode, done.stdout) == (0, told), done.stderr


TOGETHER = NESTED.replace(
    "first.__exit__(None, None, None)\nsecond.__exit__(None, None, None)\nprint",
    "[run.on_step(0, {'w': np.ones(1000)}) for run in (first, second)]\nprint",
).replace(
    "threading.Event().wait()",
    """for run in (first, second):
    run.on_step(1, {'w': np.ones(1000)})
print([run.should_stop for run in (first, second)], flush=True)
second.__exit__(None, None, None)
first.__exit__(None, None, None)
print([sorted(os.listdir(f"{sys.argv[1]}/{name}")) for name in ("first", "second")], flush=True)""",
)
BETWEEN = """between = signal.getsignal(signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda number, frame: between(number, frame))
second = enter("second")
"""


@pytest.mark.parametrize("between", ["second = enter('second')\n", BETWEEN])
def test_of_two_runs_at_a_time_both_save_their_last_step(between: str, tmp_path: Path) -> None:
    """Also where a handler of the user's own, set between the two, calls that of the first."""
    code = TOGETHER.replace(
        'first, second = enter("first"), enter("second")\n', f'first = enter("first")\n{between}'
    )
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    saved = "['.ckpt_callbacks', '0', '1']"
    told = f"left\n[True, True]\n[{saved}, {saved}]\n"
    assert (done.returncode, done.stdout) == (0, told), done.stderr


CHAINED = NESTED.replace(
    "first.__exit__(None, None, None)",
    "before = signal.getsignal(signal.SIGTERM)\n"
    "signal.signal(signal.SIGTERM, lambda number, frame: before(number, frame))\n"
    "first.__exit__(None, None, None)",
)


def test_a_handler_that_calls_ours_ends_the_process_after_the_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHAINED, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "left\n"), done.stderr


def test_in_a_distributed_run_the_runtime_takes_the_notice(tmp_path: Path) -> None:
    """One process of `jax.distributed`: the runtime's own handler agrees on a step with itself."""
    before = """
import jax, socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = "127.0.0.1:%d" % free.getsockname()[1]
jax.distributed.initialize(address, 1, 0)
"""
    # The notice reaches the loop through the runtime's own threads.
    with loop(tmp_path / "run", wait="pass", before=before) as process:
        process.send_signal(signal.SIGTERM)
        code, out, err = end(process)

    assert code == 0, err
    last = int(out.removeprefix("last "))
    assert f"told to end: step {last} is the last one that is saved" in err
    assert last in local_steps(tmp_path / "run")


def test_a_run_that_ends_saves_its_last_step_when_asked_to(tmp_path: Path) -> None:
    save = cc.EveryNSteps(4) | cc.AtEnd()
    checkpoint = cc.OrbaxCheckpoint(tmp_path / "run", save=save, keep=cc.LatestN(9))

    train(cc.Callbacks(checkpoint), 7)

    assert local_steps(tmp_path / "run") == {0, 4, 6}
    assert weight(tmp_path / "run") == 7.0


@pytest.mark.parametrize(("policy", "saved"), [(cc.AtEnd(), {0}), (cc.AtEnd(errors=True), {0, 5})])
def test_after_an_exception_the_last_step_is_saved_on_request_only(
    policy: cc.SavePolicy, saved: set[int], tmp_path: Path
) -> None:
    checkpoint = cc.OrbaxCheckpoint(
        tmp_path / "run", save=cc.EveryNSteps(1000) | policy, keep=cc.LatestN(9)
    )

    def fail(step: int, run: cc.Run[object]) -> None:
        if step == 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(cc.Callbacks(checkpoint), 10, before=fail)

    assert local_steps(tmp_path / "run") == saved


def test_a_state_that_was_donated_is_not_saved_and_an_event_says_so(tmp_path: Path) -> None:
    recorder = Recorder()
    save = cc.EveryNSteps(1000) | cc.AtEnd()
    checkpoint = cc.OrbaxCheckpoint(tmp_path / "run", save=save, keep=cc.LatestN(9))
    donating = jax.jit(advance, donate_argnums=0)

    with cc.Callbacks(checkpoint, recorder).run(new_state()) as run:
        state = run.state
        for step in range(3):
            state = donating(state)
            run.on_step(step, state)
        donating(state)

    (failed,) = recorder.of(cc.SaveFailed)
    assert isinstance(failed, cc.SaveFailed)
    assert failed.step == 2
    assert "model/w was donated or deleted" in failed.error
    assert local_steps(tmp_path / "run") == {0}


def test_outside_of_the_main_thread_and_after_a_run_no_handler_is_left(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with callbacks_in(tmp_path / "run").run(new_state()):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before

    seen = []

    def elsewhere() -> None:
        with callbacks_in(tmp_path / "other").run(new_state()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
