// The message box, which grows with its text and keeps it over a reload.

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
  try { sessionStorage.setItem("nanochat.draft", input.value); } catch { /* it is lost on a reload then */ }
}

// On a phone Enter is the only way to a new line; in an input method it chooses a word.
export const sends = event => event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch.matches;

input.addEventListener("input", resize);
