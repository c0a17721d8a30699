"""What a training loop pays, counted: waits for the device, calls, passes over bytes, copies."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xxhash
from flax import nnx

import ckpt_callbacks as cc
import embedded
from ckpt_callbacks import manifest, orbax_io
from ckpt_callbacks.hooks import Hooks
from ckpt_callbacks.policy import Candidate
from ckpt_callbacks.record import RunFile
from ckpt_callbacks.situation import Situation
from ckpt_callbacks.stores import Overview
from ckpt_callbacks.testing import MemoryStore, Recorder
from ckpt_callbacks_wandb import WandbTracker
from loops import advance, callbacks_in, new_state

ARRAY = type(jnp.float32(0))
METHODS = ("__array__", "__float__", "block_until_ready")
# NumPy, and JAX where it waits for several arrays, reach the bytes by none of these methods.
FUNCTIONS = (
    (jax, "block_until_ready"), (jax, "device_get"), (np, "array"), (np, "asarray"),
)  # fmt: skip
WAYS: dict[str, Callable[[jax.Array], object]] = {
    "float": float,
    "int": int,
    "bool": bool,
    "compare": lambda x: max(x, 1.0),
    "format": lambda x: f"{x:.3f}",
    "item": lambda x: x.item(),
    "tolist": lambda x: x.tolist(),
    "wait": lambda x: x.block_until_ready(),
    "wait for several": lambda x: jax.block_until_ready([x, x]),
    "get": lambda x: jax.device_get({"loss": x}),
    "array": lambda x: np.array(x, np.float64),
    "asarray": lambda x: np.asarray(x, np.float64),
}


class Waits:
    """How often each thread has waited for an array, or read one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._threads: list[int] = []
        for name in METHODS:
            monkeypatch.setattr(ARRAY, name, self._counted(getattr(ARRAY, name)))
        for module, name in FUNCTIONS:
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))
        # Behind `int`, `bool`, comparisons, `tolist` and `str`.
        monkeypatch.setattr(ARRAY, "_value", property(self._counted(ARRAY._value.fget)))

    def here(self) -> int:
        return self._threads.count(threading.get_ident())

    def elsewhere(self) -> int:
        return len(self._threads) - self.here()

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if any(isinstance(leaf, ARRAY) for leaf in jax.tree.leaves(arguments)):
                self._threads.append(threading.get_ident())
            return function(*arguments, **options)

        return call


@jax.jit
def train_step(step: jax.Array) -> dict[str, jax.Array]:
    return {"loss": step / 4, "norm": step + 0.5, "rate": -step}


@pytest.mark.parametrize("way", WAYS)
def test_a_wait_is_counted_whichever_way_it_comes(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, loss = Waits(monkeypatch), train_step(jnp.float32(3))["loss"]
    assert (waits.here(), waits.elsewhere()) == (0, 0)

    WAYS[way](loss)

    assert waits.here() > 0
    assert waits.elsewhere() == 0


def test_the_loop_waits_for_no_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, state = MemoryStore(), new_state()
    counted = []
    with callbacks_in(tmp_path, store, Every70(), every=10_000).run(state) as run:
        run.on_step(0, state)
        run.wait()
        waits = Waits(monkeypatch)
        for step in range(1, 1001):
            metrics = train_step(np.float32(step))
            before = waits.here()
            run.on_step(step, state, metrics)
            counted.append(waits.here() - before)

    assert sum(counted) == 0
    assert waits.elsewhere() > 0, "another thread has read them"
    read = [(p.step, dict(p.values)) for p in store.points]
    assert read == [(s, {"loss": s / 4, "norm": s + 0.5, "rate": -s}) for s in range(1, 1001)]


class Every70:
    def __init__(self) -> None:
        self.seen: list[int] = []

    @cc.hookimpl(every=70)
    def on_step(self, event: cc.Step) -> None:
        self.seen.append(event.step)


class Every110(Every70):
    @cc.hookimpl(every=110)
    def on_step(self, event: cc.Step) -> None:
        self.seen.append(event.step)


def test_a_step_that_no_plugin_wants_is_no_call_even_where_one_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, enter = [], Hooks.step

    def counted(hooks: Hooks, event: cc.Step) -> int:
        entered.append(event.step)
        return enter(hooks, event)

    monkeypatch.setattr(Hooks, "step", counted)
    plugins, state = [Every70(), Every110(), Every70()], new_state()
    keep = cc.LatestN(9)
    with callbacks_in(tmp_path, *plugins, every=300, keep=keep).run(state) as run:
        for step in range(1000):
            run.on_step(step, state)

    assert {e.step for e in cc.checkpoints(tmp_path)} == {0, 300, 600, 900}
    assert entered == [s for s in range(1000) if s % 70 == 0 or s % 110 == 0]
    assert [p.seen for p in plugins] == [list(range(0, 1000, n)) for n in (70, 110, 70)]


def test_with_two_trackers_too_each_file_is_hashed_once_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[Path] = []
    hashed: list[int] = []
    digest_of, xxh3 = manifest.digest_of, xxhash.xxh3_128

    def counted(path: Path) -> str:
        digested.append(path)
        return digest_of(path)

    class Hash:
        def __init__(self) -> None:
            self._hash = xxh3()

        def update(self, data: bytes) -> None:
            hashed.append(len(data))
            self._hash.update(data)

        def hexdigest(self) -> str:
            return str(self._hash.hexdigest())

    monkeypatch.setattr(manifest, "digest_of", counted)
    monkeypatch.setattr(xxhash, "xxh3_128", Hash)
    stores = (
        embedded.tracker(tmp_path),
        WandbTracker(project="digits", mode="offline", dir=tmp_path / "logs"),
    )
    root, recorder = tmp_path / "run", Recorder()
    callbacks = callbacks_in(root, *stores, recorder, keep=cc.LatestN(9), drain_limit=60)
    state = new_state()
    with callbacks.run(state) as run:
        for step in range(3):
            state = advance(state)
            run.on_step(step, state, {"loss": 1.0})

    mirrored = [(e.store, e.step) for e in recorder.of(cc.Mirrored)]
    assert sorted(mirrored) == [(s, n) for s in ("mlflow", "wandb") for n in range(3)]
    files = [p for step in range(3) for p in manifest.files_in(root / str(step))]
    assert Counter(digested) == Counter(files)
    assert sum(hashed) == sum(p.stat().st_size for p in files)


def test_what_orbax_is_given_are_the_arrays_of_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a save makes no copy of the state besides Orbax's own."""
    given, save = [], orbax_io.save

    def noted(path: Path, items: orbax_io.Items, metadata: Any) -> orbax_io.PendingSave:
        given.append(jax.tree.leaves(dict(items)))
        return save(path, items, metadata)

    monkeypatch.setattr(orbax_io, "save", noted)
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    params = {"w": jnp.ones((4, 4)), "half": jnp.ones(5, jnp.bfloat16)}
    plain = {"params": params, "moments": optax.adam(1e-3).init(params), "host": np.arange(6.0)}
    state = plain | {"net": model, "key": jax.random.key(3)}
    with callbacks_in(tmp_path).run(state) as run:
        for step in range(2):
            run.on_step(step, state)
            run.wait()

    arrays = [*jax.tree.leaves(plain), *jax.tree.leaves(nnx.state(model)), state["key"]]
    assert len(arrays) >= 10
    wanted = {id(a): a.shape for a in arrays}
    assert [{id(a): a.shape for a in leaves} for leaves in given] == [wanted, wanted]


def test_mirrors_on_the_same_disk_add_no_copy(tmp_path: Path) -> None:
    state = {"params": jnp.arange(4 * 2**20, dtype=jnp.float32)}
    stores = (
        embedded.tracker(tmp_path),
        WandbTracker(project="digits", mode="offline", dir=tmp_path / "logs"),
    )
    with callbacks_in(tmp_path / "run", *stores, drain_limit=60).run(state) as run:
        run.on_step(0, state)

    own = {p.stat().st_ino: p.stat() for p in manifest.files_in(tmp_path / "run" / "0")}
    size = sum(status.st_size for status in own.values())
    assert size >= 16 * 2**20
    assert all(status.st_nlink >= 3 for status in own.values() if status.st_size)
    files = {p.stat().st_ino: p for p in manifest.files_in(tmp_path) if p.suffix != ".db"}
    added = sum(p.stat().st_size for ino, p in files.items() if ino not in own)
    assert added <= 0.01 * size


def test_data_files_are_of_a_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they are written while others are filled, and not one of them at the end."""
    monkeypatch.setattr(orbax_io, "_DATA_FILE", 2**20)
    state = {"params": {str(i): jnp.arange(2**17, dtype=jnp.float32) + i for i in range(8)}}
    with callbacks_in(tmp_path).run(state) as run:
        run.on_step(0, state)

    sizes = [p.stat().st_size for p in manifest.files_in(tmp_path / "0")]
    assert sum(sizes) >= 4 * 2**20
    assert max(sizes) <= 2 * 2**20


def test_a_long_run_shows_no_more_evicted_checkpoints_than_a_short_one() -> None:
    policy = cc.LatestN(1) | cc.BestN(1, "score", mode="max")
    situation = Situation({}, RunFile("0123456789ab", []), policy, {"memory": None})

    def shown(count: int) -> list[int]:
        gone = [Candidate(step, {"score": 0.5}) for step in range(count)]
        (curve,) = situation.overview("memory", "run", gone).curves
        return [step for step, _ in curve.points]

    assert shown(2000) == list(range(2000))
    assert shown(2001) == shown(2002) == list(range(0, 2002, 2))  # seldom others
    assert 1000 < len(shown(100_000)) <= 2000


def test_showing_what_a_store_holds_takes_a_twentieth_of_the_time_at_most(tmp_path: Path) -> None:
    """Since it grows with the run, and each save is something new to show."""
    took, latest, newest = 0.02, threading.Event(), 1999

    class Slow(MemoryStore):
        shown = 0

        def show(self, overview: Overview) -> None:
            self.shown += 1
            threading.Event().wait(took)
            if overview.rows and overview.rows[-1].step == newest:
                latest.set()

    store, begun = Slow(), time.monotonic()
    with callbacks_in(tmp_path, store).run(new_state()) as run:
        for step in range(50):
            run.on_step(step, new_state())
            run.wait()
        run.on_step(newest, new_state())
        assert latest.wait(60)  # without anything new, while the run goes on
        elapsed = time.monotonic() - begun

    # The first one, and the last one, which follows the word to end.
    assert 2 <= store.shown <= 2 + elapsed / (20 * took)
