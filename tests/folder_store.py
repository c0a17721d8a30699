"""A tracker whose service is a folder, so that it outlives the processes that use it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckpt_callbacks.errors import CheckpointNotFound
from ckpt_callbacks.stores import Checkpoint, Copy, Listing, MetricPoint, RunInfo, Tracker


class FolderStore(Tracker):
    name = "folder"
    title = "Folder"
    put_moves_aliases = False

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def open(self, run: RunInfo) -> Mapping[str, str]:
        for folder in () if run.reading else ("steps", "aliases"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        return {}

    def put(self, checkpoint: Checkpoint, aliases: Sequence[str]) -> Copy:
        target = self.root / "steps" / str(checkpoint.step)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(checkpoint.path, target)
        (target / "READY").write_text(checkpoint.digest)
        return Copy("confirmed", str(target))

    def listing(self) -> Listing | None:
        ready = [p.parent for p in self.root.glob("steps/*/READY")]
        aliases = {p.name: int(p.read_text()) for p in self.root.glob("aliases/*")}
        return Listing({int(p.name): Copy("confirmed", str(p)) for p in ready}, aliases)

    def get(self, step: int, into: Path) -> None:
        if not (self.root / "steps" / str(step) / "READY").exists():
            raise CheckpointNotFound(f"no copy of step {step}")
        names = shutil.ignore_patterns("READY")
        shutil.copytree(self.root / "steps" / str(step), into, dirs_exist_ok=True, ignore=names)

    def alias(self, name: str, step: int) -> None:
        new = self.root / f"{name}.new"
        new.write_text(str(step))
        new.replace(self.root / "aliases" / name)

    def delete(self, step: int) -> None:
        shutil.rmtree(self.root / "steps" / str(step), ignore_errors=True)

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        with (self.root / "metrics.jsonl").open("a") as file:
            for p in points:
                file.write(json.dumps([p.step, p.time, dict(p.values)]) + "\n")

    def log_artifact(self, path: Path, name: str) -> None:
        target = self.root / "files" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        new = self.root / f"{path.name}.new"
        shutil.copyfile(path, new)
        new.replace(target)

    def close(self, status: str) -> None: ...

    def hint(self) -> str:
        return str(self.root)

    def files(self) -> dict[str, bytes]:
        """Return the content of every file that was logged, by name."""
        root = self.root / "files"
        found = [p for p in root.rglob("*") if p.is_file()]
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in found}

    def metrics(self) -> list[tuple[int, str]]:
        """Return step and name of every value, one that was sent twice once."""
        lines = set((self.root / "metrics.jsonl").read_text().splitlines())
        return sorted((step, name) for step, _, values in map(json.loads, lines) for name in values)
