"""The W&B store in offline mode: what is logged goes to W&B's own log file, to be synced later."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ckpt_callbacks.directory import replace_text
from ckpt_callbacks.errors import CheckpointNotFound, ConfigError
from ckpt_callbacks.extras import load, require
from ckpt_callbacks.manifest import files_in, link_tree
from ckpt_callbacks.policy import KeepPolicy, as_keep
from ckpt_callbacks.retention import policy_to_json
from ckpt_callbacks.stores import Checkpoint, Copy, Listing, MetricPoint, RunInfo, Tracker
from ckpt_callbacks_wandb._log import Artifact, Log, Row, Saved, logs_of

if TYPE_CHECKING:
    import wandb

__all__ = ["WandbTracker"]

STEP_KEY = "trainer/step"
ARTIFACTS = "artifacts"
"""The folder among the files of W&B's run that has those of the user."""
FLUSH_SECONDS = 0.1
"""How often W&B writes its log. Its default of 15 s is how much a kill may lose."""
LOG_SECONDS = 60.0
"""How long to wait for something to arrive in W&B's log before trying again."""

_MOST_REPEATED = 2000
"""How many rows may come once more after a kill: more than the worker sends at a time."""

_EXIT_CODE = {"finished": 0, "failed": 1, "killed": 255, "preempted": 255}


class WandbTracker(Tracker):
    """Logs metrics and kept checkpoints to W&B, in offline mode.

    Args:
        project: name of the project.
        mode: `offline` is the only one so far.
        entity: user or team; W&B's default if not given.
        artifact: name of the artifact; that of the run directory if not given.
        run_name: name of the run; that of the run directory if not given.
        dir: where W&B keeps its files; W&B's default (`WANDB_DIR`, or `./wandb`) if not given.
        keep: of the checkpoints that are kept, hold only those that this policy keeps, such as
            `BestN(1, "val_accuracy", mode="max", pending=0)`; all if not given.

    Raises:
        MissingExtra: wandb is not installed.
        ConfigError: a name or the mode is not one that W&B takes, or `keep` is no policy.
    """

    name = "wandb"
    title = "W&B"
    put_moves_aliases = True

    def __init__(
        self,
        project: str,
        *,
        mode: Literal["offline"] = "offline",
        entity: str | None = None,
        artifact: str | None = None,
        run_name: str | None = None,
        dir: str | os.PathLike[str] | None = None,
        keep: KeepPolicy | None = None,
    ) -> None:
        require("wandb", extra="wandb", who="WandbTracker")
        if not project:
            raise ConfigError("WandbTracker: project must not be empty")
        if mode != "offline":
            raise ConfigError(f"WandbTracker: mode {mode!r} is not supported; use 'offline'")
        if artifact is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", artifact):
            raise ConfigError(
                f"WandbTracker: artifact {artifact!r} must be letters, digits, '_', '-' and '.'"
            )
        self.keep = as_keep("WandbTracker", keep)
        self._project = project
        self._entity = entity
        self._artifact = artifact
        self._name = ""
        self._run_name = run_name
        self._dir = None if dir is None else Path(dir).absolute()
        self._held = self._folder = Path()
        self._run_id = ""
        self._run: wandb.Run
        self._log_file: Log
        self._logged: set[tuple[int, str]] = set()

    def settings(self) -> Mapping[str, Any]:
        folder = self._folder.parent if self._folder.name else self._dir
        return {
            "project": self._project,
            "entity": self._entity,
            "artifact": self._artifact,
            "run_name": self._run_name,
            "dir": folder and str(folder),
            "keep": self.keep and policy_to_json(self.keep),
        }

    def open(self, run: RunInfo) -> Mapping[str, str]:
        self._held = run.scratch
        if run.reading:
            return run.remembered
        # Here and not above: it takes a second, and this is the worker's thread.
        load("wandb")
        import wandb

        self._name = self._artifact or re.sub(r"[^A-Za-z0-9_.-]", "-", run.name)[:128]
        self._run_id = run_id = run.run_id
        if self._dir:
            self._dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            id=run_id,
            name=self._run_name or run.name,
            mode="offline",
            dir=self._dir,
            config=dict(run.config),
            reinit="create_new",  # a run that the user has open is left alone
            settings=wandb.Settings(
                x_transaction_log_flush_interval=FLUSH_SECONDS,
                # The loop's output is the user's, and threads of ours must not capture it.
                console="off",
                # The same facts are in `hint` and in events.
                silent=True,
            ),
        )
        started = Path(self._run.dir).parent
        self._folder = started.parent
        self._log_file = Log(started / f"run-{run_id}.wandb")
        # After a kill between W&B's log and our note of it the last points come once more.
        rows: deque[Row] = deque(maxlen=_MOST_REPEATED)
        for log in logs_of(self._folder, run_id):
            rows.extend(found for found in log.new() if isinstance(found, Row))
        self._logged = {(r.values.get(STEP_KEY, -1), name) for r in rows for name in r.values}
        # A step metric of our own: W&B drops values at a step lower than its current one.
        self._run.define_metric(STEP_KEY, hidden=True)
        self._run.define_metric("*", step_metric=STEP_KEY)
        # The folder too: in another one there is nothing of what was logged before.
        return {"run_id": run_id, "folder": str(self._folder)}

    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        folder = self._held / str(checkpoint.step)
        if self._digest(checkpoint.step) != checkpoint.digest:
            # Cut, or of other bytes: the step was saved again.
            shutil.rmtree(folder, ignore_errors=True)
        link_tree(checkpoint.path, folder / "files")
        # In the artifact too, so that equal weights at two steps are two versions, not one.
        about = {
            "run": checkpoint.run_id,
            "step": checkpoint.step,
            "digest": checkpoint.digest,
            "reason": checkpoint.reason,
            "metrics": {k: v for k, v in checkpoint.metrics.items() if v - v == 0},
        }
        replace_text(folder / "checkpoint.json", json.dumps(about, indent=1))
        self._log(checkpoint.step, [f"step-{checkpoint.step}", *aliases])
        return Copy("staged", f"{self._name}:step-{checkpoint.step}", shared=True)

    def listing(self) -> Listing | None:
        # There is no server to ask, but W&B's own log tells what it will send.
        named: dict[str, int] = {}
        for log in logs_of(self._folder, self._run_id):
            for found in log.new():
                if isinstance(found, Artifact):
                    named |= dict.fromkeys(found.aliases, int(found.metadata["step"]))
        copies = {
            step: Copy("staged", f"{self._name}:{alias}", shared=True)
            for alias, step in named.items()
            if alias == f"step-{step}" and self._digest(step)
        }
        return Listing(
            copies,
            {n: s for n, s in named.items() if s in copies and n not in ("latest", f"step-{s}")},
            exact=True,
        )

    def get(self, step: int, into: Path) -> None:
        files = self._held / str(step) / "files"
        if not files.is_dir():
            raise CheckpointNotFound(f"no files of step {step} are held for W&B")
        shutil.copytree(files, into, dirs_exist_ok=True)

    def alias(self, name: str, step: int) -> None:
        # Offline an alias moves by logging the same content again: W&B's server stores it once.
        self._log(step, [name])

    def delete(self, step: int) -> None:
        # What is in W&B's log stays there; without its files a sync leaves it out.
        shutil.rmtree(self._held / str(step), ignore_errors=True)

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        rows, before = 0, frozenset(self._logged)
        for point in points:
            new = {k: v for k, v in point.values.items() if (point.step, k) not in before}
            if new:
                self._run.log({STEP_KEY: point.step, **new})
                # Until they have arrived: if that takes too long, the same points come again.
                self._logged |= {(point.step, k) for k in new}
                rows += 1
        arrived = (isinstance(found, Row) for found in self._log_file.follow(LOG_SECONDS))
        while rows:
            rows -= next(arrived)
        self._logged.clear()

    def log_artifact(self, path: Path, name: str) -> None:
        # Into the folder that W&B syncs, since the file goes. Below a folder of ours there, since
        # W&B has files of its own, such as `config.yaml`.
        files = Path(self._run.dir)
        target = files / ARTIFACTS / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        self._run.save(glob.escape(str(target)), base_path=str(files), policy="now")
        for found in self._log_file.follow(LOG_SECONDS):
            if isinstance(found, Saved) and f"{ARTIFACTS}/{name}" in found.names:
                return

    def close(self, status: str) -> None:
        self._run.finish(exit_code=_EXIT_CODE[status])

    def hint(self) -> str:
        # Every restart of a run writes a log of its own.
        return f"wandb sync {self._folder / f'offline-run-*-{self._run_id}'}"

    def _digest(self, step: int) -> str | None:
        """Return the digest of the whole checkpoint that is held, if one is."""
        try:
            about = json.loads((self._held / str(step) / "checkpoint.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        return str(about["digest"])

    def _log(self, step: int, aliases: Sequence[str]) -> None:
        """Log the files held of a step, and return when that is in W&B's log."""
        import wandb

        folder = self._held / str(step)
        about = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        artifact = wandb.Artifact(self._name, "model", metadata=about)
        # Immutable and without the cache: W&B reads the held links themselves and copies nothing.
        held = {"checkpoint.json": folder / "checkpoint.json"}
        for path in files_in(folder / "files"):
            held[f"checkpoint/{path.relative_to(folder / 'files').as_posix()}"] = path
        for name, path in sorted(held.items()):
            artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=[*aliases])
        for found in self._log_file.follow(LOG_SECONDS):
            if (
                isinstance(found, Artifact)
                and found.metadata.get("step") == step
                and found.aliases >= set(aliases)
            ):
                return
