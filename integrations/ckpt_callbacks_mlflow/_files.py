"""The files of a checkpoint in MLflow's artifact store: brought there, checked, fetched, removed.

MLflow sends a folder file by file, and begins again from the first after a cut. Here several go
at a time, and those that arrived are not sent again. A store on this machine's disk gets hard
links, so that a copy costs no bytes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ckpt_callbacks.manifest import link_tree
from ckpt_callbacks.stores import File

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

__all__ = ["FOLDER", "Tree", "download", "is_local", "remove", "repository", "send", "upload"]

FOLDER = "checkpoint"
"""Where the checkpoint lies in a LoggedModel's artifacts; beside it is what describes it."""

Tree = tuple[Path, Mapping[str, File]]
"""A folder on this machine, and the files of it that are meant."""

_AT_A_TIME = 4
"""Files on their way at once. More gained nothing with a server of one process."""


def repository(location: str, tracking_uri: str) -> ArtifactRepository:
    """Return the artifact store at `location`.

    `MlflowClient` has no call that deletes artifacts or sends one file; these classes do.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(location, tracking_uri=tracking_uri)


def upload(
    store: ArtifactRepository, folders: Mapping[str, Tree], about: Path, *, new: bool
) -> bool:
    """Bring `folders`, and the files in the folder `about`, to the store.

    Where it is not `new`, what an earlier call has brought there is not sent again. Returns
    whether all files of the checkpoint are hard links.

    Args:
        store: of a LoggedModel.
        folders: by their name there: where each is on this machine, and its files.
        about: what lies beside them.
        new: whether there is nothing yet.

    Raises:
        OSError: a file did not arrive whole.
    """
    trees = folders.items()
    expected = {f"{to}/{n}": file for to, (_, files) in trees for n, file in files.items()}
    linked = False
    if root := _local_folder(store):
        root.mkdir(parents=True, exist_ok=True)
        links = {to: link_tree(source, root / to, files) for to, (source, files) in trees}
        linked = links[FOLDER]
        for path in about.iterdir():
            (root / path.name).unlink(missing_ok=True)
            shutil.copyfile(path, root / path.name)
        arrived = _arrived(store, folders)
    else:
        arrived = {} if new else _arrived(store, folders)
        missing = {name for name, file in expected.items() if arrived.get(name) != file.size}
        here = {f"{to}/{n}": source / n for to, (source, files) in trees for n in files}
        jobs = [(here[name], name) for name in sorted(missing)]
        jobs += [(path, path.name) for path in about.iterdir()]
        with ThreadPoolExecutor(_AT_A_TIME, "ckpt-mlflow-upload") as pool:
            sent = [pool.submit(send, store, path, name) for path, name in jobs]
        for job in sent:
            job.result()
        if missing:
            arrived = _arrived(store, folders)
    for name, file in expected.items():
        if (size := arrived.get(name)) != file.size:
            raise OSError(f"{name} has {size} bytes in MLflow instead of {file.size}")
    return linked


def download(store: ArtifactRepository, names: Iterable[str], into: Path) -> None:
    """Copy files and folders of the store to the same names below `into`."""
    for name in names:
        with tempfile.TemporaryDirectory(dir=into) as scratch:  # so that a move is a rename
            found = Path(store.download_artifacts(name, scratch))
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(found, target)


def remove(store: ArtifactRepository) -> None:
    """Free the bytes of all that the store holds; what is gone already is no error."""
    folder = _local_folder(store)
    if folder is None or folder.exists():
        store.delete_artifacts()
    if folder and folder.parent.exists():
        folder.parent.rmdir()  # the model's own folder, which MLflow leaves empty


def send(store: ArtifactRepository, path: Path, name: str) -> None:
    """Bring one file there, under a name that ends as its own does."""
    parent = PurePosixPath(name).parent.as_posix()
    store.log_artifact(str(path), None if parent == "." else parent)


def _local_folder(store: ArtifactRepository) -> Path | None:
    """Return the folder of a store on this machine's disk."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    return Path(store.artifact_dir) if isinstance(store, LocalArtifactRepository) else None


def is_local(store: ArtifactRepository) -> bool:
    """Return whether a store is on this machine's disk, where its files may be hard links."""
    return _local_folder(store) is not None


def _arrived(store: ArtifactRepository, folders: Iterable[str]) -> dict[str, int]:
    return {name: size for folder in folders for name, size in _sizes(store, folder)}


def _sizes(store: ArtifactRepository, folder: str) -> Iterator[tuple[str, int]]:
    """Yield path and size of every file below `folder`."""
    for info in store.list_artifacts(folder):
        if info.is_dir:
            yield from _sizes(store, info.path)
        else:
            yield info.path, info.file_size or 0  # a server leaves out a zero
