// The settings dialog, and the colour theme.

import { input, touch } from "./composer.js";
import { chat, saveChat } from "./conversation.js";
import { $ } from "./dom.js";
import { server } from "./server.js";
import { setting, settings } from "./storage.js";

export const options = $("options");
const fields = options.querySelector("form").elements;
const NUMBERS = ["temperature", "top_k", "max_tokens"];

export function openSettings(focus) {
  const now = settings();
  for (const name of NUMBERS) {
    fields[name].value = now[name] ?? "";
    fields[name].placeholder = server.defaults?.[name] ?? "";
  }
  if (server.context) fields.max_tokens.max = Math.min(4096, server.context);
  fields.system.value = chat.system;
  fields.theme.value = now.theme ?? "";
  fields.key.value = now.key ?? "";
  if (!options.open) options.showModal();
  if (focus) fields[focus].focus();
}

function readSettings() {
  for (const name of NUMBERS) {
    if (fields[name].validity.valid) setting(name, fields[name].value === "" ? undefined : Number(fields[name].value));
    fields[name].setAttribute("aria-invalid", String(!fields[name].validity.valid));
  }
  chat.system = fields.system.value.trim();
  setting("system", chat.system || undefined);
  setting("theme", fields.theme.value || undefined);
  setting("key", fields.key.value.trim() || undefined);
  applyTheme();
}

export function applyTheme() {
  const theme = settings().theme;
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

options.addEventListener("input", readSettings);
options.addEventListener("close", () => { saveChat(); if (!touch.matches) input.focus(); });
options.addEventListener("click", event => { if (event.target === options) options.close(); });
$("defaults").addEventListener("click", () => {
  for (const name of [...NUMBERS, "system"]) fields[name].value = "";
  readSettings();
});
$("settings").addEventListener("click", () => openSettings());
addEventListener("nokey", () => openSettings("key"));
