"""Random damage to real checkpoints, with Orbax alone beside it on the same damage."""

import contextlib
import os
import random
import secrets
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

import ckpt_callbacks as cc
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.record import record_from_json, run_from_json
from ckpt_callbacks.testing import MemoryStore
from orbax_alone import make_state, same

SCRIPT = Path(__file__).parent / "orbax_alone.py"
STEP = 7


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint, whose record has something in every field."""
    root = tmp_path_factory.mktemp("saved") / "run"
    callbacks = cc.Callbacks(
        cc.OrbaxCheckpoint(
            root,
            save=cc.EveryNSteps(1),
            keep=cc.LatestN(1) | cc.BestN(1, "score", mode="max"),
        ),
        MemoryStore(),
    )
    state = make_state()
    with callbacks.run(state) as run:
        run.on_eval(STEP, {"score": 0.1})
        run.on_step(STEP, state, {"loss": 1.25})
    return root


@dataclass(frozen=True)
class Damage:
    """A flipped bit of a file, or its end cut off."""

    file: Path
    byte: int
    bit: int | None

    def __str__(self) -> str:
        what = "cut off at" if self.bit is None else f"bit {self.bit} flipped of"
        return f"{self.file} {what} byte {self.byte}"

    def inflict(self, root: Path) -> None:
        """Replace the file, which may be a hard link."""
        path = root / self.file
        content = bytearray(path.read_bytes())
        if self.bit is None:
            del content[self.byte :]
        else:
            content[self.byte] ^= 1 << self.bit
        path.unlink()
        path.write_bytes(content)


def damages(checkpoint: Path, count: int, rng: random.Random) -> list[Damage]:
    """Draw files by size, as a bad sector does; every third by count, so that small ones come."""
    sizes = {
        path.relative_to(checkpoint): path.stat().st_size
        for path in checkpoint.rglob("*")
        if path.is_file() and path.stat().st_size
    }
    files = sorted(sizes, key=lambda file: (sizes[file], file))
    weights = [sizes[file] for file in files]
    drawn: list[Damage] = []
    for trial in range(count):
        file = rng.choice(files) if trial % 3 == 2 else rng.choices(files, weights)[0]
        bit = None if trial % 5 == 4 else rng.randrange(8)
        drawn.append(Damage(file, rng.randrange(sizes[file]), bit))
    return drawn


class OrbaxAlone:
    """Orbax in a process of its own; where damage kills it, that is an error and a new one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def load(self, checkpoint: Path) -> str:
        """Return `silent`, `error` or `unharmed`."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self._process
        assert process.stdin
        assert process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{checkpoint}\n")
            process.stdin.flush()
        answer = process.stdout.readline().strip()
        if not answer:
            self.close()
        return answer or "error"

    def close(self) -> None:
        """End the process; the next `load` starts another."""
        if self._process:
            self._process.communicate(timeout=60)
            self._process = None


@pytest.fixture
def orbax() -> Iterator[OrbaxAlone]:
    alone = OrbaxAlone()
    yield alone
    alone.close()


def load_with_us(root: Path, damage: Damage) -> str:
    """Return `silent`, `detected` or what else it was."""
    try:
        found = cc.restore(root, like=make_state())
    except cc.CorruptCheckpoint as error:
        return "detected" if str(root / str(STEP) / damage.file) in str(error) else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "unnoticed, but unharmed" if same(found, make_state()) else "silent"


def test_damage_to_a_checkpoint_is_always_noticed_and_its_file_named(
    saved: Path,
    orbax: OrbaxAlone,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trials = request.config.getoption("--flips")
    seed = secrets.randbits(32)
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    unexpected: list[str] = []
    assert orbax.load(saved / str(STEP)) == "unharmed"
    assert same(cc.restore(saved, like=make_state()), make_state())

    for damage in damages(saved / str(STEP), trials, random.Random(seed)):
        root = tmp_path / "run"
        shutil.copytree(saved, root, copy_function=os.link)
        damage.inflict(root / str(STEP))
        outcome = load_with_us(root, damage)
        ours[outcome] += 1
        theirs[orbax.load(root / str(STEP))] += 1
        if outcome != "detected":
            unexpected.append(f"{damage}: {outcome}")
        shutil.rmtree(root)

    rows = [
        ("", "silently wrong", "error", "unharmed"),
        ("ckpt_callbacks", ours["silent"], ours["detected"], ours["unnoticed, but unharmed"]),
        ("Orbax alone", theirs["silent"], theirs["error"], theirs["unharmed"]),
    ]
    with capsys.disabled():
        print(f"\n{trials} damaged checkpoints, seed {seed}")
        for name, *cells in rows:
            print(f"{name:14}", *(f"{cell:>14}" for cell in cells))
    assert unexpected == []
    assert theirs.total() == trials
    # Once this fails, Orbax notices by itself, and reading every file twice can go.
    assert trials < 60 or theirs["silent"] > 0


@dataclass(frozen=True)
class Small:
    """One of our own small files, and how its text and the file itself are read."""

    name: str
    parse: Callable[[str, str], object]
    read: Callable[[RunDirectory], object]


RECORD = Small(f"records/{STEP}.json", record_from_json, lambda d: d.read_records()[STEP])
RUN = Small("run.json", run_from_json, lambda d: d.read_run())


def misread(read: Callable[[], object], original: object, name: str) -> str:
    """Return how a damaged file was read, or nothing if it was found out or is as before."""
    try:
        found = read()
    except cc.RecordError as error:
        return "" if name in str(error) else f"the error does not name it: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if found == original else "read as if nothing were"


@pytest.mark.parametrize("small", [RECORD, RUN], ids=["record", "run"])
def test_a_flipped_bit_in_a_record_is_an_error(saved: Path, small: Small) -> None:
    """Every bit of the text, unless what is read is the same."""
    text = (saved / ".ckpt_callbacks" / small.name).read_text(encoding="utf-8")
    original = small.parse(text, small.name)
    problems: list[str] = []
    for at, character in enumerate(text):
        for bit in range(7):
            flipped = text[:at] + chr(ord(character) ^ 1 << bit) + text[at + 1 :]
            if what := misread(partial(small.parse, flipped, small.name), original, small.name):
                problems.append(f"bit {bit} of byte {at}, after {text[at - 20 : at]!r}: {what}")

    assert text.isascii()
    assert problems == []


@pytest.mark.parametrize("small", [RECORD, RUN], ids=["record", "run"])
def test_a_damaged_record_file_is_an_error_that_names_it(
    saved: Path, tmp_path: Path, small: Small
) -> None:
    """One bit of every byte, also the eighth: then the file is no text any more."""
    directory = RunDirectory(shutil.copytree(saved, tmp_path / "run"))
    path = directory.meta / small.name
    content = path.read_bytes()
    original = small.read(directory)
    rng = random.Random(0)
    problems: list[str] = []
    for at in range(len(content)):
        bit = rng.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        if what := misread(partial(small.read, directory), original, str(path)):
            problems.append(f"bit {bit} of byte {at}: {what}")

    assert problems == []
