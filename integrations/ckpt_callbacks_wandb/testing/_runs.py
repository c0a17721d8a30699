"""What the server does with runs: it makes them and takes what is streamed and saved of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_callbacks_wandb.testing._graphql import Refused
from ckpt_callbacks_wandb.testing._store import Run, Store, now

__all__ = ["EVENTS", "HISTORY", "OUTPUT", "Runs"]

HISTORY, EVENTS, OUTPUT = "wandb-history.jsonl", "wandb-events.jsonl", "output.log"
_SUMMARY = "wandb-summary.json"


class Runs:
    """What is done with runs.

    Args:
        store: that is changed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def upsert(
        self,
        id: str | None = None,
        name: str | None = None,
        entity_name: str | None = None,
        model_name: str | None = None,
        state: str | None = None,
        summary_metrics: str | None = None,
        group_name: str | None = None,
        description: str | None = None,
        display_name: str | None = None,
        notes: str | None = None,
        config: str | None = None,
        commit: str | None = None,
        host: str | None = None,
        debug: bool | None = None,
        job_program: str | None = None,
        job_repo: str | None = None,
        job_type: str | None = None,
        sweep: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> tuple[Run, bool]:
        """Return a run, changed or made, and whether it was made."""
        run = self._store.run(id) if id else None
        inserted = False
        if run is None:
            if not name:
                raise Refused(f"run {id} not found", 404)
            project = self._store.make_project(entity_name, model_name)
            inserted = name not in project.runs
            if inserted:
                project.runs[name] = Run(self._store.new_id("run"), name, project)
            run = project.runs[name]
        given = {
            "group": group_name,
            "description": description,
            "display_name": display_name,
            "notes": notes,
            "config": config,
            "commit": commit,
            "host": host,
            "program": job_program,
            "repo": job_repo,
            "job_type": job_type,
            "sweep": sweep,
            "tags": tags,
        }
        run.fields |= {name: value for name, value in given.items() if value is not None}
        run.state = state or run.state
        run.summary = summary_metrics or run.summary
        return run, inserted

    def stream(
        self, entity: str, project: str, name: str, writer: str, body: Mapping[str, Any]
    ) -> None:
        """Take what a client streams; lines at an offset that is there already replace these."""
        run = self._run(entity, project, name)
        if writer not in run.writers:
            run.writers.append(writer)
        for file, chunk in (body.get("files") or {}).items():
            if file == _SUMMARY:
                # Of several writers each sends its own part.
                before = json.loads(run.summary) if writer else {}
                parts = map(json.loads, chunk["content"])
                run.summary = json.dumps(before | dict(item for p in parts for item in p.items()))
                continue
            lines = run.lines.setdefault(file, {})
            for number, line in enumerate(chunk["content"], chunk["offset"]):
                lines[run.writers.index(writer), number] = line
        run.heartbeat_at = now()
        if not writer:
            run.state, run.exit_code = "running", None
        if body.get("complete"):
            run.exit_code = body.get("exitcode") or 0
            run.state = "failed" if run.exit_code else "finished"
        elif body.get("preempting"):
            run.state = "preempting"

    def create_files(
        self, entity_name: str, project_name: str, run_name: str, files: Sequence[str]
    ) -> tuple[Run, Sequence[str]]:
        """Return a run that gets files, with their names."""
        return self._run(entity_name, project_name, run_name), files

    def mark_uploaded(
        self, entity_name: str, project_name: str, run_name: str, files: Sequence[str]
    ) -> None:
        """Take note that files of a run have arrived."""
        run = self._run(entity_name, project_name, run_name)
        if missing := set(files) - set(run.files):
            raise Refused(f"not uploaded: {', '.join(sorted(missing))}")

    def update_state(self, id: str, state: str) -> None:
        """Set the state of a run, `pending` or `failed`."""
        run = self._store.run(id)
        if run is None:
            raise Refused(f"run {id} not found", 404)
        run.state = state

    def delete(self, id: str, delete_artifacts: bool = False) -> None:
        """Delete a run; artifacts stay."""
        run = self._store.run(id)
        if run is None or delete_artifacts:
            raise Refused(f"cannot delete run {id} or, in the stand-in, with its artifacts", 404)
        del run.project.runs[run.name]

    def _run(self, entity: str, project: str, name: str) -> Run:
        found = self._store.project(entity, project)
        if found is None or name not in found.runs:
            raise Refused(f"run {entity}/{project}/{name} not found", 404)
        return found.runs[name]
