"""What a person wants otherwise than the policy, in every store: aliases, and what goes at once."""

from pathlib import Path

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.record import ADOPTED
from ckpt_callbacks.testing import MemoryStore
from ckpt_callbacks_wandb import WandbTracker
from ckpt_callbacks_wandb.testing import WandbServer
from embedded import aliases, tracker, uri
from loops import callbacks_in, local_steps, train, weight


def test_a_promoted_step_is_pinned_in_every_store_until_another_one_is(tmp_path: Path) -> None:
    root = tmp_path / "run"
    all_of_it, one = MemoryStore(), MemoryStore("newest", keep=cc.LatestN(1))
    scores = {0: 0.9, **dict.fromkeys(range(1, 8), 0.5)}
    train(callbacks_in(root, all_of_it, one), 4, scores)
    assert cc.promote(root, 2, "production", stores=[all_of_it, one])

    train(callbacks_in(root, all_of_it, one), 8, scores)

    assert local_steps(root) == set(all_of_it.copies) == {0, 2, 6, 7}
    assert set(one.copies) == {2, 7}
    expected = {"best": 0, "last": 7, "production": 2}
    assert all_of_it.aliases == expected
    assert one.aliases["production"] == 2
    assert cc.find(root, "production").reason == "pinned as production"
    assert weight(root, "production") == 3.0

    assert cc.promote(root, 7, "production", stores=[all_of_it, one])
    assert local_steps(root) == set(all_of_it.copies) == {0, 6, 7}
    assert set(one.copies) == {7}
    assert all_of_it.aliases == expected | {"production": 7}


def test_what_is_no_longer_promoted_is_left_to_the_policy(tmp_path: Path) -> None:
    """In a store it keeps the alias, and so the copy, which a service can not take from it."""
    root, store = tmp_path / "run", MemoryStore()
    train(callbacks_in(root, store), 4)
    cc.promote(root, 2, "production", stores=[store])
    cc.unpin(root, 2, stores=[store])

    train(callbacks_in(root, store), 8)

    assert local_steps(root) == {6, 7}
    assert set(store.copies) == {2, 6, 7}
    assert store.aliases == {"last": 7, "production": 2}
    with pytest.raises(cc.CheckpointNotFound, match="no checkpoint 'production'"):
        cc.restore(root, which="production")


def test_going_back_takes_the_alias_with_the_step(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(callbacks_in(root), 4)
    cc.promote(root, 3, "production")

    train(callbacks_in(root), 6, resume=2, discard_newer=True)

    assert RunDirectory(root).open_run().promoted == {}
    assert local_steps(root) == {4, 5}


@pytest.mark.parametrize("alias", ["best", "best-loss", "last", "latest", "v3", "step-4", "run"])
def test_names_that_mean_something_else_are_refused(alias: str, tmp_path: Path) -> None:
    train(callbacks_in(tmp_path), 1)
    with pytest.raises(cc.ConfigError, match="has a meaning of its own"):
        cc.promote(tmp_path, 0, alias)


def test_prune_removes_at_once_what_a_policy_does_not_keep(tmp_path: Path) -> None:
    root, store = tmp_path / "run", MemoryStore()
    keep = cc.LatestN(5)
    train(callbacks_in(root, store, keep=keep), 5, {0: 0.9, 1: 0.1})
    cc.pin(root, 1, stores=[store])

    plan = cc.prune(root, cc.BestN(1, "score", mode="max", pending=0), dry_run=True)
    assert [gone.step for gone in plan.goes] == [2, 3]
    assert plan.bytes == sum(gone.bytes for gone in plan.goes) > 0
    assert local_steps(root) == {0, 1, 2, 3, 4}
    assert cc.prune(root, plan.keep, stores=[store]) == plan

    assert local_steps(root) == set(store.copies) == {0, 1, 4}
    assert cc.prune(root, plan.keep).goes == []
    train(callbacks_in(root, store, keep=keep), 8)  # the run's own policy is still in force
    assert local_steps(root) == set(store.copies) == {1, 4, 5, 6, 7}


def test_prune_refuses_to_rank_by_what_no_checkpoint_has(tmp_path: Path) -> None:
    """A misspelt name would remove all but the newest."""
    train(callbacks_in(tmp_path, keep=cc.LatestN(5)), 3, {0: 0.9})

    with pytest.raises(cc.ConfigError, match=r"'scroe'.* are loss, score\. Did you mean score\?"):
        cc.prune(tmp_path, cc.LatestN(1) | cc.BestN(1, "scroe", mode="max"))

    assert local_steps(tmp_path) == {0, 1, 2}


@pytest.mark.parametrize("there", [False, True])
def test_a_pull_that_fails_leaves_nothing(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise cc.CheckpointNotFound("there is no such model")

    monkeypatch.setattr("ckpt_callbacks.addresses.fetch", fetch)
    root = tmp_path / "new"
    if there:
        root.mkdir()
        (root / "notes.txt").touch()

    with pytest.raises(cc.CheckpointNotFound):
        cc.pull("mlflow:/digits@bset", root)

    assert root.exists() == there
    assert [path.name for path in root.rglob("*")] == ["notes.txt"] * there


def test_prune_takes_only_policies_that_can_be_written_down(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path), 1)
    with pytest.raises(cc.ConfigError, match="is a function"):
        cc.prune(tmp_path, cc.Custom(lambda history: [c.step for c in history]))


def test_a_registered_model_gets_the_alias_and_is_pulled_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, store = tmp_path / "run", tracker(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri(tmp_path))
    train(callbacks_in(root, store), 4, {0: 0.9})
    cc.promote(root, 2, "production", stores=[store])
    train(callbacks_in(root, store), 6)
    assert aliases(tmp_path).keys() == {"best", "last", "production"}
    address = next(iter(cc.inspect(root, "production").copies.values()))
    assert address.startswith("mlflow:/digits/")

    assert cc.pull(address, tmp_path / "new") == 2

    assert weight(tmp_path / "new") == 3.0
    run = RunDirectory(tmp_path / "new").open_run()
    assert run.run_id != RunDirectory(root).open_run().run_id
    train(callbacks_in(tmp_path / "new"), 6)
    assert local_steps(tmp_path / "new") == {4, 5}
    assert store.ping(None).endswith("answers")  # type: ignore[arg-type]

    with pytest.raises(cc.UsageError, match="newer checkpoints"):
        cc.pull(address, tmp_path / "same", go_on=True)
    assert cc.pull("mlflow:/digits@last", tmp_path / "same", go_on=True) == 5
    run = RunDirectory(tmp_path / "same").open_run()
    assert (run.run_id, run.status) == (RunDirectory(root).open_run().run_id, ADOPTED)


def test_what_can_not_be_pulled_is_refused(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run"), 1)
    for directory, address, message in (
        ("run", "mlflow:/digits@best", "holds a run already"),
        ("new", "digits", "is no address"),
        ("new", "mlflwo:/digits@best", r"is understood here.*Did you mean mlflow\?"),
    ):
        with pytest.raises(cc.ConfigError, match=message):
            cc.pull(address, tmp_path / directory)


def test_wandb_gets_the_alias_and_its_copies_have_addresses(
    tmp_path: Path, wandb_server: WandbServer
) -> None:
    root, store = tmp_path / "run", WandbTracker("p", artifact="digits")
    train(callbacks_in(root, store), 4, {0: 0.9})
    assert cc.promote(root, 2, "production", stores=[WandbTracker("p", artifact="digits")])

    there = {v.metadata["step"]: v for v in wandb_server.versions("p", "digits")}
    assert "production" in there[2].aliases
    (address,) = cc.inspect(root, "production").copies.values()
    assert address.startswith("wandb:")
    assert weight(root, "production") == float(
        cc.restore(address, as_numpy=True)["model"]["w"][0, 0]
    )
    assert "answers" in store.ping(None)  # type: ignore[arg-type]


def test_sync_without_a_key_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("ckpt_callbacks_wandb._tracker.sys.modules", {})
    train(callbacks_in(tmp_path / "run"), 1)

    unsent = cc.sync(tmp_path / "run", stores=[WandbTracker("p")])

    assert "there is no API key for W&B" in unsent["wandb"]
