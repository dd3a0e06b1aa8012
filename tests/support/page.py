"""The chat page in a real browser (Debian's chromium, driven by Playwright), against a real server.

A pytest plugin with the fixtures of the tests that need them.

SCREENSHOTS=folder saves pictures of the page: light, dark, and as wide as a phone.
"""

import os
import shutil
import time
from pathlib import Path

import pytest
from serving import ScriptedEngine, answer_ids, serving

from nanochat_jax.serve.page import FILES

try:
    from playwright.sync_api import sync_playwright
except ModuleNotFoundError:
    sync_playwright = None

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS = [
    pytest.mark.browser,
    pytest.mark.skipif(not sync_playwright, reason="no playwright: pip install '.[e2e]'"),
    pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium"),
]

SKY = (
    "Sunlight holds all colours. On its way through the air the blue part of it is scattered in every direction, far "
    "more than the red, so that from wherever you look, some of that blue light reaches your eyes.\n\nAt sunset the "
    "light has a longer way to go. Most of the blue is lost by then, and what is left is orange and red."
)
SUM = ("Let me see. 37 times 12 is ", ("python", "37*12"), ("python_output", "444"), " in all.")
SCRIPT = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SHOWS = f"""Here is **how**:

1. write *it*
2. run it

```python
print("{SCRIPT}")
```
[here](javascript:document.title='owned') and [there](https://example.org/a_b_c), ![pixel](http://example.org/x.png)"""

EXPORTS = """async addresses => {
    if (globalThis.exported) return;
    for (const address of addresses) {
        const module = await import(new URL(address, document.baseURI));
        for (const name in module) Object.defineProperty(globalThis, name, { get: () => module[name] });
    }
    globalThis.exported = true;
}"""


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Chat:
    """A page in a fresh browser context, without stored conversations."""

    def __init__(self, browser, server, engine, **options):
        self.server, self.engine, self.requests = server, engine, []
        self.context = browser.new_context(viewport={"width": 1280, "height": 860}, **options)
        self.context.set_default_timeout(10_000)
        self.open()

    def open(self) -> None:
        """Opens the page, in a new window if it was open before."""
        self.page = self.context.new_page()
        self.problems = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.server.url)
        self.until("document.querySelector('#model').innerText.includes('nanochat')")

    def js(self, script: str, *args):
        """Runs `script` with everything that the page's modules export, and returns its result."""
        self.page.evaluate(EXPORTS, [f".{address}" for address in FILES if address.endswith(".js")])
        return self.page.evaluate(script, *args)

    def until(self, script: str, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not self.js(f"!!({script})"):
            assert time.monotonic() < deadline, f"never true: {script}\n{self.page.inner_text('body')}"
            time.sleep(0.02)

    def press(self, keys: str) -> None:
        self.page.keyboard.press(keys)

    def type(self, text: str) -> None:
        self.page.type("#input", text)

    def ask(self, text: str) -> None:
        """Sends a message and waits for the end of the answer."""
        self.page.fill("#input", text)
        self.page.click("#send")
        self.until("!running")

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True).locator("visible=true").last

    def contents(self) -> list:
        """The contents of the messages, as the page has them."""
        return self.js("chat.messages.map(message => message.content)")

    def last_prompt(self) -> str:
        """The prompt of the last request, as text."""
        return self.engine.tokenizer.decode(list(self.engine.requests.values())[-1].ids)

    def screenshot(self, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder, f"{name}.png"))


@pytest.fixture
def page_engine(tokenizer):
    """An engine whose answer depends on a word in the last message."""

    def script(request):
        message = tokenizer.decode(request.ids).rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
        answers = {
            "sky": (SKY,),
            "37": SUM,
            "show": (SHOWS,),
            "tag": (SCRIPT,),
            "Grüße": ("Grüße 你好🌍!",),
            "silent": ("",),
        }
        for word, answer in answers.items():
            if word in message:
                return answer_ids(tokenizer, *answer)
        return tokenizer.encode("and so on ") * 400 if "endless" in message else answer_ids(tokenizer, "nothing to add")

    return ScriptedEngine(tokenizer, script, slots=2, context=4096, delay=0.001)


@pytest.fixture
def chat(chromium, page_engine):
    with serving(page_engine) as server:
        chat = Chat(chromium, server, page_engine)
        yield chat
        chat.context.close()
        assert not chat.problems
        # The page fetches nothing from other servers.
        assert all(url.startswith((server.url, "blob:")) for url in chat.requests)
