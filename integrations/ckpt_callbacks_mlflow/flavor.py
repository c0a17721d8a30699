"""How MLflow loads a checkpoint: `mlflow.pyfunc.load_model("models:/digits@best")`.

The files are checked against their digests, and nothing is unpickled. Predictions come from the
function that `MLflowTracker(predict=...)` names, which must be importable where the model is
loaded, and which gets the weights and the input::

    # my_model.py, with MLflowTracker(..., predict="my_model:apply", like="my_model:make")

    def make():
        return {"model": MLP(rngs=nnx.Rngs(0))}

    def apply(state, inputs):
        return np.asarray(state["model"](inputs))

Without `like` the weights are nested dicts of arrays, named as in the state.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ckpt_callbacks.errors import ConfigError
from ckpt_callbacks.loading import load_params
from ckpt_callbacks.payload import WEIGHTS
from ckpt_callbacks.publication import verified
from ckpt_callbacks.reading import read_alone
from ckpt_callbacks.record import record_from_json
from ckpt_callbacks_mlflow._fetch import MANIFEST
from ckpt_callbacks_mlflow._files import FOLDER
from ckpt_callbacks_mlflow._models import FLAVOR

__all__ = ["Loaded"]


class Loaded:
    """A checkpoint as MLflow's `pyfunc` sees it.

    Args:
        path: the folder with `MLmodel`, `checkpoint.json`, and `checkpoint` or `weights`.

    Raises:
        ConfigError: what `predict` or `like` name cannot be imported.
        CorruptCheckpoint: a file is damaged.
    """

    def __init__(self, path: Path) -> None:
        from mlflow.models import Model

        options = Model.load(str(path / "MLmodel")).flavors[FLAVOR]
        self._apply = _function(options.get("predict"), "predict")
        make = _function(options.get("like"), "like")
        self.state = _weights(path, make() if make else None)
        """The weights: as `like` has them, or nested dicts of arrays."""

    def predict(self, model_input: Any, params: Any = None) -> Any:
        """Return the predictions for an input, which MLflow hands on as it is.

        Raises:
            ConfigError: no function was named when the checkpoint was logged.
        """
        if self._apply is None:
            raise ConfigError(
                "this checkpoint was logged without a function that predicts: give "
                "MLflowTracker(..., predict='package.module:function')"
            )
        return self._apply(self.state, model_input)


def _load_pyfunc(path: str) -> Loaded:
    """Load a checkpoint; MLflow calls this by its name."""
    return Loaded(Path(path))


def _weights(path: Path, like: Any) -> Any:
    if not (path / FOLDER).is_dir():  # a reference to the checkpoint, and its weights beside it
        return load_params(verified(path), like)
    text = (path / MANIFEST).read_text(encoding="utf-8")
    record = record_from_json(text, str(path / MANIFEST))
    return read_alone(path / FOLDER, like, record.files, WEIGHTS)


def _function(name: str | None, option: str) -> Any:
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{option}={name!r} of this checkpoint can not be imported here: {error}"
        ) from error
