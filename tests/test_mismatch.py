"""What a person is told whose state is not that of the checkpoint: all of it, and what to do."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import ckpt_callbacks as cc
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.matching import check_same
from loops import callbacks_in
from saved import save, tree_digest


class Net(nnx.Module):
    def __init__(self, *widths: int) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in pairwise(widths)])


def with_sgd(net: Net) -> dict[str, Any]:
    return {"model": net, "optimizer": nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)}


def with_(tx: optax.GradientTransformation) -> dict[str, Any]:
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    return {"params": params, "opt_state": tx.init(params)}


def dense(**names: str) -> dict[str, Any]:
    layer = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    first, out = names.get("first", "dense"), {"kernel": jnp.ones((3, 1))}
    return {"params": {first: layer, "out": out}, "step": 7}


SCHEDULE = optax.linear_schedule(1.0, 0.0, 10)
OTHERS = {
    "another width": (
        with_sgd(Net(2, 3, 1)),
        with_sgd(Net(2, 4, 1)),
        """
        the state does not fit the checkpoint ROOT/0:
          model/layers/0/bias: shape (4,) in the state, (3,) in the checkpoint
          model/layers/0/kernel: shape (2, 4) in the state, (2, 3) in the checkpoint
          model/layers/1/kernel: shape (4, 1) in the state, (3, 1) in the checkpoint
        The rest fits: only='optimizer' restores that alone
        """,
    ),
    "a layer more": (
        {"model": Net(2, 2)},
        {"model": Net(2, 2, 2, 2)},
        """
        the state does not fit the checkpoint ROOT/0:
          model/layers/1 (2 leaves): not in the checkpoint
          model/layers/2 (2 leaves): not in the checkpoint
        """,
    ),
    "a layer less": (
        {"model": Net(2, 2, 2), "step": 1},
        {"model": Net(2, 2), "step": 0},
        """
        the state does not fit the checkpoint ROOT/0:
          model/layers/1 (2 leaves): not in the state
        The rest fits: only='step' restores that alone
        """,
    ),
    "a layer of another name": (
        dense(),
        dense(first="Dense_0"),
        """
        the state does not fit the checkpoint ROOT/0:
          params/dense is called params/Dense_0 in the state: it holds the same leaves otherwise, \
so rename one of them
        The rest fits: only='step' restores that alone
        """,
    ),
    "another name at the top": (
        dense(),
        {"weights": dense()["params"], "step": 1},
        """
        the state does not fit the checkpoint ROOT/0:
          params is called weights in the state: it holds the same leaves otherwise, so rename one \
of them
        The rest fits: only='step' restores that alone
        """,
    ),
    "a transposed kernel": (
        {"params": {"kernel": jnp.ones((2, 3))}},
        {"params": {"kernel": jnp.ones((3, 2))}},
        """
        the state does not fit the checkpoint ROOT/0:
          params/kernel: shape (3, 2) in the state, (2, 3) in the checkpoint: is one of them \
transposed?
        """,
    ),
    "sgd for adam": (
        with_(optax.adam(0.1)),
        with_(optax.sgd(0.1)),
        """
        the state does not fit the checkpoint ROOT/0:
          opt_state (5 leaves): not in the state
        The rest fits: only='params' restores that alone
        """,
    ),
    "adam for sgd": (
        with_(optax.sgd(0.1)),
        with_(optax.adam(0.1)),
        """
        the state does not fit the checkpoint ROOT/0:
          opt_state (5 leaves): not in the checkpoint
        The rest fits: only='params' restores that alone
        """,
    ),
    "adam for adamw with a schedule": (
        with_(optax.adamw(SCHEDULE)),
        with_(optax.adam(0.1)),
        """
        the state does not fit the checkpoint ROOT/0:
          opt_state/2/count: not in the state
        The rest fits: only='params' restores that alone
        """,
    ),
    "keys of another implementation": (
        {"key": jax.random.key(0, impl="rbg")},
        {"key": jax.random.key(0)},
        """
        the state does not fit the checkpoint ROOT/0:
          key: key<threefry2x32>[] in the state, key<rbg>[] in the checkpoint: make them with \
impl='rbg'
        """,
    ),
    "raw keys for typed ones": (
        {"key": jax.random.key(0), "step": 1},
        {"key": jax.random.PRNGKey(0), "step": 0},
        """
        the state does not fit the checkpoint ROOT/0:
          key: uint32[2] in the state, key<threefry2x32>[] in the checkpoint: typed and raw keys \
are not the same (see `jax.random.wrap_key_data`)
        The rest fits: only='step' restores that alone
        """,
    ),
    "text for a number": (
        {"note": 3, "rate": 0.5},
        {"note": "three", "rate": 0.1},
        """
        the state does not fit the checkpoint ROOT/0:
          note: str in the state, int in the checkpoint
        The rest fits: only='rate' restores that alone
        """,
    ),
    "a number for text": (
        {"note": "three"},
        {"note": jnp.ones((2, 2), jnp.bfloat16)},
        """
        the state does not fit the checkpoint ROOT/0:
          note: bfloat16[2, 2] in the state, str in the checkpoint
        """,
    ),
    "a number for an array": (
        {"x": jnp.ones(4), "y": 1},
        {"x": 1.0, "y": jnp.ones(1)},
        """
        the state does not fit the checkpoint ROOT/0:
          x: shape () in the state, (4,) in the checkpoint
          y: shape (1,) in the state, () in the checkpoint
        """,
    ),
    "a lone module for a dict": (
        with_sgd(Net(2, 2)),
        Net(2, 2),
        """
        the state has no leaf in common with the checkpoint ROOT/0:
          the state has layers (2 leaves)
          the checkpoint has model (2 leaves), optimizer/step
        All of the state is below model in the checkpoint: like={'model': …} with only='model' \
restores that
        """,
    ),
    "a dict for a lone module": (
        Net(2, 2),
        with_sgd(Net(2, 2)),
        """
        the state has no leaf in common with the checkpoint ROOT/0:
          the state has model (2 leaves), optimizer/step
          the checkpoint has layers (2 leaves)
        All of it is below model in the state: restore into that alone
        """,
    ),
    "another program": (
        with_(optax.adam(0.1)),
        {"agent": Net(2, 2), "episodes": 3},
        """
        the state has no leaf in common with the checkpoint ROOT/0:
          the state has agent (2 leaves), episodes
          the checkpoint has opt_state (5 leaves), params (2 leaves)
        """,
    ),
}
HINT = """
To train this state from the start, give the run another directory (start_from=cc.Weights('ROOT', \
only=…) takes over what fits), or resume=None and discard_newer=True, which removes the \
checkpoints in this one"""


def text_of(expected: str, root: Path) -> str:
    lines = [line[8:] for line in expected.strip("\n").split("\n")[:-1]]
    return "\n".join(lines).replace("ROOT", str(root))


def live(state: Any) -> dict[str, str]:
    """Return a digest of everything in a state, by way of JAX and Flax alone."""
    nodes = jax.tree.map(
        lambda x: nnx.state(x) if isinstance(x, nnx.Pytree) else x,
        state,
        is_leaf=lambda x: isinstance(x, nnx.Pytree),
    )
    return tree_digest(nodes)


@pytest.mark.parametrize("name", OTHERS)
def test_all_that_does_not_fit_is_told_and_nothing_is_changed(tmp_path: Path, name: str) -> None:
    saved, state, expected = OTHERS[name]
    root = save(tmp_path / "run", saved)
    before = live(state)

    with pytest.raises(cc.StateMismatch) as error:
        cc.restore(root, like=state)
    assert str(error.value) == text_of(expected, root)

    with callbacks_in(root).run(state) as run, pytest.raises(cc.StateMismatch) as error:
        run.state  # noqa: B018  # a property that restores
    assert str(error.value) == text_of(expected, root) + HINT.replace("ROOT", str(root))
    assert live(state) == before
    assert [found.step for found in cc.checkpoints(root)] == [0]


def test_what_the_message_advises_works(tmp_path: Path) -> None:
    root = save(tmp_path / "run", with_(optax.adam(0.1)))
    state = with_(optax.sgd(0.1))
    zeros = jax.tree.map(jnp.zeros_like, state)

    restored = cc.restore(root, like=zeros, only="params")
    assert tree_digest(restored) == tree_digest(state)

    elsewhere = callbacks_in(tmp_path / "another")
    with elsewhere.run(zeros, start_from=cc.Weights(root, only="params")) as run:
        assert tree_digest(run.state) == tree_digest(state)
    net = Net(2, 2)
    dicts = save(tmp_path / "dict", with_sgd(net))
    got = cc.restore(dicts, like={"model": Net(2, 2)}, only="model")
    assert live(got) == live({"model": net})
    with callbacks_in(root).run(state, resume=None, discard_newer=True) as run:
        assert run.next_step == 0


def test_of_many_differences_the_first_are_shown() -> None:
    state = {("params", str(i), "w"): jnp.ones(2) for i in range(30)} | {("step",): 1}
    there = {path: Leaf("array", (3,), "float32") for path in state} | {("step",): Leaf("int")}

    with pytest.raises(cc.StateMismatch) as error:
        check_same(state, there, "X")

    lines = str(error.value).splitlines()
    assert lines[20:] == [
        "  params/19/w: shape (2,) in the state, (3,) in the checkpoint",
        "  … and 10 more",
        "The rest fits: only='step' restores that alone",
    ]


def test_what_is_wrong_alone_is_left_out_where_that_is_shorter() -> None:
    state = {(f"layer{i}", "w"): jnp.ones(2) for i in range(9)}
    there = {path: Leaf("array", (2,), "float32") for path in state}
    there["layer3", "w"] = Leaf("str")

    with pytest.raises(cc.StateMismatch, match="only='!layer3' restores that alone"):
        check_same(state, there, "X")


def test_nothing_newer_is_discarded_for_a_state_that_does_not_fit(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with callbacks_in(root, keep=cc.LatestN(9)).run({"w": jnp.ones(2)}) as run:
        for step in range(4):
            run.on_step(step, {"w": jnp.full(2, step)})

    with (
        pytest.raises(cc.StateMismatch, match=r"w: shape \(3,\)"),
        callbacks_in(root).run({"w": jnp.ones(3)}, resume=1, discard_newer=True) as run,
    ):
        run.state  # noqa: B018  # not reached

    assert [found.step for found in cc.checkpoints(root)] == [0, 1, 2, 3]
