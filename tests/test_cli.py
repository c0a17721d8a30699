"""Each command on a real run directory: what it prints, how it ends, and its JSON."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result
from orbax.checkpoint import v1

import ckpt_callbacks as cc
from ckpt_callbacks import catalog
from ckpt_callbacks.cli import COMMANDS, listing, main, watching
from ckpt_callbacks.cli.output import table
from ckpt_callbacks.cli.policies import policy_from_text
from ckpt_callbacks.cli.schemas import SCHEMAS
from ckpt_callbacks.directory import RunDirectory
from ckpt_callbacks.record import Copy, run_to_json
from ckpt_callbacks.report import summarize
from ckpt_callbacks.testing import FakeClock
from ckpt_callbacks.text import as_text
from folder_store import FolderStore
from loops import callbacks_in, local_steps, new_state, train

GOLDEN = Path(__file__).parent / "commands"
START = 1_700_000_000.0
NAMES = [name for section in COMMANDS.values() for name in section]


class Remade(FolderStore):
    """One that another process can make again."""

    def settings(self) -> dict[str, Any]:
        return {"root": str(self.root)}

    def missing(self) -> str | None:
        return "there is no key" if (self.root / "no-key").exists() else None

    def ping(self, run: Any) -> str:
        if (self.root / "down").exists():
            raise ConnectionError("http://me:secret@host is down")
        return "the folder answers"

    def address(self, step: int, copy: Copy, remembered: Any) -> str | None:
        return f"folder:{copy.ref}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run, and what a store has of it."""
    folder = tmp_path_factory.mktemp("made")
    before = Path.cwd()
    os.chdir(folder)
    try:
        clock = FakeClock(START)
        checkpoint = cc.OrbaxCheckpoint(
            "run",
            save=cc.EveryNSteps(1),
            keep=cc.LatestN(2) | cc.BestN(1, "score", mode="max"),
            synchronous=True,
        )
        callbacks = cc.Callbacks(checkpoint, Remade(Path("store")), clock=clock)
        scores = {0: 0.25, 1: 0.875, 2: 0.5, 3: 0.75, 4: 0.5}
        train(callbacks, 5, scores, lambda step, run: clock.advance(60), config={"rate": 0.5})
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def _run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a copy into the working directory, and let it be a day later."""
    for name in ("run", "store"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.setattr(catalog, "_make", lambda name, settings: Remade(Path(settings["root"])))
    monkeypatch.setenv("COLUMNS", "110")
    now = SimpleNamespace(time=lambda: START + 86400)
    monkeypatch.setattr(listing, "time", now)
    monkeypatch.setattr(watching, "time", now)


def invoke(line: str, **options: Any) -> Result:
    return CliRunner().invoke(main, shlex.split(line), prog_name="ckpt-callbacks", **options)


def as_json(line: str, exit_code: int = 0) -> Any:
    """Return what a command prints with `--json`, checked against its schema."""
    result = invoke(f"{line} --json")
    assert result.exit_code == exit_code, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    jsonschema.validate(found, SCHEMAS[line.split(maxsplit=1)[0]])
    return found


def settled(text: str, tmp_path: Path) -> str:
    """Return a text without what differs by machine: places, sizes on disk, and times."""
    text = text.replace(str(tmp_path), "/DIR")
    text = re.sub(r"[0-9.]+ ([KM]i)?B\b", "SIZE", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", text)
    text = re.sub(r"([━─])\1+", r"\1", text)
    return re.sub(r" {2,}", "  ", text)


def table_at(columns: int, line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines of a table in a terminal that is so wide, but its title and addresses."""
    monkeypatch.setenv("COLUMNS", str(columns))
    result = invoke(line)
    assert result.exit_code in (0, 1), result.output
    return [text for text in result.output.splitlines()[1:] if ": folder:" not in text]


def save_alone(root: Path, count: int) -> None:
    """Save steps with Orbax alone."""
    with v1.training.Checkpointer(root) as checkpointer:
        for step in range(count):
            checkpointer.save(step, new_state(step))


SCRIPTS = {
    "ls": ["ls run", "ls run --plain"],
    "why": ["why run best", "why run 0", "why run last"],
    "show": ["show run", "show run best --depth 1", "show run/1 --depth 1"],
    "inspect": ["inspect run --which best --depth 1"],
    "diff": ["diff run/3 run/4", "diff run/best run/1", "diff run run/1 --only moments --all"],
    "verify": ["verify run"],
    "pin": ["pin run 3", "unpin run 3", "ls run --plain"],
    "promote": ["promote run 3 production", "ls run --plain", "why run production",
                "promote run best production", "unpin run production"],
    "prune": ["prune run --dry-run", "prune run --keep latest:1 --dry-run",
              "prune run --keep latest:1 --yes", "ls run --plain", "why run 1"],
    "sync": ["sync run --timeout 20"],
    "watch": ["watch run --once", "watch run --once --rows 1"],
    "export": ["export run/best weights.npz --only params",
               "convert weights.npz again.npz", "diff weights.npz again.npz"],
    "wrong": ["lss run", "ls rum", "ls .", "ls folder:store/steps/3", "why run bset",
              "show run 99", "pin run 99", "promote run 3 best", "promote run 3 a/b",
              "prune run --keep newest:2", "prune run --keep best:1:scroe:max --yes",
              "plot run --metric scroe", "pull here new", "show foldr:store/3"],
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_command_prints(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    parts = []
    for line in SCRIPTS[name]:
        result = invoke(line)
        end = f"(exit {result.exit_code})\n" if result.exit_code else ""
        parts.append(f"$ ckpt-callbacks {line}\n{settled(result.output, tmp_path)}{end}")
    text = "\n".join(parts)

    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("write_commands"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


def test_every_command_has_a_schema_and_takes_json() -> None:
    assert set(SCHEMAS) == set(NAMES)
    for name in NAMES:
        assert "--json" in invoke(f"{name} --help").output
        jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])


def test_json_of_what_is_there() -> None:
    found = as_json("ls run")
    assert [row["step"] for row in found["checkpoints"]] == [1, 3, 4]
    best = found["checkpoints"][0]
    assert (best["aliases"], best["reason"], best["complete"]) == (["best"], "best #1", True)
    assert best["copies"]["folder"]["address"] == "folder:store/steps/1"
    assert found["run"]["status"] == "finished"

    assert as_json("why run best")["details"].startswith("latest #3 of 3")
    assert as_json("why run 0")["state"] == "evicted"
    assert as_json("show run best")["leaves"]["model/w"]["shape"] == [4, 4]
    assert as_json("inspect run")["copies"] == {"folder": "folder:store/steps/4"}
    assert as_json("watch run --once") == found
    assert as_json("verify run") == {"problems": []}
    assert {p["name"] for p in as_json("plugins")["plugins"]} >= {"mlflow", "wandb"}

    differ = as_json("diff run/3 run/4", exit_code=1)
    assert {leaf["largest"] for leaf in differ["leaves"]} == {1.0}
    assert as_json("diff run/4 run/last")["same"]


def test_json_of_what_is_done(tmp_path: Path) -> None:
    assert as_json("pin run best") == {"step": 1, "pinned": True, "applied": True}
    assert as_json("unpin run 1") == {"step": 1, "pinned": False, "applied": True}
    assert as_json("promote run 3 production")["previous"] is None
    assert as_json("ls run")["run"]["promoted"] == {"production": 3}
    assert as_json("prune run --keep step:9 --dry-run")["goes"][0]["step"] == 1
    asked = invoke("prune run --keep step:9 --json")
    assert asked.exit_code == 2
    assert local_steps(tmp_path / "run") == {1, 3, 4}
    gone = as_json("prune run --keep step:9 --yes")
    assert ([g["step"] for g in gone["goes"]], gone["applied"]) == ([1], True)
    assert gone["kept"] == {"3": "pinned as production", "4": "newest"}
    assert local_steps(tmp_path / "run") == {3, 4}
    assert as_json("sync run") == {"stores": {"folder": {"title": "Folder", "lacks": None}}}
    save_alone(tmp_path / "orbax", 2)
    assert as_json("adopt orbax new")["taken"] == [0, 1]
    assert as_json("export run a.npz")["path"] == str(tmp_path / "a.npz")
    assert as_json("convert a.npz b.npz")["path"] == str(tmp_path / "b.npz")


def test_a_table_has_a_frame_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table_at(200, "ls run", monkeypatch)[0][0] == "┏"
    narrow = table_at(80, "ls run", monkeypatch)
    assert narrow[0].split() == [
        *("step", "age", "score", "size", "kept", "because", "where", "aliases", "complete")
    ]
    assert max(map(len, narrow)) <= 80


def test_a_narrow_table_lacks_what_matters_least(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    narrow = table_at(60, "ls run", monkeypatch)
    assert narrow[-1] == "no room for complete, size"
    assert narrow[0].split() == ["step", "age", "score", "kept", "because", "where", "aliases"]
    assert max(map(len, narrow)) <= 60

    shutil.rmtree(tmp_path / "run" / "3")  # then it tells something
    assert "complete" in table_at(60, "ls run", monkeypatch)[0]


def test_a_cell_is_folded_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    path = "optimizer/opt_state/0/mu/layers/0/kernel"

    shown = as_text(table("title", {"leaf": False, "largest": True}, [[path, "0.123"]]))

    assert "".join(shown.replace("0.123", "").split()) == f"titleleaflargest{path}"
    assert "0.123" in shown
    assert max(map(len, shown.splitlines())) <= 30


def test_what_a_pipe_gets_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_terminal(descriptor: int) -> os.terminal_size:
        raise OSError

    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(os, "get_terminal_size", no_terminal)
    monkeypatch.setattr(listing, "size", lambda count: "x" * 300)

    for line in ("ls run", "watch run --once"):
        assert sum("x" * 300 in text for text in invoke(line).output.splitlines()) == 4


def test_what_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> bytes:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("ckpt_callbacks.directory._content", refuse)

    refused = invoke("ls run")
    assert (refused.exit_code, refused.output.split()[0]) == (2, "Error:")
    assert refused.output.endswith("/run/.ckpt_callbacks/run.json: Permission denied\n")
    assert found_by_the_doctor("problem")["permissions"].endswith("run.json may not be read")


def test_help_is_short_too() -> None:
    assert invoke("ls -h").output == invoke("ls --help").output


def test_nothing_goes_without_a_yes(tmp_path: Path) -> None:
    for answer in ("n\n", "\n", ""):
        refused = invoke("prune run --keep latest:1", input=answer)
        assert refused.exit_code == 1
        assert "Remove 2 checkpoints and" in refused.output
        assert local_steps(tmp_path / "run") == {1, 3, 4}

    agreed = invoke("prune run --keep latest:1", input="y\n")
    assert agreed.exit_code == 0, agreed.output
    assert local_steps(tmp_path / "run") == {4}
    listed = Remade(tmp_path / "store").listing()
    assert listed
    assert set(listed.copies) == {4}
    assert dict(listed.aliases) == {"best": 4, "last": 4}


def test_damage_is_a_problem_and_not_a_wrong_use(tmp_path: Path) -> None:
    next((tmp_path / "run" / "3").rglob("_METADATA")).unlink()
    (found,) = as_json("verify run", exit_code=1)["problems"]
    assert found["step"] == 3
    (tmp_path / "run" / ".ckpt_callbacks" / "records" / "3.json").write_text("{")
    listed = invoke("ls run")
    assert listed.exit_code == 1
    assert "makes the record of a checkpoint again" in listed.output
    assert as_json("doctor run", exit_code=1)
    assert "3.json is not JSON" in invoke("doctor run").output


def test_a_checkpoint_that_was_removed_is_one_problem(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run" / "3")

    assert as_json("verify run", exit_code=1)["problems"] == [
        {"step": 3, "text": f"{tmp_path}/run/3 is not there"}
    ]


def test_each_part_of_a_path_may_be_misspelt(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename(tmp_path / "runs" / "digits")

    assert "Did you mean runs/digits?" in invoke("ls rns/digts").output
    assert f"Did you mean {tmp_path}/runs/digits?" in invoke(f"ls {tmp_path}/rnus/digits").output
    assert "mean" not in invoke("ls elsewhere/digits").output


def found_by_the_doctor(status: str) -> dict[str, str]:
    result = invoke("doctor run --json")
    found = json.loads(result.stdout)
    jsonschema.validate(found, SCHEMAS["doctor"])
    assert result.exit_code == any(c["status"] == "problem" for c in found["checks"])
    return {c["what"]: c["text"] for c in found["checks"] if c["status"] == status}


def test_the_doctor_finds_nothing_wrong() -> None:
    fine = found_by_the_doctor("ok")

    assert found_by_the_doctor("problem") == {}
    assert fine["Folder"] == "the folder answers"
    assert fine["permissions"] == "it can be written"
    assert "needs up to" in fine["disk"]
    assert "jax " in fine["versions"]


def test_the_doctor_looks_at_a_copy_without_what_was_empty(tmp_path: Path) -> None:
    (tmp_path / "run" / ".ckpt_callbacks" / "inbox").rmdir()

    assert found_by_the_doctor("problem") == {}


def test_the_doctor_shows_no_credential(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hidden-key")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden-word@host")
    (tmp_path / "store" / "down").touch()

    output = invoke("doctor run").output + invoke("doctor run --json").output

    assert "WANDB_API_KEY" in output
    assert "hidden" not in output
    assert "secret" not in output
    assert found_by_the_doctor("problem")["Folder"] == "ConnectionError: http://***@host is down"
    assert "MLFLOW_TRACKING_PASSWORD" in found_by_the_doctor("warning")["settings"]


def test_the_doctor_finds_what_is_set_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    (tmp_path / "store" / "no-key").touch()
    root = RunDirectory("run")
    run = root.open_run()
    policy = [{**leaf, "metric": "scroe"} if "metric" in leaf else leaf for leaf in run.policy]
    changed = json.loads(run_to_json(run)) | {"policy": policy}
    root.write_run(type(run)(run.run_id, changed["policy"], run.stores, settings=run.settings))

    problems = found_by_the_doctor("problem")

    assert problems["Folder"] == "there is no key"
    assert problems["settings"].endswith("Did you mean offline?")
    assert "ranks by 'scroe', which no checkpoint has" in problems["policy"]
    assert problems["policy"].endswith("Did you mean score?")


def test_the_doctor_expects_no_key_of_a_run_that_is_offline(tmp_path: Path) -> None:
    (tmp_path / "store" / "no-key").touch()
    root = RunDirectory("run")
    for record in root.read_records().values():
        staged = {name: replace(copy, state="staged") for name, copy in record.copies.items()}
        root.write_record(replace(record, copies=staged))

    assert found_by_the_doctor("warning")["Folder"] == "there is no key"


def test_the_doctor_compares_the_disk_with_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))

    assert "needs up to" in found_by_the_doctor("problem")["disk"]


def test_sync_says_at_once_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "store" / "no-key").touch()

    result = invoke("sync run --timeout 3600")

    assert result.exit_code == 1
    assert result.output.endswith("Folder lacks what there is: there is no key\n")


def test_steps_and_aliases_complete() -> None:
    def offered(line: str) -> list[str]:
        result = CliRunner().invoke(
            main,
            prog_name="ckpt-callbacks",
            env={
                "_CKPT_CALLBACKS_COMPLETE": "bash_complete",
                "COMP_WORDS": f"ckpt-callbacks {line}",
                "COMP_CWORD": str(line.count(" ") + 1),
            },
        )
        return [text.partition(",")[2] for text in result.output.split()]

    assert offered("why run ") == ["best", "last", "1", "3", "4"]
    assert offered("show run b") == ["best"]
    assert offered("inspect run --which b") == ["best"]
    assert offered("export run a.npz --which l") == ["last"]
    assert offered("promote store ") == []
    assert offered("pro") == ["promote"]


@pytest.mark.parametrize("line", ["--help", "ls run", "why run best", "doctor", "plugins"])
def test_looking_around_does_not_wait_for_jax(line: str) -> None:
    code = (
        "import sys; from ckpt_callbacks.cli import main\n"
        f"main({shlex.split(line)!r}, standalone_mode=False)\n"
        "assert not {'jax', 'numpy', 'mlflow', 'wandb'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("latest:2", cc.LatestN(2)),
        ("best:3:val/acc:max", cc.BestN(3, "val/acc", mode="max")),
        ("best:1:a:b:min, every:10", cc.BestN(1, "a:b", mode="min") | cc.EveryNSteps(10)),
        ("seconds:0.5,step:7", cc.EveryNSeconds(0.5) | cc.CustomSteps([7])),
    ],
)
def test_a_policy_as_text(text: str, policy: Any) -> None:
    assert str(policy_from_text(text)) == str(policy)


@pytest.mark.parametrize("text", ["", "latest", "latest:0", "latest:x", "best:2:a", "best:2:a:mx"])
def test_a_text_that_is_no_policy(text: str) -> None:
    with pytest.raises(cc.ConfigError):
        policy_from_text(text)


def test_a_raw_directory_of_orbax_has_no_aliases(tmp_path: Path) -> None:
    save_alone(tmp_path / "orbax", 2)

    with pytest.raises(cc.CheckpointNotFound, match=r"`ckpt-callbacks adopt .*/orbax NEW`"):
        cc.restore("orbax", which="best")
    assert "`ckpt-callbacks adopt" in invoke("ls orbax").output


def test_one_checkpoint_is_not_many(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "one"), 1)

    assert "one: 1 checkpoint, " in invoke("ls one").output
    assert invoke("sync one").output == "the run has no tracker\n"
    assert str(summarize("one")).startswith("1 checkpoint\n")
