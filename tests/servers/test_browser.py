"""What a person sees in MLflow's pages after a run. The pictures stay with `--pictures FOLDER`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from servers.backends import Backend
from servers.browsers import chromium
from servers.training import ALIASES, train


@dataclass
class Page:
    """A browser that takes a picture of what it was asked for."""

    browser: Chrome
    server: str
    pictures: Path

    def open(self, path: str) -> None:
        # Without the query MLflow shows its pages for chat agents.
        self.browser.get(f"{self.server}/#/{path}?workflowType=machine_learning")

    def find(self, text: str) -> WebElement:
        """Wait for an element that is seen and whose own text this is."""
        return self._wait(lambda: self._seen(f"//*[normalize-space(text())='{text}']"), text)

    def find_in(self, text: str) -> WebElement:
        """The same for a part of its text."""
        return self._wait(lambda: self._seen(f"//*[contains(text(), '{text}')]"), text)

    def find_row(self, *texts: str) -> WebElement:
        """Wait for a row of a table that holds all of these."""

        def row() -> WebElement | None:
            rows = self.browser.find_elements(By.CSS_SELECTOR, "[role=row]")
            return next((row for row in rows if all(text in row.text for text in texts)), None)

        return self._wait(row, " and ".join(texts))

    def frame(self) -> None:
        """Go on inside the page within the page."""
        self.browser.switch_to.frame(self._wait(lambda: self._seen("//iframe"), "a frame"))

    def picture(self, name: str) -> None:
        self.browser.save_screenshot(str(self.pictures / f"{name}.png"))

    def _seen(self, xpath: str) -> WebElement | None:
        found = self.browser.find_elements(By.XPATH, xpath)
        return next((element for element in found if element.is_displayed()), None)

    def _wait(self, ask: Callable[[], WebElement | None], what: str) -> WebElement:
        wait = WebDriverWait(self.browser, 60, ignored_exceptions=[StaleElementReferenceException])
        found = wait.until(lambda _: ask(), f"{what!r} is not on {self.browser.current_url}")
        assert found is not None
        return found


@dataclass(frozen=True)
class Trained:
    name: str
    experiment: str
    run: str
    model: str
    """Of the best checkpoint."""
    versions: Mapping[str, str]
    """By alias."""


@pytest.fixture(scope="module")
def trained(server: Backend, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    name = f"seen-{uuid4().hex[:6]}"
    train(tmp_path_factory.mktemp("run") / name, server.tracker(name))
    client = server.client()
    experiment = client.get_experiment_by_name(name).experiment_id
    (run,) = client.search_runs([experiment])
    (best,) = client.search_logged_models([experiment], f"params.step = '{ALIASES['best']}'")
    versions = client.get_registered_model(name).aliases
    return Trained(name, experiment, run.info.run_id, best.model_id, versions)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def page(
    browser: Chrome, server: Backend, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Page]:
    config = request.config
    pictures = config.invocation_params.dir / (config.getoption("--pictures") or tmp_path)
    pictures.mkdir(parents=True, exist_ok=True)
    found = Page(browser, server.uri, pictures)
    yield found
    found.picture(request.node.name.removeprefix("test_"))
    browser.switch_to.default_content()


def test_the_artifacts_of_a_run_have_an_index(page: Page, trained: Trained) -> None:
    page.open(f"experiments/{trained.experiment}/runs/{trained.run}/artifacts")

    page.find("checkpoints").click()
    page.find("index.json")
    page.find("index.html").click()

    page.frame()
    for text in (trained.name, "best", "last", "best #1", "0.9"):
        page.find(text)


def test_a_registered_model_shows_its_aliases(page: Page, trained: Trained) -> None:
    page.open(f"models/{trained.name}")

    for alias, version in trained.versions.items():
        page.find_row(f"Version {version}", f"@ {alias}")


def test_the_files_of_a_checkpoint_open(page: Page, trained: Trained) -> None:
    page.open(f"experiments/{trained.experiment}/models/{trained.model}/artifacts")

    page.find("checkpoint").click()
    page.find("_CHECKPOINT_METADATA")
    page.find("checkpoint.json").click()

    page.find_in("xxh3:")
