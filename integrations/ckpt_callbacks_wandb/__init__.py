"""Checkpoints and metrics in Weights & Biases, offline.

::

    from ckpt_callbacks_wandb import WandbTracker

    callbacks = cc.Callbacks(cc.OrbaxCheckpoint(...), WandbTracker(project="digits"))

Each kept checkpoint is one artifact version with the aliases `step-N`, `last` and `best` as they
apply (W&B adds its own `latest`, which means the last one logged). Its files are held, as hard
links, in the run directory until the policy no longer wants them.
"""

from ckpt_callbacks_wandb._tracker import WandbTracker

__all__ = ["WandbTracker"]
