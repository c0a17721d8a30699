"""The versions of an artifact on W&B's server, which several runs and people may share.

A version carries as metadata which run made it, of which step, when that run began, and, for an
alias such as `best`, what it was chosen by. So every run can tell its own from the others', and a
better one from a worse one.

W&B has no way to move an alias only if it still names what one has seen, so of two runs that
decide in the same instant the later one wins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckpt_callbacks.errors import CheckpointNotFound
from ckpt_callbacks.stores import Rank, redact
from ckpt_callbacks_wandb._held import TYPE

if TYPE_CHECKING:
    import wandb

__all__ = ["LATEST", "Versions", "is_refused", "may_take", "versions_in"]

logger = logging.getLogger("ckpt_callbacks")

LATEST = "latest"
"""W&B's client gives it to whatever is logged, also to an old step that comes late."""
_AT_ONCE = 200  # versions to ask for


def versions_in(api: wandb.Api, path: str) -> list[wandb.Artifact]:
    """Return the complete versions in a collection, the oldest first; none if there is none."""
    try:
        found = list(api.artifacts(TYPE, path, per_page=_AT_ONCE))
    except ValueError as error:
        # What W&B's client makes of an answer without the collection. (Its questions whether
        # something exists take every error of the server for a no.)
        if "Unable to parse" not in str(error):
            raise
        return []
    return sorted(found, key=index_of)


def index_of(version: wandb.Artifact) -> int:
    """Return 3 for `v3`."""
    return int(version.version.removeprefix("v"))


def is_missing(error: Exception) -> bool:
    """Return whether W&B says that there is no such thing."""
    return "not found" in str(error)


def is_refused(error: BaseException) -> bool:
    """Return whether the server understood and will not, so that asking again is of no use now."""
    answer = getattr(getattr(error, "exc", None), "response", None)
    status = getattr(answer, "http_status", None)
    return status is not None and status < 500 and status not in (408, 429)


def may_take(
    name: str, holder: Mapping[str, Any], key: str, rank: Rank | None, began: float
) -> bool:
    """Return whether a run may take an alias from a version, by that one's metadata.

    `last` goes to the run that began last. `best` leaves another run's version only for a better
    value of the same metric. A version that no run of ours made keeps both.
    """
    if holder.get("run") == key:
        return True
    if "run" not in holder:
        return False
    if rank is None:
        return float(holder.get("began", began)) < began
    try:
        other = Rank(**holder["ranks"][name])
    except (KeyError, TypeError):
        return False
    return rank.beats(other)


class Versions:
    """The versions of one run.

    Args:
        api: of W&B.
        path: of the collection, `ENTITY/PROJECT/NAME`.
        key: id of the run.
        began: when the run began, seconds since the epoch.
        rank: tells what ranks a step for an alias.
    """

    def __init__(
        self,
        api: wandb.Api,
        path: str,
        key: str,
        began: float,
        rank: Callable[[str, int], Rank | None],
    ) -> None:
        self.api = api
        self.path = path
        self.key = key
        self.began = began
        self.rank = rank
        self._told: set[tuple[str, str]] = set()

    def all(self) -> list[wandb.Artifact]:
        """Return all complete versions in the collection, the oldest first."""
        return versions_in(self.api, self.path)

    def own(self) -> dict[int, wandb.Artifact]:
        """Return the newest complete version of this run for each step."""
        return {v.metadata["step"]: v for v in self.all() if self.is_own(v)}

    def is_own(self, version: wandb.Artifact) -> bool:
        """Return whether this run made a version, and nobody has edited what tells."""
        about = version.metadata
        told = isinstance(about.get("step"), int) and isinstance(about.get("digest"), str)
        return told and bool(about.get("run") == self.key)

    def of(self, step: int) -> wandb.Artifact:
        """Return the newest complete version of a step.

        Raises:
            CheckpointNotFound: there is none.
        """
        try:
            return self.own()[step]
        except KeyError:
            raise CheckpointNotFound(f"W&B has no complete version of step {step}") from None

    def alias(self, name: str, step: int) -> bool:
        """Let an alias name a step, unless another run's version has a better claim to it."""
        there = self.all()
        version = next((v for v in reversed(there) if self._is_of(v, step)), None)
        if version is None:
            raise CheckpointNotFound(f"W&B has no complete version of step {step}")
        holder = next((v for v in there if name in v.aliases), None)
        rank = self.rank(name, step)
        if holder and not may_take(name, holder.metadata, self.key, rank, self.began):
            return False
        if rank:
            ranks = version.metadata.get("ranks", {})
            told = {"metric": rank.metric, "mode": rank.mode, "value": rank.value}
            version.metadata = {**version.metadata, "ranks": {**ranks, name: told}}
        if name not in version.aliases:
            version.aliases.append(name)
        version.save()
        return True

    def delete(self, step: int) -> bool:
        """Delete the versions of a step; return whether all are gone.

        One that a person claimed, by an alias or a link, or that the server protects, stays.
        """
        there = self.all()
        left = [v for v in there if self._is_of(v, step) and not self.remove(v, there)]
        return not left

    def remove(self, version: wandb.Artifact, there: Sequence[wandb.Artifact]) -> bool:
        """Delete one of the versions that are there; return whether it is gone."""
        if foreign := self.foreign(version):
            self._tell(version, f"it has the alias {foreign[0]!r}, which somebody else gave it")
            return False
        if links := version.linked_artifacts:
            where = f"{links[0].project}/{links[0].name}"
            self._tell(version, f"it is linked to {where}")
            return False
        self._hand_on_latest(version, there)
        try:
            version.delete(delete_aliases=True)
        except Exception as error:
            if is_missing(error):
                return True
            if not is_refused(error):
                raise
            self._tell(version, f"W&B refuses to delete it: {error}")
            return False
        return True

    def ours(self, version: wandb.Artifact) -> set[str]:
        """Return the aliases of a version that were set by us."""
        about = version.metadata
        names = {"best", "last", f"step-{about.get('step')}", *about.get("ranks", ())}
        return names.intersection(version.aliases)

    def foreign(self, version: wandb.Artifact) -> list[str]:
        """Return the aliases of a version that were not set by us."""
        return sorted(set(version.aliases) - self.ours(version) - {LATEST})

    def _hand_on_latest(self, version: wandb.Artifact, there: Sequence[wandb.Artifact]) -> None:
        """Give W&B's own alias to the newest version that stays, which W&B does not do itself."""
        others = [v for v in there if v.id != version.id]
        if LATEST in version.aliases and others:
            others[-1].aliases.append(LATEST)
            others[-1].save()

    def _tell(self, version: wandb.Artifact, why: str) -> None:
        """Say once why a version stays."""
        if (version.version, why) not in self._told:
            self._told.add((version.version, why))
            logger.warning(
                "W&B: version %s of step %s is no longer wanted, but stays: %s. The next run in "
                "this directory, or `ckpt-callbacks sync`, looks again",
                version.qualified_name,
                version.metadata.get("step"),
                redact(why),
            )

    def _is_of(self, version: wandb.Artifact, step: int) -> bool:
        return self.is_own(version) and version.metadata["step"] == step
