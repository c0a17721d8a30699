"""`benchmarks/everything.py` keeps what was measured, whatever happens to one of the scripts."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "everything.py"
GOOD = """import json, sys
from pathlib import Path
Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps({
    "title": "Good", "rows": [["row", "1 s", "", "", "", ""]], "versions": {"jax": "1"},
    "machine": {"python": "3", "system": "Linux", "processors": 2},
}))
"""


@pytest.fixture
def everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("everything", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, code in {"bad": "raise SystemExit(3)", "good": GOOD, "silent": "pass"}.items():
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "README.md").write_text(f"before\n{module.BEGIN}old\n{module.END}after\n")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "SCRIPTS", {"bad": [], "good": [], "silent": []})
    monkeypatch.setattr(module, "of_devices", lambda: "no device")
    return module


def test_one_that_fails_is_named_and_the_others_are_kept(everything: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(everything.main, ["--write"])

    assert done.exit_code == 1, done.output
    assert "bad.py failed with exit code 3" in done.output
    assert "silent.py left no results" in done.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"date", "good"}
    text = (tmp_path / "README.md").read_text()
    assert "**Good** (`good.py`)" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_what_was_measured_before_stays(everything: Any, tmp_path: Path) -> None:
    assert CliRunner().invoke(everything.main, ["--write", "good"]).exit_code == 0

    assert CliRunner().invoke(everything.main, ["--write", "bad"]).exit_code == 1

    assert json.loads((tmp_path / "results.json").read_text()).keys() == {"date", "good"}
