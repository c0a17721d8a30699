"""The report as a browser shows it. The pictures stay with `--pictures FOLDER`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

import ckpt_callbacks as cc
from pictured import make_run
from servers.browsers import chromium

WIDTHS = {"desk": 1280, "phone": 390}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cc.write_report(make_run(tmp_path_factory.mktemp("run") / "digits", 40))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = request.config
    folder: Path = config.invocation_params.dir / (config.getoption("--pictures") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def show(browser: Chrome, page: Path, width: int, scheme: str) -> None:
    about = {"width": width, "height": 900, "deviceScaleFactor": 2, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", about)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for log in ("browser", "performance"):
        browser.get_log(log)  # of what was shown before
    browser.get(page.as_uri())


def picture(browser: Chrome, file: Path) -> None:
    import base64

    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    file.write_bytes(base64.b64decode(taken["data"]))


def fetched(browser: Chrome) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [request["request"]["url"] for request in requests]


def style(browser: Chrome, selector: str, name: str) -> Any:
    element = browser.find_element(By.CSS_SELECTOR, selector)
    return element.value_of_css_property(name)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_it_is_shown_without_errors_or_requests(
    browser: Chrome, report: Path, pictures: Path, device: str, scheme: str
) -> None:
    show(browser, report, WIDTHS[device], scheme)

    picture(browser, pictures / f"report-{device}-{scheme}.png")
    assert browser.get_log("browser") == []
    assert fetched(browser) == [report.as_uri()]
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide == WIDTHS[device]
    page = style(browser, "body", "background-color")
    assert page == {"light": "rgba(255, 255, 255, 1)", "dark": "rgba(20, 24, 29, 1)"}[scheme]
    charts = browser.find_elements(By.CSS_SELECTOR, "svg.chart")
    assert len(charts) == 7
    for chart in charts:
        assert chart.size["width"] > 0.7 * WIDTHS[device]
        assert chart.accessible_name


@pytest.mark.parametrize("width", [390, 720, 1000, 1280])
def test_a_table_of_many_metrics_does_not_widen_the_page(
    browser: Chrome, tmp_path: Path, width: int
) -> None:
    more = tuple(f"validation_metric_{number}" for number in range(8))
    page = cc.write_report(make_run(tmp_path / "digits", 20, more=more))

    show(browser, page, width, "light")
    browser.execute_script("document.querySelector('details').open = true")

    root = browser.find_element(By.TAG_NAME, "html")
    assert root.get_property("scrollWidth") == root.get_property("clientWidth")
    for table in browser.find_elements(By.TAG_NAME, "table"):
        assert table.find_element(By.XPATH, "..").size["width"] <= width


@pytest.mark.parametrize("device", WIDTHS)
def test_no_text_of_a_chart_lies_on_another_or_leaves_the_page(
    browser: Chrome, report: Path, device: str
) -> None:
    show(browser, report, WIDTHS[device], "light")

    for chart in browser.find_elements(By.CSS_SELECTOR, "svg.chart"):
        texts = [t for t in chart.find_elements(By.TAG_NAME, "text") if t.is_displayed()]
        boxes = [(t.text, t.rect) for t in texts]
        for at, (text, box) in enumerate(boxes):
            assert box["x"] >= 0, text
            assert box["x"] + box["width"] <= WIDTHS[device], text
            for other, there in boxes[:at]:
                apart = (
                    box["x"] + box["width"] <= there["x"] + 1
                    or there["x"] + there["width"] <= box["x"] + 1
                    or box["y"] + box["height"] <= there["y"] + 3
                    or there["y"] + there["height"] <= box["y"] + 3
                )
                assert apart, (chart.accessible_name, text, other)


def test_a_plot_is_shown_too(browser: Chrome, report: Path, pictures: Path) -> None:
    path = cc.plot(report.parent, pictures / "val_accuracy.svg")

    show(browser, path, 900, "light")

    browser.save_screenshot(str(pictures / "plot.png"))
    assert browser.get_log("browser") == []
    assert fetched(browser) == [path.as_uri()]
