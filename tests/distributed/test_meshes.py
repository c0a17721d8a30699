"""Arrays that are saved over one mesh are the same, bit by bit, on another one."""

from pathlib import Path

import pytest

from distributed.launch import run


@pytest.fixture(scope="module", params=["one", "several"])
def saved(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Return a run directory with one checkpoint of arrays over a mesh of 4 by 2."""
    count = 1 if request.param == "one" else request.config.getoption("--processes")
    directory = tmp_path_factory.mktemp("saved") / "run"
    run(directory, count, devices=8 // count, script="meshes.py", save=[4, 2])
    return directory


@pytest.mark.parametrize("restored_by", ["one", "several"])
def test_on_other_meshes_they_are_the_same(saved: Path, restored_by: str, count: int) -> None:
    shapes = {"4x2": [4, 2], "8x1": [8, 1], "2x4": [2, 4]}
    if restored_by == "one":
        shapes |= {"2x2": [2, 2], "1x1": [1, 1]}
    by = 1 if restored_by == "one" else count

    for ended in run(saved, by, devices=8 // by, script="meshes.py", restore=list(shapes.values())):
        results = {name: result for told in ended.told for name, result in told.items()}
        assert results == dict.fromkeys(shapes, "ok"), "\n".join(results.values())
