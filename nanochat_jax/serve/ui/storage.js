// Storage in the browser. If the browser cannot store data (private window, full disk), the page still works, but a
// reload loses everything.

import { note } from "./log.js";

let crowded = false;  // whether the user has been told that saving failed

export function recall(key, otherwise) {
  try { return JSON.parse(localStorage.getItem("nanochat." + key)) ?? otherwise; } catch { return otherwise; }
}

export function keep(key, value) {
  try {
    if (value === undefined) localStorage.removeItem("nanochat." + key);
    else localStorage.setItem("nanochat." + key, JSON.stringify(value));
  } catch {
    if (!crowded) note("the browser cannot save more conversations: export some and delete them");
    crowded = true;
  }
}

export function newChat() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, updated: 0, system: recall("settings", {}).system ?? "", messages: [] };
}

export function savedChats() {
  const prefix = "nanochat.chat.";
  let keys = [];
  try { keys = Object.keys(localStorage).filter(key => key.startsWith(prefix)); } catch { /* no storage */ }
  return keys.map(key => recall(key.slice(9))).filter(saved => saved && isConversation(saved.messages))
    .sort((a, b) => b.updated - a.updated);
}

// Whether messages can be shown and sent. They may come from a file or from another version of this page.
export function isConversation(messages) {
  const part = p => ["text", "python", "python_output"].includes(p?.type) && typeof p.text === "string";
  return Array.isArray(messages) && messages.length > 0 && messages.every((message, i) =>
    message?.role === (i % 2 ? "assistant" : "user")
    && (typeof message.content === "string" || (i % 2 === 1 && Array.isArray(message.content) && message.content.every(part))));
}

export const settings = () => recall("settings", {});
export const setting = (key, value) => keep("settings", { ...settings(), [key]: value });

export function forget(id) {
  keep("chat." + id);
  changed();
}

// Makes chats.js redraw the list of conversations.
export function changed() { dispatchEvent(new Event("chats")); }
