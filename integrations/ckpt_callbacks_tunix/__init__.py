"""Checkpoints of what Tunix' `PeftTrainer` trains.

::

    from ckpt_callbacks_tunix import attach

    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(
            "runs/lora",
            save=cc.EveryNSteps(50),
            keep=cc.LatestN(2) | cc.BestN(1, "eval_loss", mode="min"),
        )
    )
    trainer = PeftTrainer(model, optax.adamw(1e-3), TrainingConfig(...))
    with attach(callbacks, trainer, config={"rank": 8}) as run:  # resumes by itself
        trainer.train(train_ds, eval_ds)

Step `k` is the state after `k` updates, which is how Tunix counts; step 0 is the one that training
begins with. Under gradient accumulation an update is one of the optimizer, not a batch.

A checkpoint has the items `model`, `optimizer` and, if the model draws random numbers (dropout),
`rngs`. With LoRA the model is its LoRA parameters alone: the base weights are never saved. They are
loaded into a model that has LoRA applied with::

    like = {"model": nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))}
    best = cc.restore("runs/lora", like=like, which="best", only="model")
    nnx.update(model, best["model"])
"""

from ckpt_callbacks_tunix._hooks import attach

__all__ = ["attach"]
