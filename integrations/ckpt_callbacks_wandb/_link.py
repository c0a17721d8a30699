"""The link in W&B's registry that follows an alias, such as `best`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ckpt_callbacks.stores import redact
from ckpt_callbacks_wandb._versions import LATEST, Versions, is_refused, may_take, versions_in

if TYPE_CHECKING:
    import wandb

__all__ = ["Link"]

logger = logging.getLogger("ckpt_callbacks")


class Link:
    """Links what an alias names to a collection of the registry, and nothing else of the run.

    Args:
        versions: of the run.
        target: of the collection, `wandb-registry-NAME/COLLECTION`.
        alias: what to follow.
    """

    def __init__(self, versions: Versions, target: str, alias: str) -> None:
        self._versions = versions
        self.target = target
        self.alias = alias
        self._told: set[str] = set()

    def follow(self, step: int) -> None:
        """Link the version of a step, and unlink the others of the run."""
        version = self._versions.of(step)
        linked = self._links(version)
        if not any(self.alias in link.aliases for link in linked):
            if not self._may_take(step):
                return
            version.link(self.target, aliases=[self.alias])
        for other in self._versions.all():
            if self._versions.is_own(other) and other.id != version.id:
                self._unlink(self._links(other))

    def leave(self, step: int) -> None:
        """See that no link of ours keeps a step that is about to go: it may have failed before."""
        own = self._versions.own()
        if step in own and self._links(own[step]):
            for other, version in own.items():
                if other != step and self.alias in version.aliases:
                    self.follow(other)

    def _may_take(self, step: int) -> bool:
        """Return whether the alias in the registry may leave the version that has it there."""
        versions = self._versions
        rank = versions.rank(self.alias, step)
        there = versions_in(versions.api, self.target)
        holder = next((v for v in there if self.alias in v.aliases), None)
        return holder is None or may_take(
            self.alias, holder.metadata, versions.key, rank, versions.began
        )

    def _links(self, version: wandb.Artifact) -> list[wandb.Artifact]:
        """Return the links of a version to the collection."""
        links: list[wandb.Artifact] = version.linked_artifacts
        path = "/".join(self.target.split("/")[-2:])
        return [k for k in links if f"{k.project}/{k.name.split(':')[0]}" == path]

    def _unlink(self, links: Iterable[wandb.Artifact]) -> None:
        """Remove links, but for those that somebody else gave an alias, or that are protected."""
        for link in links:
            own = {LATEST, self.alias, link.version}
            if foreign := sorted(set(link.aliases) - own):
                self._tell(link, f"it has the alias {foreign[0]!r}, which somebody else gave it")
                continue
            try:
                link.unlink()
            except Exception as error:
                if not is_refused(error.__cause__ or error):
                    raise
                self._tell(link, f"W&B refuses to unlink it: {error}")

    def _tell(self, link: wandb.Artifact, why: str) -> None:
        if link.name not in self._told:
            self._told.add(link.name)
            logger.warning("W&B: %s/%s stays linked: %s", link.project, link.name, redact(why))
