"""What MLflow and W&B on the same disk add to a checkpoint: bytes, and passes to digest it.

Run it with a Python that has the package, mlflow and wandb, such as the one `tox run -e py` makes::

    .tox/py/bin/python benchmarks/mirrors.py
    python benchmarks/mirrors.py --mebibytes 1024 --json mirrors.json

`benchmarks/README.md` says what the rows are.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

import ckpt_callbacks as cc
import measure
import servers
from ckpt_callbacks.manifest import digest_of, files_in
from save_path import new_state

CHUNK = 1 << 20


def mirrored(folder: Path, mebibytes: int) -> tuple[Path, float]:
    """Keep a checkpoint in all three places; return it, and what the others add by its size."""
    from ckpt_callbacks_mlflow import MLflowTracker
    from ckpt_callbacks_wandb import WandbTracker

    uri = f"sqlite:///{folder}/mlflow.db"
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(folder / "run", save=cc.EveryNSteps(1), keep=cc.LatestN(1)),
        MLflowTracker("mirrors", tracking_uri=uri, artifact_location=str(folder / "artifacts")),
        WandbTracker("mirrors", mode="offline"),
    )
    state = new_state(mebibytes)
    with callbacks.run(state) as run:
        run.on_step(0, state)
    path = folder / "run" / "0"
    (row,) = cc.checkpoints(folder / "run")
    if len(row.where) != 3:
        raise RuntimeError(f"the checkpoint is not everywhere: {row}")
    own = measure.disk(path)
    return path, (measure.disk(folder) - own) / own


def uploaded(path: Path, folder: Path) -> float:
    """Return what MLflow's and W&B's own calls add, by the size of the checkpoint."""
    import wandb
    from mlflow import MlflowClient

    before = measure.disk(folder)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run = client.create_run(client.create_experiment("own", str(folder / "own")))
    client.log_artifacts(run.info.run_id, str(path))
    with wandb.init(project="own", dir=folder, settings=wandb.Settings(console="off")) as of_wandb:
        artifact = wandb.Artifact("own", "model")
        artifact.add_dir(str(path))
        of_wandb.log_artifact(artifact)
    return (measure.disk(folder) - before) / measure.disk(path)


def digesting(path: Path, rounds: int) -> dict[str, list[float]]:
    """Return the CPU of ways to digest all files of a checkpoint."""
    import wandb

    files = list(files_in(path))

    def md5() -> None:
        for file in files:
            digest = hashlib.md5(usedforsecurity=False)
            with file.open("rb", buffering=0) as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)

    def of_wandb() -> None:
        wandb.Artifact("digest", "model").add_dir(str(path), policy="immutable", skip_cache=True)

    def cpu(way: Callable[[], object]) -> float:
        begin = time.process_time()
        way()
        return time.process_time() - begin

    ways = {"ours": lambda: [digest_of(f) for f in files], "md5": md5, "wandb": of_wandb}
    return measure.interleaved(
        {name: lambda way=way: cpu(way) for name, way in ways.items()}, rounds
    )


@click.command()
@click.option("--mebibytes", default=512, show_default=True, help="Size of the state.")
@click.option("--rounds", default=8, show_default=True, help="Of which the median counts.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the raw numbers here.")
def main(mebibytes: int, rounds: int, file: Path | None) -> None:
    """Measure what mirrors on the same disk add to a checkpoint."""
    servers.quiet()
    with tempfile.TemporaryDirectory(prefix="ckpt-callbacks-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        places = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
        os.environ |= dict.fromkeys(places, name)
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
        path, added = mirrored(folder, mebibytes)
        found = digesting(path, rounds)
        copied = uploaded(path, folder)
    rows = [
        measure.Row("bytes that MLflow and W&B add, by the checkpoint's", [added], "x", 0.01),
        measure.Row("  their own calls", [copied], "x"),
        measure.Row("our digests, CPU", found["ours"], "s"),
        measure.Row("  md5", found["md5"], "s"),
        measure.Row("  by md5", measure.ratio(found, "ours", "md5"), "x", 0.25),
        measure.Row("  W&B's own md5, which its artifacts need", found["wandb"], "s"),
    ]
    packages = ("jax", "mlflow", "wandb", "xxhash")
    raw = {"seconds": found, "added": added, "copied": copied}
    measure.report(f"Mirrors of {mebibytes} MiB", rows, packages, file, **raw)


if __name__ == "__main__":
    main()
