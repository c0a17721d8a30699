"""Weights as a file of another library, for trackers to publish beside a checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpt_callbacks as cc
from ckpt_callbacks import publication
from ckpt_callbacks.formats import safetensors
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.publication import verified
from ckpt_callbacks.published import as_payload
from ckpt_callbacks.record import record_from_json, record_to_json
from ckpt_callbacks.state import kinds_of
from payloads import check_plainly, check_read, saved, state_of


def test_the_file_holds_the_weights_and_says_whose_they_are(tmp_path: Path) -> None:
    checkpoint, state = saved(tmp_path, 3)

    cc.Safetensors().write(checkpoint, tmp_path / "weights")

    file = tmp_path / "weights" / "model.safetensors"
    check_plainly(file.read_bytes(), state)
    about = check_read(file, state)
    assert (about["step"], about["digest"]) == (3, checkpoint.digest)
    assert about["only"] == "params"
    assert [p.name for p in (tmp_path / "weights").iterdir()] == [file.name]


def test_the_same_checkpoint_makes_the_same_bytes_although_metrics_came(tmp_path: Path) -> None:
    """A copy that was cut is completed with them."""
    early, _ = saved(tmp_path)
    record = record_from_json(early.manifest, "its record")
    metrics = {**record.metrics, "score": 0.5}
    late = replace(
        early, metrics=metrics, manifest=record_to_json(replace(record, metrics=metrics))
    )

    texts = [
        cc.Safetensors().write(checkpoint, tmp_path / name)
        for name, checkpoint in (("a", early), ("b", late))
    ]

    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert texts[0] == texts[1]
    assert contents[0] == contents[1]


def test_large_weights_are_in_shards(tmp_path: Path) -> None:
    checkpoint, state = saved(tmp_path)

    cc.Safetensors(max_shard_size=50).write(checkpoint, tmp_path / "weights")

    names = {p.name for p in (tmp_path / "weights").iterdir()}
    assert "model.safetensors.index.json" in names
    assert len(names) > 2
    check_read(tmp_path / "weights", state)


def test_stacked_layers_can_be_one_by_one(tmp_path: Path) -> None:
    checkpoint, state = saved(tmp_path)

    payload = cc.Safetensors("params/layers", unstack="layers/{}", axis=0, naming="safejax")
    payload.write(checkpoint, tmp_path / "weights")

    found, _ = safetensors.read(tmp_path / "weights")
    kernel = np.asarray(state["params"]["layers"]["kernel"])
    assert {".".join(path) for path in found} == {
        f"params.layers.{n}.{leaf}" for n in (0, 1) for leaf in ("kernel", "bias")
    }
    assert found[("params", "layers", "1", "kernel")].read().tobytes() == kernel[1].tobytes()


def test_a_damaged_checkpoint_is_not_published(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path)
    victim = max(
        (p for p in (checkpoint.path / "params").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(content)

    with pytest.raises(cc.CorruptCheckpoint, match=victim.name):
        cc.Safetensors().write(checkpoint, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_what_is_damaged_in_a_copy_is_told(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path)
    text = cc.Safetensors().write(checkpoint, tmp_path / publication.FOLDER)
    (tmp_path / publication.MANIFEST).write_text(text)
    assert verified(tmp_path) == tmp_path / "weights"
    file = tmp_path / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)

    with pytest.raises(cc.CorruptCheckpoint, match=r"model.safetensors is damaged: its digest"):
        verified(tmp_path)
    (tmp_path / publication.MANIFEST).write_text(text[:-9])
    with pytest.raises(cc.RecordError, match=r"weights.json is damaged"):
        verified(tmp_path)


def test_what_cannot_be_told_leaves_nothing(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path)

    with pytest.raises(cc.StateMismatch, match="unstack: nothing is named blocks"):
        cc.Safetensors(unstack="blocks").write(checkpoint, tmp_path / "weights")
    with pytest.raises(cc.CheckpointNotFound, match="'params/tail' matches nothing"):
        cc.Safetensors("params/tail").write(checkpoint, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(
    "payload",
    [
        cc.Safetensors(),
        cc.Safetensors(["params", "!params/head"], max_shard_size=10, naming="pytree2safetensors"),
        cc.Safetensors({"b", "a"}, unstack=["layers", "blocks/{}"], axis=1),
    ],
)
def test_its_options_survive_json(payload: cc.Safetensors) -> None:
    found = as_payload("Tracker", json.loads(json.dumps(payload.to_json())))

    assert found == payload
    assert hash(found) == hash(payload)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ""}, "only must be a path"),
        ({"only": 5}, "only must be a name or several, not 5"),
        ({"only": []}, "only must be a name or several"),
        ({"max_shard_size": 0}, "max_shard_size must be an integer of at least 1"),
        ({"naming": "slashes"}, "naming must be one of dots"),
        ({"unstack": "{}x"}, "group must be a pattern"),
        ({"unstack": 7}, "unstack must be a name or several"),
        ({"unstack": "layers", "axis": -1}, "axis must be 0 or more"),
    ],
)
def test_an_option_that_is_wrong_is_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cc.ConfigError, match=message):
        cc.Safetensors(**options)


def test_weights_that_no_checkpoint_will_have_are_told() -> None:
    cc.Safetensors().check("Tracker", ["model", "opt_state"])

    with pytest.raises(cc.ConfigError, match=r"Tracker: payload=.* no item params; it has net"):
        cc.Safetensors().check("Tracker", ["net", "opt_state"])


def test_what_is_no_payload_is_told() -> None:
    with pytest.raises(cc.ConfigError, match=r"payload must be cc.Safetensors\(...\), not 'safe"):
        as_payload("Tracker", "safetensors")  # type: ignore[arg-type]


def kinds(**more: Any) -> dict[tuple[str, ...], Leaf]:
    return kinds_of({**state_of(1.0), **more})


WRONG: dict[str, tuple[cc.Safetensors, Any, str]] = {
    "a path": (cc.Safetensors("params/tail"), {}, "'params/tail' matches nothing in the state"),
    "no layers": (cc.Safetensors(unstack="blocks"), {}, "unstack: nothing is named blocks"),
    "an axis": (
        cc.Safetensors(unstack="layers", axis=1),
        {},
        r"axis 1 of layers is 3 long in params/layers/kernel|params/layers/bias",
    ),
    "a name": (
        cc.Safetensors("extra"),
        {"extra": {"\ud800": jnp.ones(2)}},
        "safetensors cannot name it 'extra",
    ),
    "names": (
        cc.Safetensors("extra", naming="pytree2safetensors"),
        {"extra": {"a": {"b": jnp.ones(2)}, "a@b": jnp.ones(2)}},
        "would both be called",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_checkpoint_of_a_state_can_give_is_told(case: str) -> None:
    payload, more, message = WRONG[case]

    with pytest.raises(cc.ConfigError, match=f"(?s)Tracker: payload=.*({message})"):
        payload.fits("Tracker", kinds(**more))


def test_what_can_be_published_is_known_without_values() -> None:
    abstract = jax.eval_shape(lambda: state_of(1.0))

    for payload in (cc.Safetensors(), cc.Safetensors("params/layers", unstack="layers/{}")):
        payload.fits("Tracker", kinds_of(abstract))
        payload.fits("Tracker", kinds(text="\ud800", big=2**80))
