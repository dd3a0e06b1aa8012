// The message box: it grows with its text and keeps the draft over a reload.

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

// Whether a key press sends the message. A phone has no Shift+Enter, so Enter starts a new line there. In an input
// method, Enter selects a word.
export const sends = event => event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch.matches;

input.addEventListener("input", resize);
