"""Where MLflow is, and how long a call to it may take."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

__all__ = ["absolute", "create_database", "exists", "has_secret", "set_deadlines"]

_PREFIX = "sqlite:///"
_SECRETS = ("user", "pass", "pwd", "secret", "token", "key", "sig", "credential")
"""Parts of names of query parameters that are not written down."""

_DEADLINES = {
    # The worker calls again by itself, and knows what an earlier call may have left. One of
    # MLflow's own retries is enough for a connection that a server had closed meanwhile.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # For one answer, not for one upload; but an artifact is answered when it is stored.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


def set_deadlines() -> None:
    """Set how often and how long MLflow tries, where the user has not.

    With MLflow's defaults (7 retries, pauses that double, 120 s) a call waits 246 s for a server
    that refuses connections, and the more for one that never answers. They can be given by
    environment variables only, which hold for the whole process.
    """
    for name, value in _DEADLINES.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").addFilter(_not_of_ours)


def _not_of_ours(record: logging.LogRecord) -> bool:
    """Leave out each single try of a worker, which tells of a failure itself, and once."""
    return not (record.threadName or "").startswith("ckpt-")


def create_database(uri: str, key: str) -> None:
    """Create the database of a `sqlite:` URI if it is missing; other URIs are left to MLflow.

    MLflow creates its tables one by one, so a kill during the first seconds of the first run
    leaves a database that it can neither use nor repair. Here it is made aside, and put in its
    place when it is whole. `key` tells two runs apart that do this at the same time.
    """
    if not uri.startswith(_PREFIX):
        return
    path = Path(uri.removeprefix(_PREFIX).partition("?")[0])
    if path.exists():
        return
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{key}.new")
    new.unlink(missing_ok=True)  # of this run, when it was killed here
    uri_of_new = f"{_PREFIX}{new}"
    MlflowClient(uri_of_new, uri_of_new).search_experiments(max_results=1)
    with contextlib.suppress(FileExistsError):  # another run was faster
        path.hardlink_to(new)
    new.unlink()


def exists(uri: str) -> bool:
    """Return whether the database of a `sqlite:` URI is there; of others nothing is known."""
    return not uri.startswith(_PREFIX) or Path(uri.removeprefix(_PREFIX).partition("?")[0]).exists()


def absolute(uri: str | None) -> str | None:
    """Return a URI that means the same from any working directory."""
    if uri and uri.startswith(_PREFIX):
        path, mark, query = uri.removeprefix(_PREFIX).partition("?")
        return f"{_PREFIX}{Path(path).absolute()}{mark}{query}"
    if uri and ":" not in uri:
        return str(Path(uri).absolute())
    return uri


def has_secret(uri: str | None) -> bool:
    """Return whether a URI names a user, or holds something like a password."""
    if not uri or uri.startswith(_PREFIX):
        return False
    parts = urlsplit(uri)
    names = " ".join(parse_qs(parts.query)).lower()
    return "@" in parts.netloc or any(word in names for word in _SECRETS)
