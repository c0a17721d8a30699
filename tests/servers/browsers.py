"""A browser without a window that reaches nothing but this machine."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

__all__ = ["chromium"]


@contextmanager
def chromium(folder: Path) -> Iterator[Chrome]:
    """Run Debian's Chromium; `folder` is where it keeps what is its own."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert binary, "install Debian's packages chromium and chromium-driver"
    assert driver, "install Debian's package chromium-driver"
    options = ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless=new",
        "--no-sandbox",  # which root cannot have
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1500,950",
        f"--user-data-dir={folder}",
        # It reaches nothing but the server.
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = Chrome(options, ChromeService(driver, log_output=str(folder / "driver.txt")))
    try:
        yield running
    finally:
        running.quit()
