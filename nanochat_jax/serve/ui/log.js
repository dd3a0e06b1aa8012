// The log. It shows messages, notes and errors, and scrolls down as the text grows.

import { $, element, sentence } from "./dom.js";

export const log = $("log"), welcome = $("welcome");
const scroller = $("scroller");

let pinned = true;  // whether the log is scrolled to its end; if so, it follows new text

export function addRow(kind, ...children) {
  welcome.hidden = true;
  const row = element("div", "row " + kind, ...children);
  log.append(row);
  follow(kind === "user");
  return row;
}

export function note(text) { addRow("note", text); }

export function trouble(text, ...buttons) {
  clearTrouble();
  addRow("trouble", element("span", "", sentence(text)), ...buttons).setAttribute("role", "alert");
}

export function clearTrouble() { for (const row of log.querySelectorAll(".trouble")) row.remove(); }

// Announces a text to screen readers. An answer is announced only when it is complete.
export function say(text) { $("status").textContent = text; }

export function follow(always) {
  if (always || pinned) scroller.scrollTop = scroller.scrollHeight;
}

export function pin() { pinned = true; }

scroller.addEventListener("scroll", () => {
  pinned = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  document.querySelector("header").classList.toggle("scrolled", scroller.scrollTop > 4);
});
new ResizeObserver(() => follow()).observe(scroller);  // the size changes when a phone's keyboard opens or the message box grows
