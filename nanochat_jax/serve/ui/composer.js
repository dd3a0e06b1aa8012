// The message box. It grows with its text, and a reload of the page keeps the draft.

import { $ } from "./dom.js";

export const input = $("input"), send = $("send");
export const touch = matchMedia("(pointer: coarse)");

export function fill(text) {
  input.value = text;
  resize();
  if (!touch.matches || text) input.focus();
  input.setSelectionRange(text.length, text.length);
}

export function grow(area) {
  area.style.height = "auto";
  area.style.height = area.scrollHeight + area.offsetHeight - area.clientHeight + "px";
}

export function resize() {
  grow(input);
  send.disabled = !send.classList.contains("busy") && !input.value.trim();
  try { sessionStorage.setItem("nanochat.draft", input.value); } catch { /* without storage, a reload loses the draft */ }
}

// Whether a key press sends the message. On a phone, Enter starts a new line, because there is no Shift+Enter. While
// the user composes a word with an input method, Enter selects the word.
export const sends = event => event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch.matches;

input.addEventListener("input", resize);
