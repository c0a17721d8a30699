"""A registered model that several runs share, and people."""

from pathlib import Path
from typing import Any

import mlflow
import pytest

from ckpt_callbacks.stores import Overview, Rank, Shown
from ckpt_callbacks.testing import make_checkpoint
from ckpt_callbacks_mlflow import MLflowTracker
from embedded import aliases, client, models, opened, tracker, uri

ONE, OTHER = "0123456789ab", "ba9876543210"


def best(value: float, metric: str = "accuracy") -> dict[tuple[str, int], Rank]:
    return {("best", 7): Rank(metric, "max", value)}


def with_version(
    folder: Path, run_id: str, ranks: dict[tuple[str, int], Rank] | None = None
) -> MLflowTracker:
    store = opened(folder, tracker(folder), run_id, ranks)
    store.put(make_checkpoint(folder / run_id, 7), [])
    return store


def test_best_goes_to_another_run_only_for_a_better_value_of_the_same_metric(
    tmp_path: Path,
) -> None:
    one = with_version(tmp_path, ONE, best(0.9))
    assert one.alias("best", 7)

    worse = with_version(tmp_path, OTHER, best(0.8))
    assert worse.alias("best", 7) is False
    assert aliases(tmp_path) == {"best": "1"}

    equal = opened(tmp_path, tracker(tmp_path), OTHER, best(0.9))
    assert equal.alias("best", 7) is False
    another = opened(tmp_path, tracker(tmp_path), OTHER, best(0.95, "recall"))
    assert another.alias("best", 7) is False
    better = opened(tmp_path, tracker(tmp_path), OTHER, best(0.95))
    assert better.alias("best", 7)
    assert aliases(tmp_path) == {"best": "2"}


def test_last_goes_to_the_run_that_began_last_and_stays_there(tmp_path: Path) -> None:
    one = with_version(tmp_path, ONE)
    assert one.alias("last", 7)
    other = with_version(tmp_path, OTHER)
    assert other.alias("last", 7)
    assert aliases(tmp_path) == {"last": "2"}

    one.put(make_checkpoint(tmp_path / ONE, 8), [])

    assert one.alias("last", 8) is False
    assert aliases(tmp_path) == {"last": "2"}
    listing = one.listing()
    assert listing
    assert not listing.aliases


def test_a_name_that_a_person_gave_away_is_left_there(tmp_path: Path) -> None:
    one = with_version(tmp_path, ONE, best(0.9))
    theirs = client(tmp_path).create_model_version("digits", source=str(tmp_path))
    for name in ("best", "last"):
        client(tmp_path).set_registered_model_alias("digits", name, str(theirs.version))

    assert one.alias("best", 7) is False
    assert one.alias("last", 7) is False
    assert aliases(tmp_path) == {"best": str(theirs.version), "last": str(theirs.version)}


@pytest.mark.parametrize("how", ["copy", "model", "copy within"])
def test_a_checkpoint_that_a_person_promoted_elsewhere_stays(
    tmp_path: Path, how: str, request: pytest.FixtureRequest
) -> None:
    mlflow.set_tracking_uri(uri(tmp_path))  # where MLflow looks up `models:/`
    request.addfinalizer(lambda: mlflow.set_tracking_uri(None))
    store = with_version(tmp_path, ONE)
    registry, model = client(tmp_path), models(tmp_path)[7]
    if how == "model":
        registry.create_registered_model("production")
        registry.create_model_version("production", f"models:/{model.model_id}")
    else:
        registry.copy_model_version("models:/digits/1", "digits" if "in" in how else "production")

    store.put(make_checkpoint(tmp_path / "again", 7), [])
    assert store.delete(7) is False

    assert Path(model.artifact_location, "checkpoint", "model", "d", "data").exists()
    assert len(registry.search_model_versions()) == 2


def test_best_is_judged_anew_when_it_is_measured_again(tmp_path: Path) -> None:
    overview = Overview("run", "", [Shown(7, 0.0, "", ["best"], {}, 1, "")], [])
    ranks = best(0.9)
    one = with_version(tmp_path, ONE, ranks)
    one.alias("best", 7)
    theirs = best(0.7)
    other = with_version(tmp_path, OTHER, theirs)
    assert other.alias("best", 7) is False

    ranks["best", 7] = Rank("accuracy", "max", 0.5)
    one.show(overview)
    other.show(overview)

    assert aliases(tmp_path) == {"best": "2"}


def test_an_alias_of_a_person_that_looks_like_ours_is_theirs(tmp_path: Path) -> None:
    store = with_version(tmp_path, ONE)
    client(tmp_path).set_registered_model_alias("digits", "best-in-production", "1")

    assert store.delete(7) is False
    assert aliases(tmp_path) == {"best-in-production": "1"}


def test_the_new_bytes_of_a_step_whose_old_ones_a_person_keeps(tmp_path: Path) -> None:
    store = with_version(tmp_path, ONE)
    client(tmp_path).set_registered_model_alias("digits", "champion", "1")
    new = make_checkpoint(tmp_path / "new", 7, b"other")

    store.put(new, [])

    (tmp_path / "got").mkdir()
    store.get(7, tmp_path / "got")
    assert (tmp_path / "got" / "model" / "d" / "data").read_bytes() == b"other"
    listing = store.listing()
    assert listing
    assert listing.copies[7].ref.startswith("digits v2 ")


@pytest.mark.parametrize("claim", ["alias", "version tag", "model tag"])
def test_what_a_person_keeps_is_not_deleted(tmp_path: Path, claim: str) -> None:
    store = with_version(tmp_path, ONE)
    registry, model = client(tmp_path), models(tmp_path)[7]
    if claim == "alias":
        registry.set_registered_model_alias("digits", "champion", "1")
    elif claim == "version tag":
        registry.set_model_version_tag("digits", "1", "keep", "yes")
    else:
        registry.set_logged_model_tags(model.model_id, {"keep": "true"})

    assert store.delete(7) is False

    assert Path(model.artifact_location, "checkpoint", "model", "d", "data").exists()
    assert len(registry.search_model_versions("name = 'digits'")) == 1
    if claim == "alias":
        registry.delete_registered_model_alias("digits", "champion")
        assert store.delete(7)
        assert not registry.search_model_versions("name = 'digits'")


def test_a_version_that_was_made_twice_is_deleted_with_its_step(tmp_path: Path) -> None:
    """An answer was lost, and MLflow's client asked again."""
    store = with_version(tmp_path, ONE)
    version = client(tmp_path).get_model_version("digits", "1")
    client(tmp_path).create_model_version("digits", version.source, tags=version.tags)
    store.put(make_checkpoint(tmp_path / "again", 7), [])

    store.delete(7)

    assert not client(tmp_path).search_model_versions("name = 'digits'")


def test_a_version_that_mlflow_itself_made_twice_is_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    create = store._client.create_model_version

    def twice(*arguments: object, **options: object) -> object:
        create(*arguments, **options)
        return create(*arguments, **options)

    monkeypatch.setattr(store._client, "create_model_version", twice)
    copy = store.put(make_checkpoint(tmp_path, 7), [])

    (version,) = client(tmp_path).search_model_versions("name = 'digits'")
    assert copy.ref.startswith(f"digits v{version.version} ")


def test_a_model_that_mlflow_makes_twice_is_one_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer was lost, and MLflow's own client asked again."""
    store = opened(tmp_path, tracker(tmp_path))
    create = store._client.create_logged_model

    def twice(*arguments: Any, **options: Any) -> Any:
        create(*arguments, **options)
        return create(*arguments, **options)

    monkeypatch.setattr(store._client, "create_logged_model", twice)

    copy = store.put(make_checkpoint(tmp_path, 7), [])

    (left,) = client(tmp_path).search_logged_models(["1"])
    assert str(left.model_id) in copy.ref
    assert str(left.status) == "READY"


def test_a_model_that_was_made_twice_is_one_again(tmp_path: Path) -> None:
    store = opened(tmp_path, tracker(tmp_path))
    checkpoint = make_checkpoint(tmp_path, 7)
    first = store._models._create(checkpoint)
    second = store._models._create(checkpoint)

    store.put(checkpoint, [])

    (left,) = client(tmp_path).search_logged_models(["1"])
    assert left.model_id in (first.model_id, second.model_id)
    assert str(left.status) == "READY"
