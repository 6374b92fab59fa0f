"""Takes the picture of the console that the documentation shows: ``make long``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkout import ROOT

pytest.importorskip("selenium")

from selenium.webdriver.common.keys import Keys
from servers.browser import needs_chromium, start_browser
from servers.server_under_test import start_server

pytestmark = [needs_chromium, pytest.mark.long]

PICTURE = ROOT / "docs" / "images" / "console.png"
ADAPTERS = ("json", "label", "pirate", "sql")


def test_the_screenshot_of_the_console_is_taken(tmp_path: Path) -> None:
    """Times and rates differ from run to run."""
    preloads = [f"--preload={name}={name}" for name in ADAPTERS]
    examples = ROOT / "examples" / "adapters"
    flags = ("--http-address", "127.0.0.1:0", "--adapter-root", str(examples), *preloads)
    with start_server(tmp_path, *flags) as server, start_browser(tmp_path / "profile") as tab:
        tab.size(1200, 900)
        tab.open(f"http://{server.http_address}/")
        tab.until(lambda: len(tab.all("#adapters-rows tr")) == len(ADAPTERS), "the adapters")
        tab.all("#adapters-rows .name")[ADAPTERS.index("pirate")].click()
        for name in ("json", "pirate"):
            tab.find(f"select[aria-label^='Add an'] option[value={name}]").click()
        tab.find("#prompt").send_keys("What is the capital of France?", Keys.ENTER)
        said = tab.find("#said")
        tab.until(lambda: "Mix has answered" in str(said.get_property("textContent")), "ends")
        tab.find(".pane:last-child .text").send_keys(Keys.ARROW_RIGHT)
        tab.run("window.scrollTo(0, 0)")
        taken = tmp_path / "console.png"
        tab.picture(taken)
        assert tab.complaints() == []
    shutil.copyfile(taken, PICTURE)
