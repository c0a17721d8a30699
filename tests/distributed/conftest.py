"""How many processes a job has."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--processes", type=int, default=2, help="of each job: 2 or 4")


@pytest.fixture
def count(request: pytest.FixtureRequest) -> int:
    number: int = request.config.getoption("--processes")
    return number
