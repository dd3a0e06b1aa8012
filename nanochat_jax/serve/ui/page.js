// The entry point: commands, keyboard shortcuts and startup.

import { narrow, openChat, show, sideFits, toggleSide } from "./chats.js";
import { composing, fill, input, sends } from "./composer.js";
import { ask, chat, edit, leave, running, saveChat } from "./conversation.js";
import { $, button, element } from "./dom.js";
import { addRow, note } from "./log.js";
import { meet, server } from "./server.js";
import { applyTheme, options } from "./settings.js";
import { changed, newChat, setting, settings } from "./storage.js";

const COMMANDS = {
  "/temperature 0.8": "0 to 2: higher gives more varied answers",
  "/topk 50": "0 to 200: sample from the k likeliest tokens; 0: from all",
  "/system You are brief.": "instructions to the model for this conversation; off: none",
  "/clear": "start a new chat; this one stays in the list",
  "/help": "show this list",
};

function help() {
  const list = element("dl");
  for (const [name, meaning] of Object.entries(COMMANDS)) list.append(element("dt", "", name), element("dd", "", meaning));
  addRow("note", list);
}

function command(text) {
  const [name, value, ...rest] = text.trim().split(/\s+/);
  const set = (key, label, low, high, whole) => {
    const number = Number(value);
    if (value === undefined) note(`${label} is ${settings()[key] ?? server.defaults?.[key] ?? "the server's default"}`);
    else if (rest.length || !(number >= low && number <= high) || (whole && !Number.isInteger(number)))
      note(`${name} ${[value, ...rest].join(" ")}: expected ${whole ? "a whole number" : "a number"} from ${low} to ${high}`);
    else { setting(key, number); note(`${label} is now ${number}`); }
  };
  if (name === "/temperature") set("temperature", "temperature", 0, 2, false);
  else if (name === "/topk") set("top_k", "top-k", 0, 200, true);
  else if (name === "/system") {
    if (value !== undefined) {
      const prompt = text.trim().slice(name.length).trim();
      chat.system = prompt.toLowerCase() === "off" ? "" : prompt;
      saveChat();
    }
    note(chat.system ? `the system prompt is: ${chat.system}` : "there is no system prompt");
  } else if (name === "/clear") show(newChat());
  else if (name === "/help") help();
  else { note(`there is no command ${name}; /help lists the commands`); return false; }
  return true;
}

function submit() {
  const text = input.value.trim();
  if (!text || running) return;
  if (text.startsWith("/")) {
    if (command(text)) fill("");
    return;
  }
  fill("");
  ask(text);
}

input.addEventListener("keydown", event => {
  if (sends(event)) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !composing(event) && !input.value && !running) {
    const last = chat.messages.findLast(message => message.role === "user");
    if (last) { event.preventDefault(); edit(last); }
  }
});
$("composer").addEventListener("submit", event => {
  event.preventDefault();
  if (running) running.controller.abort();
  else submit();
});
// Suggests what the model was trained to answer.
addEventListener("met", () => $("ideas").replaceChildren(...(server.suggestions ?? []).map(text => {
  const idea = button(text, "pill", () => { if (!running) ask(text); });
  idea.dir = "auto";
  return idea;
})));
addEventListener("keydown", event => {
  if (composing(event)) return;
  if (event.key === "Escape" && !options.open) {
    if (!$("side").hidden && narrow.matches) { toggleSide(false); $("show").focus(); }
    else running?.controller.abort();
  }
  // A keyboard with another alphabet has no key "o", but a key at the same place.
  const letter = /^[a-z]$/i.test(event.key) ? event.key : event.code.replace("Key", "");
  if ((event.ctrlKey || event.metaKey) && event.shiftKey && /^[no]$/i.test(letter)) {
    event.preventDefault();
    show(newChat());
  }
});
addEventListener("pagehide", leave);  // a reload keeps the partial answer
addEventListener("storage", event => {  // another window of this page has changed the storage
  if (!event.key?.startsWith("nanochat.")) return;
  applyTheme();
  if (event.key === "nanochat.chat." + chat.id && !running && event.newValue) openChat(chat.id);
  else changed();
});

const wanted = location.hash.slice(1);
applyTheme();
toggleSide(sideFits());
show(chat);
if (wanted) openChat(wanted);
try { fill(sessionStorage.getItem("nanochat.draft") ?? ""); } catch { fill(""); }
meet();
