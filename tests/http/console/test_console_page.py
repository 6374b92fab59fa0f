"""The console in a real browser, with a simulated engine."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from builders.registries import Registries
from checkout import ROOT
from servers.fakes import finish, saying
from servers.http_harness import HttpHarness, http_harness
from servers.server_under_test import start_server

from turret.server.adapters.adapter import AdapterRef
from turret.server.adapters.state_dir import StateDir
from turret.server.api.access import TokenTable
from turret.server.basics.work import Cancellation
from turret.server.engine.scheduling.request import Output, Request, TokenLogprob, TopLogprob
from turret.server.errors import AdapterCheckpointError
from turret.server.words import say
from turret.words import about_bytes

pytest.importorskip("selenium")

from selenium.webdriver.common.keys import Keys
from servers.browser import Browser, needs_chromium, start_browser

pytestmark = needs_chromium

EVIL = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
TOKENS = TokenTable([("looker", frozenset({"inference"})), ("all", frozenset(
    {"inference", "admin", "metrics"}))])  # fmt: skip
_T = TypeVar("_T")
Visit = Callable[..., Awaitable[Any]]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with start_browser(tmp_path_factory.mktemp("chromium")) as started:
        started.size(1280, 1000)
        yield started


@pytest.fixture
async def visit(browser: Browser) -> AsyncIterator[Visit]:
    """Run a visitor's actions in a thread, because the server runs in this one."""

    async def go(do: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.to_thread(do, browser, *args)

    yield go
    # An open tab would continue to poll.
    await go(lambda tab: tab.driver.get("about:blank"))


def open_page(tab: Browser, http: HttpHarness, expected: str = "Serving") -> None:
    tab.driver.get(f"http://{http.server.address}/icon")
    tab.run("sessionStorage.clear()")
    tab.driver.get(f"http://{http.server.address}/")
    tab.complaints()
    status(tab, expected)


def status(tab: Browser, text: str) -> None:
    tab.until(lambda: tab.text("#status") == text, text)


def names(tab: Browser) -> list[str]:
    return [element.text for element in tab.all("#adapters-rows .name")]


def scripted(*texts: str) -> Callable[[Request], AsyncIterator[Output]]:
    """Answer with these tokens of different probabilities, and with the mix as the last one."""

    async def script(request: Request) -> AsyncIterator[Output]:
        mix = "+".join(f"{ref.name}*{ref.weight:g}" for ref in request.adapters) or "base"
        for place, text in enumerate((*texts, mix)):
            top = (TopLogprob(token_id=9, text=EVIL, logprob=-0.125),)
            token = TokenLogprob(token_id=place, text=text, logprob=-1.5 * place, top=top)
            end = finish(request) if place == len(texts) else None
            yield Output(text=text, token_ids=(place,), logprobs=(token,), finish=end)

    return script


def ask(tab: Browser, prompt: str) -> list[str]:
    """Send a prompt in all three panes; returns their answers."""
    tab.find("#prompt").send_keys(prompt, Keys.ENTER)
    tab.until(lambda: "answered" in (tab.find("#said").get_attribute("textContent") or ""), "ends")
    return [element.text for element in tab.all(".pane .text")]


async def test_three_answers_are_shown_side_by_side(visit: Visit, http: HttpHarness) -> None:
    for name in ("json", "pirate", "sql"):
        http.registry.load(name, name)
    http.engine.script = scripted("A", " b")

    def do(tab: Browser) -> None:
        open_page(tab, http)
        tab.until(lambda: names(tab) == ["json", "pirate", "sql"], "adapters")
        # Clicking the name in the table selects the adapter in the second pane.
        tab.all("#adapters-rows .name")[2].click()
        assert tab.run("return document.activeElement.id") == "prompt"
        assert tab.all(".member") == []
        for name in ("json", "pirate"):
            tab.find(f"select[aria-label^='Add an'] option[value={name}]").click()
        slider = tab.find("input[aria-label='Weight of pirate']")
        slider.send_keys(*[Keys.ARROW_LEFT] * 10)
        assert tab.text(".member:nth-child(2) output") == "0.50"
        answers = ask(tab, "hello")
        assert answers == ["A bbase", "A bsql*1", "A bjson*1+pirate*0.5"]
        spans = tab.all(".pane:first-child .text span")
        kinds = [span.get_attribute("class") for span in spans]
        assert kinds == ["q1", "q4", "q5"]
        assert tab.text(".pane:first-child .facts").startswith("2 tokens")
        # Show the alternatives by keyboard.
        text = tab.find(".pane:first-child .text")
        text.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        assert tab.text(".pane:first-child .detail").startswith("␣b 22% — else <img␣src")
        tab.find("#colour").click()
        assert tab.run("return document.querySelector('.coloured')") is None
        assert tab.complaints() == []

    await visit(do)
    bodies = [request.prompt_token_ids for request in http.engine.requests]
    assert len(bodies) == 3
    assert len(set(bodies)) == 1


async def test_tokens_that_arrive_together_have_distinct_colours(
    visit: Visit, http: HttpHarness
) -> None:
    """Accepted draft tokens arrive together, and so does the end, a token without text."""
    tokens = tuple(
        TokenLogprob(token_id=place, text=text, logprob=-1.5 * place, top=())
        for place, text in enumerate(("A", " b", "<end>"))
    )
    http.engine.script = saying(Output(text="A b", token_ids=(0, 1, 2), logprobs=tokens))

    def do(tab: Browser) -> None:
        open_page(tab, http)
        assert ask(tab, "hello")[0] == "A b"
        spans = tab.all(".pane:first-child .text span")
        found = [(span.get_property("textContent"), span.get_attribute("class")) for span in spans]
        assert found == [("A", "q1"), (" b", "q4")]
        assert tab.complaints() == []

    await visit(do)


async def test_an_empty_answer_is_shown_as_empty(visit: Visit, http: HttpHarness) -> None:
    http.engine.script = saying("")

    def do(tab: Browser) -> None:
        open_page(tab, http)
        assert ask(tab, "hello")[0] == ""
        notes = tab.all(".pane:first-child .empty")
        assert [note.is_displayed() for note in notes] == [False, True]

    await visit(do)


async def test_hostile_text_is_shown_as_text(visit: Visit, http: HttpHarness) -> None:
    """Names, methods, warnings, answers and errors are untrusted input."""
    record = http.registry.load("a", "a")
    facts = replace(record.facts, method=EVIL, warnings=(EVIL,))
    http.registry.records = {EVIL: replace(record, name=EVIL, facts=facts)}
    http.engine.script = scripted(EVIL, "\u202e</div>")
    await http.post("/v1/completions", {"model": EVIL, "prompt": "a"})
    await http.settle()

    def do(tab: Browser) -> None:
        open_page(tab, http)
        tab.until(lambda: names(tab) == [EVIL], "the name")
        tab.until(lambda: "<img src=x" in tab.text("#failures-list .message"), "the failure")
        answers = ask(tab, EVIL)
        assert answers[0].startswith(EVIL)
        tab.find(".pane:first-child .text").send_keys(Keys.ARROW_RIGHT)
        tab.find("#adapters-rows .acts button:last-child").click()
        assert tab.text("#unload-name") == EVIL
        assert tab.all("main img, main script, dialog img") == []
        assert tab.driver.title == "turret"
        assert tab.complaints() == []

    await visit(do)


async def test_an_adapter_may_have_the_name_of_a_property(visit: Visit, http: HttpHarness) -> None:
    http.registry.load("constructor", "a")

    def do(tab: Browser) -> None:
        open_page(tab, http)
        tab.until(lambda: names(tab) == ["constructor"], "the adapter")
        assert tab.text("#adapters-rows td:nth-of-type(6)") == "0"

    await visit(do)


_ASK = """
const done = arguments[2];
fetch(arguments[0], arguments[1]).then(answer => done(answer.status), error => done(error.name));
"""
_LOAD = {"method": "POST", "body": '{"lora_name": "b", "lora_path": "sql"}'}
_JSON = {"headers": {"content-type": "application/json"}}


async def test_pages_of_other_origins_are_rejected(visit: Visit, http: HttpHarness) -> None:
    """A page under a rebound name, and a page from another origin, are rejected."""
    http.registry.load("a", "a")
    own = f"http://{http.server.address}"
    rebound = own.replace("127.0.0.1", "rebound.example")

    def do(tab: Browser) -> None:
        def ask(url: str, asked: dict[str, Any]) -> Any:
            return tab.driver.execute_async_script(_ASK, url, asked)

        tab.driver.get(rebound)
        assert "unknown_host" in tab.text("body")
        for path in ("/console/state?find=", "/v1/models", "/health"):
            assert ask(rebound + path, {}) == 421
        assert ask(f"{rebound}/v1/load_lora_adapter", _LOAD | _JSON) == 421
        for path in ("/console/state?find=", "/v1/models"):
            assert ask(own + path, {}) == "TypeError"
        assert ask(f"{own}/v1/load_lora_adapter", _LOAD | _JSON) == "TypeError"
        # Without a header that needs a preflight, the request is sent, and rejected.
        assert ask(f"{own}/v1/load_lora_adapter", _LOAD | {"mode": "no-cors"}) == 0

    await visit(do)
    assert set(http.registry.records) == {"a"}
    loaded = await http.post("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "sql"})
    assert loaded.status_code == 200


async def test_an_administrator_loads_pins_and_unloads(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with http_harness(tokens=TOKENS) as http:
        http.metrics.sequences(waiting=3, running=2)
        http.metrics.kv_blocks(free=3, used=1)

        def give(tab: Browser, token: str) -> None:
            tab.find("#token-open").click()
            tab.find("#token").clear()
            tab.find("#token").send_keys(token, Keys.ENTER)

        def do(tab: Browser) -> None:
            open_page(tab, http, "Locked")
            assert "requires a token" in tab.text("#notice")
            # Without a token, nothing can change, so the page does not poll.
            count = "return performance.getEntriesByName(new URL('console/state?find=', location)"
            asked = tab.run(f"{count}.href).length")
            time.sleep(2.5)
            assert (asked, tab.run(f"{count}.href).length")) == (1, 1)
            give(tab, "wrong")
            tab.until(lambda: "does not know this token" in tab.text("#notice"), "the refusal")
            give(tab, "looker")
            status(tab, "Serving")
            assert "a token with the role metrics" in tab.text("#live-empty")
            assert "a token with the role admin" in tab.text("#adapters-empty")
            assert "a token with the role admin" in tab.text("#failures-empty")
            assert not tab.find("#load-open").is_displayed()
            give(tab, "all")
            tab.until(lambda: tab.text("#running") == "2", "figures")
            assert (tab.text("#waiting"), tab.text("#kv")) == ("3 waiting", "25%")
            assert "--preload" in tab.text("#adapters-empty")
            tab.find("#load-open").click()
            tab.find("#load-name").send_keys("No Name")
            tab.find("#load-path").send_keys("sql", Keys.ENTER)
            tab.until(lambda: tab.text("#load-failed").startswith("Name: "), "the reason")
            tab.find("#load-name").clear()
            tab.find("#load-name").send_keys("sql", Keys.ENTER)
            tab.until(lambda: names(tab) == ["sql"], "the adapter")
            assert tab.text("#adapters-rows td:nth-of-type(4)") == "100 B"
            # Sizes have the format of the ``turret`` command.
            ask = "import('/console/dom.js').then(dom => arguments[0](dom.bytes(707584)))"
            assert tab.driver.execute_async_script(ask) == "691 KiB"
            for count in (0, 512, 1536, 11_000_000, 1_060_000, 3 << 40):
                ask = f"import('/console/dom.js').then(dom => arguments[0](dom.bytes({count})))"
                assert tab.driver.execute_async_script(ask) == about_bytes(count)
            assert not tab.find("#load-dialog").is_displayed()
            tab.find("button[aria-label='Replace sql']").click()
            assert tab.find("#load-name").get_property("value") == "sql"
            tab.find("#load-path").send_keys("sql-v2", Keys.ENTER)
            tab.until(lambda: http.registry.get("sql").generation == 2, "the next generation")
            tab.until(lambda: not tab.find("#load-dialog").is_displayed(), "no dialog")
            tab.find("#adapters-rows .acts button").click()
            tab.until(lambda: tab.text("#adapters-rows .pin") == "pinned", "the pin")
            assert http.registry.get("sql").pinned
            tab.find("button[aria-label='Unload sql']").click()
            tab.find("#unload-go").click()
            tab.until(lambda: "is pinned" in tab.text("#unload-failed"), "why not")
            tab.find("#unload-dialog [data-close]").click()
            tab.find("button[aria-label='Unpin sql']").click()
            tab.until(lambda: not http.registry.get("sql").pinned, "no pin")
            tab.find("button[aria-label='Unload sql']").click()
            tab.find("#unload-go").click()
            tab.until(lambda: names(tab) == [], "no adapter")
            # The token is stored only in this tab, and removed on request.
            assert tab.run("return Object.keys(localStorage).length") == 0
            assert tab.driver.get_cookies() == []
            tab.find("#token-open").click()
            tab.find("#token-forget").click()
            status(tab, "Locked")

        await visit(do)
        assert http.registry.unloads[0][:2] == ("sql", "DRAIN")


async def test_an_administrator_uploads_files(visit: Visit, tmp_path: Path) -> None:
    made = Registries(tmp_path)
    registry = made(2.5, state=StateDir(tmp_path / "state", 1 << 20))
    async with http_harness(registry=registry) as http:

        def choose(tab: Browser, folder: str, *names: str) -> None:
            files = "\n".join(str(made.root / folder / name) for name in names)
            tab.find("#load-files").send_keys(files)
            assert not tab.find("#load-path").is_enabled()

        def do(tab: Browser) -> None:
            open_page(tab, http)
            tab.find("#load-open").click()
            tab.find("#load-name").send_keys("up")
            choose(tab, "a", "adapter_config.json")
            tab.find("#load-go").click()
            tab.until(lambda: "adapter_model" in tab.text("#load-failed"), "what is missing")
            choose(tab, "a", "adapter_model.safetensors")
            tab.find("#load-go").click()
            tab.until(lambda: names(tab) == ["up"], "the adapter")
            tab.find("button[aria-label='Replace up']").click()
            assert tab.find("#load-path").is_enabled()
            choose(tab, "b", "adapter_config.json", "adapter_model.safetensors")
            tab.find("#load-go").click()
            tab.until(lambda: registry.get("up").generation == 2, "the next generation")

        await visit(do)
        uploaded = registry.get("up").facts.digest
        assert uploaded == made().load("b", "b").facts.digest
    made.close()


async def test_an_active_merge_is_shown(visit: Visit, http: HttpHarness) -> None:
    http.merger.merge((AdapterRef(name=EVIL, weight=0.5),), "NF4", Cancellation())

    def do(tab: Browser) -> None:
        open_page(tab, http)
        tab.until(lambda: f"{EVIL}@3=0.5 (nf4, " in tab.text("#merged"), "the merge")
        assert tab.all("main img, main script") == []
        http.merger.unmerge(Cancellation())
        tab.until(lambda: not tab.find("#merged").is_displayed(), "nothing")
        assert tab.complaints() == []

    await visit(do)


async def test_the_page_shows_that_the_server_starts_stops_or_rejects(visit: Visit) -> None:
    async with http_harness(serving=False) as http:
        await visit(open_page, http, "Not serving")
        starting = say("SERVER_STARTING")[1:]
        assert starting in await visit(lambda tab: tab.text("#notice"))
    await visit(status, "Unreachable")
    assert "retries" in await visit(lambda tab: tab.text("#notice"))
    async with http_harness() as http:
        http.engine.refuse = AdapterCheckpointError("no such weights")

        def do(tab: Browser) -> None:
            open_page(tab, http)
            tab.find("#prompt").send_keys("a", Keys.ENTER)
            tab.until(lambda: tab.text(".pane .failed") == "no such weights", "the reason")
            advice = [element.text for element in tab.all(".pane .empty")]
            assert "Load an adapter to ask it." in advice

        await visit(do)


async def test_the_enter_key_sends_only_what_the_button_would(
    visit: Visit, http: HttpHarness
) -> None:

    def do(tab: Browser) -> None:
        open_page(tab, http)
        refused = "return document.querySelector(arguments[0]).matches(':invalid')"
        tab.find("#prompt").send_keys(Keys.ENTER)
        assert tab.run(refused, "#prompt")
        tab.find("#max-tokens").clear()
        tab.find("#max-tokens").send_keys("100000")
        tab.find("#prompt").send_keys("a", Keys.ENTER)
        assert tab.run(refused, "#max-tokens")
        assert tab.run("return document.activeElement.id") == "max-tokens"
        assert [pane.text for pane in tab.all(".pane .text")] == [""] * 3

    await visit(do)
    assert http.engine.requests == []


async def test_an_answer_can_be_stopped(visit: Visit, http: HttpHarness) -> None:
    async def slow(request: Request) -> AsyncIterator[Output]:
        while True:
            yield Output(text="H", token_ids=(72,))
            await asyncio.sleep(0.01)

    http.engine.script = slow

    def do(tab: Browser) -> None:
        open_page(tab, http)
        tab.find("#prompt").send_keys("a", Keys.ENTER)
        tab.until(lambda: len(tab.text(".pane .text")) > 5, "a beginning")
        tab.find("#stop").click()
        tab.until(lambda: "stopped" in tab.text(".pane .facts"), "its end")

    await visit(do)
    await asyncio.wait_for(http.engine.streams[0].cancelled.wait(), 20)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 360])
async def test_the_page_fits_and_is_readable(
    visit: Visit, width: int, dark: bool, http: HttpHarness
) -> None:
    """No horizontal scrolling, names for all controls, and contrast according to WCAG AA."""
    for name in ("json", "x" * 128):
        http.registry.load(name, name, pinned=True)
    http.merger.merge((AdapterRef(name="x" * 128),), "BF16", Cancellation())
    http.engine.script = scripted("A", " b", " c")
    await http.post("/v1/completions", {"model": "base", "prompt": "a", "temperature": -1})

    def do(tab: Browser) -> None:
        tab.size(width, 900, dark=dark)
        try:
            open_page(tab, http)
            tab.until(lambda: len(names(tab)) == 2, "adapters")
            ask(tab, "hello")
            assert tab.run("return document.documentElement.scrollWidth") <= width
            unnamed = tab.run(_UNNAMED)
            assert unnamed == []
            assert tab.run(_TOO_FAINT) == []
        finally:
            tab.size(1280, 1000)

    await visit(do)


# Controls without a name for screen readers.
_UNNAMED = """
return [...document.querySelectorAll("button, input, select, textarea, meter, [tabindex]")]
  .filter((e) => !(e.getAttribute("aria-label")
    || (e.labels && e.labels.length && e.labels[0].textContent.trim())
    || (e.tagName === "BUTTON" && e.textContent.trim().length > 0)))
  .map((e) => e.outerHTML);
"""
# Texts with a contrast below 4.5.
_TOO_FAINT = """
const parse = (text) => {
  const numbers = text.match(/[\\d.]+/g).map(Number);
  return numbers.length > 3 ? numbers : [...numbers, 1];
};
const over = (top, under) => under.map((c, i) => (i < 3 ? top[i] * top[3] + c * (1 - top[3]) : 1));
const behind = (element) => {
  const chain = [];
  for (let e = element; e; e = e.parentElement) {
    chain.unshift(parse(getComputedStyle(e).backgroundColor));
  }
  return chain.reduce((under, top) => over(top, under), [255, 255, 255, 1]);
};
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || !element.offsetParent || element.closest("noscript")) continue;
  const under = behind(element);
  const [a, b] = [light(over(parse(getComputedStyle(element).color), under)), light(under)];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const what = `${element.className || element.tagName} ${element.textContent.slice(0, 30)}`;
  if (contrast < 4.5 && !element.disabled) found.push(`${what}: ${contrast.toFixed(2)}`);
}
return found;
"""


PICTURE = ROOT / "docs" / "images" / "console.png"
ADAPTERS = ("json", "label", "pirate", "sql")


@pytest.mark.long
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
        tab.until(lambda: "ms" in tab.text("#first"), "the figures")
        tab.run("window.scrollTo(0, 0)")
        taken = tmp_path / "console.png"
        tab.picture(taken)
        assert tab.complaints() == []
    shutil.copyfile(taken, PICTURE)
