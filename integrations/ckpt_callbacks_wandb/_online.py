"""What a run holds on W&B's server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_callbacks.stores import Checkpoint, Copy, Listing, Overview, redact
from ckpt_callbacks_wandb._client import remove_unfinished
from ckpt_callbacks_wandb._fetch import fetch, known_of
from ckpt_callbacks_wandb._held import Held, changing
from ckpt_callbacks_wandb._link import Link
from ckpt_callbacks_wandb._versions import Versions

if TYPE_CHECKING:
    import wandb

__all__ = ["Online"]

logger = logging.getLogger("ckpt_callbacks")

UPLOAD_SECONDS = 600.0
"""How long to wait for an upload before its delay is told. It goes on, and is waited for again."""


class Online:
    """The versions of a run on the server; each call returns when the server has done it.

    Args:
        run: the run of W&B, which is open.
        held: the files that are to be sent.
        versions: what there is.
        link: what follows an alias in the registry.
    """

    moves_aliases = False

    def __init__(self, run: wandb.Run, held: Held, versions: Versions, link: Link | None) -> None:
        self._run = run
        self._held = held
        self._versions = versions
        self._link = link
        self._uploads: dict[int, tuple[str, Future[wandb.Artifact]]] = {}
        if steps := self._remove_unfinished():
            logger.warning(
                "W&B: removed %d version(s) that were begun and never finished: step %s",
                len(steps),
                ", ".join(map(str, steps)),
            )
        own = versions.own()
        for step in held.steps():  # of a run that was killed in between
            if step in own and own[step].metadata["digest"] == held.about(step)["digest"]:
                held.release(step)

    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        step, held = checkpoint.step, self._held
        there = self._versions.all()
        old = [v for v in there if self._versions.is_own(v) and v.metadata["step"] == step]
        same = [v for v in old if v.metadata["digest"] == checkpoint.digest]
        if same and step not in self._uploads:
            held.release(step)
            version = same[-1]
        else:
            held.hold(checkpoint, self._versions.began)
            # What an old one of other bytes was called is that of the new one.
            names = {f"step-{step}"}.union(*(self._versions.ours(v) for v in old))
            version = self._upload(step, checkpoint.digest, sorted(names))
        for other in old:
            if other.id != version.id:
                self._versions.remove(self._again(other), there)
        return self._copy(version)

    def listing(self) -> Listing:
        there = self._versions.all()
        own = {v.metadata["step"]: v for v in there if self._versions.is_own(v)}
        waiting = self._held.steps() - own.keys()
        name = self._held.name
        copies = {
            **{step: self._copy(version) for step, version in own.items()},
            **{step: Copy("pending", f"{name}:step-{step}", shared=True) for step in waiting},
        }
        aliases = {
            alias: step
            for step, version in own.items()
            for alias in self._versions.ours(version)
            if alias != f"step-{step}"
        }
        known = {step: known_of(version) for step, version in own.items()}
        # A database answers with what it has.
        return Listing(copies, aliases, exact=True, known=known)

    def get(self, step: int, into: Path) -> None:
        fetch(self._versions.of(step), into)

    def alias(self, name: str, step: int) -> bool:
        moved = self._versions.alias(name, step)
        if moved:
            self._follow(name, step)
        return moved

    def _follow(self, name: str, step: int) -> None:
        """Let the link in the registry follow an alias; what fails must not hold up all else."""
        if self._link and name == self._link.alias:
            try:
                self._link.follow(step)
            except Exception as error:
                logger.warning(
                    "W&B: step %d could not be linked to %s, which is tried again when something "
                    "changes: %s",
                    step,
                    self._link.target,
                    redact(str(error)),
                )

    def delete(self, step: int) -> bool:
        if step in self._uploads:  # which goes on, and would end as a version of nobody
            try:
                self._finish_upload(step)
            except TimeoutError:
                raise
            except Exception:
                logger.debug("the upload of step %d failed, and is not wanted", step)
        if self._link:
            self._link.leave(step)
        gone = self._versions.delete(step)
        self._held.release(step)
        return gone

    def show(self, overview: Overview) -> None:
        """Bring the metadata of the versions up to date, and the link in the registry."""
        own = self._versions.own()
        for row in overview.rows:
            version = own.get(row.step)
            if version is None:
                continue
            about = {**version.metadata, **changing(row.metrics, row.reason)}
            if about != version.metadata:
                version.metadata = about
                version.save()
            for alias in row.aliases:  # it was measured again, or refused before
                if alias not in version.aliases or self._is_ranked_otherwise(alias, version):
                    self.alias(alias, row.step)
                else:
                    self._follow(alias, row.step)

    def _is_ranked_otherwise(self, alias: str, version: wandb.Artifact) -> bool:
        rank = self._versions.rank(alias, version.metadata["step"])
        told = version.metadata.get("ranks", {}).get(alias, {})
        return rank is not None and told.get("value") != rank.value

    def _upload(self, step: int, digest: str, aliases: Sequence[str]) -> wandb.Artifact:
        """Send what is held of a step and return the version, once W&B has all of it."""
        if self._uploads.get(step, ("", None))[0] != digest:
            artifact = self._held.artifact(step)
            about = artifact.digest
            self._run.log_artifact(artifact, aliases=[*aliases])
            self._uploads[step] = (digest, _waited_for(artifact, about))
        version = self._finish_upload(step)
        self._held.release(step)
        return version

    def _finish_upload(self, step: int) -> wandb.Artifact:
        """Return the version that an upload made.

        Raises:
            TimeoutError: it takes long, and goes on.
            Exception: it failed, as W&B's client says; what it left is removed.
        """
        upload = self._uploads[step][1]
        if not wait([upload], UPLOAD_SECONDS).done:
            raise TimeoutError(
                f"the upload of step {step} is not confirmed after {UPLOAD_SECONDS:.0f} s; "
                "it goes on"
            )
        del self._uploads[step]
        try:
            return upload.result()
        except Exception:
            self._remove_unfinished()
            raise

    def _remove_unfinished(self) -> list[int]:
        """Remove the versions that never got whole, but for those that are being sent."""
        versions = self._versions
        return remove_unfinished(versions.api, self._run.path, versions.key, [*self._uploads])

    def _again(self, version: wandb.Artifact) -> wandb.Artifact:
        """Return a version as it is now: the new one took its aliases."""
        fresh: wandb.Artifact = self._versions.api.artifact(version.qualified_name)
        return fresh

    def _copy(self, version: wandb.Artifact) -> Copy:
        part = version.metadata.get("sent", "checkpoint") != "checkpoint"
        return Copy("confirmed", version.name, shared=part)


def _waited_for(artifact: wandb.Artifact, digest: str) -> Future[wandb.Artifact]:
    """Return the version that an artifact becomes.

    `wait` with a time limit works once only, so it has none, and a thread of its own.
    """
    future: Future[wandb.Artifact] = Future()

    def work() -> None:
        try:
            version = artifact.wait()
            if version.state != "COMMITTED" or version.digest != digest:
                raise ValueError(
                    f"W&B has {version.name} as {version.state} with digest {version.digest}, "
                    f"but {digest} was sent"
                )
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(version)

    threading.Thread(target=work, name="ckpt-wandb-upload", daemon=True).start()
    return future
