"""The page in other languages: input methods, other keyboards, and text that runs from right to left."""

import pytest
from page import NEEDS, Chat
from serving import ScriptedEngine, answer_ids, serving

from nanochat_jax.config import ChatWeb

pytest_plugins = ["page"]
pytestmark = NEEDS

ARABIC, HEBREW = "السماء زرقاء لأن الهواء يشتت الضوء الأزرق.", "השמיים כחולים בגלל האוויר."
MIXED = f"""{ARABIC}

{HEBREW} That is Hebrew.

It is English: {HEBREW}

## {HEBREW}

- {ARABIC}
- English in an Arabic list
- `code` {ARABIC}

1. English
2. {ARABIC}

> {ARABIC}

| {ARABIC[:14]} | {HEBREW[:7]} |
|---|---|
| {ARABIC[:6]} | 12 |

```python
print("{HEBREW}")
```
"""

# -----------------------------------------------------------------------------
# Input methods and keyboards


class InputMethod:
    """An input method that composes words in the focused box, through Chromium's own interface for input methods."""

    def __init__(self, chat):
        self.cdp = chat.context.new_cdp_session(chat.page)

    def compose(self, text: str) -> None:
        self.cdp.send("Input.imeSetComposition", {"text": text, "selectionStart": len(text), "selectionEnd": len(text)})

    def commit(self, text: str) -> None:
        self.cdp.send("Input.insertText", {"text": text})

    def press(self, name: str) -> None:
        """Presses a key that the input method uses itself: the page sees the key code 229, and no text is typed."""
        key = {"key": name, "code": name, "windowsVirtualKeyCode": 229}
        self.cdp.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **key})
        self.cdp.send("Input.dispatchKeyEvent", {"type": "keyUp", **key})


def key(chat, selector: str, **options) -> bool:
    """Dispatches a key press. Returns whether the page left it to the browser."""
    return chat.js(
        "([selector, options]) => document.querySelector(selector).dispatchEvent("
        "new KeyboardEvent('keydown', { bubbles: true, cancelable: true, ...options }))",
        [selector, options],
    )


def test_enter_that_ends_a_composition_does_not_send(chat):
    seen = "addEventListener('keydown', event => seen.push([event.key, event.keyCode, event.isComposing]), true)"
    chat.js(f"() => {{ globalThis.seen = []; {seen}; }}")
    ime = InputMethod(chat)
    chat.page.focus("#input")
    ime.compose("にほんご")
    ime.press("Enter")  # Chromium and Firefox report the key before the composition ends
    ime.commit("日本語")
    ime.compose("を")
    ime.commit("を")
    ime.press("Enter")  # Safari reports it afterwards
    assert chat.js("seen") == [["Enter", 229, True], ["Enter", 229, False]]
    assert chat.contents() == [] and chat.page.input_value("#input") == "日本語を"
    assert key(chat, "#input", key="Enter", isComposing=True)  # with any key code
    assert chat.contents() == []
    chat.press("Enter")
    chat.until("!running && chat.messages.length == 2")
    assert chat.contents()[0] == "日本語を"


def test_a_composition_in_an_edited_message(chat):
    chat.ask("first")
    chat.press("ArrowUp")
    area = chat.page.get_by_role("textbox", name="Edit the message")
    area.fill("中文")
    for name in ("Enter", "Escape"):  # Escape cancels the composition, not the edit
        assert key(chat, ".edit textarea", key=name, keyCode=229)
        assert key(chat, ".edit textarea", key=name, isComposing=True)
    assert area.input_value() == "中文" and chat.contents()[0] == "first"
    area.press("Enter")
    chat.until("!running && chat.messages.length == 2")
    assert chat.contents()[0] == "中文"


def test_escape_in_a_composition_does_not_stop_the_answer(chat):
    chat.type("endless")
    chat.press("Enter")
    chat.until("running && document.querySelector('.assistant .body')?.innerText.length > 30")
    assert key(chat, "#input", key="Escape", keyCode=229) and chat.js("!!running")
    assert key(chat, "#input", key="ArrowUp", keyCode=229) and chat.page.locator(".edit").count() == 0
    chat.press("Escape")
    chat.until("!running")


@pytest.mark.parametrize(
    ("letter", "code", "new"),
    [("O", "KeyO", True), ("Щ", "KeyO", True), ("ד", "KeyS", False), ("R", "KeyO", False), ("Т", "KeyN", True)],
)
def test_the_shortcut_for_a_new_chat_on_other_keyboards(chat, letter, code, new):
    """On a Russian keyboard, the key of O types щ. On a Dvorak keyboard, the key of O types r."""
    chat.ask("hello")
    key(chat, "#input", key=letter, code=code, ctrlKey=True, shiftKey=True)
    assert (chat.contents() == []) == new


# -----------------------------------------------------------------------------
# From right to left

# The side of its box that the content of a node is nearer to.
SIDE = """node => {
    const range = document.createRange();
    range.selectNodeContents(node);
    const text = range.getBoundingClientRect(), box = node.getBoundingClientRect();
    const left = text.left - box.left, right = box.right - text.right;
    return left < right ? "left" : "right";
}"""


def sides(chat, selector: str) -> list[str]:
    return chat.page.locator(selector).evaluate_all(f"nodes => nodes.map({SIDE})")


def styles(chat, selector: str, name: str) -> list[str]:
    return chat.page.locator(selector).evaluate_all("(nodes, name) => nodes.map(n => getComputedStyle(n)[name])", name)


def check_right_to_left(chat) -> None:
    assert sides(chat, ".assistant:last-child .body > p") == ["right", "right", "left"]
    assert sides(chat, ".assistant:last-child .body > h3") == ["right"]
    # The first item decides the side of a list. Each item stands beside its bullet and runs in its own direction.
    assert styles(chat, ".assistant:last-child :is(ul, ol)", "direction") == ["rtl", "ltr"]
    assert styles(chat, ".assistant:last-child :is(ul, ol)", "paddingLeft")[0] == "0px"
    assert sides(chat, ".assistant:last-child ul p") == ["right"] * 3
    assert sides(chat, ".assistant:last-child ol p") == ["left"] * 2
    assert set(styles(chat, ".assistant:last-child .body :is(p, h3, td)", "unicodeBidi")) == {"plaintext"}
    assert styles(chat, ".assistant:last-child :is(blockquote, table)", "direction") == ["rtl", "rtl"]
    assert styles(chat, ".assistant:last-child blockquote", "borderRightWidth") == ["3px"]
    assert sides(chat, ".assistant:last-child .wide") == ["right"]
    assert styles(chat, ".assistant:last-child td", "textAlign") == ["right"] * 2
    first, second = chat.page.locator(".assistant:last-child th").evaluate_all(
        "all => all.map(n => n.getBoundingClientRect().x)"
    )
    assert first > second
    assert styles(chat, ".assistant:last-child :is(.code, code)", "direction") == ["ltr"] * 3
    # A message keeps its side, and so does the rest of the page.
    bubble, room = (chat.page.locator(s).bounding_box() for s in (".user .body >> nth=0", "#log"))
    assert bubble["x"] + bubble["width"] > room["x"] + room["width"] - 40
    assert chat.js("getComputedStyle(document.body).direction") == "ltr"


@pytest.fixture
def server(tokenizer):
    engine = ScriptedEngine(tokenizer, lambda _: answer_ids(tokenizer, MIXED), slots=2, context=4096)
    with serving(engine, ChatWeb(max_new_tokens=4000)) as server:
        server.engine = engine
        yield server


def test_text_runs_from_right_to_left(chromium, server):
    chat = Chat(chromium, server, server.engine)
    assert chat.page.locator("#input").evaluate("node => getComputedStyle(node).direction") == "ltr"  # empty
    chat.page.fill("#input", ARABIC)
    assert chat.page.locator("#input").evaluate("node => getComputedStyle(node).direction") == "rtl"
    chat.screenshot("composing-arabic")
    chat.ask(ARABIC)
    chat.ask(f"Please translate:\n{HEBREW}\n{ARABIC}")
    check_right_to_left(chat)
    lines = (
        chat.page.locator(".user .body")
        .nth(1)
        .evaluate(
            """node => {
            const box = node.getBoundingClientRect(), text = node.firstChild, lines = text.data.split("\\n");
            let start = 0;
            return lines.map(line => {
                const range = document.createRange();
                range.setStart(text, start);
                range.setEnd(text, start += line.length);
                start++;
                const rect = range.getBoundingClientRect();
                return rect.left - box.left < box.right - rect.right ? "left" : "right";
            });
        }"""
        )
    )
    assert lines == ["left", "right", "right"]
    chat.page.locator(".user").last.get_by_role("button", name="Edit").click()
    assert chat.page.locator(".edit textarea").get_attribute("dir") == "auto"
    chat.press("Escape")
    chat.page.click("#show")
    assert chat.page.locator("#chats .open").evaluate("node => getComputedStyle(node).direction") == "rtl"
    assert styles(chat, "#chats .open", "textAlign") == ["start"]
    chat.screenshot("right-to-left-light")
    chat.page.reload()  # the same again, from the browser's storage
    chat.until("chat.messages.length == 4")
    check_right_to_left(chat)
    chat.context.close()


def test_right_to_left_on_a_dark_phone(chromium, server):
    options = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2, "color_scheme": "dark"}
    chat = Chat(chromium, server, server.engine, **options)
    chat.page.set_viewport_size({"width": 375, "height": 1400})
    chat.ask(ARABIC * 3)
    check_right_to_left(chat)
    assert chat.js("document.documentElement.scrollWidth") <= 375
    chat.screenshot("right-to-left-phone-dark")
    chat.context.close()


@pytest.mark.parametrize("width", [320, 640])  # a page 1280 pixels wide, at a zoom of 400% and 200%
def test_zoom_and_long_words(chat, width):
    chat.page.set_viewport_size({"width": width, "height": 256 if width == 320 else 430})
    chat.ask("w" * 500 + "\n" + "ا" * 500)
    chat.js("""() => {
        const long = "w".repeat(500), cells = `| ${long} | b |\\n|---|---|\\n| a | ${long} |`;
        chat.messages[1].content = [long, "- " + long, "# " + long, "> " + long, "`" + long + "`",
            "https://example.org/" + long, cells, "```\\n" + long + "\\n```", "ا".repeat(500)].join("\\n\\n");
        render();
    }""")
    for selector in ("#log", ".user .body", ".assistant:last-child .body", "#composer"):
        assert chat.page.locator(selector).evaluate("n => n.getBoundingClientRect().right") <= width, selector
    assert chat.js("document.documentElement.scrollWidth") <= width
    assert chat.js("$('scroller').scrollWidth <= $('scroller').clientWidth")
    chat.screenshot(f"zoom-{width}")


def test_pasted_text_is_plain(chat):
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.js("""() => navigator.clipboard.write([new ClipboardItem({
        "text/html": new Blob(["<b onclick=x>bold</b> <img src=y>"], { type: "text/html" }),
        "text/plain": new Blob(["bold\\r\\nnext"], { type: "text/plain" }),
    })])""")
    chat.page.focus("#input")
    chat.press("Control+V")
    assert chat.page.input_value("#input") == "bold\nnext"


def test_a_title_is_cut_between_characters(chat):
    chat.ask("a" * 79 + "😀😀")
    assert chat.js("$('chats').querySelector('.open').textContent") == "a" * 79 + "😀"
