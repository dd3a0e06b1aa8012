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

// Whether a key press belongs to an input method, with which the user composes a word, for example in Japanese. Safari
// ends the composition before it reports the key that ended it. That key then has the code 229, but isComposing is false.
export const composing = event => event.isComposing || event.keyCode === 229;

// Whether a key press sends the message. On a phone, Enter starts a new line, because there is no Shift+Enter.
export const sends = event => event.key === "Enter" && !event.shiftKey && !composing(event) && !touch.matches;

input.addEventListener("input", resize);
