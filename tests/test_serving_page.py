"""Tests of page.html in a real browser. They need playwright and a chromium on the path."""

import shutil

import pytest

from running_server import Running

pytest_plugins = ["server_fixtures"]

BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PROMPT = "def the_same_prefix_that_both_have(x): "


@pytest.fixture(scope="module")
def browser():
    """A browser."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install playwright: a browser drives the page"
    )
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no chromium on the path")
    with playwright.sync_playwright() as p:
        with p.chromium.launch(executable_path=chromium, args=BROWSER_FLAGS) as browser:
            yield browser


@pytest.mark.parametrize("scheme, width", [("light", 1200), ("dark", 390)])
def test_page_in_a_browser(server, tmp_path, browser, scheme, width):
    """Catches: a page that does not stream, cannot be stopped, shows no alternatives or no pages,
    or calls another host."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    hosts, problems = watch(page)
    page.goto(server.url)
    generate_two_and_stop_one(server, page, tmp_path / f"{scheme}_running.png")
    look_at_the_other(server, page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / f"{scheme}_done.png", full_page=True)
    meet_errors(server, page)
    page.screenshot(path=tmp_path / f"{scheme}_errors.png", full_page=True)
    assert hosts == {f"127.0.0.1:{server.port}"}
    assert [p for p in problems if "400" not in p and "429" not in p] == []
    page.close()


def watch(page) -> tuple[set[str], list[str]]:
    """The hosts that the page calls from now on, and what it complains of."""
    hosts = set()
    problems = []

    def note_problem(message) -> None:
        if message.type in ("error", "warning"):
            problems.append(message.text)

    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.on("console", note_problem)
    page.on("pageerror", lambda error: problems.append(str(error)))
    return hosts, problems


def generate_two_and_stop_one(server, page, screenshot) -> None:
    """Two requests run side by side and share pages; the later one is stopped."""
    server.step_seconds = 0.03
    page.fill("#prompt", PROMPT)
    page.fill("[name=max_tokens]", "80")
    page.fill("[name=seed]", "1")
    page.press("#prompt", "Control+Enter")
    page.click("text=Generate")
    page.locator("#legend li >> nth=1").wait_for()  # two requests hold pages
    page.locator(".output >> nth=0 >> .token >> nth=5").wait_for()
    page.locator("#pool-text", has_text="4 of them shared").wait_for()
    page.screenshot(path=screenshot, full_page=True)
    page.locator(".output >> nth=0").get_by_text("Stop").click()
    page.locator(".output >> nth=0", has_text="stopped").wait_for()
    server.until(lambda: len(server.worker.open_jobs) == 1, "one stopped, the other not")
    server.step_seconds = 0.0


def look_at_the_other(server, page) -> None:
    """The other one comes to its end, with the text that the API gives; its tokens can be looked
    at by mouse and by keyboard."""
    page.locator(".output >> nth=1", has_text="80 new").wait_for()
    answer = server.complete(prompt=PROMPT, max_tokens=80, seed=1, temperature=0.8)
    expected = answer["choices"][0]["text"].rstrip("\n")
    assert page.locator(".output >> nth=1 >> .text").inner_text().endswith(expected)
    page.hover(".output >> nth=1 >> .token >> nth=3")
    assert page.locator("#tip").inner_text().count("%") >= 6
    page.keyboard.press("Escape")
    page.focus(".output >> nth=1 >> .text")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").is_visible()


def meet_errors(server, page) -> None:
    """The page shows the server's sentences: for a mistake, and for a full queue."""
    page.fill("[name=max_tokens]", "500")
    page.click("text=Generate")
    page.locator(".output .error", has_text="context is 128").wait_for()
    with server.standing():
        full = [server.connection({"prompt": ["a"] * 8, "max_tokens": 1}) for _ in range(2)]
        server.until(lambda: len(server.worker.open_jobs) == 2, "the queue is full")
        page.fill("[name=max_tokens]", "8")
        page.click("text=Generate")
        page.locator(".output .error", has_text="limit is 16: try again").wait_for()
    for connection in full:
        connection.close()


def test_page_shows_how_the_server_is(tiny_model, tmp_path, browser):
    """Catches: a page that asks for no password where there is a key, or looks alive when a stream
    has broken off or the server is gone."""
    running = Running(tiny_model, api_key="secret", drain_timeout=0).ready()
    page = browser.new_page(http_credentials={"username": "anyone", "password": "secret"})
    page.goto(running.url)
    page.locator("#state", has_text="ready").wait_for()
    running.step_seconds = 0.1
    page.fill("[name=max_tokens]", "100")
    page.click("text=Generate")
    page.locator(".output .token >> nth=2").wait_for()
    running.drain()
    page.locator(".output .error", has_text="drain_timeout=0").wait_for()
    page.locator("#state.error", has_text="does not answer").wait_for()
    page.click("text=Generate")
    page.locator(".output .error", has_text="does not answer").wait_for()
    page.screenshot(path=tmp_path / "down.png", full_page=True)
    assert running.ended() is None
