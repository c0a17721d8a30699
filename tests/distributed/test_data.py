"""Iterators over the data: each process has its own part, saved and restored beside the model."""

from pathlib import Path

from distributed.launch import job, run


def test_each_process_goes_on_in_its_own_part(tmp_path: Path, count: int) -> None:
    options = {"count": count, "devices": 4 // count, "data": True}
    whole = run(tmp_path / "whole", steps=12, **options)
    taken = [[told["taken"] for told in process.told if "taken" in told] for process in whole]
    assert len({tuple(numbers) for numbers in taken}) == count  # each its own

    with job(tmp_path / "run", steps=12, pause=7, **options) as processes:
        for process in processes:
            process.until("paused")
        processes.killed()
    files = sorted(p.name for p in (tmp_path / "run" / "6" / "data").iterdir())
    assert files == [f"process_{rank}-of-{count}.json" for rank in range(count)]

    for rank, process in enumerate(run(tmp_path / "run", steps=12, **options)):
        after = [told["taken"] for told in process.told if "taken" in told]
        assert after == taken[rank][7:]
        assert process.last("digest") == whole[rank].last("digest")


def test_another_number_of_processes_is_told_before_anything_is_read(
    tmp_path: Path, count: int
) -> None:
    run(tmp_path / "run", count, devices=4 // count, data=True, steps=4)

    with job(tmp_path / "run", 1, devices=4, data=True, steps=8) as processes:
        (ended,) = processes.end()

    assert ended.code == 1
    assert (
        f"StateMismatch: the state does not fit the checkpoint {tmp_path / 'run' / '3'}:\n"
        f"  data: saved by {count} processes, each with a part of its own, and now there are 1: "
        "go on with as many, or leave it out with only="
    ) in ended.err
