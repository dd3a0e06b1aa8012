// Messages, and the view of an answer in the log.
//
// A message is {role, content, remark}. The content is a string, or a list of {type, text} if an answer contains tool
// calls. The remark says why an answer is incomplete.

import { button, copy, element } from "./dom.js";
import { addRow, follow } from "./log.js";
import { markdown, TOOL } from "./markdown.js";

export const parts = message => typeof message.content === "string" ? [{ type: "text", text: message.content }] : message.content;
export const plain = message => parts(message).filter(part => part.type === "text").map(part => part.text).join("");

export function append(message, type, text) {
  const all = parts(message).filter(part => part.text), last = all[all.length - 1];
  if (type === "text" && last?.type === "text") last.text += text;
  else all.push({ type, text });
  message.content = all.every(part => part.type === "text") ? all.map(part => part.text).join("") : all;
}

// The view of an answer. begin() shows that an answer is on its way, update() draws the text so far, and finish() adds
// the buttons. The buttons call answer() to regenerate the answer, or answer(message) to continue it.
export function answerView(message, answer) {
  const typing = element("span", "typing", element("i"), element("i"), element("i"));
  typing.setAttribute("role", "img");
  typing.setAttribute("aria-label", "nanochat is thinking");
  const body = element("div", "body"), waiting = element("div", "waiting"), actions = element("div", "actions");
  const row = addRow("assistant", element("span", "unseen", "nanochat:"), body, waiting, actions);
  const tools = [];    // one element per tool call; redrawing the text keeps these elements
  let due = 0, took = 0;

  function source() {
    let text = "", count = 0, open = false;
    for (const { type, text: piece } of parts(message)) {
      if (type === "text") {
        text += piece.replace(/[\uE000-\uF8FF]/g, "\uFFFD");
        open = false;
        continue;
      }
      if (type === "python" || !open) {
        text += String.fromCharCode(TOOL + count);
        tools[count] ??= element("details", "tool", element("summary", "", "calculator"), element("div"));
        tools[count].dir = "ltr";
        count++;
      }
      const box = tools[count - 1].lastChild, wanted = type === "python" ? "code" : "output";
      if (!box.querySelector(wanted)) box.append(element(wanted, "", piece));
      open = type === "python";
    }
    return text;
  }

  function draw() {
    cancelAnimationFrame(due);
    due = 0;
    const start = performance.now(), fresh = [...markdown(source(), tools).childNodes];
    // Replace only the nodes that have changed, so that the user can select text while more arrives.
    fresh.forEach((child, i) => {
      const old = body.childNodes[i];
      if (!old) body.append(child);
      else if (!old.isEqualNode(child)) old.replaceWith(child);
    });
    while (body.childNodes.length > fresh.length) body.lastChild.remove();
    took = performance.now() - start;
    follow();
  }

  const view = {
    row,
    begin() { tools.length = 0; actions.replaceChildren(); view.wait(typing); },
    wait(...children) { waiting.replaceChildren(...children); follow(); },
    typing() { view.wait(typing); },
    // Redraws at most once per frame. If drawing is slow, waits longer, so that drawing takes about a quarter of the time.
    update() {
      if (!due) due = requestAnimationFrame(() => took > 8 ? setTimeout(draw, 3 * took) : draw());
    },
    finish() {
      draw();
      waiting.replaceChildren();
      actions.replaceChildren(
        button("Copy", "", event => copy(plain(message), event.target)),
        button("Regenerate", "last quiet", () => answer()),
        ...(message.remark ? [button("Continue", "last quiet", () => answer(message)), message.remark] : []),
      );
      follow();
    },
  };
  return view;
}
