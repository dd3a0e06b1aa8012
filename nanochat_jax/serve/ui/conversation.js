// The open conversation. This file shows, sends and edits its messages, and receives the answers.

import { composing, fill, grow, input, resize, send, sends } from "./composer.js";
import { button, copy, element, sentence } from "./dom.js";
import { addRow, clearTrouble, follow, log, pin, say, trouble, welcome } from "./log.js";
import { answerView, append, parts, plain } from "./message.js";
import { Refused, request, Unreachable } from "./server.js";
import { changed, forget, keep, newChat } from "./storage.js";

export let chat = newChat();  // the open conversation: {id, updated, system, messages}
export let running = null;    // the answer being generated: {message, view, controller, before, replaced}
const views = new Map();  // message -> its view in the log

export function saveChat() {
  if (!chat.messages.length) return;
  chat.updated = Date.now();
  keep("chat." + chat.id, chat);
  history.replaceState(null, "", "#" + chat.id);  // a reload opens this conversation again
  changed();
}

// Switches to another conversation.
export function turnTo(next) {
  leave();
  chat = next;
  history.replaceState(null, "", chat.messages.length ? "#" + chat.id : location.pathname + location.search);
  render();
}

// Stops the running answer and keeps the text received so far.
export function leave() {
  if (!running) return;
  const { message, controller } = running;
  message.remark = "stopped";
  settle();
  controller.abort();
}

// ---------------------------------------------------------------------------
// Messages

function addUser(message) {
  const body = element("div", "body", message.content);
  const actions = element("div", "actions", button("Edit", "quiet", () => edit(message)), button("Copy", "", event => copy(message.content, event.target)));
  views.set(message, { row: addRow("user", element("span", "unseen", "You:"), body, actions) });
}

function addAnswer(message) {
  const view = answerView(message, answer);
  views.set(message, view);
  return view;
}

export function render() {
  views.clear();
  log.replaceChildren(welcome);
  welcome.hidden = chat.messages.length > 0;
  for (const message of chat.messages) {
    if (message.role === "user") addUser(message);
    else addAnswer(message).finish();
  }
  if (chat.messages.length % 2) trouble("Not answered yet", button("Try again", "pill", () => answer()));
  pin();
  follow();
}

// Removes the message and everything after it from the conversation.
function truncate(message) {
  const index = chat.messages.indexOf(message);
  for (const gone of chat.messages.splice(index)) {
    views.get(gone).row.remove();
    views.delete(gone);
  }
  for (const row of log.querySelectorAll(".note, .trouble, .forgotten")) row.remove();
}

// Replaces a message with a text box to edit it. Later messages are removed only when the edit is sent.
export function edit(message) {
  if (running || log.querySelector(".edit")) return;
  const row = views.get(message).row, area = element("textarea"), shown = [...row.children];
  const later = chat.messages.indexOf(message) < chat.messages.length - 2;
  const close = () => { row.replaceChildren(...shown); input.focus(); };
  const submit = () => {
    const text = area.value.trim();
    if (!text) return;
    truncate(message);
    ask(text);
  };
  area.value = message.content;
  area.dir = "auto";
  area.setAttribute("aria-label", "Edit the message");
  row.replaceChildren(element("div", "edit", area, element("div", "", later ? "What follows is replaced. " : "",
    button("Cancel", "pill", close), button("Send", "pill main", submit))));
  grow(area);
  area.addEventListener("input", () => grow(area));
  area.addEventListener("keydown", event => {
    if (event.key === "Escape" && !composing(event)) { event.stopPropagation(); close(); }
    else if (sends(event)) { event.preventDefault(); submit(); }
  });
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

// The server's limits on a request. A longer conversation would not fit the model's context anyway.
const MAX_CHARS = 32000, MAX_MESSAGES = 500;

// Returns the index of the first message to send, which is a user's message. If the request would be too large, the
// oldest turns are omitted.
function firstToSend() {
  const messages = chat.messages, size = message => parts(message).reduce((n, part) => n + part.text.length, 0);
  let first = 0, total = messages.reduce((n, message) => n + size(message), chat.system.length);
  while (first + 2 < messages.length && (total > MAX_CHARS || messages.length - first >= MAX_MESSAGES)) {
    total -= size(messages[first]) + size(messages[first + 1]);
    first += 2;
  }
  return first;
}

// Draws a line below the first `count` messages, which no longer fit the model's context.
function markForgotten(count) {
  log.querySelector(".forgotten")?.remove();
  const view = count && views.get(chat.messages[count]);
  if (view) view.row.before(element("div", "forgotten", "the messages above no longer fit the model's context"));
}

// ---------------------------------------------------------------------------
// Answers

export function ask(text) {
  const last = chat.messages[chat.messages.length - 1];
  if (last?.role === "user") {  // the last message has no answer yet: merge it with the new one
    text = last.content + "\n\n" + text;
    truncate(last);
  }
  const message = { role: "user", content: text };
  chat.messages.push(message);
  addUser(message);
  saveChat();
  answer();
}

// Requests an answer to the user's last message, and replaces an existing answer. If `cut` is given, continues this
// incomplete answer instead.
async function answer(cut) {
  if (running) return;
  clearTrouble();
  const last = chat.messages[chat.messages.length - 1], replaced = !cut && last.role === "assistant" ? last : null;
  if (replaced) truncate(replaced);
  if (cut && parts(cut).at(-1)?.type === "python") parts(cut).pop();  // removes a tool call without a result, to generate it again
  const asked = structuredClone(chat.messages.map(({ role, content }) => ({ role, content })));
  const message = cut ?? { role: "assistant", content: "" };
  const view = cut ? views.get(cut) : addAnswer(message);
  if (!cut) chat.messages.push(message);
  delete message.remark;
  const job = { message, view, replaced, before: JSON.stringify(message.content), controller: new AbortController() };
  const { signal } = job.controller;
  setRunning(job);
  view.begin();
  pin();

  let failure = null;
  for (let attempt = 0; !failure; attempt++) {
    try {
      await receive(asked, message, view, signal);
      break;
    } catch (error) {
      if (signal.aborted) message.remark = "stopped";
      else if (came(job)) message.remark = error.message;
      else if (!(error instanceof Unreachable)) failure = error;
      else if (await pause(error, attempt, view, signal)) { view.typing(); continue; }
      else message.remark = "stopped";
      break;
    }
  }
  if (running !== job) return;  // the user has opened another conversation
  const stopped = message.remark === "stopped";
  settle();
  if (failure) refuse(failure, replaced);
  else if (chat.messages.includes(message)) say(message.remark ? `The answer ends here: ${message.remark}.` : "The answer is complete.");
  else if (!replaced) trouble(stopped ? "Not answered yet" : "The model gave no answer", button("Try again", "pill", () => answer()));
}

const came = ({ message, before }) => JSON.stringify(message.content) !== before;

// Ends the running answer. If this answer is empty, removes it and restores the answer that it replaced.
function settle() {
  const { message, view, replaced } = running;
  if (plain(message) || parts(message).length > 1) view.finish();
  else {
    truncate(message);
    if (replaced) {
      chat.messages.push(replaced);
      addAnswer(replaced).finish();
    }
  }
  setRunning(null);
  saveChat();
}

// Shows an error. A message that the server refused goes back into the message box, unless the box already has text.
function refuse(failure, replaced) {
  const question = chat.messages[chat.messages.length - 1];
  if (replaced || question.role === "assistant") trouble(failure.message);
  else if (!(failure instanceof Refused)) trouble(failure.message, button("Try again", "pill", () => answer()));
  else if (input.value) trouble(failure.message, button("Edit", "pill", () => edit(question)));
  else {
    truncate(question);
    fill(question.content);
    trouble(failure.message);
    if (chat.messages.length) saveChat();
    else forget(chat.id);
  }
}

// Sends one request and appends the answer to `message`. Throws if the answer is incomplete.
async function receive(asked, message, view, signal) {
  const first = firstToSend(), system = chat.system ? [{ role: "system", content: chat.system }] : [];
  markForgotten(first);
  const answered = await request([...system, ...asked.slice(first)], signal);
  let done = false;
  try {
    for await (const event of answered) {
      if (signal.aborted) return;
      const [type, text] = event.token !== undefined ? ["text", event.token] : event.python !== undefined ? ["python", event.python] : ["python_output", event.output];
      if (text !== undefined) {
        append(message, type, text);
        if (type === "text") view.wait();
        else view.typing();
        view.update();
        if (Date.now() - chat.updated > 1000) saveChat();
      } else if (event.waiting) view.wait(`The server is busy: number ${event.waiting} in the queue.`);
      else if (event.dropped) markForgotten(first + event.dropped);
      else if (event.cut) message.remark = "cut off: the answer reached its maximum length";
      else if (event.error) throw new Unreachable(sentence(event.error), 0);
      else if (event.done) done = true;
    }
  } catch (error) {
    throw error instanceof Unreachable ? error : new Unreachable("the connection was lost", 0);
  }
  if (!done) throw new Unreachable("the connection was lost", 0);
}

// Counts down to the next attempt. Resolves to false if the user stops the answer. The wait ends early if the user
// clicks "Try now" or the network comes back.
function pause(error, attempt, view, signal) {
  let left = Math.round(Math.max(error.seconds || 1, Math.min(15, 1.6 ** attempt)));
  return new Promise(resolve => {
    const show = () => {
      text.textContent = `${error.message} Trying again in ${left} s.`;
      if (left-- <= 0) end();
    };
    const end = () => {
      clearInterval(timer);
      removeEventListener("online", end);
      signal.removeEventListener("abort", end);
      resolve(!signal.aborted);
    };
    const text = element("span"), timer = setInterval(show, 1000);
    addEventListener("online", end);
    signal.addEventListener("abort", end);
    view.wait(text, button("Try now", "", end));
    if (!attempt) say(`${error.message} Trying again until it responds.`);
    show();
  });
}

function setRunning(job) {
  running = job;
  log.setAttribute("aria-busy", String(!!running));  // screen readers wait for the whole answer
  send.classList.toggle("busy", !!running);
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  resize();
}
