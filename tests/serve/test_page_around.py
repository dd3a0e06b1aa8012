"""The page around a conversation: settings, keyboard, screen readers, appearance, and a server that is busy or gone."""

import httpx
from page import NEEDS, Chat
from serving import serving, until

from nanochat_jax.config import ChatWeb

pytest_plugins = ["page"]
pytestmark = NEEDS

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
    chat.screenshot("settings")
    chat.page.get_by_role("button", name="Done").click()
    for _ in range(2):
        chat.ask("hello")
        request = last_request(chat)
        assert (request.temperature, request.top_k, request.max_tokens) == (0.25, 0, 7)
        assert "You are a pirate.\n\nhello" in chat.last_prompt()
        assert "cut off" in chat.texts(".assistant .actions")[-1] and chat.button("Continue").is_visible()
        chat.page.reload()
        chat.until("chat.messages.length == 2")
        assert chat.js("document.documentElement.dataset.theme") == "dark"
        chat.page.get_by_role("button", name="New chat").first.click()
    chat.page.get_by_role("button", name="Settings").click()
    chat.page.get_by_label("Temperature").fill("9")  # a value that the server would refuse is not sent
    assert chat.page.get_by_label("Temperature").get_attribute("aria-invalid") == "true"
    chat.page.get_by_role("button", name="Defaults").click()
    chat.press("Escape")
    chat.ask("hello")
    request = last_request(chat)
    assert (request.temperature, request.top_k, request.max_tokens) == (0.8, 50, 512)
    assert "pirate" not in chat.last_prompt()


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
    assert (last_request(chat).temperature, last_request(chat).top_k) == (0.25, 0)
    assert "Be brief." not in chat.last_prompt()
    chat.page.fill("#input", "/clear")
    chat.press("Enter")
    assert chat.contents() == [] and chat.texts(".note") == [] and chat.page.locator("#welcome").is_visible()


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
    # Everything can be reached with the Tab key, and the focus is visible.
    chat.press("Control+Shift+O")
    assert chat.contents() == []
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
    """The WCAG contrast between an element's text and the page's background."""
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


def test_dark_and_light(chromium, page_engine):
    with serving(page_engine) as server:
        colors = {}
        for scheme in ("light", "dark"):
            chat = Chat(chromium, server, page_engine, color_scheme=scheme)
            chat.ask("Why is the sky blue?")
            chat.ask("show")
            chat.ask("And what is 37 times 12?")
            colors[scheme] = chat.js("getComputedStyle(document.body).backgroundColor")
            for selector in (".assistant .body", ".actions button", "#model", "#hint", ".body a"):
                assert contrast(chat, selector) >= 4.5, (scheme, selector)
            chat.screenshot(f"chat-{scheme}")
            for choice in ("light", "dark", ""):  # the choice overrides the system's setting
                chat.js("choice => { setting('theme', choice || undefined); applyTheme(); }", choice)
                colors[scheme, choice] = chat.js("getComputedStyle(document.body).backgroundColor")
            chat.context.close()
        assert colors["light"] != colors["dark"]
        for scheme in ("light", "dark"):
            assert colors[scheme, ""] == colors[scheme]
            assert colors[scheme, "light"] == colors["light"] and colors[scheme, "dark"] == colors["dark"]


def test_phone(chromium, page_engine):
    with serving(page_engine) as server:
        chat = Chat(chromium, server, page_engine, has_touch=True, is_mobile=True, device_scale_factor=2)
        chat.page.set_viewport_size({"width": 375, "height": 700})
        chat.page.reload()
        chat.until("server.ready")
        chat.screenshot("phone-welcome")
        # The message box has no focus, or an on-screen keyboard would cover half of the page.
        assert chat.js("document.activeElement.id") != "input"
        # On a phone, which has no Shift key, Enter starts a new line.
        chat.page.tap("#input")
        chat.type("show")
        chat.press("Enter")
        chat.type("two")
        assert chat.page.input_value("#input") == "show\ntwo"
        chat.page.tap("#send")
        chat.until("!running && chat.messages.length == 2")
        chat.page.locator(".actions").get_by_role("button", name="Copy").first.tap()  # visible without hovering
        chat.ask("And what is 37 times 12?")
        chat.screenshot("phone")
        assert chat.js("document.documentElement.scrollWidth") <= 375
        small = chat.js("""[...document.querySelectorAll("header button:not([hidden]), #send")].filter(
            e => e.getBoundingClientRect().width < 32 || e.getBoundingClientRect().height < 32).length""")
        assert small == 0
        # The list of conversations covers the page, which is inert meanwhile.
        chat.page.tap("#show")
        assert chat.page.locator("#side").is_visible() and chat.js("$('room').inert")
        chat.screenshot("phone-conversations")
        chat.page.touchscreen.tap(360, 400)
        assert chat.page.locator("#side").is_hidden() and not chat.js("$('room').inert")
        chat.page.tap("#show")
        chat.page.locator("#chats .open").tap()
        assert chat.page.locator("#side").is_hidden() and len(chat.contents()) == 4
        assert not chat.problems
        chat.context.close()


# -----------------------------------------------------------------------------
# A server that is busy, gone, or refuses


def test_a_server_killed_and_back_answers_what_was_asked(chat, chromium, page_engine):
    chat.ask("hello")
    chat.server.stop()
    chat.type("are you there?")
    chat.press("Enter")
    chat.until("document.querySelector('.waiting span')?.innerText.includes('does not answer')", seconds=5)
    assert chat.texts(".user .body") == ["hello", "are you there?"]
    chat.type("and another thing")  # the user can go on typing
    chat.screenshot("gone")
    chat.page.close(run_before_unload=False)
    with serving(page_engine, port=chat.server.port):
        chat.page = chat.context.new_page()  # a new window shows the question, and sends it again on request
        chat.page.goto(chat.server.url)
        chat.page.click("#chats .open")
        assert chat.texts(".user .body") == ["hello", "are you there?"]
        assert "Not answered yet" in chat.texts(".trouble")[0]
        chat.button("Try again").click()
        chat.until("!running && chat.messages.length == 4")
        assert chat.contents()[3] == "nothing to add" and chat.texts(".trouble") == []


def test_it_tries_again_by_itself(chat, page_engine):
    chat.ask("hello")
    chat.server.stop()
    chat.type("are you there?")
    chat.press("Enter")
    chat.until("document.querySelector('.waiting span')?.innerText.includes('Trying again in')")
    chat.type("typed meanwhile")
    with serving(page_engine, port=chat.server.port):
        chat.until("!running && chat.messages.length == 4", seconds=20)
        assert chat.contents()[3] == "nothing to add" and chat.page.input_value("#input") == "typed meanwhile"


def test_stopping_to_wait_keeps_the_question(chat):
    chat.server.stop()
    chat.type("are you there?")
    chat.press("Enter")
    chat.until("document.querySelector('.waiting span')")
    chat.page.click("#send")
    chat.until("!running")
    assert chat.texts(".user .body") == ["are you there?"] and "Not answered yet" in chat.texts(".trouble")[0]
    chat.type("hello?")  # both become one message
    chat.press("Enter")
    chat.until("running")
    assert chat.texts(".user .body") == ["are you there?\n\nhello?"]


def test_a_server_that_dies_in_the_middle_of_an_answer(chat, page_engine):
    chat.type("endless")
    chat.press("Enter")
    chat.until("document.querySelector('.assistant .body')?.innerText.length > 50")
    chat.server.stop()
    chat.until("!running")
    before = chat.contents()[1]
    assert before.startswith("and so on") and chat.texts(".assistant .actions")[0].count("\n") >= 2
    assert chat.js("chat.messages[1].remark")
    with serving(page_engine, port=chat.server.port):
        chat.button("Continue").click()
        chat.until(f"chat.messages[1].content.length > {len(before)}")
        chat.press("Escape")
        chat.until("!running")
        assert chat.contents()[1].startswith(before)


def test_a_busy_server_is_waited_for(chromium, tokenizer, page_engine):
    with serving(page_engine, ChatWeb(max_waiting=1, max_new_tokens=4000)) as server:
        chat = Chat(chromium, server, page_engine)
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
            chat.screenshot("busy")
            for stream in streams:
                stream.__exit__(None, None, None)
        chat.button("Try now").click()
        chat.until("!running && chat.messages.length == 2")
        assert chat.contents() == ["hello", "nothing to add"] and not chat.problems
        chat.context.close()


def test_the_key_is_asked_for_and_kept(chromium, page_engine):
    with serving(page_engine, ChatWeb(api_key="secret")) as server:
        chat = Chat(chromium, server, page_engine)
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
        assert len(chat.contents()) == 4
        chat.context.close()


def test_an_empty_answer(chat):
    chat.ask("silent")
    assert "no answer" in chat.texts(".trouble")[0] and chat.texts(".user .body") == ["silent"]
    chat.button("Try again").click()
    chat.until("!running && document.querySelector('.trouble')")
    chat.ask("no more")
    assert chat.contents()[0] == "silent\n\nno more"


def test_a_refusal_gives_the_text_back_and_long_chats_go_on(chat):
    chat.page.fill("#input", "x" * 8001)
    chat.press("Enter")
    chat.until("document.querySelector('.trouble')")
    assert "8001 characters" in chat.texts(".trouble")[0]
    assert chat.page.input_value("#input") == "x" * 8001 and chat.contents() == [] and chat.texts("#chats .open") == []
    chat.page.fill("#input", "")
    # With more characters than a request may have, the page leaves out the oldest turns and says so.
    chat.js("""() => {
        for (let i = 0; i < 6; i++)
            chat.messages.push({ role: "user", content: "q".repeat(7000) }, { role: "assistant", content: "a" });
        render();
    }""")
    chat.ask("and now?")
    assert chat.contents()[-1] == "nothing to add"
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
