"""The mutations of artifacts: what the server does when one is logged, changed or deleted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_callbacks_wandb.testing._graphql import Refused
from ckpt_callbacks_wandb.testing._store import (
    Collection,
    Member,
    Project,
    Run,
    Store,
    Version,
    now,
)

__all__ = ["Artifacts"]

_INHERIT, _NO_TTL = -1, -2


class Artifacts:
    """What is done with artifacts.

    Args:
        store: that is changed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(
        self,
        artifact_type_name: str,
        digest: str,
        entity_name: str,
        project_name: str,
        run_name: str | None = None,
        artifact_collection_names: Sequence[str] = (),
        artifact_collection_name: str | None = None,
        client_id: str | None = None,
        sequence_client_id: str | None = None,
        description: str | None = None,
        metadata: str | None = None,
        aliases: Sequence[Mapping[str, str]] | None = None,
        tags: Sequence[Mapping[str, str]] | None = None,
        ttl_duration_seconds: int | None = None,
        history_step: int | None = None,
        distributed_id: str | None = None,
        enable_digest_deduplication: bool = False,
        digest_algorithm: str = "MANIFEST_MD5",
    ) -> Version:
        """Make an artifact, or return the one of the same content."""
        if digest_algorithm != "MANIFEST_MD5":
            raise Refused(f"the stand-in knows no digests of {digest_algorithm}")
        project = self._store.make_project(entity_name, project_name)
        run = self._run(project, run_name)
        name = artifact_collection_name or artifact_collection_names[0]
        sequence = self._sequence(project, name, artifact_type_name)
        names = [alias["alias"] for alias in aliases or ()]
        same = self._same(sequence, digest) if enable_digest_deduplication else None
        if same and same.version.state == "COMMITTED":
            same.version.client_ids.append(client_id)
            for alias in names:
                sequence.move(alias, same)
            return same.version
        version = same.version if same else self._new(sequence, digest)
        version.client_ids.append(client_id)
        version.run = run
        version.asked_aliases = names
        version.tags = [tag["tag_name"] for tag in tags or ()]
        version.fields = {
            "description": description,
            "metadata": metadata,
            "ttl": _ttl(ttl_duration_seconds),
            "history_step": history_step,
        }
        return version

    def update(
        self,
        artifact_id: str,
        description: str | None = None,
        metadata: str | None = None,
        ttl_duration_seconds: int | None = None,
        tags_to_add: Sequence[Mapping[str, str]] | None = None,
        tags_to_delete: Sequence[Mapping[str, str]] | None = None,
        aliases: Sequence[Mapping[str, str]] | None = None,
        labels: str | None = None,
    ) -> Version:
        """Change what is said of an artifact."""
        version = self._store.version(artifact_id)
        for name, value in (("description", description), ("metadata", metadata)):
            if value is not None:
                version.fields[name] = value
        if ttl_duration_seconds is not None:
            version.fields["ttl"] = _ttl(ttl_duration_seconds)
        version.tags += [tag["tag_name"] for tag in tags_to_add or ()]
        gone = {tag["tag_name"] for tag in tags_to_delete or ()}
        version.tags = [tag for tag in dict.fromkeys(version.tags) if tag not in gone]
        if aliases or labels:
            raise Refused("the stand-in sets no aliases or labels with `updateArtifact`")
        version.updated_at = now()
        return version

    def add_aliases(self, artifact_id: str, aliases: Sequence[Mapping[str, str]]) -> None:
        """Move aliases to a version, in the collections that are named."""
        version = self._store.version(artifact_id)
        members = [(self._member(version, alias), alias["alias"]) for alias in aliases]
        for member, alias in members:
            member.collection.move(alias, member)

    def delete_aliases(self, artifact_id: str, aliases: Sequence[Mapping[str, str]]) -> None:
        """Take aliases from a version, in the collections that are named."""
        version = self._store.version(artifact_id)
        for alias in aliases:
            member = self._member(version, alias)
            if alias["alias"] in member.aliases:
                member.aliases.remove(alias["alias"])

    def delete(self, artifact_id: str, delete_aliases: bool | None = False) -> Version:
        """Delete an artifact and its links. No other version gets its aliases."""
        version = self._store.version(artifact_id)
        members = self._store.members_of(version)
        for member in members:
            is_link = member.collection is not version.sequence
            if is_link and self._store.protected & set(member.aliases):
                raise Refused("permission denied: it has a protected alias in a registry", 403)
        if not delete_aliases and any(member.aliases for member in members):
            raise Refused("failed to delete artifact: it has aliases", 409)
        for member in members:
            member.collection.members.remove(member)
        version.state = "DELETED"
        return version

    def link(
        self,
        artifact_portfolio_name: str | None = None,
        entity_name: str | None = None,
        project_name: str | None = None,
        aliases: Sequence[Mapping[str, str]] | None = None,
        artifact_id: str | None = None,
        client_id: str | None = None,
        artifact_portfolio_id: str | None = None,
    ) -> Member:
        """Put a version into a portfolio, such as one of a registry, which is made if need be."""
        version = self._store.version(artifact_id, client_id)
        if version.state != "COMMITTED":
            raise Refused(f"artifact {artifact_id or client_id} is not committed")
        if artifact_portfolio_name is None or artifact_portfolio_id:
            raise Refused("the stand-in links by the name of a portfolio")
        project = self._store.make_project(entity_name, project_name)
        portfolio = project.collections.get(artifact_portfolio_name)
        if portfolio is None:
            portfolio = self._make(
                "ArtifactPortfolio", project, artifact_portfolio_name, version.sequence.type
            )
        if portfolio.kind != "ArtifactPortfolio":
            raise Refused(f"{artifact_portfolio_name} is no portfolio")
        member = portfolio.member(version) or self._add(portfolio, version)
        for alias in ["latest", *(alias["alias"] for alias in aliases or ())]:
            portfolio.move(alias, member)
        return member

    def unlink(self, artifact_id: str, artifact_portfolio_id: str) -> None:
        """Take a version out of a portfolio."""
        portfolio = self._store.collection(artifact_portfolio_id)
        version = self._store.version(artifact_id)
        member = portfolio.member(version) if portfolio else None
        if member is None or member.collection.kind != "ArtifactPortfolio":
            raise Refused(f"artifact {artifact_id} is not linked there", 404)
        member.collection.members.remove(member)

    def use(
        self,
        artifact_id: str,
        entity_name: str,
        project_name: str,
        run_name: str,
        artifact_entity_name: str | None = None,
        artifact_project_name: str | None = None,
        used_as: str | None = None,
    ) -> Version:
        """Note that a run uses a version."""
        version = self._store.version(artifact_id)
        if version.state != "COMMITTED":
            raise Refused(f"cannot use artifact {artifact_id} as it has not committed")
        run = self._run(self._store.make_project(entity_name, project_name), run_name)
        if run and run not in version.used_by:
            version.used_by.append(run)
        return version

    def _run(self, project: Project, name: str | None) -> Run | None:
        if name is not None and name not in project.runs:
            raise Refused(f"run {name} not found", 404)
        return project.runs[name] if name else None

    def _sequence(self, project: Project, name: str, type_name: str) -> Collection:
        sequence = project.collections.get(name)
        if sequence is None:
            return self._make("ArtifactSequence", project, name, type_name)
        if sequence.type != type_name:
            raise Refused(f"artifact {name} already exists with type {sequence.type}")
        return sequence

    def _make(self, kind: Any, project: Project, name: str, type_name: str) -> Collection:
        collection = Collection(self._store.new_id("collection"), kind, project, name, type_name)
        project.collections[name] = collection
        return collection

    def _new(self, sequence: Collection, digest: str) -> Version:
        version = Version(self._store.new_id("artifact"), sequence, sequence.next_index, digest)
        self._store.versions[version.id] = version
        self._add(sequence, version)
        return version

    def _add(self, collection: Collection, version: Version) -> Member:
        number = collection.next_index
        member = Member(self._store.new_id("membership"), collection, version, number)
        collection.next_index += 1
        collection.members.append(member)
        return member

    def _same(self, sequence: Collection, digest: str) -> Member | None:
        """Return the one of the same content; a committed one if there is one."""
        same = [m for m in sequence.members if m.version.digest == digest]
        return next((m for m in same if m.version.state == "COMMITTED"), next(iter(same), None))

    def _member(self, version: Version, where: Mapping[str, str]) -> Member:
        project = self._store.project(where["entity_name"], where["project_name"])
        collection = project and project.collections.get(where["artifact_collection_name"])
        member = collection and collection.member(version)
        if not member:
            raise Refused(f"{where['artifact_collection_name']} does not have {version.id}", 404)
        return member


def _ttl(seconds: int | None) -> int | None:
    """Return the seconds that are kept: 0 for none at all, None for those of the project."""
    if seconds == _NO_TTL:
        return 0
    return None if seconds == _INHERIT else seconds
