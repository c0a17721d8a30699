"""Every public name is listed, every hook documented and emitted."""

import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points

import pytest

import ckpt_callbacks
from ckpt_callbacks import events
from ckpt_callbacks.hooks import _hook_name
from ckpt_callbacks.hookspecs import Specs
from ckpt_callbacks.testing import Recorder

HOOKS = [name for name in vars(Specs) if name.startswith("on_")]
MODULES = [m.name for m in pkgutil.iter_modules(ckpt_callbacks.__path__, "ckpt_callbacks.")]


@pytest.mark.parametrize(
    "name",
    [
        "ckpt_callbacks",
        "ckpt_callbacks_mlflow",
        "ckpt_callbacks_tunix",
        "ckpt_callbacks_wandb",
        *MODULES,
    ],
)
def test_all_names_what_is_there(name: str) -> None:
    module = importlib.import_module(name)

    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public)
    assert module.__doc__


def test_each_store_can_be_loaded_by_name() -> None:
    found = {e.name: e.load().name for e in entry_points(group="ckpt_callbacks.stores")}

    assert found == {"mlflow": "mlflow", "wandb": "wandb"}


def test_each_event_has_its_documented_hook() -> None:
    kinds = [
        k for k in vars(events).values() if inspect.isclass(k) and k.__module__ == events.__name__
    ]

    assert sorted(map(_hook_name, kinds)) == sorted(HOOKS)
    for kind in kinds:
        assert kind.__name__ in ckpt_callbacks.__all__
        assert kind.__doc__


@pytest.mark.parametrize("name", HOOKS)
def test_each_hook_is_documented_and_takes_the_event(name: str) -> None:
    spec = getattr(Specs, name)

    assert spec.__doc__
    assert list(inspect.signature(spec).parameters) == ["self", "event"]
    assert hasattr(Recorder, name)
