"""What holds for every run directory, and for one in object storage, wherever that is."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import ckpt_callbacks as cc
from ckpt_callbacks.bucket import Bucket
from ckpt_callbacks.cli import main
from ckpt_callbacks.cli.doctor import checks
from ckpt_callbacks.cli.listing import facts_of
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.history_file import HistoryFile
from ckpt_callbacks.lease import HELD, SLACK, Lease
from ckpt_callbacks.manifest import settle
from ckpt_callbacks.memory import Memory, Tail
from ckpt_callbacks.record import Gone, Record, RunFile
from ckpt_callbacks.remote import GRACE, RemoteDirectory, open_directory
from ckpt_callbacks.report import why
from ckpt_callbacks.retention import policy_to_json
from ckpt_callbacks.testing import FakeClock, MemoryStore, Recorder
from folder_store import FolderStore

SCORES = {0: 0.5, 2: 0.9, 4: 0.1, 6: 0.2, 8: 0.3, 10: 0.4}
KEEP = cc.LatestN(1) | cc.BestN(1, "score", mode="max")
Machine = Callable[[str], None]
"""Goes to the machine of a name, which has scratch of its own."""


def new_state() -> dict[str, Any]:
    return {"params": {"w": np.zeros(1000)}, "opt": {"mu": np.zeros((3, 3))}}


def after(step: int) -> dict[str, Any]:
    total = float(sum(range(step + 1)))
    return {"params": {"w": np.full(1000, total)}, "opt": {"mu": np.full((3, 3), -total)}}


def train(
    where: str | Path, until: int, *stores: Any, keep_here: Any = None, **options: Any
) -> None:
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(where, save=cc.EveryNSteps(2), keep=KEEP, keep_here=keep_here),
        *stores,
        drain_limit=20,
    )
    with callbacks.run(new_state(), config={"rate": 0.5}, **options) as run:
        state = run.state
        for step in range(run.next_step, until):
            state = {
                "params": {"w": state["params"]["w"] + step},
                "opt": {"mu": state["opt"]["mu"] - step},
            }
            if step in SCORES:
                run.on_eval(step, {"score": SCORES[step]})
            run.on_step(step, state, {"loss": float(step)})


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal(found["params"]["w"], expected["params"]["w"])
    np.testing.assert_array_equal(found["opt"]["mu"], expected["opt"]["mu"])


def steps_in(bucket: Bucket) -> set[str]:
    """Return the folders of checkpoints of which there is anything."""
    return {name.partition("/")[0] for name in bucket.tree("") if name[0].isdecimal()}


def flip(bucket: Bucket, step: int) -> str:
    """Flip a bit in the largest object of a checkpoint, and return its name."""
    sizes = bucket.tree(str(step))
    name = f"{step}/{max(sizes, key=lambda name: sizes[name])}"
    content = bytearray(bucket.read(name) or b"")
    content[len(content) // 2] ^= 1
    bucket.write(name, bytes(content))
    return name


def command(*line: str, exit_code: int = 0) -> str:
    done = CliRunner().invoke(main, line)
    assert done.exit_code == exit_code, done.output
    return done.output


def problems_of(where: str) -> dict[str, str]:
    return {c.what: c.text for c in checks(where) if c.status == "problem"}


def _refuse(*_: Any, **__: Any) -> Any:
    raise OSError("503 Slow Down")


def committed(directory: RunDirectory) -> list[int]:
    return [step for step in directory.folders() if directory.is_committed(step)]


def orbax_wrote(directory: RunDirectory, step: int) -> None:
    """Write what passes for a checkpoint that Orbax has committed."""
    path = directory.path(step)
    (path / "state" / "d").mkdir(parents=True)
    (path / "state" / "d" / "data").write_bytes(f"step {step}".encode() * 1000)
    (path / "state" / "empty").write_bytes(b"")
    (path / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"run": "abc"}}')


def save(directory: RunDirectory, step: int, owner: str = "abc") -> Record:
    """Save a checkpoint as a run does."""
    saving = Record(step, "saving", owner, 1.0)
    directory.write_record(saving)
    orbax_wrote(directory, step)
    directory.write_record(Record(step, "saving", owner, 1.0, logged=True))
    record = Record(step, "complete", owner, 1.0, logged=True, files=directory.commit(step))
    directory.write_record(record)
    return record


class DirectoryContract:
    """What every run directory does. A subclass has the fixture `where`."""

    @pytest.fixture
    def directory(self, where: str) -> Iterator[RunDirectory]:
        directory = open_directory(where)
        directory.acquire()
        yield directory
        directory.release()

    def test_what_is_written_of_a_run_is_read_by_others(
        self, directory: RunDirectory, where: str
    ) -> None:
        run = RunFile("abc", policy_to_json(KEEP), pins=frozenset({3}))
        assert open_directory(where).read_run() is None
        directory.write_run(run)
        first, second = Record(3, "gone", "abc", 1.0), Record(12, "gone", "abc", 2.0)
        for record in (second, Record(3, "complete", "abc", 1.0), first):
            directory.write_record(record)

        other = open_directory(where)

        assert other.open_run() == run
        assert list(other.read_records().items()) == [(3, first), (12, second)]
        directory.remove_record(3)
        directory.remove_record(3)
        assert other.read_record(3) is None
        assert list(other.read_records()) == [12]

    def test_a_committed_checkpoint_is_whole_for_others(
        self, directory: RunDirectory, where: str
    ) -> None:
        record = save(directory, 7)
        other = open_directory(where)

        assert other.is_readable(record)
        assert other.folders() == [7]
        assert other.saved_by(7) == "abc"
        assert list(other.damage(record)) == []
        with other.lend(record) as (path, _):
            assert settle(path) == record.files
        with directory.lend(record) as (path, _):
            assert settle(path) == record.files

    def test_what_is_in_the_trash_counts_for_nobody(
        self, directory: RunDirectory, where: str
    ) -> None:
        for step in (7, 70):
            save(directory, step)

        directory.to_trash(7)
        directory.to_trash(7)
        directory.to_trash(8)  # there is none

        assert directory.folders() == committed(directory) == [70]
        directory.remove_record(7)
        directory.release()
        directory.acquire()
        directory.empty_trash()
        assert committed(open_directory(where)) == [70]
        again = save(directory, 7)
        assert open_directory(where).is_readable(again)

    def test_what_was_evicted_is_remembered(self, directory: RunDirectory, where: str) -> None:
        gone = [Gone(step, 1.0, {"loss": step / 2}, "too old") for step in range(3)]

        for one in gone:
            directory.log_evicted(one)

        assert directory.read_evicted() == gone
        directory.release()
        assert open_directory(where).read_evicted() == gone

    def test_requests_come_in_their_order_and_go(self, directory: RunDirectory, where: str) -> None:
        other = open_directory(where)
        for name in ("2.json", "1.json"):
            other.post(name, f"request {name}")

        assert directory.posted() == ["1.json", "2.json"]
        assert directory.read_posted("1.json") == "request 1.json"
        directory.withdraw("1.json")
        assert (other.is_posted("1.json"), other.is_posted("2.json")) == (False, True)

    def test_a_damaged_record_is_set_aside(self, directory: RunDirectory, where: str) -> None:
        directory.write_record(Record(3, "gone", "abc", 1.0))
        directory._replace("records/5.json", "{")
        damaged: list[Path] = []

        records = directory.read_records(lambda path, error: damaged.append(path))

        assert list(records) == [3]
        assert "damaged" in str(directory.set_aside(damaged[0]))
        assert list(open_directory(where).read_records()) == [3]

    def test_it_belongs_to_one_run_at_a_time(self, directory: RunDirectory, where: str) -> None:
        assert directory.is_mine
        with pytest.raises(cc.DirectoryLocked, match="in use by"):
            open_directory(where).acquire()


class RemoteContract(DirectoryContract):
    """What a run directory in object storage does."""

    @pytest.fixture
    def bucket(self, where: str) -> Bucket:
        return Bucket(where)

    @pytest.fixture(autouse=True)
    def machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
        def go(name: str) -> None:
            monkeypatch.setenv("CKPT_CALLBACKS_SCRATCH", str(tmp_path / name))

        go("first")
        return go

    def test_an_object_is_created_by_one_only(self, bucket: Bucket) -> None:
        assert bucket.create("a/lock", b"first")
        assert not bucket.create("a/lock", b"second")
        assert bucket.create("a/lock", b"first")  # whose reply was lost
        assert bucket.read("a/lock") == b"first"

    def test_objects_are_listed_as_others_wrote_them(self, bucket: Bucket, where: str) -> None:
        assert bucket.listing("a") == ([], [])
        assert bucket.tree("a") == {}
        bucket.write("a/x", b"12")
        before = {found.name: found.stamp for found in bucket.listing("a")[0]}
        Bucket(where).write("a/x", b"34")
        Bucket(where).write("a/b/y", b"5")

        files, folders = bucket.listing("a")

        assert [(f.name, f.size) for f in files] == [("x", 2)]
        assert files[0].stamp != before["x"]
        assert folders == ["b"]
        assert bucket.tree("a") == {"x": 2, "b/y": 1}
        bucket.move("a", "z/w")
        assert bucket.tree("") == {"z/w/x": 2, "z/w/b/y": 1}
        bucket.remove(["z/w/x", "z/w/never"])
        assert (bucket.exists("z/w/x"), bucket.exists("z/w/b/y")) == (False, True)
        assert (bucket.read("z/w/x"), bucket.read("z/w/b/y")) == (None, b"5")

    def test_from_the_first_step_to_another_machine(
        self, where: str, bucket: Bucket, machine: Machine
    ) -> None:
        train(where, 5)

        assert steps_in(bucket) == {"2", "4"}
        machine("second")
        train(where, 11)

        assert steps_in(bucket) == {"2", "10"}
        assert [c.step for c in cc.checkpoints(where)] == [2, 10]
        assert [c["local"] for c in facts_of(open_directory(where))["checkpoints"]] == [True, True]
        assert cc.find(where, "best").step == 2
        for which, step in (("best", 2), ("last", 10), (2, 2)):
            assert_same(cc.restore(where, like=new_state(), which=which), after(step))
        assert "Step 4 was evicted" in str(why(where, 4))
        assert cc.verify(where) == []

        machine("third")
        assert cc.report_metrics(where, 10, {"score": 0.95})
        assert steps_in(bucket) == {"10"}
        assert cc.find(where, "best").step == 10
        assert cc.pin(where, 10)
        assert "pinned" in cc.checkpoints(where)[0].reason
        left = bucket.tree(".ckpt_callbacks")
        assert {name.partition("/")[0] for name in left} == {
            "run.json", "records", "lease", "evicted", "history", "metrics.json", "metrics",
        } - ({"metrics"} if not any(n.startswith("metrics/") for n in left) else set())  # fmt: skip

    def test_orbax_reads_a_copy_of_it(self, where: str, bucket: Bucket, tmp_path: Path) -> None:
        from orbax.checkpoint import v1 as ocp

        train(where, 3)

        names = bucket.tree("2")
        bucket.download("2", names, tmp_path / "copy")
        loaded = ocp.load_checkpointables(tmp_path / "copy", {"params": None})
        np.testing.assert_array_equal(loaded["params"]["w"], after(2)["params"]["w"])

    def test_one_item_is_read_alone(self, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        train(where, 3)
        read: list[str] = []
        download = Bucket.download

        def noting(self: Bucket, source: str, names: Any, folder: Path) -> None:
            read.extend(names)
            download(self, source, read, folder)

        monkeypatch.setattr(Bucket, "download", noting)

        found = cc.restore(where, only="params")

        np.testing.assert_array_equal(found["params"]["w"], after(2)["params"]["w"])
        assert any(name.startswith("params/") for name in read)
        assert not any(name.startswith("opt/") for name in read)

    def test_a_flipped_bit_is_found_and_named(self, where: str, bucket: Bucket) -> None:
        train(where, 5)
        name = flip(bucket, 4)

        (problem,) = cc.verify(where)

        assert (problem.step, f"{where}/{name} is damaged" in problem.text) == (4, True)
        with pytest.raises(cc.CorruptCheckpoint, match=name):
            cc.restore(where, like=new_state(), which=4)

    def test_a_damaged_one_is_repaired_from_a_store(
        self, where: str, bucket: Bucket, machine: Machine
    ) -> None:
        store = MemoryStore()
        train(where, 5, store)
        assert set(store.copies) == {2, 4}  # with all their bytes
        flip(bucket, 4)
        machine("second")

        train(where, 5, store)

        assert cc.verify(where) == []
        assert_same(cc.restore(where, like=new_state()), after(4))

    def test_without_a_copy_it_is_set_aside(
        self, where: str, bucket: Bucket, machine: Machine
    ) -> None:
        train(where, 5)
        flip(bucket, 4)
        machine("second")

        train(where, 5)

        assert cc.verify(where) == []
        assert_same(cc.restore(where, like=new_state()), after(4))
        assert any(name.startswith(".ckpt_callbacks/damaged/4-") for name in bucket.tree(""))

    def test_going_back_saves_the_same_steps_again(self, where: str, bucket: Bucket) -> None:
        train(where, 5)
        train(where, 5, resume=2, discard_newer=True)

        assert steps_in(bucket) == {"2", "4"}
        assert cc.verify(where) == []
        assert_same(cc.restore(where, like=new_state()), after(4))

    def test_a_machine_that_others_followed_forgets_what_it_has(
        self, where: str, machine: Machine
    ) -> None:
        train(where, 5)
        scratch = RemoteDirectory(where).root
        assert (scratch / "4").is_dir()
        machine("second")
        train(where, 7)
        machine("first")

        train(where, 7)

        assert not (scratch / "4").exists()
        assert_same(cc.restore(where, like=new_state()), after(6))

    def test_the_loop_itself_sends_nothing(
        self, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = Bucket._asked
        threads: list[str] = []

        def noting(self: Bucket, name: str) -> Any:
            threads.append(threading.current_thread().name)
            return asked(self, name)

        callbacks = cc.Callbacks(cc.OrbaxCheckpoint(where, save=cc.EveryNSteps(1), keep=KEEP))
        with callbacks.run(new_state()) as run, monkeypatch.context() as patch:
            patch.setattr(Bucket, "_asked", noting)
            for step in range(3):
                run.on_eval(step, {"score": SCORES.get(step, 0.0)})
                run.on_step(step, after(step))
            run.wait()

        assert "ckpt-saver" in threads
        assert threading.current_thread().name not in threads

    def test_an_evaluation_before_its_step_waits_for_no_request(
        self, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = Bucket._asked
        asking, answer = threading.Event(), threading.Event()

        def waiting(self: Bucket, name: str) -> Any:
            if name.endswith("records/0.json") and threading.current_thread().name == "ckpt-saver":
                asking.set()
                answer.wait(30)
            return asked(self, name)

        monkeypatch.setattr(Bucket, "_asked", waiting)
        callbacks = cc.Callbacks(cc.OrbaxCheckpoint(where, save=cc.EveryNSteps(1), keep=KEEP))
        with callbacks.run(new_state()) as run:
            run.on_step(0, after(0))
            assert asking.wait(30)
            evaluation = threading.Thread(target=run.on_eval, args=(1, {"score": 0.5}))
            evaluation.start()
            evaluation.join(10)
            waits = evaluation.is_alive()
            answer.set()
            evaluation.join()
            run.on_step(1, after(1))

        assert not waits
        assert cc.find(where, "best").step == 1

    def test_a_save_that_can_not_be_sent_is_told_and_leaves_nothing(
        self, where: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upload = Bucket.upload

        def refuse(self: Bucket, folder: Path, names: Any, to: str, *rest: Any) -> None:
            upload(self, folder, names, to, *rest)
            if to == "2":
                raise OSError("503 Slow Down")

        monkeypatch.setattr(Bucket, "upload", refuse)
        recorder = Recorder()

        train(where, 5, recorder)

        (failed,) = recorder.of(cc.SaveFailed)
        assert (failed.step, "503" in failed.error) == (2, True)
        assert steps_in(bucket) == {"0", "4"}
        assert cc.verify(where) == []

    def test_what_a_tracker_lacks_comes_along(self, where: str, machine: Machine) -> None:
        store = MemoryStore()
        store.down = True
        callbacks = cc.Callbacks(
            cc.OrbaxCheckpoint(where, save=cc.EveryNSteps(2), keep=KEEP), store, drain_limit=0.1
        )
        with callbacks.run(new_state()) as run:
            Path("plot [1].png").write_bytes(b"a plot")
            run.log_artifact("plot [1].png")
            for step in range(3):
                run.on_step(step, after(step), {"loss": float(step)})
        store.down = False
        machine("second")

        assert cc.sync(where, stores=[store]) == {}

        assert [(p.step, p.values["loss"]) for p in store.points] == [(0, 0.0), (1, 1.0), (2, 2.0)]
        assert store.files == {"plot [1].png": b"a plot"}
        assert set(store.copies) == {2}

    def test_a_second_start_that_fails_sends_nothing(
        self, where: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is on this machine then is not what the run remembers."""
        first = RemoteDirectory(where)
        first.acquire()
        first.release()
        machine("second")
        other = RemoteDirectory(where)
        other.acquire()
        (other.meta / "metrics.jsonl").write_text("of another machine\n")
        other.release()

        with monkeypatch.context() as patch:
            patch.setattr(Tail, "read", _refuse)
            with pytest.raises(cc.ConfigError, match="503 Slow Down"):
                first.acquire()

        assert other._memory.metrics.read() == b"of another machine\n"
        first.acquire()
        assert (first.meta / "metrics.jsonl").read_text() == "of another machine\n"
        first.release()

    def test_what_another_owner_saved_again_is_there_for_the_first_one(
        self, where: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = RemoteDirectory(where)
        first.acquire()
        save(first, 7)
        first.write_record(Record(7, "evicting", "abc", 1.0))
        first.to_trash(7)
        with monkeypatch.context() as patch:
            patch.setattr(RemoteDirectory, "_empty", _refuse)
            first.release()
        machine("second")
        other = RemoteDirectory(where)
        other.acquire()
        again = save(other, 7)
        other.release()

        first.acquire()

        assert committed(first) == [7]
        assert first.is_readable(again)
        first.release()

    def test_a_start_that_fails_late_leaves_no_lease(
        self, where: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listing, calls = Bucket.listing, []

        def refuse_second(self: Bucket, folder: str) -> Any:
            calls.append(folder)
            return _refuse() if len(calls) == 2 else listing(self, folder)

        clock = FakeClock()
        first, second = Lease(bucket, "lease", clock), Lease(bucket, "lease", clock)
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "listing", refuse_second)
            with pytest.raises(OSError, match="503"):
                first.take(brief=False, cache=lambda before: "")

        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "remove", _refuse)  # the next owner removes it
            second.take(brief=False, cache=lambda before: "")
        assert second.holder()["pid"] == os.getpid()

    def test_a_step_that_somebody_removed_is_saved_again(self, where: str, bucket: Bucket) -> None:
        train(where, 3)
        scratch = RemoteDirectory(where).root
        (scratch / "4.orbax-checkpoint-tmp").mkdir()  # of a save that was killed
        bucket.remove([f"2/{name}" for name in bucket.tree("2")])
        recorder = Recorder()

        train(where, 3, recorder)

        assert recorder.of(cc.SaveFailed) == []
        assert steps_in(bucket) == {"0", "2"}
        assert cc.verify(where) == []
        assert [p.name for p in scratch.iterdir() if p.name[0].isdecimal()] == ["2"]

    def test_a_bucket_may_hold_less_than_is_kept(
        self, where: str, bucket: Bucket, tmp_path: Path, machine: Machine
    ) -> None:
        store = FolderStore(tmp_path / "store")

        train(where, 5, store, keep_here=cc.LatestN(1))

        assert steps_in(bucket) == {"4"}
        machine("second")
        train(where, 7, store, keep_here=cc.LatestN(1))
        assert steps_in(bucket) == {"6"}
        assert next((c.step, c.where) for c in cc.checkpoints(where)) == (2, [store.title])
        assert_same(cc.restore(where, like=new_state(), which=2, stores=[store]), after(2))
        train(where, 5, store, keep_here=cc.LatestN(1), resume=2, discard_newer=True)
        assert steps_in(bucket) == {"4"}
        assert_same(cc.restore(where, like=new_state()), after(4))

    def test_a_second_owner_waits_for_the_lease_to_end(self, where: str, machine: Machine) -> None:
        clock = FakeClock()
        first = RemoteDirectory(where, clock)
        first.acquire()
        machine("second")
        second = RemoteDirectory(where, clock)
        clock.advance(HELD + SLACK - 1)
        with pytest.raises(cc.DirectoryLocked, match=r"in use by process \d+ on .* in 1 s"):
            second.acquire()
        assert first._lease
        first._lease.renew()
        clock.advance(HELD + SLACK - 1)
        with pytest.raises(cc.DirectoryLocked, match="in use by process"):
            second.acquire()
        clock.advance(2)

        second.acquire()

        with pytest.raises(cc.DirectoryLocked, match=r"this run lost .* could not renew"):
            first.write_run(RunFile("old", []))
        first.release()
        second.write_run(RunFile("new", []))
        second.release()
        assert (found := RemoteDirectory(where).read_run())
        assert found.run_id == "new"

    def test_an_owner_whose_machine_slept_writes_nothing_before_it_looks(
        self, where: str, machine: Machine
    ) -> None:
        """A machine that sleeps stops the clock by which pauses are measured."""
        clock = FakeClock()
        first = RemoteDirectory(where, clock)
        first.acquire()
        clock.wall += HELD + SLACK + 1
        machine("second")
        second = RemoteDirectory(where, clock)
        second.acquire()

        with pytest.raises(cc.DirectoryLocked, match="this run lost"):
            first.write_run(RunFile("old", []))

        first.release()
        second.release()

    def test_a_run_that_lost_its_directory_ends_and_decides_nothing_any_more(
        self, where: str, machine: Machine
    ) -> None:
        clock, recorder = FakeClock(), Recorder()
        calling, taken = threading.Event(), threading.Event()

        def before(call: str) -> None:
            if call == "put" and not taken.is_set():
                calling.set()
                taken.wait(30)

        store = MemoryStore(before=before)
        callbacks = cc.Callbacks(
            cc.OrbaxCheckpoint(where, save=cc.EveryNSteps(1), keep=cc.LatestN(1)),
            store,
            recorder,
            drain_limit=2,
            clock=clock,
        )
        machine("first")
        first = RemoteDirectory(where)
        others: list[RemoteDirectory] = []

        def lose_it() -> None:
            with callbacks.run(new_state()) as run:
                run.on_step(0, after(0))
                assert calling.wait(30)
                clock.advance(HELD + SLACK + 1)
                machine("second")
                others.append(RemoteDirectory(where, clock))
                others[0].acquire()
                store.calls.clear()
                taken.set()
                for step in range(1, 9):
                    run.on_step(step, after(step))
                    run.wait()

        with pytest.raises(cc.DirectoryLocked, match="this run lost"):
            lose_it()

        assert [e.step for e in recorder.of(cc.SaveFailed)] == [1]
        assert {"put", "alias", "delete"} & {*store.calls} == set()
        assert not first.is_mine
        others[0].release()

    def test_what_a_killed_reader_left_on_this_disk_goes(self, where: str) -> None:
        train(where, 3)
        scratch = RemoteDirectory(where).root.parent
        for name, age in (("reading-old", 2 * 86400), ("reading-now", 0)):
            (scratch / name / "2").mkdir(parents=True)
            os.utime(scratch / name, (time.time() - age,) * 2)

        cc.restore(where, like=new_state())

        assert [p.name for p in scratch.glob("reading-*")] == ["reading-now"]

    def test_ctrl_c_while_it_is_left_leaves_no_lease(
        self, where: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        first = RemoteDirectory(where)
        first.acquire()
        with monkeypatch.context() as patch:
            patch.setattr(Memory, "push", interrupt)
            with pytest.raises(KeyboardInterrupt):
                first.release()

        assert not first.is_mine
        assert "ckpt-lease" not in {thread.name for thread in threading.enumerate()}
        machine("second")
        second = RemoteDirectory(where)
        second.acquire()
        second.release()

    def test_a_lease_that_can_not_be_read_is_held_by_somebody(
        self, where: str, bucket: Bucket
    ) -> None:
        bucket.write(".ckpt_callbacks/lease/00000003.json", b"")

        with pytest.raises(cc.DirectoryLocked, match="in use by process"):
            RemoteDirectory(where).acquire()

    def test_what_is_evicted_stays_for_those_who_read_it(self, where: str, bucket: Bucket) -> None:
        clock = FakeClock()
        directory = RemoteDirectory(where, clock)
        directory.acquire()
        save(directory, 7)
        directory.write_record(Record(7, "evicting", "abc", 1.0))
        directory.to_trash(7)

        clock.advance(GRACE - 1)
        directory.empty_trash()
        assert steps_in(bucket) == {"7"}
        clock.advance(1)
        directory.empty_trash()

        assert steps_in(bucket) == set()
        assert not bucket.tree(".ckpt_callbacks/trash")
        directory.release()

    def test_a_live_checkpoint_is_never_removed_by_an_old_marker(
        self, where: str, bucket: Bucket
    ) -> None:
        directory = RemoteDirectory(where)
        directory.acquire()
        record = save(directory, 7)
        bucket.write(".ckpt_callbacks/trash/7-1", b"")
        directory.release()

        directory.acquire()
        directory.empty_trash()
        directory.release()

        assert list(directory.damage(record)) == []
        assert not bucket.tree(".ckpt_callbacks/trash")

    def test_the_command_line_takes_its_address(self, where: str) -> None:
        train(where, 5)

        assert "latest #1" in command("ls", where)
        assert "all files are as recorded" in command("verify", where)
        for name, text in (("", "step 4 of"), ("/best", "step 2 of"), ("/2", "step 2 of")):
            assert text in command("show", where + name)
        assert "has no checkpoint 'worst'" in command("show", f"{where}/worst", exit_code=2)
        assert "is kept" in command("why", where, "4")
        command("pin", where, "2")

    def test_a_run_is_watched_from_another_machine(
        self, where: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckpt_callbacks.remote._TELL", 0.0)
        checkpoint = cc.OrbaxCheckpoint(
            where, save=cc.EveryNSteps(1), keep=cc.LatestN(1), synchronous=True
        )
        with cc.Callbacks(checkpoint).run(new_state()) as run:
            state = run.state
            for step in range(3):
                run.on_step(step, state, {"loss": 0.25})
            machine("another")
            shown = command("watch", where, "--once")
            told = json.loads(command("watch", where, "--once", "--json"))
            happened = open_directory(where).read_history()

        assert ("saved", 1) in {(entry.what, entry.step) for entry in happened}
        assert "in use by process" in shown
        assert "evicted last: step 1" in shown
        assert [row["step"] for row in told["checkpoints"]] == [2]

    def test_the_timeline_is_drawn_on_another_machine(
        self, where: str, machine: Machine, tmp_path: Path
    ) -> None:
        train(where, 5, MemoryStore())
        here = open_directory(where)
        machine("another")

        found = open_directory(where).read_history()

        assert found == HistoryFile(here.meta).entries()
        assert {("saved", "local", 4), ("copied", "memory", 4)} <= {
            (entry.what, entry.store, entry.step) for entry in found
        }
        train(where, 7, MemoryStore())  # another owner goes on with it
        assert open_directory(where).read_history()[: len(found)] == found

    def test_a_history_that_can_not_be_sent_fails_no_save(
        self, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckpt_callbacks.remote._TELL", 0.0)
        push = Tail.push

        def refuse(tail: Tail) -> None:
            if tail._folder.endswith("/history"):
                _refuse()
            push(tail)

        monkeypatch.setattr(Tail, "push", refuse)
        train(where, 5)

        assert committed(open_directory(where)) == [2, 4]
        assert open_directory(where).read_history() == []

    def test_what_changes_is_seen(self, where: str) -> None:
        train(where, 3)
        directory = open_directory(where)
        before = directory.seen()
        assert directory.seen() == before

        command("pin", where, "2")

        assert directory.seen() != before

    def test_the_doctor_looks_at_it(self, where: str, bucket: Bucket) -> None:
        train(where, 3)
        before = bucket.tree("")

        found = {c.what: c for c in checks(where)}

        assert not [c for c in found.values() if c.status == "problem"]
        assert where in found["directory"].text
        assert "two checkpoints of" in found["disk"].text
        assert bucket.tree("") == before

    def test_the_doctor_tells_what_it_refuses(
        self, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train(where, 3)

        def overwrites(self: Bucket, name: str, content: bytes) -> bool:
            self.write(name, content)
            return True

        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "create", overwrites)
            assert "ignores If-None-Match" in problems_of(where)["permissions"]
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "create", _refuse)
            assert "may not be written" in problems_of(where)["permissions"]
        monkeypatch.setattr(Bucket, "read", _refuse)
        assert "directory" in problems_of(where)

    def test_a_misspelt_address_is_noticed(self, where: str) -> None:
        train(where, 3)
        above, _, name = where.rpartition("/")

        def said(address: str) -> str:
            return command("ls", address, exit_code=2)

        assert f"Did you mean {where}?" in said(f"{above}/{name[:-1]}")
        assert f"Did you mean {where}?" in said(f"{above}x/{name}")
        assert f"checkpoint of the run directory {where}" in said(f"{where}/2")
        assert f"There are run directories in it: {name}" in said(above)
