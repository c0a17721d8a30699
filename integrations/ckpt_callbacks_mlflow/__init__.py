"""Checkpoints and metrics in MLflow.

::

    from ckpt_callbacks_mlflow import MLflowTracker

    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(...),
        MLflowTracker(experiment="digits", register_as="digits"),
    )

Each kept checkpoint is one LoggedModel of the run, `READY` when all its files are there. With
`register_as` it is also a version of a registered model, whose aliases `best` and `last` move.
(`latest` is MLflow's own name for the highest version number and can not be set.)

What is there is read with `cc.restore("mlflow:/digits@best", like=state)`, or
`"mlflow:/runs/RUN_ID/STEP"`, and loaded with `mlflow.pyfunc.load_model("models:/digits@best")`.
"""

from ckpt_callbacks_mlflow._address import fetch
from ckpt_callbacks_mlflow._tracker import MLflowTracker

__all__ = ["MLflowTracker", "fetch"]
