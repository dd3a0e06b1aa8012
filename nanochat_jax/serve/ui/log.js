// The log: its rows, the page's own notes and errors, and scrolling with the text as it grows.

import { $, element, sentence } from "./dom.js";

export const log = $("log"), welcome = $("welcome");
const scroller = $("scroller");

let pinned = true;  // the log is scrolled to its end, so it follows new text

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

// Announces a text to screen readers, which hear of an answer only when it is complete.
export function say(text) { $("status").textContent = text; }

export function follow(always) {
  if (always || pinned) scroller.scrollTop = scroller.scrollHeight;
}

export function pin() { pinned = true; }

scroller.addEventListener("scroll", () => {
  pinned = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  document.querySelector("header").classList.toggle("scrolled", scroller.scrollTop > 4);
});
new ResizeObserver(() => follow()).observe(scroller);  // when a phone's keyboard opens or the message box grows
