"""MLflow as people run it: a file, a server, one on PostgreSQL and S3, and S3 without a server."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from servers import processes
from servers.backends import Backend, Files, digest, files_in

BUCKET = "artifacts"


@dataclass(frozen=True)
class S3:
    endpoint: str
    bucket: Any

    @property
    def settings(self) -> Mapping[str, str]:
        """What a client of it needs in its environment."""
        return processes.AWS | {"MLFLOW_S3_ENDPOINT_URL": self.endpoint}

    def files(self, folder: str) -> Files:
        return {
            o.key.removeprefix(f"{folder}/"): digest(o.get()["Body"].read())
            for o in self.bucket.objects.filter(Prefix=f"{folder}/")
        }


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", type=Path, help="folder for what the browser shows")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """`mlflow server` on a sqlite file and a local folder."""
    folder = tmp_path_factory.mktemp("server")
    store, artifacts = f"sqlite:///{folder}/mlflow.db", folder / "artifacts"
    with processes.mlflow_server(folder, store, str(artifacts)) as uri:
        yield Backend(uri, lambda location: files_in(artifacts / below(location)))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with processes.s3(tmp_path_factory.mktemp("s3")) as endpoint:
        bucket = boto3.resource(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        ).Bucket(BUCKET)
        bucket.create()
        yield S3(endpoint, bucket)


@pytest.fixture(scope="session")
def cloud(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """`mlflow server` on PostgreSQL and S3."""
    folder, artifacts = tmp_path_factory.mktemp("cloud"), f"s3://{BUCKET}/mlflow"
    with (
        processes.postgres() as store,
        processes.mlflow_server(folder, store, artifacts, s3.settings) as uri,
    ):
        yield Backend(uri, lambda location: s3.files(f"mlflow/{below(location)}"))


@pytest.fixture(scope="session")
def direct(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    """A sqlite file, and S3 to which the training itself sends, as without a server's proxy."""
    folder = tmp_path_factory.mktemp("direct")
    return Backend(
        f"sqlite:///{folder}/mlflow.db",
        lambda location: s3.files(location.removeprefix(f"s3://{BUCKET}/")),
        f"s3://{BUCKET}/direct",
        s3.settings,
    )


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    """No server: a sqlite file and a local folder."""
    folder = tmp_path_factory.mktemp("embedded")
    return Backend(
        f"sqlite:///{folder}/mlflow.db",
        lambda location: files_in(Path(location)),
        str(folder / "artifacts"),
    )


@pytest.fixture(scope="module", params=["embedded", "server", "cloud", "direct"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    found: Backend = request.getfixturevalue(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.settings.items():
            patch.setenv(name, value)
        yield found


def below(location: str) -> str:
    """Return where a server keeps what it calls `mlflow-artifacts:/<path>`."""
    return location.removeprefix("mlflow-artifacts:/").strip("/")
