"""MLflow's sqlite file, made at once.

MLflow creates its tables one by one, so a kill during the first seconds of the first run leaves
a database that it can neither use nor repair.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

__all__ = ["absolute", "create_database", "has_secret"]

_PREFIX = "sqlite:///"
_SECRETS = ("user", "pass", "pwd", "secret", "token", "key", "sig", "credential")
"""Parts of names of query parameters that are not written down."""


def create_database(uri: str, key: str) -> None:
    """Create the database of a `sqlite:` URI if it is missing; other URIs are left to MLflow.

    `key` tells two runs apart that do this at the same time.
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
