"""Disks that are full or read-only: real file systems, and runs in processes of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "full_disk.py"


def run(folder: Path, scenario: str, *how: str) -> tuple[Any, str]:
    """Run a scenario of the script and return what it found, and what it wrote to stderr."""
    unshare = shutil.which("unshare")
    assert unshare, "these tests need `unshare`, from util-linux"
    # Mounts of its own; who is not root becomes it in a user namespace of its own.
    flags = "-m" if os.geteuid() == 0 else "-rm"
    check = subprocess.run(
        [unshare, flags, "mount", "-t", "tmpfs", "none", folder],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert check.returncode == 0, (
        f"`unshare {flags}` can not mount here, which these tests need: run them as root, or where "
        f"user namespaces are allowed, and in a container with CAP_SYS_ADMIN: {check.stderr}"
    )
    try:
        done = subprocess.run(
            [unshare, flags, sys.executable, SCRIPT, scenario, folder, *how],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired as hung:
        pytest.fail(f"{scenario} does not end; so far it wrote\n{hung.stdout!r}\n{hung.stderr!r}")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout), done.stderr


def reported(stderr: str) -> list[int]:
    """Return the steps whose failed save was told on stderr, once for every time."""
    return [int(s) for s in re.findall(r"the checkpoint of step (\d+) could not be saved", stderr)]


def problems(found: dict[str, dict[str, Any]], steps: int) -> list[str]:
    """Return what is not as it should be after runs that had a good disk in the end.

    The policy is LatestN(2), and the two newest were saved when the disk was good again.
    """
    newest = [steps - 2, steps - 1]
    wanted = {
        "all told": list(range(steps)),
        "values": {str(step): [step] for step in newest},
        "steps": list(map(str, newest)),
        "copies": newest,
        "logged": list(range(steps)),
        "temporary": [],
        "trash": [],
    }
    return [
        f"{case}: {key} is {result[key]}, not {value}"
        for case, result in found.items()
        for key, value in wanted.items()
        if (result | {"all told": sorted(result["saved"] + result["failed"])})[key] != value
    ]


def test_training_goes_on_over_a_full_disk_and_saves_again_when_there_is_space(
    tmp_path: Path,
) -> None:
    found, stderr = run(tmp_path, "full")

    assert found["last"] == 9
    assert found["saved"] == [0, 1, 6, 7, 8, 9]
    assert found["failed"] == [2, 3, 4, 5]
    assert reported(stderr) == [2, 3, 4, 5]
    nothing_else = {"temporary": [], "trash": []}
    assert found["while full"] == nothing_else | {
        "values": {"0": [0], "1": [1]},
        "steps": ["0", "1"],
        "evicted": [],
    }
    assert found["after"] == nothing_else | {
        "values": {"8": [8], "9": [9]},
        "steps": ["8", "9"],
        "evicted": [0, 1, 6, 7],
    }


@pytest.mark.slow
def test_however_little_space_is_left_what_is_saved_is_right_and_nothing_else_stays(
    tmp_path: Path,
) -> None:
    found, _ = run(tmp_path, "little")

    assert found["0"]["failed"] == [2, 3]
    assert list(found.values())[-1]["failed"] == []
    assert problems(found, 7) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_wherever_a_disk_fails_for_a_while_the_next_run_leaves_all_as_it_should_be(
    how: str, tmp_path: Path
) -> None:
    found, _ = run(tmp_path, "at_every_point", how)

    # All that a run on its own passes; the others are in what other processes ask of it.
    assert len(found) > 20
    assert problems(found, 6) == []
    assert {str(result["aliases"]) for result in found.values()} == {"{'last': 5}"}
    if how == "full":  # from a read-only disk nothing can be removed, and the next run does it
        clean = [{"4": [4], "5": [5]}, ["4", "5"]]
        ends = {point: result["at the end of the run"] for point, result in found.items()}
        assert {point: end for point, end in ends.items() if end != clean} == {}


def test_a_finished_run_on_a_read_only_disk_can_be_read_and_not_gone_on_with(
    tmp_path: Path,
) -> None:
    found, _ = run(tmp_path, "finished")

    for root, error in found["errors"].items():
        assert error.startswith(f"ConfigError: cannot write to the run directory {root}: Read-only")
    assert found["values"] == {"1": [1], "2": [2]}
    assert re.search(r"\n +1 .* latest #2 .*\n +2 .* latest #1 .* last ", found["ls"])


@pytest.mark.parametrize("when", ["between", "record-saving", "orbax-started", "orbax-committed"])
def test_training_goes_on_to_its_end_where_the_directory_becomes_read_only(
    when: str, tmp_path: Path
) -> None:
    """Between two saves, or anywhere in one; and the process ends."""
    found, stderr = run(tmp_path, "becomes_read_only", when)

    assert found["last"] == 6
    assert found["saved"] == [0, 1, 2]
    assert found["failed"] == [3, 4, 5, 6]
    assert reported(stderr) == [3, 4, 5, 6]
    assert found["newest"] == [2, 2, 2]
    assert {step: found["values"][step] for step in "12"} == {"1": [1], "2": [2]}


def test_metrics_that_can_not_be_written_any_more_are_told_of_at_the_end(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "becomes_read_only", "between")

    assert found["logged"] == [0, 1, 2]
    assert list(found["unsent"]) == ["memory"]


def test_a_run_that_starts_on_a_full_disk_begins_or_says_which_directory(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "starts")

    vague = [
        (root, error)
        for root, error in found["errors"]
        if error and not (error.startswith("ConfigError: ") and root in error)
    ]
    assert vague == []
    assert found["values"] == {"3": [3], "4": [4]}


def test_what_is_remembered_of_evicted_checkpoints_survives_a_full_disk(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "remembers")

    assert 0 < found["written"] < 100
    assert found["error"] == ""
    assert found["steps"] == [0] * found["written"] + [1]
