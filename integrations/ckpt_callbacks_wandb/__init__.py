"""Checkpoints and metrics in Weights & Biases.

::

    from ckpt_callbacks_wandb import WandbTracker

    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(...),
        WandbTracker(project="digits", link_to="wandb-registry-model/digits"),
    )

Each kept checkpoint is one artifact version with the aliases `step-N`, `last` and `best` as they
apply. (W&B's client gives its own `latest` to whatever was sent last, also to an old step that
comes late.) A version that the policy no longer wants is deleted, unless somebody gave it another
alias or linked it.

Offline its files are held, as hard links, in the run directory until the policy no longer wants
them or `ckpt-callbacks sync` or the next online run has sent them.
"""

from ckpt_callbacks_wandb._address import fetch
from ckpt_callbacks_wandb._tracker import WandbTracker

__all__ = ["WandbTracker", "fetch"]
