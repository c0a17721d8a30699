"""One process of a job that trains: python job.py OPTIONS, a JSON object.

It prints a JSON object a line. Weights are sharded over all devices of all processes, others are
replicated, and a counter, a key and a NumPy array are each process's own.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

OPTIONS: dict[str, Any] = {
    "steps": 10,
    "every": 3,
    "save": "steps",
    "keep": 2,
    "show": None,  # the step of which it tells the state
    "pause": None,  # the step after which it waits for a line, once all is saved
    "terminate_at": None,  # the failpoint at which this process sends itself SIGTERM
    "late": False,  # whether it waits for a line before it enters the run
    "own": 0,  # added to what is each process's own
    "start": None,  # another first step
    "extra": False,  # whether the state has one more leaf
    "slow": 0.0,  # seconds a step
    "timeout": 60.0,
    "heartbeat": 100,
    "shutdown": 20,  # seconds that JAX waits for the others at the end of a process
    "data": False,  # whether the state has an iterator over the data
    "mlflow": None,
    "fails": None,  # the step at which the state cannot be saved
    "evaluate": False,  # whether every step is evaluated, of which the fourth is best
    "cwd": ".",
    **json.loads(sys.argv[1]),
}
RANK, COUNT = OPTIONS["rank"], OPTIONS["count"]

if COUNT > 1:
    jax.distributed.initialize(
        OPTIONS["address"],
        COUNT,
        RANK,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=OPTIONS["heartbeat"],
        shutdown_timeout_seconds=OPTIONS["shutdown"],
    )

import ckpt_callbacks as cc  # noqa: E402
from ckpt_callbacks import failpoints  # noqa: E402
from ckpt_callbacks.clock import Clock  # noqa: E402
from saved import tree_digest  # noqa: E402

MESH = Mesh(np.array(jax.devices()), ("x",))
SHARDED, REPLICATED = NamedSharding(MESH, P("x")), NamedSharding(MESH, P())


def tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def new_state() -> dict[str, Any]:
    own = OPTIONS["own"]
    state: dict[str, Any] = {
        "params": {
            "w": jax.jit(lambda: jnp.ones((16, 8)), out_shardings=SHARDED)(),
            "b": jax.jit(lambda: jnp.zeros(8), out_shardings=REPLICATED)(),
        },
        "count": jnp.asarray(own, jnp.int32),
        "key": jax.random.key(own),
        "seen": np.full(3, own, np.int64),
        "epoch": 0,
    }
    if OPTIONS["extra"]:
        state["more"] = np.zeros(1)
    if OPTIONS["data"]:
        import grain

        numbers = grain.MapDataset.range(RANK, 1000, COUNT).shuffle(seed=3)
        state["data"] = iter(numbers.to_iter_dataset())
    return state


@partial(jax.jit, out_shardings=({"w": SHARDED, "b": REPLICATED}, REPLICATED))
def update(params: dict[str, Any], step: Any) -> tuple[dict[str, Any], Any]:
    """One step of gradient descent on a batch whose rows are sharded, as those of `w`.

    Gloo and XLA add up in another order, so the gradient of each example is rounded to what can be
    added in any.
    """
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (32, 16))
    x = jax.lax.with_sharding_constraint(x, SHARDED)
    whole = jax.lax.with_sharding_constraint(params, REPLICATED)

    def loss(params: dict[str, Any], x: Any) -> Any:
        return jnp.mean((x @ params["w"] + params["b"] - jnp.sin(x[:8])) ** 2)

    values, gradients = jax.vmap(jax.value_and_grad(loss), (None, 0))(whole, x)
    summed = jax.tree.map(lambda g: jnp.sum(jnp.round(g * 4096) / 4096, axis=0), gradients)
    return jax.tree.map(lambda p, g: p - 0.01 * g, params, summed), jnp.mean(values)


def train_step(state: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    params, loss = update(state["params"], np.int32(step))
    taken = next(state["data"]) if OPTIONS["data"] else step
    return {
        **state,
        "params": params,
        "count": state["count"] + 1,
        "key": jax.random.fold_in(state["key"], step),
        "seen": state["seen"] + step,
        "epoch": step // 5,
    }, {"loss": loss, "taken": float(taken)}


def digest(state: dict[str, Any]) -> dict[str, str]:
    """Return digests of the values of a state, the same in all processes."""
    state = {name: value for name, value in state.items() if name != "data"}
    state["params"] = {
        name: x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
        for name, x in state["params"].items()
    }
    return tree_digest(jax.device_get(state))


def policy() -> Any:
    match OPTIONS["save"]:
        case "steps":
            return cc.EveryNSteps(OPTIONS["every"]) | cc.AtEnd()
        case "seconds":
            return cc.EveryNSeconds(1e-6)
        case "function":
            return lambda context: RANK == 0 and context.step % 4 == 1
        case "evaluation":
            return cc.OnImprovement()
    raise ValueError(OPTIONS["save"])


class Stopped(Clock):
    """By this one no time passes."""

    def monotonic(self) -> float:
        return 0.0


def plugins() -> list[Any]:
    if OPTIONS["mlflow"] is None:
        return []
    from ckpt_callbacks_mlflow import MLflowTracker

    return [MLflowTracker(experiment="many", register_as="many", **OPTIONS["mlflow"])]


def terminate(point: str) -> None:
    if point == OPTIONS["terminate_at"]:
        failpoints.arm(None)
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    os.chdir(OPTIONS["cwd"])
    if OPTIONS["terminate_at"]:
        failpoints.arm(terminate)
    if OPTIONS["late"]:
        tell(waits=True)
        sys.stdin.readline()
    keep: Any = cc.LatestN(OPTIONS["keep"])
    if OPTIONS["evaluate"]:
        keep = cc.BestN(1, "score", mode="max")
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(OPTIONS["directory"], save=policy(), keep=keep),
        *plugins(),
        process_timeout=OPTIONS["timeout"],
        clock=Clock() if RANK == 0 else Stopped(),
    )
    with callbacks.run(new_state()) as run:
        tell(next_step=run.next_step)
        state = run.state
        tell(restored=digest(state))
        step = run.next_step
        for step in range(run.next_step, OPTIONS["steps"]):
            number = step if OPTIONS["start"] is None else step + OPTIONS["start"]
            state, metrics = train_step(state, step)
            tell(step=step, taken=metrics["taken"], loss=float(metrics["loss"]))
            given = state
            if OPTIONS["fails"] == step:
                given = {**state, "count": state["count"] + 0}
                given["count"].delete()
            if OPTIONS["evaluate"]:
                run.on_eval(number, {"score": -abs(step - 4)})
            run.on_step(number, given, metrics)
            if OPTIONS["show"] == step:
                tell(shown=digest(state))
            if OPTIONS["pause"] == step:
                run.wait()
                tell(paused=step)
                sys.stdin.readline()
            if run.should_stop:
                break
            time.sleep(OPTIONS["slow"])
    tell(last=step, digest=digest(state), stopped=run.should_stop)
    tell(modules=[name for name in ("mlflow", "wandb") if name in sys.modules])


if __name__ == "__main__":
    main()
