"""The chat page in a real browser (Debian's chromium, driven by Playwright), against a real server.

SCREENSHOTS=folder keeps pictures of the page: light, dark, and as wide as a phone.
"""

import json
import os
import shutil
import time
from pathlib import Path

import httpx
import pytest
from serving import TEXT, ScriptedEngine, say, serving, until

from nanochat_jax.config import ChatWeb
from nanochat_jax.tokenizer import Tokenizer

try:
    from playwright.sync_api import sync_playwright
except ModuleNotFoundError:
    sync_playwright = None

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
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


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(TEXT), 300)


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Chat:
    """A page of its own, in a browser that has never seen it."""

    def __init__(self, browser, server, engine, **options):
        self.server, self.engine, self.requests = server, engine, []
        self.context = browser.new_context(viewport={"width": 1280, "height": 860}, **options)
        self.context.set_default_timeout(10_000)
        self.open()

    def open(self) -> None:
        """The page in a new window, or for the first time."""
        self.page = self.context.new_page()
        self.problems = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.server.url)
        self.until("document.querySelector('#model').innerText.includes('nanochat')")

    def js(self, script: str, *args):
        return self.page.evaluate(script, *args)

    def until(self, script: str, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not self.js(f"!!({script})"):
            assert time.monotonic() < deadline, f"never: {script}\n{self.page.inner_text('body')}"
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

    def said(self) -> list:
        """The conversation as the page has it."""
        return self.js("chat.messages.map(message => message.content)")

    def sent(self) -> str:
        """The prompt of the last request, as text."""
        return self.engine.tokenizer.decode(list(self.engine.requests.values())[-1].ids)

    def shoot(self, name: str) -> None:
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder, f"{name}.png"))


@pytest.fixture
def engine(tokenizer):
    """What the model says, by a word in the last message."""

    def script(request):
        said = tokenizer.decode(request.ids).rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
        answers = {
            "sky": (SKY,),
            "37": SUM,
            "show": (SHOWS,),
            "tag": (SCRIPT,),
            "Grüße": ("Grüße 你好🌍!",),
            "silent": ("",),
        }
        for word, answer in answers.items():
            if word in said:
                return say(tokenizer, *answer)
        return tokenizer.encode("and so on ") * 400 if "endless" in said else say(tokenizer, "nothing to add")

    return ScriptedEngine(tokenizer, script, slots=2, context=4096, delay=0.001)


@pytest.fixture
def chat(chromium, engine):
    with serving(engine) as server:
        chat = Chat(chromium, server, engine)
        yield chat
        chat.context.close()
        assert not chat.problems
        # Nothing is fetched from anywhere else.
        assert all(url.startswith((server.url, "blob:")) for url in chat.requests)


# -----------------------------------------------------------------------------
# A conversation


def test_a_conversation_with_a_tool_call(chat):
    assert chat.js("document.activeElement.id") == "input"
    chat.shoot("welcome")
    chat.ask("Why is the sky blue?")
    chat.ask("And what is 37 times 12?")
    assert chat.texts(".user .body") == ["Why is the sky blue?", "And what is 37 times 12?"]
    assert chat.texts(".assistant .body")[0] == SKY
    assert chat.js("document.querySelector('.typing')") is None
    # The call is folded; the keyboard opens it.
    tool = chat.page.locator(".tool")
    assert tool.inner_text() == "calculator" and chat.texts(".assistant .body")[1].startswith("Let me see. 37 times 12")
    tool.locator("summary").press("Enter")
    assert tool.locator("code").inner_text() == "37*12" and tool.locator("output").inner_text() == "444"
    chat.shoot("light")
    # What the model hears next has its own tool call in it, with the special tokens it learned.
    chat.ask("Thank you")
    assert "is <|python_start|>37*12<|python_end|><|output_start|>444<|output_end|> in all." in chat.sent()
    assert chat.page.locator("#log").get_attribute("aria-busy") == "false"
    assert chat.texts("#status") == ["The answer is complete."]


def test_what_a_model_writes_stays_text(chat):
    chat.ask("a tag please")
    chat.ask("Grüße " + SCRIPT)
    chat.ask("show")
    for _ in range(2):
        assert chat.texts(".assistant .body")[:2] == [SCRIPT, "Grüße 你好🌍!"]
        assert chat.js("document.title") == "nanochat"
        assert chat.page.locator("#log script, #log img:not(#welcome img), #log [onerror]").count() == 0
        assert chat.page.locator(".code code").inner_text() == f'print("{SCRIPT}")'
        assert chat.texts(".body strong, .body em, .body li") == ["how", "write it", "it", "run it"]
        links = chat.page.locator(".body a").evaluate_all("all => all.map(a => [a.href, a.target, a.rel])")
        addresses = ["https://example.org/a_b_c", "http://example.org/x.png"]
        assert links == [[address, "_blank", "noopener noreferrer"] for address in addresses]
        chat.page.reload()  # and from the browser's own storage
        chat.until("chat.messages.length == 6")
    policy = chat.page.evaluate("fetch('/').then(r => r.headers.get('content-security-policy'))")
    assert "unsafe" not in policy
    blocked = chat.js("""() => {
        const violations = [];
        addEventListener("securitypolicyviolation", event => violations.push(event.violatedDirective));
        for (const run of [() => eval("1"), () => { document.body.innerHTML = "<b>x</b>"; }]) try { run(); } catch { }
        const script = document.createElement("script");
        script.append("document.title = 'owned'");
        try { document.body.append(script); } catch { }
        return new Promise(done => setTimeout(() => done([violations.length, document.title]), 200));
    }""")
    assert blocked[0] >= 2 and blocked[1] == "nanochat" and len(chat.texts(".assistant .body")) == 3


MARKDOWN = [
    ("plain\ntext", "<p>plain\ntext</p>"),
    ("one\n\ntwo", "<p>one</p><p>two</p>"),
    ("37*12*3 = 1332, 2 * 3 * 4, a_b_c, 2**3**2", "<p>37*12*3 = 1332, 2 * 3 * 4, a_b_c, 2**3**2</p>"),
    ("**a** *b* ~~e~~ `f*g*`", "<p><strong>a</strong> <em>b</em> <del>e</del> <code>f*g*</code></p>"),
    ("__a__ _b_", "<p><strong>a</strong> <em>b</em></p>"),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    (r"\*not\* ``a`b``", "<p>*not* <code>a`b</code></p>"),
    ("# A #\n#### 444", "<h2>A</h2><h5>444</h5>"),
    ("#no heading", "<p>#no heading</p>"),
    ("- a\n- b\n  - c\n\n  d", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul><p>d</p></li></ul>"),
    ("3. x\n4. y", '<ol start="3"><li><p>x</p></li><li><p>y</p></li></ol>'),
    ("- a\n1. b", "<ul><li><p>a</p></li></ul><ol><li><p>b</p></li></ol>"),
    ("> a\n> > b\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("a\n***\nb", "<p>a</p><hr><p>b</p>"),
    ("| a |\n|---|\n| *1* |\n\nc", '<div class="wide"><table><thead><tr><th>a</th></tr></thead><tbody><tr><td>'
     "<em>1</em></td></tr></tbody></table></div><p>c</p>"),
    ("a | b\n\nc", "<p>a | b</p><p>c</p>"),
    ("at https://a.org/b.", '<p>at <a href="https://a.org/b" target="_blank" rel="noopener noreferrer" '
     'title="https://a.org/b">https://a.org/b</a>.</p>'),
    ("[x](data:text/html,hi) [y](/z) [](vbscript:x)", "<p>x (data:text/html,hi) y (/z) vbscript:x (vbscript:x)</p>"),
    ("&lt;b&gt; <b>x</b>", "<p>&amp;lt;b&amp;gt; &lt;b&gt;x&lt;/b&gt;</p>"),
]  # fmt: skip


def test_markdown(chat):
    html = (
        """text => { const box = document.createElement("div"); box.append(markdown(text)); return box.innerHTML; }"""
    )
    for text, expected in MARKDOWN:
        assert chat.js(html, text) == expected, text
    fence = "```sh\nls *x* <b>\n\n# no heading\n```\nafter"
    box = chat.js(html, fence)
    assert "<code>ls *x* &lt;b&gt;\n\n# no heading</code></pre></div><p>after</p>" in box and "<span>sh</span>" in box
    assert "<code>unfinished\n- x</code>" in chat.js(html, "~~~~\nunfinished\n- x")  # while it is being written
    # Nothing that a model can write keeps the browser busy.
    hostile = [
        "*" * 20_000, "**a " * 5_000, "`" * 20_000, "[" * 20_000, "[a](" * 5_000, "> " * 10_000, "- " * 10_000,
        "|" * 20_000, "# " * 10_000, "_a" * 10_000, "http://" * 3_000, "a|b\n" + "-" * 20_000,
        "a|b\n" + " -" * 10_000, "~~" * 10_000, " " * 20_000, "\n" * 20_000, "\\" * 20_000,
        "  " * 5_000 + "- x\n" + "1. " * 5_000, "# x" + " #" * 10_000 + "x",
    ]  # fmt: skip
    timed = "text => { const start = performance.now(); markdown(text); return performance.now() - start; }"
    took = chat.js(f"texts => texts.map({timed})", hostile)
    assert max(took) < 1500, [(round(ms), text[:10]) for ms, text in zip(took, hostile, strict=True) if ms > 500]


# -----------------------------------------------------------------------------
# Stop, continue, edit, regenerate, copy


def test_stop_keeps_what_came_frees_the_slot_and_can_be_continued(chat):
    chat.type("endless")
    chat.press("Enter")
    chat.until("document.querySelector('.assistant .body')?.innerText.length > 30")
    assert chat.page.locator("#send").get_attribute("aria-label") == "Stop"
    chat.shoot("writing")
    chat.press("Escape")
    chat.until("!running")
    assert "stopped" in chat.texts(".assistant .actions")[0]
    until(lambda: httpx.get(f"{chat.server.url}/stats").json()["busy_workers"] == 0, seconds=3)
    before = chat.said()[1]
    assert before.startswith("and so on")
    chat.button("Continue").click()
    chat.until(f"running && chat.messages[1].content.length > {len(before) + 20}")
    chat.page.click("#send")
    chat.until("!running")
    assert chat.said()[1].startswith(before) and len(chat.said()) == 2
    assert chat.sent().endswith(before)  # the model has been asked to go on just there
    chat.ask("go on")
    assert chat.said()[3] == "nothing to add"
    assert chat.page.get_by_role("button", name="Continue").locator("visible=true").count() == 0


def test_edit_and_resend(chat):
    for text in ("first", "second", "third"):
        chat.ask(text)
    chat.page.locator(".user").nth(1).get_by_role("button", name="Edit").click()
    area = chat.page.get_by_role("textbox", name="Edit the message")
    assert area.input_value() == "second" and chat.js("document.activeElement.value") == "second"
    area.fill("never mind")
    area.press("Escape")
    assert len(chat.said()) == 6 and chat.texts(".user .body")[1] == "second"
    chat.press("ArrowUp")  # in the empty message box: the last message
    assert area.input_value() == "third"
    area.press("Escape")
    chat.page.locator(".user").nth(1).get_by_role("button", name="Edit").click()
    assert "What follows is replaced" in chat.texts(".edit")[0]
    area.fill("second thought")
    area.press("Enter")
    chat.until("!running && chat.messages.length == 4")
    assert chat.texts(".user .body") == ["first", "second thought"]
    assert "third" not in chat.sent() and "second thought" in chat.sent()


def test_regenerate_keeps_the_old_answer_until_a_new_one_comes(chat):
    chat.ask("first")
    chat.ask("second")
    before = len(chat.engine.requests)
    chat.button("Regenerate").click()
    chat.until("!running")
    assert len(chat.engine.requests) == before + 1 and len(chat.said()) == 4
    assert chat.page.get_by_role("button", name="Regenerate").locator("visible=true").count() == 1
    chat.server.stop()
    chat.button("Regenerate").click()
    chat.until("document.querySelector('.waiting').innerText || document.querySelectorAll('.waiting')[1].innerText")
    chat.press("Escape")
    chat.until("!running")
    assert chat.said() == ["first", "nothing to add", "second", "nothing to add"]


def test_copy(chat):
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.ask("show")
    chat.page.locator(".code").get_by_role("button", name="Copy").click()
    chat.until("document.querySelector('.code button').innerText == 'Copied'")
    assert chat.js("navigator.clipboard.readText()") == f'print("{SCRIPT}")'
    chat.page.locator(".assistant .actions").get_by_role("button", name="Copy").click()
    chat.until("document.querySelector('.assistant .actions button').innerText == 'Copied'")
    assert chat.js("navigator.clipboard.readText()") == SHOWS
    # Where there is no clipboard (a page over HTTP from another machine) the old way is taken.
    chat.js("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    chat.page.locator(".user .actions").get_by_role("button", name="Copy").click()
    chat.until("document.querySelector('.user .actions button:last-child').innerText == 'Copied'")


# -----------------------------------------------------------------------------
# What the browser keeps


def test_several_conversations_are_kept_and_deleted(chat):
    chat.ask("Why is the sky blue?")
    chat.page.get_by_role("button", name="New chat").first.click()
    assert chat.said() == [] and chat.page.locator("#welcome").is_visible()
    chat.ask("37 please")
    chat.type("not sent yet")
    chat.page.reload()
    chat.until("chat.messages.length == 2")
    assert chat.texts(".user .body") == ["37 please"] and chat.page.locator(".tool").count() == 1
    assert chat.page.input_value("#input") == "not sent yet"
    assert chat.texts("#chats .open") == ["37 please", "Why is the sky blue?"]
    assert chat.page.locator("#chats [aria-current]").inner_text() == "37 please"
    chat.page.get_by_role("button", name="Why is the sky blue?", exact=True).click()
    assert chat.texts(".assistant .body") == [SKY]
    chat.ask("And what is 37 times 12?")  # it goes on as if it had never been left
    assert "Sunlight" in chat.sent() and chat.texts("#chats .open")[0] == "Why is the sky blue?"
    chat.shoot("conversations")

    chat.page.once("dialog", lambda dialog: dialog.dismiss())
    chat.page.get_by_role("button", name="Delete: 37 please").click()
    assert len(chat.texts("#chats .open")) == 2
    chat.page.once("dialog", lambda dialog: dialog.accept())
    chat.page.get_by_role("button", name="Delete: 37 please").click()
    assert chat.texts("#chats .open") == ["Why is the sky blue?"] and len(chat.said()) == 4
    chat.page.once("dialog", lambda dialog: dialog.accept())
    chat.page.get_by_role("button", name="Delete all").click()
    assert chat.texts("#chats .open") == [] and chat.said() == []
    assert chat.js("Object.keys(localStorage).filter(key => key.includes('chat.'))") == []
    chat.page.reload()
    chat.until("server.ready")
    assert chat.said() == []


def test_export_and_import(chat, tmp_path):
    chat.page.fill("#input", "/system You are brief.")
    chat.press("Enter")
    chat.ask("37 please")
    chat.page.get_by_role("button", name="New chat").first.click()
    chat.ask("Grüße")
    chat.page.click("#show:visible, #side:visible #chats-title")
    with chat.page.expect_download() as one:
        chat.page.locator("#chats .item").nth(1).hover()
        chat.page.get_by_role("button", name="Export: 37 please").click()
    assert one.value.suggested_filename == "nanochat 37 please.jsonl"
    with chat.page.expect_download() as all_of_them:
        chat.page.get_by_role("button", name="Export all").click()
    all_of_them.value.save_as(path := tmp_path / "all.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    call = [{"type": kind, "text": text} for kind, text in [("text", SUM[0]), *SUM[1:3], ("text", SUM[3])]]
    expected = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "37 please"},
        {"role": "assistant", "content": call},
    ]
    assert [len(line) for line in lines] == [2, 3] and lines[1] == expected
    assert json.loads(Path(one.value.path()).read_text(encoding="utf-8")) == expected

    chat.page.once("dialog", lambda dialog: dialog.accept())
    chat.page.get_by_role("button", name="Delete all").click()
    path.write_text(
        path.read_text(encoding="utf-8") + '{"x": 1}\n[{"role": "assistant", "content": "x"}]\nno\n', encoding="utf-8"
    )
    chat.page.set_input_files("#import", path)
    chat.until("chat.messages.length")
    assert len(chat.texts("#chats .open")) == 2
    assert chat.texts(".note") == ["2 conversations imported; 3 lines are no conversation"]
    assert chat.js("chat.system") == "You are brief."


def test_a_reload_in_the_middle_of_an_answer_keeps_what_came(chat):
    chat.type("endless")
    chat.press("Enter")
    chat.until("document.querySelector('.assistant .body')?.innerText.length > 50")
    chat.page.reload()
    chat.until("chat.messages.length == 2")
    assert chat.said()[1].startswith("and so on") and "stopped" in chat.texts(".assistant .actions")[0]
    assert chat.button("Continue").is_visible()
    until(lambda: httpx.get(f"{chat.server.url}/stats").json()["busy_workers"] == 0, seconds=3)


def test_two_windows_do_not_overwrite_each_other(chat):
    chat.ask("first")
    url = chat.page.url
    other = chat.context.new_page()
    other.goto(url)
    chat.ask("second")
    other.wait_for_selector(".user >> nth=1")
    assert other.locator(".user .body").all_inner_texts() == ["first", "second"]


def test_without_storage_the_page_works_and_forgets(chat):
    full = "() => { throw new DOMException('full', 'QuotaExceededError'); }"
    chat.js(f"() => {{ Storage.prototype.setItem = {full}; }}")
    chat.ask("hello")
    assert chat.said() == ["hello", "nothing to add"]
    assert chat.texts(".note") == ["the browser keeps no more conversations: export some and delete them"]


# -----------------------------------------------------------------------------
# Settings


def last_request(chat):
    return list(chat.engine.requests.values())[-1]


def test_settings_reach_the_server_and_stay(chat):
    chat.page.get_by_role("button", name="Settings").click()
    assert chat.page.get_by_label("Temperature").get_attribute("placeholder") == "0.8"
    chat.page.get_by_label("System prompt").fill("You are a pirate.")
    chat.page.get_by_label("Temperature").fill("0.25")
    chat.page.get_by_label("Top-k").fill("0")
    chat.page.get_by_label("Length").fill("7")
    chat.page.get_by_label("Colours").select_option("dark")
    chat.shoot("settings")
    chat.page.get_by_role("button", name="Done").click()
    for _ in range(2):
        chat.ask("hello")
        request = last_request(chat)
        assert (request.temperature, request.top_k, request.max_tokens) == (0.25, 0, 7)
        assert "You are a pirate.\n\nhello" in chat.sent()
        assert "cut off" in chat.texts(".assistant .actions")[-1] and chat.button("Continue").is_visible()
        chat.page.reload()
        chat.until("chat.messages.length == 2")
        assert chat.js("document.documentElement.dataset.theme") == "dark"
        chat.page.get_by_role("button", name="New chat").first.click()
    chat.page.get_by_role("button", name="Settings").click()
    chat.page.get_by_label("Temperature").fill("9")  # what the server would refuse is not sent
    assert chat.page.get_by_label("Temperature").get_attribute("aria-invalid") == "true"
    chat.page.get_by_role("button", name="Defaults").click()
    chat.press("Escape")
    chat.ask("hello")
    request = last_request(chat)
    assert (request.temperature, request.top_k, request.max_tokens) == (0.8, 50, 512)
    assert "pirate" not in chat.sent()


def test_commands(chat):
    for text in ("/temperature 0.25", "/topk 0", "/topk 500", "/temperature", "/system Be brief.", "/system"):
        chat.page.fill("#input", text)
        chat.press("Enter")
    assert chat.texts(".note") == [
        "temperature is now 0.25",
        "top-k is now 0",
        "/topk 500: expected a whole number from 0 to 200",
        "temperature is 0.25",
        "the system prompt is: Be brief.",
        "the system prompt is: Be brief.",
    ]
    chat.page.fill("#input", "/system off")
    chat.press("Enter")
    assert chat.texts(".note")[-1] == "there is no system prompt"
    chat.page.fill("#input", "/clera")
    chat.press("Enter")
    assert "no command" in chat.texts(".note")[-1] and chat.page.input_value("#input") == "/clera"
    chat.page.fill("#input", "/help")
    chat.press("Enter")
    assert "/clear" in chat.texts(".note")[-1]
    chat.ask("hello")
    assert (last_request(chat).temperature, last_request(chat).top_k) == (0.25, 0) and "Be brief." not in chat.sent()
    chat.page.fill("#input", "/clear")
    chat.press("Enter")
    assert chat.said() == [] and chat.texts(".note") == [] and chat.page.locator("#welcome").is_visible()


# -----------------------------------------------------------------------------
# Keyboard, screen readers, dark and light, phone


def test_keyboard(chat):
    height = chat.js("input.offsetHeight")
    chat.type("one")
    chat.press("Shift+Enter")
    chat.press("Shift+Enter")
    chat.type("two")
    assert chat.page.input_value("#input") == "one\n\ntwo" and chat.js("input.offsetHeight") > height
    chat.page.fill("#input", "line\n" * 60)
    assert chat.js("input.offsetHeight") == 200
    chat.page.fill("#input", "hello")
    chat.press("Enter")
    chat.until("!running && chat.messages.length == 2")
    assert chat.js("document.activeElement.id") == "input"
    # Everything can be reached with the Tab key, and shows where one is.
    chat.press("Control+Shift+O")
    assert chat.said() == []
    reached = set()
    for _ in range(25):
        chat.press("Tab")
        reached.add(chat.js("document.activeElement.id || document.activeElement.innerText"))
        shown = "e => e == document.body || getComputedStyle(e).outlineStyle != 'none' || e.closest('form')"
        assert chat.js(f"({shown})(document.activeElement)")
    assert {"show", "fresh", "settings", "input", "Why is the sky blue?"} <= reached


def test_everything_has_a_name_for_screen_readers(chat):
    chat.ask("show")
    chat.page.click("#show")
    chat.page.get_by_role("button", name="Settings").click()
    nameless = chat.js("""() => {
        const named = e => e.innerText?.trim() || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby")
            || e.labels?.length || e.textContent.trim();
        const all = document.querySelectorAll("button, input, textarea, select, a, summary, dialog, nav");
        return [...all].filter(e => !named(e)).map(e => e.outerHTML);
    }""")
    assert nameless == []
    assert chat.js(
        "[...document.querySelectorAll('main svg, nav svg, header svg')].every(e => e.getAttribute('aria-hidden'))"
    )
    assert chat.js("document.documentElement.lang") == "en"
    chat.press("Escape")
    tree = chat.page.locator("#log").aria_snapshot()
    assert "You:" in tree and "nanochat:" in tree and "list" in tree


def contrast(chat, selector: str) -> float:
    """WCAG's contrast of an element's text with the page behind it."""
    return chat.js("""selector => {
        const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const light = color => {
            canvas.fillStyle = color;
            canvas.fillRect(0, 0, 1, 1);
            const rgb = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255);
            const linear = rgb.map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return linear[0] * .2126 + linear[1] * .7152 + linear[2] * .0722;
        };
        const text = light(getComputedStyle(document.querySelector(selector)).color);
        const behind = light(getComputedStyle(document.body).backgroundColor);
        return (Math.max(text, behind) + .05) / (Math.min(text, behind) + .05);
    }""", selector)  # fmt: skip


def test_dark_and_light(chromium, engine):
    with serving(engine) as server:
        colors = {}
        for scheme in ("light", "dark"):
            chat = Chat(chromium, server, engine, color_scheme=scheme)
            chat.ask("Why is the sky blue?")
            chat.ask("show")
            chat.ask("And what is 37 times 12?")
            colors[scheme] = chat.js("getComputedStyle(document.body).backgroundColor")
            for selector in (".assistant .body", ".actions button", "#model", "#hint", ".body a"):
                assert contrast(chat, selector) >= 4.5, (scheme, selector)
            chat.shoot(f"chat-{scheme}")
            for choice in ("light", "dark", ""):  # whatever the system says
                chat.js("choice => { setting('theme', choice || undefined); applyTheme(); }", choice)
                colors[scheme, choice] = chat.js("getComputedStyle(document.body).backgroundColor")
            chat.context.close()
        assert colors["light"] != colors["dark"]
        for scheme in ("light", "dark"):
            assert colors[scheme, ""] == colors[scheme]
            assert colors[scheme, "light"] == colors["light"] and colors[scheme, "dark"] == colors["dark"]


def test_phone(chromium, engine):
    with serving(engine) as server:
        chat = Chat(chromium, server, engine, has_touch=True, is_mobile=True, device_scale_factor=2)
        chat.page.set_viewport_size({"width": 375, "height": 700})
        chat.page.reload()
        chat.until("server.ready")
        chat.shoot("phone-welcome")
        assert chat.js("document.activeElement.id") != "input"  # no keyboard over half of the page
        # Where there is no Shift, Enter is a new line.
        chat.page.tap("#input")
        chat.type("show")
        chat.press("Enter")
        chat.type("two")
        assert chat.page.input_value("#input") == "show\ntwo"
        chat.page.tap("#send")
        chat.until("!running && chat.messages.length == 2")
        chat.page.locator(".actions").get_by_role("button", name="Copy").first.tap()  # visible without hovering
        chat.ask("And what is 37 times 12?")
        chat.shoot("phone")
        assert chat.js("document.documentElement.scrollWidth") <= 375
        small = chat.js("""[...document.querySelectorAll("header button:not([hidden]), #send")].filter(
            e => e.getBoundingClientRect().width < 32 || e.getBoundingClientRect().height < 32).length""")
        assert small == 0
        # The list of conversations lies over the page, which is out of reach meanwhile.
        chat.page.tap("#show")
        assert chat.page.locator("#side").is_visible() and chat.js("$('room').inert")
        chat.shoot("phone-conversations")
        chat.page.touchscreen.tap(360, 400)
        assert chat.page.locator("#side").is_hidden() and not chat.js("$('room').inert")
        chat.page.tap("#show")
        chat.page.locator("#chats .open").tap()
        assert chat.page.locator("#side").is_hidden() and len(chat.said()) == 4
        assert not chat.problems
        chat.context.close()


# -----------------------------------------------------------------------------
# A server that is busy, gone, or will not


def test_a_server_killed_and_back_answers_what_was_asked(chat, chromium, engine):
    chat.ask("hello")
    chat.server.stop()
    chat.type("are you there?")
    chat.press("Enter")
    chat.until("document.querySelector('.waiting span')?.innerText.includes('does not answer')", seconds=5)
    assert chat.texts(".user .body") == ["hello", "are you there?"]
    chat.type("and another thing")  # one can go on typing
    chat.shoot("gone")
    chat.page.close(run_before_unload=False)
    with serving(engine, port=chat.server.port):
        chat.page = chat.context.new_page()  # a new window finds the question, and asks again when told to
        chat.page.goto(chat.server.url)
        chat.page.click("#chats .open")
        assert (
            chat.texts(".user .body") == ["hello", "are you there?"] and "Not answered yet" in chat.texts(".trouble")[0]
        )
        chat.button("Try again").click()
        chat.until("!running && chat.messages.length == 4")
        assert chat.said()[3] == "nothing to add" and chat.texts(".trouble") == []


def test_it_tries_again_by_itself(chat, engine):
    chat.ask("hello")
    chat.server.stop()
    chat.type("are you there?")
    chat.press("Enter")
    chat.until("document.querySelector('.waiting span')?.innerText.includes('Trying again in')")
    chat.type("typed meanwhile")
    with serving(engine, port=chat.server.port):
        chat.until("!running && chat.messages.length == 4", seconds=20)
        assert chat.said()[3] == "nothing to add" and chat.page.input_value("#input") == "typed meanwhile"


def test_stopping_to_wait_keeps_the_question(chat):
    chat.server.stop()
    chat.type("are you there?")
    chat.press("Enter")
    chat.until("document.querySelector('.waiting span')")
    chat.page.click("#send")
    chat.until("!running")
    assert chat.texts(".user .body") == ["are you there?"] and "Not answered yet" in chat.texts(".trouble")[0]
    chat.type("hello?")  # both are one message then
    chat.press("Enter")
    chat.until("running")
    assert chat.texts(".user .body") == ["are you there?\n\nhello?"]


def test_a_server_that_dies_in_the_middle_of_an_answer(chat, engine):
    chat.type("endless")
    chat.press("Enter")
    chat.until("document.querySelector('.assistant .body')?.innerText.length > 50")
    chat.server.stop()
    chat.until("!running")
    before = chat.said()[1]
    assert before.startswith("and so on") and chat.texts(".assistant .actions")[0].count("\n") >= 2
    assert chat.js("chat.messages[1].remark")
    with serving(engine, port=chat.server.port):
        chat.button("Continue").click()
        chat.until(f"chat.messages[1].content.length > {len(before)}")
        chat.press("Escape")
        chat.until("!running")
        assert chat.said()[1].startswith(before)


def test_a_busy_server_is_waited_for(chromium, tokenizer, engine):
    with serving(engine, ChatWeb(max_waiting=1, max_new_tokens=4000)) as server:
        chat = Chat(chromium, server, engine)
        body = {"messages": [{"role": "user", "content": "endless"}], "max_tokens": 3000}
        with httpx.Client(timeout=30) as others:
            streams = [others.stream("POST", f"{server.url}/chat/completions", json=body) for _ in range(3)]
            for stream in streams[:2]:
                stream.__enter__()
            chat.type("hello")
            chat.press("Enter")
            chat.until("document.querySelector('.waiting').innerText.includes('number 1 in the queue')")
            chat.press("Escape")
            chat.until("!running")
            until(lambda: httpx.get(f"{server.url}/stats").json()["waiting"] == 0)
            streams[2].__enter__()  # now the queue is full too
            chat.button("Try again").click()
            chat.until("document.querySelector('.waiting span')?.innerText.includes('busy')")
            chat.shoot("busy")
            for stream in streams:
                stream.__exit__(None, None, None)
        chat.button("Try now").click()
        chat.until("!running && chat.messages.length == 2")
        assert chat.said() == ["hello", "nothing to add"] and not chat.problems
        chat.context.close()


def test_the_key_is_asked_for_and_kept(chromium, engine):
    with serving(engine, ChatWeb(api_key="secret")) as server:
        chat = Chat(chromium, server, engine)
        chat.type("hello")
        chat.press("Enter")
        chat.until("document.querySelector('#options').open")
        assert chat.js("document.activeElement.name") == "key"
        chat.page.keyboard.type("secret")
        chat.press("Enter")
        chat.button("Try again").click()
        chat.until("!running && chat.messages.length == 2")
        chat.page.reload()
        chat.until("server.ready")
        chat.ask("again")
        assert len(chat.said()) == 4
        chat.context.close()


def test_an_empty_answer(chat):
    chat.ask("silent")
    assert "no answer" in chat.texts(".trouble")[0] and chat.texts(".user .body") == ["silent"]
    chat.button("Try again").click()
    chat.until("!running && document.querySelector('.trouble')")
    chat.ask("no more")
    assert chat.said()[0] == "silent\n\nno more"


def test_a_refusal_gives_the_text_back_and_long_chats_go_on(chat):
    chat.page.fill("#input", "x" * 8001)
    chat.press("Enter")
    chat.until("document.querySelector('.trouble')")
    assert "8001 characters" in chat.texts(".trouble")[0]
    assert chat.page.input_value("#input") == "x" * 8001 and chat.said() == [] and chat.texts("#chats .open") == []
    chat.page.fill("#input", "")
    # More characters than a request may have: the page leaves out the oldest turns and says so.
    chat.js("""() => {
        for (let i = 0; i < 6; i++)
            chat.messages.push({ role: "user", content: "q".repeat(7000) }, { role: "assistant", content: "a" });
        render();
    }""")
    chat.ask("and now?")
    assert chat.said()[-1] == "nothing to add"
    assert chat.page.locator(".forgotten").count() == 1


def test_events_may_be_split_anywhere(chat):
    found = chat.js("""async () => {
        const lines = [": still here", 'data: {"token": "Grüße 🌍"}', 'data: {"done": true}', ""];
        const bytes = new TextEncoder().encode(lines.join("\\n\\n"));
        const found = [];
        const start = (out) => { for (const byte of bytes) out.enqueue(new Uint8Array([byte])); out.close(); };
        for await (const event of events(new ReadableStream({ start }))) found.push(event);
        return found;
    }""")
    assert found == [{"token": "Grüße 🌍"}, {"done": True}]
