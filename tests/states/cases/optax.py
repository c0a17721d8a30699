"""Optax: each transformation with parameters that it trains."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from states.case import Case, batch_of

DECAY = optax.cosine_decay_schedule(0.1, 10)
LABELS = {"w": "fast", "b": "slow"}
GROUPS = {"fast": optax.adam(0.1), "slow": optax.sgd(0.01, momentum=0.9)}
WEIGHTS = {"w": True, "b": False}

TRANSFORMATIONS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.1),
    "schedule": optax.adamw(DECAY),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1), optax.zero_nans()),
    "named-chain": optax.named_chain(("clip", optax.clip(1.0)), ("adam", optax.adam(0.1))),
    "multi-transform": optax.multi_transform(GROUPS, LABELS),
    "partition": optax.partition(GROUPS, LABELS),
    "multi-steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "masked": optax.masked(optax.adam(0.1), WEIGHTS),
    "ema": optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "schedule-free": optax.contrib.schedule_free_adamw(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9),
    "lion": optax.lion(0.1),
    "muon": optax.contrib.muon(0.1),
    "apply-if-finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "add-noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
    "reduce-on-plateau": optax.chain(
        optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1, accumulation_size=2)
    ),
    "lbfgs": optax.lbfgs(),
    "inject-hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=DECAY),
    "inject-stateful-hyperparams": optax.inject_stateful_hyperparams(optax.adamw)(
        learning_rate=optax.schedules.WrappedSchedule(DECAY)
    ),
    "dadapt": optax.contrib.dadapt_adamw(),
    "prodigy": optax.contrib.prodigy(),
}
MIXED = {"inject-hyperparams", "inject-stateful-hyperparams", "dadapt", "prodigy"}
"""Trained with parameters of two precisions, since their state changes its own with the first."""


def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def case_of(name: str, transformation: optax.GradientTransformation) -> Case:
    optimizer = optax.with_extra_args_support(transformation)

    def make(seed: int) -> dict[str, Any]:
        w, b = jax.random.split(jax.random.key(seed))
        precision = jnp.bfloat16 if name in MIXED else jnp.float32
        params = {"w": jax.random.normal(w, (3, 2)), "b": jax.random.normal(b, 2, precision)}
        # Some keep the parameters that they begin with: copies, since both are donated.
        return {"params": params, "optimizer": jax.tree.map(jnp.copy, optimizer.init(params))}

    @partial(jax.jit, donate_argnums=0)
    def train(state: dict[str, Any], x: jax.Array, y: jax.Array) -> dict[str, Any]:
        params = state["params"]
        loss = partial(loss_of, x=x, y=y)
        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(
            gradients, state["optimizer"], params, value=value, grad=gradients, value_fn=loss
        )
        return {"params": optax.apply_updates(params, updates), "optimizer": opt_state}

    return Case(name, make, lambda state, step: train(state, *batch_of(step)))


CASES = [case_of(name, transformation) for name, transformation in TRANSFORMATIONS.items()]
