"""The versions and aliases of a registered model, which several runs and people may share.

A version carries as tags which run made it, of which step, when that run began, and, for an alias
such as `best`, what it was chosen by. So every run can tell its own from the others', and a better
one from a worse one.

MLflow has no way to move an alias only if it still names what one has seen, so of two runs that
decide in the same instant the later one wins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from ckpt_callbacks.errors import CheckpointNotFound
from ckpt_callbacks.stores import Rank

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["RUN_TAG", "STEP_TAG", "Registry", "is_claimed", "is_missing", "keeps"]

RUN_TAG = "ckpt_callbacks_run"
STEP_TAG = "ckpt_callbacks_step"
MODEL_TAG = "ckpt_callbacks_model"
"""Id of the LoggedModel of a version, which a search leaves out."""
BEGAN_TAG = "ckpt_callbacks_began"
"""When the run began that made a version, in milliseconds since the epoch."""
RANK_TAG = "ckpt_callbacks_{alias}"
"""What a version was given an alias for."""
KEEP_TAG = "keep"
"""A person's word that a version, or a LoggedModel, stays."""

_PAGE = 250
"""Versions to ask for at a time."""


def is_missing(error: Exception) -> bool:
    """Return whether MLflow says that there is no such thing."""
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"


def is_claimed(client: MlflowClient, model: LoggedModel, number: str | None, name: str) -> bool:
    """Return whether a person registered a LoggedModel, or a version of it, somewhere else.

    Args:
        client: of MLflow.
        model: the LoggedModel.
        number: of our own version of it, if there is one.
        name: of our own registered model.
    """
    sources = [model.artifact_location, f"models:/{model.model_id}"]
    if number:
        sources.append(f"models:/{name}/{number}")
    for source in sources:
        for version in client.search_model_versions(f"source_path = '{source}'"):
            if (version.name, str(version.version)) != (name, number):
                return True
    return False


class Registry:
    """What one run has in a registered model.

    Args:
        client: of MLflow.
        name: of the registered model.
        key: id of the run.
        rank: tells what ranks a step for an alias.
    """

    def __init__(
        self,
        client: MlflowClient,
        name: str,
        key: str,
        rank: Callable[[str, int], Rank | None],
    ) -> None:
        self._client = client
        self.name = name
        self._key = key
        self._rank = rank

    def create(self) -> None:
        """Create the registered model if need be."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def versions(self, step: int | None = None) -> list[ModelVersion]:
        """Return the versions that this run made, of one step or of all, oldest first."""
        where = f"name = '{self.name}' and tags.{RUN_TAG} = '{self._key}'"
        if step is not None:
            where += f" and tags.{STEP_TAG} = '{step}'"
        found: list[ModelVersion] = []
        token = None
        while True:
            page = self._client.search_model_versions(where, _PAGE, page_token=token)
            found += page
            if not (token := page.token):
                break
        # A copy that a person made of one has its tags too.
        own = [v for v in found if not v.source.startswith("models:")]
        return sorted(own, key=lambda v: int(v.version))

    def numbers(self) -> dict[str, str]:
        """Return the version of each LoggedModel, by its id."""
        return {v.tags[MODEL_TAG]: str(v.version) for v in self.versions()}

    def publish(self, model: LoggedModel, run_id: str, began: int) -> ModelVersion:
        """Return the version of a LoggedModel, made if need be."""
        if not (found := self._of(model)):
            self._create(model, run_id, began)
            found = self._of(model)
        for double in found[1:]:  # an answer was lost, and MLflow's client asked again
            self._client.delete_model_version(self.name, str(double.version))
        return found[0]

    def _of(self, model: LoggedModel) -> list[ModelVersion]:
        versions = self.versions(int(model.tags[STEP_TAG]))
        return [v for v in versions if v.tags[MODEL_TAG] == model.model_id]

    def _create(self, model: LoggedModel, run_id: str, began: int) -> None:
        self._client.create_model_version(
            self.name,
            # Not `models:/<id>`, which MLflow would look up in the process's global store.
            source=model.artifact_location,
            run_id=run_id,
            model_id=model.model_id,
            tags={
                RUN_TAG: self._key,
                STEP_TAG: model.tags[STEP_TAG],
                MODEL_TAG: model.model_id,
                BEGAN_TAG: str(began),
            },
            description=f"step {model.tags[STEP_TAG]}",
            await_creation_for=0,
        )

    def aliases(self) -> dict[str, int]:
        """Return the steps of this run that aliases name."""
        steps = {str(v.version): int(v.tags[STEP_TAG]) for v in self.versions()}
        return {n: steps[v] for n, v in self._all_aliases().items() if v in steps}

    def alias(self, name: str, step: int) -> bool:
        """Let an alias name a step, unless another run's version has a better claim to it.

        `last` goes to the run that began last. `best` leaves another run's version only for a
        better value of the same metric. A version that no run of ours made keeps both.
        """
        if not (versions := self.versions(step)):
            raise CheckpointNotFound(f"{self.name} has no version of step {step}")
        version = versions[-1]
        holder = self._all_aliases().get(name)
        rank = self._rank(name, step)
        if holder and not self._may_take(name, holder, version, rank):
            return False
        number = str(version.version)
        if rank:  # before the alias, so that whoever sees that finds this
            told = json.dumps({"metric": rank.metric, "mode": rank.mode, "value": rank.value})
            self._client.set_model_version_tag(self.name, number, RANK_TAG.format(alias=name), told)
        if holder != number:
            self._client.set_registered_model_alias(self.name, name, number)
        return True

    def delete(self, step: int, but: Collection[str] = ()) -> set[str]:
        """Delete the versions of a step, but for those of the LoggedModels with these ids.

        Returns the ids of LoggedModels whose versions stay, since a person gave them an alias or
        the tag `keep`.
        """
        from mlflow.exceptions import MlflowException

        kept: set[str] = set()
        for version in self.versions(step):
            if version.tags[MODEL_TAG] in but:
                continue
            number = str(version.version)
            names = [n for n, v in self._all_aliases().items() if v == number]
            if any(not _is_ours(n, version.tags) for n in names) or keeps(version.tags):
                kept.add(version.tags[MODEL_TAG])
                continue
            try:
                for name in names:
                    self._client.delete_registered_model_alias(self.name, name)
                self._client.delete_model_version(self.name, number)
            except MlflowException as error:
                if not is_missing(error):
                    raise
        return kept

    def _may_take(self, name: str, holder: str, ours: ModelVersion, rank: Rank | None) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            tags = self._client.get_model_version(self.name, holder).tags
        except MlflowException as error:
            if is_missing(error):  # deleted just now, and the alias with it
                return True
            raise
        if tags.get(RUN_TAG) == self._key:
            return True
        if rank is None:
            return int(tags.get(BEGAN_TAG, ours.tags[BEGAN_TAG])) < int(ours.tags[BEGAN_TAG])
        try:
            other = Rank(**json.loads(tags[RANK_TAG.format(alias=name)]))
        except (KeyError, ValueError, TypeError):
            return False
        return rank.beats(other)

    def _all_aliases(self) -> dict[str, str]:
        # Numbers over SQL, text over REST.
        aliases = self._client.get_registered_model(self.name).aliases
        return {name: str(version) for name, version in aliases.items()}


def keeps(tags: Mapping[str, str]) -> bool:
    """Return whether a person asked by a tag that something stays."""
    return tags.get(KEEP_TAG, "").lower() not in ("", "false", "no", "0")


def _is_ours(alias: str, tags: Mapping[str, str]) -> bool:
    """Return whether an alias was set by us, and not by a person who likes our names."""
    return alias in ("best", "last") or RANK_TAG.format(alias=alias) in tags
