"""MLflow as people run it: a file, a server, and a server on PostgreSQL and S3."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from servers import processes
from servers.backends import Backend, Files, digest, files_in

BUCKET = "artifacts"


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
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """`mlflow server` on PostgreSQL and S3."""
    with processes.postgres() as store, processes.s3(tmp_path_factory.mktemp("s3")) as endpoint:
        bucket = boto3.resource(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        ).Bucket(BUCKET)
        bucket.create()

        def files(location: str) -> Files:
            prefix = f"mlflow/{below(location)}/"
            return {
                o.key.removeprefix(prefix): digest(o.get()["Body"].read())
                for o in bucket.objects.filter(Prefix=prefix)
            }

        folder = tmp_path_factory.mktemp("cloud")
        settings = processes.AWS | {"MLFLOW_S3_ENDPOINT_URL": endpoint}
        artifacts = f"s3://{BUCKET}/mlflow"
        with processes.mlflow_server(folder, store, artifacts, settings) as uri:
            yield Backend(uri, files)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    """No server: a sqlite file and a local folder."""
    folder = tmp_path_factory.mktemp("embedded")
    return Backend(
        f"sqlite:///{folder}/mlflow.db",
        lambda location: files_in(Path(location)),
        folder / "artifacts",
    )


@pytest.fixture(scope="module", params=["embedded", "server", "cloud"])
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.getfixturevalue(request.param)
    return found


def below(location: str) -> str:
    """Return where a server keeps what it calls `mlflow-artifacts:/<path>`."""
    return location.removeprefix("mlflow-artifacts:/").strip("/")
