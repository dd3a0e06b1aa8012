// The sidebar. It lists the saved conversations and can open, delete, export and import them.

import { input, touch } from "./composer.js";
import { chat, running, turnTo } from "./conversation.js";
import { $, button, element, icon } from "./dom.js";
import { note } from "./log.js";
import { forget, isConversation, keep, newChat, recall, savedChats, setting, settings } from "./storage.js";

export const narrow = matchMedia("(max-width: 52rem)");

// The first line of a conversation, cut between characters: an emoji takes two places in a string.
const title = saved => [...(saved.messages[0].content.trim().split("\n")[0] || "untitled")].slice(0, 80).join("");

function listChats() {
  const focused = document.activeElement?.closest?.(".item")?.dataset.id;
  $("chats").replaceChildren(...savedChats().map(saved => {
    const open = button(title(saved), "open", () => openChat(saved.id));
    open.dir = "auto";
    open.title = new Date(saved.updated).toLocaleString();
    const item = element("li", "item", open,
      icon("Export: " + title(saved), "M12 4v11M7 10.500l5 5 5-5M5 20h14", () => download([recall("chat." + saved.id)], title(saved))),
      icon("Delete: " + title(saved), "M5 7h14M10 7V4.500h4V7M7 7l1 13h8l1-13", () => {
        if (confirm(`Delete "${title(saved)}" from this browser?`)) removeChat(saved.id);
      }));
    item.dataset.id = saved.id;
    item.classList.toggle("current", saved.id === chat.id);
    if (saved.id === chat.id) open.setAttribute("aria-current", "true");
    return item;
  }));
  if (focused) document.querySelector(`.item[data-id="${CSS.escape(focused)}"] .open`)?.focus();
}

export function show(next) {
  turnTo(next);
  listChats();
  if (narrow.matches) toggleSide(false);
  if (!touch.matches) input.focus();
}

export function openChat(id) {
  const saved = recall("chat." + id);
  if (saved && isConversation(saved.messages)) show({ system: "", ...saved });
}

function removeChat(id) {
  if (id === chat.id) show(newChat());
  forget(id);
}

// Downloads a file with one conversation per line, as a list of messages. Training and importChats read this format.
function download(chats, name) {
  const lines = chats.map(({ system, messages }) => JSON.stringify([
    ...(system ? [{ role: "system", content: system }] : []), ...messages.map(({ role, content }) => ({ role, content })),
  ]) + "\n");
  const link = element("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = `nanochat ${name.replace(/[^\p{L}\p{N} -]/gu, "").slice(0, 40).trim()}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function importChats(file) {
  let count = 0, bad = 0, last;
  for (const line of (await file.text()).split("\n").filter(line => line.trim())) {
    try {
      const all = JSON.parse(line), system = all[0]?.role === "system" ? String(all[0].content) : "";
      const messages = (system ? all.slice(1) : all).map(({ role, content }) => ({ role, content }));
      if (!isConversation(messages)) throw new Error("not a conversation");
      last = { ...newChat(), updated: Date.now() + count++, system, messages };
      keep("chat." + last.id, last);
    } catch { bad++; }
  }
  listChats();
  if (last && !running) openChat(last.id);
  const skipped = bad ? `; ${bad} ${bad === 1 ? "line is not a conversation" : "lines are not conversations"}` : "";
  note(`${count} ${count === 1 ? "conversation" : "conversations"} imported${skipped}`);
}

export const sideFits = () => !narrow.matches && (settings().side ?? savedChats().length > 0);

export function toggleSide(open, asked = false) {
  $("side").hidden = !open;
  $("shade").hidden = !open;
  $("show").hidden = open && !narrow.matches;
  $("show").setAttribute("aria-expanded", String(open));
  $("room").inert = open && narrow.matches;
  if (asked && !narrow.matches) setting("side", open);
}

addEventListener("chats", listChats);
for (const id of ["new", "fresh"]) $(id).addEventListener("click", () => show(newChat()));
$("show").addEventListener("click", () => { toggleSide(true, true); $("new").focus(); });
for (const id of ["shut", "shade"]) $(id).addEventListener("click", () => { toggleSide(false, true); $("show").focus(); });
$("export-all").addEventListener("click", () => download(savedChats(), "conversations"));
$("delete-all").addEventListener("click", () => {
  const all = savedChats();
  if (!all.length || !confirm(`Delete all ${all.length} conversations from this browser?`)) return;
  show(newChat());
  for (const saved of all) forget(saved.id);
});
$("import").addEventListener("change", event => {
  if (event.target.files[0]) importChats(event.target.files[0]);
  event.target.value = "";
});
narrow.addEventListener("change", () => toggleSide(sideFits()));
