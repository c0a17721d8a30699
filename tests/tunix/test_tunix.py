"""Training with LoRA by the real trainer of Tunix: what is saved, when, and how it goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import ckpt_callbacks as cc
import lora_tunix
from ckpt_callbacks.preemption import Preemption
from ckpt_callbacks_tunix import attach

EXAMPLES = Path(lora_tunix.__file__).parent
ACCUMULATION = pytest.mark.parametrize("accumulation", [None, 2])


class Network(nnx.Module):
    """A base layer with LoRA beside it, and dropout that is never off."""

    def __init__(self, *, lora: bool) -> None:
        rngs = nnx.Rngs(0)
        self.base = nnx.Linear(8, 4, rngs=rngs)
        self.lora = nnx.LoRA(8, 2, 4, rngs=rngs) if lora else None
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.base(x)
        return self.dropout(y + self.lora(x) if self.lora else y)


def loss_of(model: Network, x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * jnp.mean((model(x) - x[:, :4]) ** 2)


def new_trainer(*, lora: bool = True, **options: Any) -> PeftTrainer:
    config = TrainingConfig(**{"eval_every_n_steps": 1000, **options})
    return PeftTrainer(Network(lora=lora), optax.adamw(0.1), config).with_loss_fn(loss_of)


def batches(count: int, scale: float = 1.0) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"x": rng.normal(size=(16, 8)).astype(np.float32), "scale": np.float32(scale)}


def callbacks_in(directory: Path, *plugins: object, save: Any = None) -> cc.Callbacks:
    keep = cc.LatestN(100) | cc.BestN(1, "eval_loss", mode="min")
    return cc.Callbacks(
        cc.OrbaxCheckpoint(directory, save=save or cc.EveryNSteps(1), keep=keep), *plugins
    )


def on_host(*parts: nnx.State) -> list[bytes]:
    """Return the bytes of every leaf."""
    leaves = [leaf for part in parts for leaf in jax.tree.leaves(nnx.to_pure_dict(part))]
    return [
        np.asarray(
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        ).tobytes()
        for leaf in leaves
    ]


def live(trainer: PeftTrainer) -> list[bytes]:
    """Return what training changes."""
    model = trainer.model
    kind = nnx.LoRAParam if model.lora else nnx.Param
    return on_host(
        nnx.state(model, kind), nnx.state(trainer.optimizer), nnx.state(model, nnx.RngState)
    )


def saved(directory: Path, step: int, **options: Any) -> list[bytes]:
    """Return the same of a checkpoint, by way of a new trainer that goes on from it."""
    trainer = new_trainer(**options)
    with attach(callbacks_in(directory), trainer, resume=step, discard_newer=True):
        assert trainer.train_steps == step
    return live(trainer)


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """Return every leaf by its path, read by Orbax alone."""
    names = [p.name for p in checkpoint.iterdir() if p.is_dir()]
    like = {n: ocp.metadata(checkpoint, checkpointable_name=n).metadata for n in names}
    like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    leaves, _ = jax.tree_util.tree_flatten_with_path(ocp.load_checkpointables(checkpoint, like))
    return {
        "/".join(str(key.key) for key in path): np.asarray(
            jax.random.key_data(leaf) if "key" in str(leaf.dtype) else leaf
        )
        for path, leaf in leaves
    }


def steps_in(directory: Path) -> set[int]:
    return {info.step for info in cc.checkpoints(directory)}


class Watching:
    """Stands before the hooks and notes, by itself, what each step begins with."""

    def __init__(self, trainer: PeftTrainer) -> None:
        self._hooks = trainer.training_hooks
        self.seen: dict[int, list[bytes]] = {}
        trainer.with_training_hooks(self)

    def on_train_step_start(self, trainer: PeftTrainer) -> None:
        self.seen.setdefault(trainer.train_steps, live(trainer))
        self._hooks.on_train_step_start(trainer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)


class Losses:
    """Notes the loss of each step that the run is told of."""

    def __init__(self) -> None:
        self.of: dict[int, float] = {}

    @cc.hookimpl
    def on_step(self, event: cc.Step) -> None:
        for value in event.metrics.values():
            self.of[event.step] = float(value)


class Killed(Exception):
    """Stands for the end of the process."""


def test_cut_and_resumed_in_a_new_process_it_ends_as_if_it_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    lora_tunix.train(lora_tunix.callbacks_in(plain), 100)
    endless = lora_tunix.batches

    def cut_short(data: Any, seed: int) -> Iterator[Any]:
        for number, batch in enumerate(endless(data, seed)):
            if number == 70 and seed == 1:
                raise Killed
            yield batch

    monkeypatch.setattr(lora_tunix, "batches", cut_short)
    with pytest.raises(Killed):
        lora_tunix.train(lora_tunix.callbacks_in(cut), 100)
    assert steps_in(cut / "lora-tunix") == {0, 50}

    resumed = subprocess.run(
        [sys.executable, EXAMPLES / "lora_tunix.py", "--directory", cut, "--steps", "100"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert resumed.returncode == 0, resumed.stderr
    assert "training goes on after step 50" in resumed.stdout
    assert "best #1" in resumed.stdout
    of = {root: cc.find(root / "lora-tunix", "last") for root in (plain, cut)}
    assert of[plain].step == of[cut].step == 100
    assert of[plain].metrics == of[cut].metrics
    expected, found = (arrays(root / "lora-tunix" / "100") for root in (plain, cut))
    assert found.keys() == expected.keys()
    assert {n: a.tobytes() for n, a in found.items()} == {
        n: a.tobytes() for n, a in expected.items()
    }

    # LoRA that Qwix applied, dropout, and the two moments of AdamW; nothing of the base model.
    assert {name.split("/")[0] for name in found} == {"model", "optimizer", "rngs"}
    lora = {name for name in found if name.startswith("model/")}
    assert len(lora) == 2 * 6
    assert all(name.endswith(("_lora_a", "_lora_b")) for name in lora)
    base = lora_tunix.base_model()
    assert not set(on_host(nnx.state(base, nnx.Param))) & {a.tobytes() for a in found.values()}


@ACCUMULATION
def test_a_checkpoint_holds_what_its_step_ended_with(
    tmp_path: Path, accumulation: int | None
) -> None:
    losses = Losses()
    trainer = new_trainer(gradient_accumulation_steps=accumulation)
    with attach(callbacks_in(tmp_path, losses), trainer) as run:
        assert run.next_step == 0
        watching = Watching(trainer)
        trainer.train(batches(7))  # amid an update at the end, if two batches make one
    if not accumulation:
        watching.seen[7] = live(trainer)

    steps = set(range(4 if accumulation else 8))
    assert watching.seen.keys() == steps
    assert steps_in(tmp_path) == steps
    for step in sorted(steps, reverse=True):
        found = saved(tmp_path, step, gradient_accumulation_steps=accumulation)
        assert found == watching.seen[step]
    logged = trainer.metrics_logger.get_metric_history("", "loss", "train")
    assert losses.of == pytest.approx(dict(enumerate(logged.tolist(), start=1)))


@ACCUMULATION
def test_a_resumed_trainer_skips_what_it_was_trained_on(
    tmp_path: Path, accumulation: int | None
) -> None:
    options = {"gradient_accumulation_steps": accumulation, "eval_every_n_steps": 2}
    plain = new_trainer(**options)
    plain.train(batches(8), list(batches(2)))

    cut, resumed = (new_trainer(**options) for _ in range(2))
    with attach(callbacks_in(tmp_path), cut):
        cut.train(batches(5), list(batches(2)))
    with attach(callbacks_in(tmp_path), resumed) as run:
        assert run.next_step == (3 if accumulation else 6)
        resumed.train(batches(8), list(batches(2)))

    assert live(resumed) == live(plain)
    assert resumed.iter_steps == plain.iter_steps


def test_the_base_weights_are_not_saved(tmp_path: Path) -> None:
    trainer = new_trainer()
    with attach(callbacks_in(tmp_path), trainer):
        trainer.train(batches(1))

    found = arrays(tmp_path / "1")
    assert {n: a.shape for n, a in found.items() if n.startswith("model/")} == {
        "model/lora/lora_a": (8, 2),
        "model/lora/lora_b": (2, 4),
    }
    kernel = np.asarray(trainer.model.base.kernel[...])
    assert all(kernel.shape != array.shape for array in found.values())
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"kernel" not in everything


def test_lora_parameters_are_loaded_into_a_model(tmp_path: Path) -> None:
    trainer = new_trainer()
    with attach(callbacks_in(tmp_path), trainer):
        trainer.train(batches(2))
    model = new_trainer().model

    like = {"model": nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))}
    nnx.update(model, cc.restore(tmp_path, like=like, only="model")["model"])

    lora, trained = (on_host(nnx.state(m, nnx.LoRAParam)) for m in (model, trainer.model))
    assert lora == trained


def test_without_lora_the_whole_model_is_saved(tmp_path: Path) -> None:
    trainer = new_trainer(lora=False)
    with attach(callbacks_in(tmp_path), trainer):
        trainer.train(batches(2))

    assert {"model/base/kernel", "model/base/bias"} <= arrays(tmp_path / "2").keys()
    assert saved(tmp_path, 2, lora=False) == live(trainer)


class Scaled:
    """Two batches for each evaluation, whose losses are multiplied by these."""

    def __init__(self, *scales: tuple[float, float]) -> None:
        self._scales = iter(scales)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for scale in next(self._scales):
            yield from batches(1, scale)


def test_an_evaluation_is_the_mean_and_ranks(tmp_path: Path) -> None:
    trainer = new_trainer(eval_every_n_steps=2)
    with attach(callbacks_in(tmp_path, save=cc.OnEval()), trainer):
        trainer.train(batches(6), Scaled((5, 3), (4, 1), (0.2, 0.1), (8, 6)))

    expected = trainer.metrics_logger.get_metric_history("", "loss", "eval")
    found = {info.step: info.metrics["eval_loss"] for info in cc.checkpoints(tmp_path)}
    assert found == pytest.approx(dict(zip((0, 2, 4, 6), expected.tolist(), strict=True)))
    assert cc.find(tmp_path, "best").step == 4


def test_the_evaluation_that_a_resumed_run_begins_with_counts_only_if_it_was_lost(
    tmp_path: Path,
) -> None:
    evaluated: list[int] = []

    class Noting:
        @cc.hookimpl
        def on_eval(self, event: cc.Eval) -> None:
            evaluated.append(event.step)

    first, second, third = (new_trainer(eval_every_n_steps=2) for _ in range(3))
    with attach(callbacks_in(tmp_path, Noting()), first):
        first.train(batches(2), list(batches(1)))
    with attach(callbacks_in(tmp_path, Noting()), second):
        second.train(batches(3), list(batches(1)))
    assert evaluated == [0, 2]

    with attach(callbacks_in(tmp_path, Noting()), third):
        third.train(batches(3), list(batches(1)))  # step 3 was saved and never evaluated
    assert evaluated == [0, 2, 3]


def interrupted(at: int, count: int, interrupt: Any) -> Iterator[dict[str, Any]]:
    for number, batch in enumerate(batches(count)):
        if number == at:
            interrupt()
        yield batch


@pytest.mark.parametrize(("accumulation", "last"), [(None, 3), (2, 2)])
def test_told_to_end_the_trainer_ends_after_a_whole_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int | None, last: int
) -> None:
    monkeypatch.setattr(Preemption, "_told", None)
    trainer = new_trainer(gradient_accumulation_steps=accumulation, max_steps=900)

    def tell() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with attach(callbacks_in(tmp_path, save=cc.EveryNSteps(1000)), trainer) as run:
        trainer.train(interrupted(3, 1000, tell))
        assert run.should_stop

    assert steps_in(tmp_path) == {0, last}
    assert trainer.iter_steps == 4  # the batch that was being loaded is the last one
    assert trainer.config.max_steps == 900


def test_interrupted_between_two_updates_the_last_one_is_saved(tmp_path: Path) -> None:
    trainer = new_trainer()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), attach(callbacks_in(tmp_path, save=cc.AtEnd()), trainer):
        trainer.train(interrupted(3, 1000, interrupt))

    assert steps_in(tmp_path) == {3}
    assert saved(tmp_path, 3) == live(trainer)


def test_checkpoints_of_tunix_too_are_an_error(tmp_path: Path) -> None:
    trainer = new_trainer(checkpoint_root_directory=str(tmp_path / "theirs"))
    with (
        pytest.raises(cc.ConfigError, match="Tunix is to write checkpoints too"),
        attach(callbacks_in(tmp_path / "ours"), trainer),
    ):
        pass
    assert not (tmp_path / "ours").exists()
    trainer.close()


def test_hooks_of_somebody_else_are_an_error(tmp_path: Path) -> None:
    trainer = new_trainer()
    with (
        attach(callbacks_in(tmp_path / "one"), trainer),
        pytest.raises(cc.ConfigError, match="has training hooks, _Hooks, and there is room for"),
        attach(callbacks_in(tmp_path / "two"), trainer),
    ):
        pass
    assert trainer.training_hooks is None
