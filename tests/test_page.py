"""The chat page in a real browser (Debian's chromium and chromium-driver), against a real server.

SCREENSHOTS=folder keeps pictures of the page: light, dark, and as wide as a phone.
"""

import base64
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from serving import TEXT, ScriptedEngine, say, serving

from nanochat_jax.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="no chromium and chromedriver: apt-get install chromium chromium-driver",
    ),
]

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's key for a reference to an element
ENTER, SHIFT = "\ue007", "\ue008"
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,860",
    "--hide-scrollbars",
]  # fmt: skip


class Browser:
    """As much of the WebDriver protocol as these tests need."""

    def __init__(self, driver_url: str, profile: Path):
        self.http = httpx.Client(base_url=driver_url, timeout=60)
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={profile}"]}
        capabilities = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.session = self.call("POST", "/session", capabilities, session=False)["sessionId"]

    def call(self, method: str, path: str, body: dict | None = None, session: bool = True):
        path = f"/session/{self.session}{path}" if session else path
        value = self.http.request(method, path, json=body if method == "POST" else None).json()["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def js(self, script: str, *args):
        return self.call("POST", "/execute/sync", {"script": script, "args": args})

    def devtools(self, command: str, **params):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def find(self, selector: str) -> str:
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self.call("POST", f"/element/{self.find(selector)}/click", {})

    def type(self, text: str) -> None:
        self.call("POST", f"/element/{self.find('#input')}/value", {"text": text})

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector)

    def until(self, script: str, *args, seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while not self.js(f"return !!({script})", *args):
            assert time.monotonic() < deadline, f"never: {script}\n{self.texts('body')}"
            time.sleep(0.05)

    def ask(self, text: str) -> None:
        """Sends a message and waits for the end of the answer."""
        self.type(text + ENTER)
        self.until("!running && (messages.length && messages.length % 2 == 0 || document.querySelector('.error'))")

    def shoot(self, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, f"{name}.png").write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/status")
                break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < deadline, "chromedriver does not start"
                time.sleep(0.05)
        browser = Browser(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile"))
        yield browser
        browser.call("DELETE", "")
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def browser(driver):
    yield driver
    driver.devtools("Emulation.clearDeviceMetricsOverride")
    driver.devtools("Emulation.setTouchEmulationEnabled", enabled=False)
    driver.devtools("Emulation.setEmulatedMedia", features=[])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(TEXT), 300)


SKY = (
    "Sunlight holds all colours. On its way through the air the blue part of it is scattered in every direction, far "
    "more than the red, so that from wherever you look, some of that blue light reaches your eyes.\n\nAt sunset the "
    "light has a longer way to go. Most of the blue is lost by then, and what is left is orange and red."
)
SUM = ("Let me see. 37 times 12 is ", ("python", "37*12"), ("python_output", "444"), " in all.")
SCRIPT = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def answers(tokenizer):
    """What the scripted model says, by a word in the last message; without such a word it echoes."""

    def script(request):
        start, end = tokenizer.special("<|user_start|>"), tokenizer.special("<|user_end|>")
        ids = list(request.ids)
        last = len(ids) - 1 - ids[::-1].index(start)
        said = tokenizer.decode(ids[last + 1 : ids.index(end, last)])
        for word, answer in {"sky": (SKY,), "37": SUM, "tag": (SCRIPT,), "Grüße": ("Grüße 你好🌍!",)}.items():
            if word in said:
                return say(tokenizer, *answer)
        if "endless" in said:
            return tokenizer.encode("and so on ") * 400
        return say(tokenizer, "nothing to add" if "silent" not in said else "")

    return script


@pytest.fixture
def chat(browser, tokenizer):
    engine = ScriptedEngine(tokenizer, answers(tokenizer), slots=2, context=4096, delay=0.002)
    with serving(engine) as server:
        browser.open(server.url)
        browser.engine, browser.server = engine, server
        browser.until("document.querySelector('#model').innerText == 'nanochat-test-sft'")
        yield browser


def sent(chat) -> str:
    """The prompt of the last request, as text."""
    return chat.engine.tokenizer.decode(list(chat.engine.requests.values())[-1].ids)


def test_a_conversation_with_a_tool_call(chat):
    assert chat.js("return document.activeElement.id") == "input"
    chat.shoot("welcome")
    chat.ask("Why is the sky blue?")
    chat.ask("And what is 37 times 12?")
    assert chat.texts(".user .body") == ["Why is the sky blue?", "And what is 37 times 12?"]
    assert chat.texts(".assistant .body")[0] == SKY
    assert chat.texts(".tool code") == ["37*12"] and chat.texts(".tool output") == ["444"]
    assert chat.js("return document.querySelector('.typing')") is None
    chat.shoot("light")
    # What the model hears next has its own tool call in it, with the special tokens it learned.
    chat.ask("Thank you")
    assert "is <|python_start|>37*12<|python_end|><|output_start|>444<|output_end|> in all." in sent(chat)


def test_dark_and_phone(chat):
    chat.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    chat.ask("Why is the sky blue?")
    chat.ask("And what is 37 times 12?")
    chat.type("/help" + ENTER)
    chat.shoot("dark")
    dark = chat.js("return getComputedStyle(document.body).backgroundColor")
    chat.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    assert chat.js("return getComputedStyle(document.body).backgroundColor") != dark
    chat.devtools("Emulation.setDeviceMetricsOverride", width=375, height=700, deviceScaleFactor=2, mobile=True)
    chat.devtools("Emulation.setTouchEmulationEnabled", enabled=True)
    assert chat.js("return document.documentElement.scrollWidth") <= 375
    chat.shoot("phone")
    # Where there is no Shift, Enter is a new line.
    chat.open(chat.server.url)
    chat.until("matchMedia('(pointer: coarse)').matches")
    chat.shoot("phone-welcome")
    chat.type("one" + ENTER + "two")
    assert chat.js("return input.value") == "one\ntwo"
    chat.click("#send")
    chat.until("!running && messages.length == 2")


def test_what_a_model_writes_stays_text(chat):
    chat.ask("a tag please")
    assert chat.texts(".assistant .body") == [SCRIPT]
    chat.ask("Grüße " + SCRIPT)
    assert chat.texts(".assistant .body")[1] == "Grüße 你好🌍!"
    assert chat.js("return document.title") == "nanochat"
    assert chat.js("return document.querySelectorAll('#log img:not(#welcome img), #log script').length") == 0


def test_stop_keeps_what_came_and_frees_the_slot(chat):
    chat.type("endless" + ENTER)
    chat.until("document.querySelector('.assistant .body').innerText.length > 30")
    assert chat.js("return send.getAttribute('aria-label')") == "Stop"
    chat.shoot("writing")
    chat.click("#send")
    chat.until("!running && messages.length == 2")
    assert "stopped" in chat.texts(".assistant .actions")[0]
    assert chat.texts(".assistant .body")[0].startswith("and so on")
    deadline = time.monotonic() + 5
    while httpx.get(f"{chat.server.url}/stats").json()["busy_workers"]:
        assert time.monotonic() < deadline, "the server goes on"
        time.sleep(0.05)
    chat.ask("go on")
    assert chat.texts(".assistant .body")[1] == "nothing to add"


def test_edit_and_regenerate(chat):
    chat.ask("first")
    chat.ask("second")
    chat.click(".user:nth-of-type(3) .body")
    assert chat.js("return input.value") == "second"
    assert chat.texts(".user .body") == ["first"]
    chat.type(" thought" + ENTER)
    chat.until("!running && messages.length == 4")
    assert chat.texts(".user .body") == ["first", "second thought"]
    before = len(chat.engine.requests)
    chat.js("document.querySelectorAll('.assistant')[0].querySelector('.actions button:last-of-type').click()")
    chat.until("!running && messages.length == 2")
    assert len(chat.engine.requests) == before + 1 and "second" not in sent(chat)


def test_commands_and_new_chat(chat):
    chat.type("/temperature 0.25" + ENTER + "/topk 0" + ENTER + "/topk 500" + ENTER + "/temperature" + ENTER)
    assert chat.texts(".note") == [
        "temperature is now 0.25",
        "top-k is now 0",
        "/topk 500: expected a whole number from 0 to 200",
        "temperature is 0.25",
    ]
    chat.ask("hello")
    request = list(chat.engine.requests.values())[-1]
    assert (request.temperature, request.top_k, request.max_tokens) == (0.25, 0, 512)
    chat.type("/clera" + ENTER)
    assert "no command" in chat.texts(".note")[-1] and chat.js("return input.value") == "/clera"
    chat.click("#new")
    assert chat.js("return messages.length") == 0 and chat.texts(".note") == []
    assert chat.js("return !welcome.hidden")


def test_shift_enter_is_a_new_line_and_the_box_grows(chat):
    height = chat.js("return input.offsetHeight")
    chat.type("one" + SHIFT + ENTER + ENTER + SHIFT + "two")
    assert chat.js("return input.value") == "one\n\ntwo" and chat.js("return input.offsetHeight") > height
    chat.js("fill('line\\n'.repeat(60))")
    assert chat.js("return input.offsetHeight") == 200


def test_an_empty_answer_gives_the_question_back(chat):
    chat.ask("silent")
    assert chat.texts(".error") == ["The model had no answer."]
    assert chat.js("return [input.value, messages.length]") == ["silent", 0]
    chat.type(" no more" + ENTER)
    chat.until("!running && document.querySelector('.error')")
    chat.js("fill('')")
    chat.ask("hello")
    assert chat.texts(".error") == [] and chat.texts(".user .body") == ["hello"]


def test_a_dead_server_loses_nothing_that_was_typed(chat):
    chat.ask("hello")
    chat.server.stop()
    chat.type("are you there?" + ENTER)
    chat.until("document.querySelector('.error')")
    assert "does not answer" in chat.texts(".error")[0]
    assert chat.js("return input.value") == "are you there?" and chat.texts(".user .body") == ["hello"]
    chat.shoot("error")


def test_refusals_are_shown_and_long_chats_go_on(chat):
    chat.js("fill('x'.repeat(8001)); submit()")
    chat.until("document.querySelector('.error')")
    assert "8001 characters" in chat.texts(".error")[0]
    chat.click("#new")
    # More characters than a request may have: the page leaves out the oldest turns and says so.
    chat.js("""
        for (let i = 0; i < 6; i++) {
            addUser("q".repeat(7000));
            const reply = addAnswer();
            reply.add("text", "a");
            reply.finish();
        }
        fill("and now?");
        submit();
    """)
    chat.until("!running && messages.length == 14")
    assert chat.texts(".assistant .body")[-1] == "nothing to add"
    assert chat.js("return document.querySelectorAll('.forgotten').length") == 1


def test_events_may_be_split_anywhere(chat):
    script = """
        const bytes = new TextEncoder().encode('data: {"token": "Grüße 🌍"}\\n\\ndata: {"done": true}\\n\\n');
        const done = arguments[arguments.length - 1];
        (async () => {
            const found = [];
            const start = (out) => { for (const byte of bytes) out.enqueue(new Uint8Array([byte])); out.close(); };
            for await (const event of events(new ReadableStream({ start }))) found.push(event);
            done(found);
        })();
    """
    found = chat.call("POST", "/execute/async", {"script": script, "args": []})
    assert found == [{"token": "Grüße 🌍"}, {"done": True}]
