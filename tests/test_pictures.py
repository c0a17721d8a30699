"""The report and the plot of a known run, and of very large ones."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

import ckpt_callbacks as cc
from ckpt_callbacks.cli import main
from loops import callbacks_in, train
from pictured import make_run
from test_page import drawings, levels, marks, read

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("known") / "digits")


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return cc.write_report(run).read_text()


def charts(text: str) -> dict[str, ElementTree.Element]:
    return {svg.attrib["aria-label"].partition(":")[0]: svg for svg in drawings(text)}


def bars(svg: ElementTree.Element, style: str) -> int:
    paths = [p.attrib["d"] for p in svg.findall(f"svg/path[@class='bar {style}']")]
    return "".join(paths).count("M")


def test_it_stands_alone(text: str) -> None:
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<img|<iframe| on\w+=", text)


def test_each_chart_is_there_with_axes_and_units(text: str) -> None:
    reader, found = read(text), charts(text)

    assert list(found) == [
        "val_accuracy by step",
        "loss by step",
        "Run directory",
        "MLflow",
        "W&B",
        "Disk use of the run directory",
        "Times of saves, commits and uploads",
    ]
    for title in ("step", "time since the first save (min)", "size (MiB)", "time", "val_accuracy"):
        assert title in reader.text
    for svg in found.values():
        assert 2 <= len(levels(svg)) <= 8


def test_what_is_kept_and_evicted_is_marked(text: str, run: Path) -> None:
    kept = {row.step for row in cc.checkpoints(run)}
    curve = charts(text)["val_accuracy by step"]

    assert kept == {700, 750, 950, 1000}
    titles = marks(curve)
    assert {int(re.findall(r"(\d+):", title)[0]) for title in titles} == kept
    assert "best 700: 0.97" in " ".join(titles)
    (evicted,) = curve.findall("svg/path[@class='dots past']")
    assert evicted.attrib["d"].count("M") == 16
    assert "Higher is better; 20 checkpoints measured, 4 kept" in text
    assert "higher" not in charts(text)["loss by step"].attrib["aria-label"].lower()


def test_each_place_has_a_bar_for_each_checkpoint(text: str) -> None:
    found = charts(text)

    for place, style in (("Run directory", "kept"), ("MLflow", "best"), ("W&B", "third")):
        assert bars(found[place], style) == 4
    assert bars(found["Run directory"], "past faint") == 16
    assert bars(found["MLflow"], "past faint") == 16
    assert bars(found["W&B"], "past faint") == 14  # what went while it was down never got there


def test_the_figures_are_those_of_the_run(text: str) -> None:
    seen = read(text).text

    for part in (
        "4 checkpoints, 100.0 MiB. Keep ",
        "of 20 saved",
        "instead of 500.0 MiB",
        "100.0 MiB now; 500.0 MiB if all 20 checkpoints had been kept",
        "local, MLflow, W&B",
        "latest #1",
        "16 checkpoints evicted",
    ):
        assert part in seen
    (medians,) = {part for part in seen if part.startswith("Medians: ")}
    assert re.fullmatch(
        r"Medians: save: the loop waits [45] ms; commit, behind the loop \d+ ms; "
        r"upload to MLflow [\d.]+ s; upload to W&B [\d.]+ s",
        medians,
    )


def test_equal_runs_have_equal_reports(text: str, run: Path, tmp_path: Path) -> None:
    again = cc.write_report(run, tmp_path / "made" / "again.html")

    assert again == tmp_path / "made" / "again.html"
    assert again.read_text() == text


@pytest.mark.parametrize(
    "keep", [cc.LatestN(3) | cc.BestN(2, "loss", mode="min"), cc.LatestN(10_000)]
)
def test_ten_thousand_checkpoints_are_less_than_2_mb(tmp_path: Path, keep: cc.KeepPolicy) -> None:
    more = tuple(f"metric_{'x' * n}" for n in range(6))
    text = cc.write_report(make_run(tmp_path / "run", 10_000, keep, more)).read_text()

    assert len(text.encode()) < 2e6
    assert "of 10,000 saved" in text
    assert "10,000 checkpoints measured" in text
    assert f">{500_000}<" in text  # the newest is in the table


def test_a_run_that_has_no_history_has_a_report(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(callbacks_in(root), 4, {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.2})
    for name in ("history.jsonl", "evicted.jsonl"):
        (root / ".ckpt_callbacks" / name).unlink()

    text = cc.write_report(root).read_text()

    assert bars(charts(text)["Run directory"], "kept") == 3
    assert "Times of saves" not in text


def test_a_run_that_saved_nothing_has_a_report(tmp_path: Path) -> None:
    train(callbacks_in(tmp_path / "run", every=100, keep=cc.LatestN(1)), 0)

    reader = read(cc.write_report(tmp_path / "run").read_text())

    assert "0 checkpoints, 0 B. Keep " in reader.text
    assert not [tag for tag, _ in reader.tags if tag in ("table", "svg")]


def test_a_plot_is_a_file_that_other_programs_draw(run: Path, tmp_path: Path) -> None:
    path = cc.plot(run, tmp_path / "loss.svg", metric="loss")

    root = ElementTree.fromstring(path.read_text())
    assert root.tag == f"{SVG}svg"
    assert root.findtext(f"{SVG}title") == "loss by step"
    assert "var(" not in path.read_text()
    assert len(root.findall(f".//{SVG}circle/{SVG}title")) == 3
    assert {t.text for t in root.iter(f"{SVG}text")} >= {"kept", "best", "evicted", "step", "loss"}
    assert cc.plot(run) == run / "val_accuracy.svg"


def test_what_cannot_be_drawn_or_written_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        cc.ConfigError, match=r"'los'; .* are val_accuracy, loss\. Did you mean loss\?"
    ):
        cc.plot(run, metric="los")
    with pytest.raises(cc.ConfigError, match=r"loss\.png is no name for an SVG file"):
        cc.plot(run, "loss.png", metric="loss")
    with pytest.raises(cc.ConfigError, match="is no run directory"):
        cc.write_report(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(cc.ConfigError, match=r"file/report\.html cannot be written"):
        cc.write_report(run, tmp_path / "file" / "report.html")


def test_the_commands_tell_where_the_file_is(run: Path, tmp_path: Path) -> None:
    cli = CliRunner()

    made = cli.invoke(main, ["report", str(run), "-o", str(tmp_path / "a.html")])
    drawn = cli.invoke(main, ["plot", str(run), "--metric", "loss", "-o", str(tmp_path / "a.svg")])
    wrong = cli.invoke(main, ["plot", str(run), "--metric", "x"])

    assert (made.exit_code, made.output.strip()) == (0, str(tmp_path / "a.html"))
    assert (drawn.exit_code, drawn.output.strip()) == (0, str(tmp_path / "a.svg"))
    assert (tmp_path / "a.html").stat().st_size > 1000
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert (wrong.exit_code, "the metrics are val_accuracy, loss" in wrong.output) == (2, True)
