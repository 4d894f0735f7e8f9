"""Tests of the page in a real browser, which need playwright and a chromium on the path.

Those of what the server gives it need neither."""

import json
import re
import shutil

import pytest
import requests

from running_server import Running

pytest_plugins = ["server_fixtures"]

NUMBERS = re.compile(r"(\d+) pages")
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
    page.click("#completion-tab")
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
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("[name=max_tokens]", "80")
    page.fill("[name=seed]", "1")
    page.press("#prompt", "Control+Enter")
    page.click("text=Generate")
    page.locator("#legend li", has_text="(from here)").nth(1).wait_for()  # both hold pages
    page.locator(".output >> nth=0 >> .token >> nth=5").wait_for()
    page.locator("#legend li", has_text="shared by several sequences: 4 pages").wait_for()
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
    assert not page.locator("#tip").is_visible()
    page.focus(".output >> nth=1 >> .text")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").is_visible()


def meet_errors(server, page) -> None:
    """The page shows the server's sentences: for a mistake, and for a full queue."""
    page.fill("[name=max_tokens]", "500")
    page.click("text=Generate")
    page.locator(".output .error", has_text="context length is 128").wait_for()
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
    page.evaluate("document.getElementById('settings').open = true")
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


def test_chat_in_a_browser(server, tmp_path, browser):
    """Catches: a turn that is not sent, an answer whose text is not the API's, markup that is taken
    for HTML, a conversation that a reload loses, a system prompt that is left out, an Esc that
    closes a tip and stops the answer, too."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    _, problems = watch(page)
    page.goto(server.url)
    page.click("#system-box summary")
    page.fill("#system", "Be brief.")
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("[name=max_tokens]", "12")
    said = "<b>Hello</b>  *you*"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": said}]
    answer = server.chat(messages=messages, max_tokens=12, temperature=0)
    expected = answer["choices"][0]["message"]["content"]
    say(page, said)
    assert page.locator(".user .bubble").text_content() == said
    assert page.locator(".assistant .bubble").text_content() == expected
    stop_the_second_answer(server, page)
    page.reload()
    page.locator(".turn >> nth=3").wait_for()
    assert page.locator(".assistant .bubble >> nth=0").text_content() == expected
    assert page.input_value("#system") == "Be brief."
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    edit_the_first(page)
    page.screenshot(path=tmp_path / "chat.png", full_page=True)
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    assert problems == []
    page.close()


def say(page, text) -> None:
    """Send a message, and wait until the answer is complete."""
    page.fill("#say", text)
    page.press("#say", "Enter")
    page.locator(".assistant .about", has_text="Retry").last.wait_for()


def stop_the_second_answer(server, page) -> None:
    """The answer goes on when Esc closes a tip, and ends at the next Esc."""
    server.step_seconds = 0.05
    page.fill("[name=max_tokens]", "30")
    page.fill("#say", "More")
    page.press("#say", "Enter")
    page.hover(".assistant >> nth=1 >> .token >> nth=1")
    page.locator("#tip").wait_for()
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    assert len(server.worker.open_jobs) == 1
    page.keyboard.press("Escape")
    page.locator(".assistant >> nth=1", has_text="stopped").wait_for()
    server.until(lambda: not server.worker.open_jobs, "stopped")
    server.step_seconds = 0.0


def edit_the_first(page) -> None:
    """An edited message is answered anew, and what came after it is gone."""
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("[name=max_tokens]", "6")
    page.locator(".user >> nth=0").get_by_text("Edit").click()
    page.fill(".turn textarea", "Hi")
    page.locator(".turn >> nth=0").get_by_text("Send").click()
    page.locator(".assistant .about", has_text="6 tokens").wait_for()
    assert page.locator(".turn").count() == 2
    assert page.locator(".user .bubble").text_content() == "Hi"


def test_fill_the_pool(server, browser):
    """Catches: prompts that share nothing, a history that shows the present in place of the past,
    shared pages that are counted once for each request."""
    page = browser.new_page()
    page.goto(server.url)
    page.locator("#state", has_text="ready").wait_for()
    page.click("#fill")
    page.locator("#fill-text", has_text="12 prompts were answered").wait_for()
    page.locator("#pool-text", has_text=": 0 of").or_(
        page.locator("#pool-text", has_text="0 sequences running")
    ).first.wait_for()
    seen = page.evaluate(LOOK_BACK)
    assert any("shared by several" in legend for legend in seen)
    for legend in seen:
        assert sum(map(int, NUMBERS.findall(legend))) == 64, legend
    page.close()


LOOK_BACK = """() => {
  const moment = document.getElementById("moment"), seen = [];
  for (let i = 0; i <= Number(moment.max); i++) {
    moment.value = i;
    moment.dispatchEvent(new Event("input"));
    seen.push(document.getElementById("legend").innerText);
  }
  return seen;
}"""


def test_parts_of_the_page(server):
    """Catches: a file of the page that is missing, a path that leads out of its directory, a page
    that may load from elsewhere."""
    for path in ("/", "/docs", "/page/chat.js", "/page/page.css"):
        answer = server.get(path)
        assert answer.status_code == 200, path
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
    for path in ("/page/routes.py", "/page/..%2froutes.py", "/page/%2fetc%2fpasswd"):
        assert server.get(path).status_code == 404, path


def test_every_field_is_described(server):
    """Catches: a new field or route that the page of the API does not explain."""
    schema = server.get("/openapi.json").json()
    bare = [
        f"{name}.{field}"
        for name, definition in schema["components"]["schemas"].items()
        for field, properties in definition.get("properties", {}).items()
        if not properties.get("description")
    ]
    routes = [route for methods in schema["paths"].values() for route in methods.values()]
    assert bare == []
    assert all(route.get("description") for route in routes)
    assert len(routes) >= 11


def test_pool_events(server):
    """Catches: a change of the pool that is not told, a watcher that stays when its client left, a
    server that asks itself without end while nothing happens."""
    with requests.get(server.url + "/pool/events", stream=True, timeout=60) as stream:
        frames = (json.loads(line[6:]) for line in stream.iter_lines() if line)
        before = next(frames)
        assert before["running"] == 0
        server.step_seconds = 0.05
        server.complete(prompt="pool" * 10, max_tokens=20)
        server.step_seconds = 0.0
        running = next(frame for frame in frames if frame["running"] == 1)
        ended = next(frame for frame in frames if frame["running"] == 0)
        assert any(page["holders"] for page in running["used"])
        assert not any(page["holders"] for page in ended["used"])
        assert ended["queried_tokens"] - before["queried_tokens"] == 40
        assert len(server.worker.watchers) == 1
    server.until(lambda: not server.worker.watchers, "the watcher has gone")
