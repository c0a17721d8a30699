"""Run directories by the contract: on a local disk, and in fsspec's file system in memory."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt_callbacks as cc
from ckpt_callbacks.bucket import Bucket, is_bucket
from ckpt_callbacks.cli import main
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.lease import Card, Lease
from ckpt_callbacks.memory import Memory, Tail
from ckpt_callbacks.testing import FakeClock
from object_storage import DirectoryContract, RemoteContract


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    yield
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


class TestLocal(DirectoryContract):
    @pytest.fixture
    def where(self, tmp_path: Path) -> str:
        return str(tmp_path / "run")


class TestMemory(RemoteContract):
    @pytest.fixture
    def where(self) -> str:
        return "memory://bucket/runs/digits"


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=20).map(lambda b: b.replace(b"\n", b" ") + b"\n"),
            st.sampled_from(["push", "empty", "moves", "killed"]),
        ),
        max_size=200,
    )
)
def test_a_file_that_grows_is_read_as_it_was_pushed(events: list[bytes | str]) -> None:
    """Also after it was emptied, and when a kill came before the pieces it replaced were gone."""
    bucket = Bucket("memory://bucket/tail")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lines")
        tail = Tail(bucket, "lines", path)
        pushed = b""
        for event in events:
            if isinstance(event, bytes):
                with path.open("ab") as file:
                    file.write(event)
            elif event == "push":
                tail.push()
                pushed = path.read_bytes() if path.exists() else b""
                assert tail.read() == pushed
            elif event == "empty":
                tail.push()
                path.write_bytes(b"")
                tail.push()
                pushed = b""
            elif event == "moves":  # to a machine that has what was pushed
                path.write_bytes(tail.read())
            elif pushed:
                bucket.write(f"lines/{0:012d}-{len(pushed):012d}", pushed)
            assert tail.read() == pushed
    bucket.remove(bucket.tree(""))


def test_the_pieces_of_a_file_are_made_one_now_and_then(tmp_path: Path) -> None:
    bucket = Bucket("memory://bucket/tail")
    tail = Tail(bucket, "lines", tmp_path / "lines")
    most = 0
    for number in range(200):
        with (tmp_path / "lines").open("a") as file:
            file.write(f"{number}\n")
        tail.push()
        most = max(most, len(bucket.tree("lines")))

    assert most == 64
    assert tail.read() == (tmp_path / "lines").read_bytes()


def test_how_far_a_tracker_is_never_exceeds_the_metrics(tmp_path: Path) -> None:
    """Else what comes next would be taken for sent."""
    bucket = Bucket("memory://bucket/memory")
    memory = Memory(bucket, "meta", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("12345\n")
    (tmp_path / "metrics.json").write_text("sent 6")
    memory.push()
    (tmp_path / "metrics.json").write_text("sent 0")
    (tmp_path / "metrics.jsonl").write_text("")
    order: list[str] = []
    write, remove = bucket.write, bucket.remove
    bucket.write = lambda name, content: (order.append(name), write(name, content))[1]  # type: ignore[method-assign]
    bucket.remove = lambda names: [order.append(n) or remove([n]) for n in names] and None  # type: ignore[func-returns-value,method-assign]

    memory.push()

    assert order == ["meta/metrics.json", "meta/metrics/000000000000-000000000006"]


def test_where_a_store_creates_an_object_twice_the_first_owner_notices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one does that does not know `If-None-Match`."""
    bucket, clock = Bucket("memory://bucket/run"), FakeClock()
    monkeypatch.setattr(
        Bucket, "create", lambda self, name, content: self.write(name, content) is None
    )
    first, second = Lease(bucket, "lease", clock), Lease(bucket, "lease", clock)
    seen: list[tuple[int, Card]] = [(0, {})]  # before the first one wrote
    look = second._highest
    monkeypatch.setattr(second, "_highest", lambda: seen.pop() if seen else look())

    first.take(brief=False, cache=lambda before: "")
    second.take(brief=False, cache=lambda before: "")

    with pytest.raises(cc.DirectoryLocked, match="this run lost"):
        first.renew()
    second.renew()


@pytest.mark.parametrize("where", ["s3://bucket/run", "gs://b/run", "memory://b/run"])
def test_an_address_is_told_from_a_path(where: str) -> None:
    assert is_bucket(where)
    with pytest.raises(cc.ConfigError, match="is an address"):
        RunDirectory(where)
    with pytest.raises(cc.ConfigError, match="is an address"):
        RunDirectory(Path(where))


@pytest.mark.parametrize("where", ["runs/digits", "/runs", "mlflow:/digits@best", "file:///x", 3])
def test_what_is_no_address(where: object) -> None:
    assert not is_bucket(where)


@pytest.mark.parametrize("where", ["memory://", "memory://bucket", "memory://user:word@bucket/x"])
def test_an_address_names_a_place_and_no_secret(where: str) -> None:
    with pytest.raises(cc.ConfigError, match="must name a bucket and a place in it") as raised:
        cc.OrbaxCheckpoint(where, save=cc.EveryNSteps(1), keep=cc.LatestN(1))
    assert "word" not in str(raised.value)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_callbacks.extras.find_spec", lambda name: None)

    with pytest.raises(cc.MissingExtra, match=r"needs s3fs.*ckpt-callbacks\[object-storage\]"):
        cc.OrbaxCheckpoint("s3://bucket/x", save=cc.EveryNSteps(1), keep=cc.LatestN(1))


@pytest.mark.parametrize(
    "call",
    [
        lambda where: cc.pull("mlflow:/digits@best", where),
        lambda where: cc.adopt(Path.cwd(), where),
        lambda where: cc.adopt(where, Path.cwd()),
    ],
)
def test_what_needs_a_local_directory_says_so(call: Callable[[str], object]) -> None:
    with pytest.raises(cc.ConfigError, match="in object storage, and this needs a local directory"):
        call("s3://bucket/runs/digits")


@pytest.mark.parametrize("command", ["pull mlflow:/digits@best", "adopt ."])
def test_a_command_that_needs_a_local_directory_says_so(command: str) -> None:
    done = CliRunner().invoke(main, [*command.split(), "s3://bucket/runs/digits"])
    assert (done.exit_code, "in object storage" in done.output) == (2, True), done.output


def test_a_run_in_object_storage_has_a_report_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = "memory://bucket/runs/digits"
    keep = cc.LatestN(1) | cc.BestN(1, "score", mode="max")
    checkpoint = cc.OrbaxCheckpoint(where, save=cc.EveryNSteps(1), keep=keep)
    with cc.Callbacks(checkpoint).run({"w": 1.0}) as run:
        state = run.state
        for step in range(4):
            run.on_step(step, state, {"score": -abs(step - 1)})

    done = [CliRunner().invoke(main, [command, where]) for command in ("report", "plot")]
    assert [d.output.strip() for d in done] == [
        str(tmp_path / "report.html"),
        str(tmp_path / "score.svg"),
    ]

    text = Path("report.html").read_text()
    assert "<title>digits" in text
    assert "2 checkpoints evicted" in text
    assert "4 checkpoints measured, 2 kept" in Path("score.svg").read_text()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_callbacks.run.here", lambda timeout: object())
    monkeypatch.setattr("ckpt_callbacks.extras.find_spec", lambda name: object())
    checkpoint = cc.OrbaxCheckpoint("s3://bucket/x", save=cc.EveryNSteps(1), keep=cc.LatestN(1))

    with pytest.raises(cc.ConfigError, match="several processes can not share"):
        cc.Callbacks(checkpoint).run({"params": 1.0}).__enter__()
