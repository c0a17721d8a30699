"""Save the states of a group in one process, and go on with them in another.

python -m states.process save GROUP DIRECTORY
python -m states.process resume GROUP DIRECTORY

GROUP is a module with CASES, such as `cases.nnx`; `tests` must be on the path.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path

import ckpt_callbacks as cc
from states.case import Case, Digest, differences, digest

SAVED, LAST = 2, 5


def callbacks_for(case: Case, root: Path) -> cc.Callbacks:
    checkpoint = cc.OrbaxCheckpoint(
        root / case.name,
        save=cc.CustomSteps([SAVED]),
        keep=cc.LatestN(1),
        on_failure="raise",
    )
    return cc.Callbacks(checkpoint)


def save(case: Case, root: Path) -> str:
    """Train with seed 0 and save on the way; training goes on while the save is under way."""
    digests: dict[int, Digest] = {}
    with callbacks_for(case, root).run(case.make(0)) as run:
        state = run.state
        for step in range(LAST + 1):
            state = case.train(state, step)
            if step in (SAVED, LAST):
                digests[step] = digest(case, state)
            run.on_step(step, state)
    assert digests[SAVED] != digests[LAST], "training changes nothing"
    (root / f"{case.name}.json").write_text(json.dumps([digests[SAVED], digests[LAST]]))
    return f"{len(digests[SAVED])} leaves saved"


def resume(case: Case, root: Path) -> str:
    """Restore into a state of seed 1 and take the same last steps."""
    digests = root / f"{case.name}.json"
    assert digests.exists(), "was not saved"
    saved, last = json.loads(digests.read_text())
    assert digest(case, case.make(1)) != saved, "the seed changes nothing"
    with callbacks_for(case, root).run(case.target(1)) as run:
        state = run.state
        assert run.next_step == SAVED + 1, f"goes on at step {run.next_step}"
        wrong = [f"restored {line}" for line in differences(saved, digest(case, state))]
        for step in range(run.next_step, LAST + 1):
            state = case.train(state, step)
            run.on_step(step, state)
        wrong += [f"trained on {line}" for line in differences(last, digest(case, state))]
    assert not wrong, "\n  ".join([f"{len(saved)} leaves, {len(wrong)} differ:", *wrong])
    return f"{len(saved)} leaves, 0 differ"


def main() -> None:
    mode, group, directory = sys.argv[1:]
    do = {"save": save, "resume": resume}[mode]
    failed = False
    for case in importlib.import_module(f"states.{group}").CASES:
        try:
            result = do(case, Path(directory))
        except Exception as error:  # the other cases are still of interest
            failed = True
            result = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
        print(f"{mode} {case.name}: {result}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
