"""The page: a conversation in it, and what the browser keeps."""

import json
from pathlib import Path

import httpx
from page import NEEDS, SCRIPT, SHOWS, SKY, SUM, Chat
from serving import SUGGESTIONS, serving, until

pytest_plugins = ["page"]
pytestmark = NEEDS

# -----------------------------------------------------------------------------
# A conversation


def test_a_conversation_with_a_tool_call(chat):
    assert chat.js("document.activeElement.id") == "input"
    chat.screenshot("welcome")
    chat.ask("Why is the sky blue?")
    chat.ask("And what is 37 times 12?")
    assert chat.texts(".user .body") == ["Why is the sky blue?", "And what is 37 times 12?"]
    assert chat.texts(".assistant .body")[0] == SKY
    assert chat.js("document.querySelector('.typing')") is None
    # The calculator's call is folded; the keyboard opens it.
    tool = chat.page.locator(".tool")
    assert tool.inner_text() == "calculator" and chat.texts(".assistant .body")[1].startswith("Let me see. 37 times 12")
    tool.locator("summary").press("Enter")
    assert tool.locator("code").inner_text() == "37*12" and tool.locator("output").inner_text() == "444"
    chat.screenshot("light")
    # The next prompt contains the model's own call, with the special tokens it was trained on.
    chat.ask("Thank you")
    assert "is <|python_start|>37*12<|python_end|><|output_start|>444<|output_end|> in all." in chat.last_prompt()
    assert chat.page.locator("#log").get_attribute("aria-busy") == "false"
    assert chat.texts("#status") == ["The answer is complete."]


def test_the_page_suggests_what_the_server_names(chat, chromium, page_engine):
    assert chat.texts("#ideas button") == SUGGESTIONS
    chat.button(SUGGESTIONS[1]).click()
    chat.until("!running && chat.messages.length == 2")
    assert chat.contents()[0] == SUGGESTIONS[1] and not chat.page.locator("#welcome").is_visible()
    # A base model has no suggestions, and neither has one trained only on the user's own conversations.
    with serving(page_engine, suggestions=[]) as server:
        other = Chat(chromium, server, page_engine)
        assert other.page.locator("#welcome").is_visible() and other.page.locator("#ideas button").count() == 0
        other.context.close()


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
        chat.page.reload()  # the same again, from the browser's storage
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


AUTO = ' dir="auto"'
MARKDOWN = [
    ("plain\ntext", "<p>plain\ntext</p>"),
    ("one\n\ntwo", "<p>one</p><p>two</p>"),
    ("37*12*3 = 1332, 2 * 3 * 4, a_b_c, 2**3**2", "<p>37*12*3 = 1332, 2 * 3 * 4, a_b_c, 2**3**2</p>"),
    ("**a** *b* ~~e~~ `f*g*`", '<p><strong>a</strong> <em>b</em> <del>e</del> <code dir="ltr">f*g*</code></p>'),
    ("__a__ _b_", "<p><strong>a</strong> <em>b</em></p>"),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    (r"\*not\* ``a`b``", '<p>*not* <code dir="ltr">a`b</code></p>'),
    ("# A #\n#### 444", "<h2>A</h2><h5>444</h5>"),
    ("#no heading", "<p>#no heading</p>"),
    ("- a\n- b\n  - c\n\n  d", f"<ul{AUTO}><li><p>a</p></li><li><p>b</p><ul{AUTO}><li><p>c</p></li></ul><p>d</p></li>"
     "</ul>"),
    ("3. x\n4. y", f'<ol{AUTO} start="3"><li><p>x</p></li><li><p>y</p></li></ol>'),
    ("- a\n1. b", f"<ul{AUTO}><li><p>a</p></li></ul><ol{AUTO}><li><p>b</p></li></ol>"),
    ("> a\n> > b\nc", f"<blockquote{AUTO}><p>a</p><blockquote{AUTO}><p>b</p></blockquote></blockquote><p>c</p>"),
    ("a\n***\nb", "<p>a</p><hr><p>b</p>"),
    ("| a |\n|---|\n| *1* |\n\nc", f'<div class="wide"{AUTO}><table><thead><tr><th>a</th></tr></thead><tbody><tr><td>'
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
    assert "<code>unfinished\n- x</code>" in chat.js(html, "~~~~\nunfinished\n- x")  # while it is still being generated
    # No text that a model can write keeps the browser busy.
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
    chat.screenshot("writing")
    chat.press("Escape")
    chat.until("!running")
    assert "stopped" in chat.texts(".assistant .actions")[0]
    until(lambda: httpx.get(f"{chat.server.url}/stats").json()["busy_workers"] == 0, seconds=3)
    before = chat.contents()[1]
    assert before.startswith("and so on")
    chat.button("Continue").click()
    chat.until(f"running && chat.messages[1].content.length > {len(before) + 20}")
    chat.page.click("#send")
    chat.until("!running")
    assert chat.contents()[1].startswith(before) and len(chat.contents()) == 2
    assert chat.last_prompt().endswith(before)  # the model continues exactly there
    chat.ask("go on")
    assert chat.contents()[3] == "nothing to add"
    assert chat.page.get_by_role("button", name="Continue").locator("visible=true").count() == 0


def test_edit_and_resend(chat):
    for text in ("first", "second", "third"):
        chat.ask(text)
    chat.page.locator(".user").nth(1).get_by_role("button", name="Edit").click()
    area = chat.page.get_by_role("textbox", name="Edit the message")
    assert area.input_value() == "second" and chat.js("document.activeElement.value") == "second"
    area.fill("never mind")
    area.press("Escape")
    assert len(chat.contents()) == 6 and chat.texts(".user .body")[1] == "second"
    chat.press("ArrowUp")  # in the empty message box: the last message
    assert area.input_value() == "third"
    area.press("Escape")
    chat.page.locator(".user").nth(1).get_by_role("button", name="Edit").click()
    assert "What follows is replaced" in chat.texts(".edit")[0]
    area.fill("second thought")
    area.press("Enter")
    chat.until("!running && chat.messages.length == 4")
    assert chat.texts(".user .body") == ["first", "second thought"]
    assert "third" not in chat.last_prompt() and "second thought" in chat.last_prompt()


def test_regenerate_keeps_the_old_answer_until_a_new_one_comes(chat):
    chat.ask("first")
    chat.ask("second")
    before = len(chat.engine.requests)
    chat.button("Regenerate").click()
    chat.until("!running")
    assert len(chat.engine.requests) == before + 1 and len(chat.contents()) == 4
    assert chat.page.get_by_role("button", name="Regenerate").locator("visible=true").count() == 1
    chat.server.stop()
    chat.button("Regenerate").click()
    chat.until("document.querySelector('.waiting').innerText || document.querySelectorAll('.waiting')[1].innerText")
    chat.press("Escape")
    chat.until("!running")
    assert chat.contents() == ["first", "nothing to add", "second", "nothing to add"]


def test_copy(chat):
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.ask("show")
    chat.page.locator(".code").get_by_role("button", name="Copy").click()
    chat.until("document.querySelector('.code button').innerText == 'Copied'")
    assert chat.js("navigator.clipboard.readText()") == f'print("{SCRIPT}")'
    chat.page.locator(".assistant .actions").get_by_role("button", name="Copy").click()
    chat.until("document.querySelector('.assistant .actions button').innerText == 'Copied'")
    assert chat.js("navigator.clipboard.readText()") == SHOWS
    # Without a clipboard (a page over HTTP from another machine), the page falls back to the old way of copying.
    chat.js("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    chat.page.locator(".user .actions").get_by_role("button", name="Copy").click()
    chat.until("document.querySelector('.user .actions button:last-child').innerText == 'Copied'")


# -----------------------------------------------------------------------------
# What the browser keeps


def test_several_conversations_are_kept_and_deleted(chat):
    chat.ask("Why is the sky blue?")
    chat.page.get_by_role("button", name="New chat").first.click()
    assert chat.contents() == [] and chat.page.locator("#welcome").is_visible()
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
    chat.ask("And what is 37 times 12?")  # the conversation continues as if it had never been left
    assert "Sunlight" in chat.last_prompt() and chat.texts("#chats .open")[0] == "Why is the sky blue?"
    chat.screenshot("conversations")

    chat.page.once("dialog", lambda dialog: dialog.dismiss())
    chat.page.get_by_role("button", name="Delete: 37 please").click()
    assert len(chat.texts("#chats .open")) == 2
    chat.page.once("dialog", lambda dialog: dialog.accept())
    chat.page.get_by_role("button", name="Delete: 37 please").click()
    assert chat.texts("#chats .open") == ["Why is the sky blue?"] and len(chat.contents()) == 4
    chat.page.once("dialog", lambda dialog: dialog.accept())
    chat.page.get_by_role("button", name="Delete all").click()
    assert chat.texts("#chats .open") == [] and chat.contents() == []
    assert chat.js("Object.keys(localStorage).filter(key => key.includes('chat.'))") == []
    chat.page.reload()
    chat.until("server.ready")
    assert chat.contents() == []


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
    assert chat.texts(".note") == ["2 conversations imported; 3 lines are not conversations"]
    assert chat.js("chat.system") == "You are brief."


def test_a_reload_in_the_middle_of_an_answer_keeps_what_came(chat):
    chat.type("endless")
    chat.press("Enter")
    chat.until("document.querySelector('.assistant .body')?.innerText.length > 50")
    chat.page.reload()
    chat.until("chat.messages.length == 2")
    assert chat.contents()[1].startswith("and so on") and "stopped" in chat.texts(".assistant .actions")[0]
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
    assert chat.contents() == ["hello", "nothing to add"]
    assert chat.texts(".note") == ["the browser cannot save more conversations: export some and delete them"]
