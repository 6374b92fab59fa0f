"""Debian's headless Chromium, driven by Selenium."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="Chromium is not installed (Debian: apt-get install chromium chromium-driver)",
)
_T = TypeVar("_T")
_WAIT_SECONDS = 60.0


class Browser:
    """A tab.

    Args:
        driver: The driver of the browser.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Load a page in a tab without stored data."""
        self.driver.get("about:blank")
        self.driver.delete_all_cookies()
        self.driver.get(url)

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the screen, in CSS pixels, and the colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The visible text of the first match; empty without a match."""
        found = self.all(selector)
        return found[0].text if found else ""

    def run(self, script: str, *args: Any) -> Any:
        """The result of a test's script, to which the page's policy does not apply."""
        return self.driver.execute_script(script, *args)

    def until(self, look: Callable[[], _T], what: str) -> _T:
        """Wait until a function returns a true value.

        Raises:
            AssertionError: The function returned none in time; the message has the browser's log.
        """
        end = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(StaleElementReferenceException):
                if found := look():
                    return found
            time.sleep(0.05)
        raise AssertionError(f"never saw {what}; the browser says {self.complaints()}")

    def complaints(self) -> list[str]:
        """Errors of scripts and violations of the page's policy since the last call.

        Answers with an error status are not included, because a page may receive them.
        """
        entries: list[dict[str, Any]] = self.driver.get_log("browser")
        severe = [entry for entry in entries if entry["level"] == "SEVERE"]
        return [entry["message"] for entry in severe if entry["source"] != "network"]

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Write the visible part, or the whole page, as PNG."""
        asked = {"format": "png", "captureBeyondViewport": whole}
        data = self.driver.execute_cdp_cmd("Page.captureScreenshot", asked)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def start_browser(folder: Path) -> Iterator[Browser]:
    """Run a browser until the block ends; its profile is in ``folder``."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}"]
    # Names that an attacker has made resolve to this machine.
    flags += ["--host-resolver-rules=MAP *.example 127.0.0.1"]
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Selenium must not search for other drivers or send statistics.
    os.environ.setdefault("SE_AVOID_STATS", "true")
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver)
    finally:
        with contextlib.suppress(WebDriverException):
            driver.quit()
