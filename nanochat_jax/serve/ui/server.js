// Communication with the server: its health, its answers and its errors.

import { $, sentence } from "./dom.js";
import { settings } from "./storage.js";

export let server = {};  // the response of /health: the model, its context, the defaults, suggestions

export class Refused extends Error {}      // the server rejects the request; retrying would not help
export class Unreachable extends Error {   // the server is busy, gone or restarting; retrying may help
  constructor(message, seconds) { super(message); this.seconds = seconds; }
}

// Sends the messages and returns the events of the answer. Throws an error if the request fails.
export async function request(messages, signal) {
  const { temperature, top_k, max_tokens, key } = settings();
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
  const body = JSON.stringify({ messages, temperature, top_k, max_tokens });
  const response = await fetch("chat/completions", { method: "POST", headers, body, signal })
    .catch(() => { throw new Unreachable("The server does not answer.", 0); });
  if (!response.ok) throw await refusal(response);
  return events(response.body);
}

async function refusal(response) {
  const detail = await response.json().then(body => body.detail, () => "");
  const text = typeof detail === "string" && detail ? detail : `The server answered ${response.status}.`;
  if (response.status === 401) {
    dispatchEvent(new Event("nokey"));  // opens the settings
    return new Error(settings().key ? "The server does not accept this key." : "The server requires a key: enter it in the settings.");
  }
  if (response.status === 429) return new Unreachable("The server is busy.", Number(response.headers.get("Retry-After")));
  if (response.status >= 500) return new Unreachable(sentence(text), 0);
  return new Refused(text);
}

// Parses server-sent events as JSON. An event may arrive in several pieces, and so may a single character.
export async function* events(stream) {
  const reader = stream.getReader(), decoder = new TextDecoder();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    buffer += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const lines = buffer.split(/\r?\n/);
    buffer = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield JSON.parse(line.slice(5));
    if (done) return;
  }
}

export async function meet(attempt = 0) {
  try {
    server = await (await fetch("health")).json();
    $("model").textContent = server.ready ? server.model ?? "" : "the model is not running";
  } catch {
    $("model").textContent = "the server does not answer";
  }
  const well = Boolean(server.ready) && $("model").textContent === server.model;
  $("model").classList.toggle("gone", !well);
  dispatchEvent(new Event("met"));
  if (!well) setTimeout(meet, Math.min(15, 2 ** attempt) * 1000, attempt + 1);
}
