// The page: a question goes to the server, and the answer is shown as it comes.

import * as api from "./api.js";
import { asMarkdown, label, load, messages, save, show } from "./conversation.js";
import { Documents } from "./documents.js";

const byId = (id) => document.getElementById(id);
const turns = load();
const items = new Map(); // turns' elements
let running = null; // what stops the answer that is being written

const documents = new Documents({
  changed: (model) => {
    byId("target").textContent = model === null ? "…" : model === documents.library ? "all documents" : model;
  },
  problem: (text) => {
    if (byId("problem").textContent !== text) byId("problem").textContent = text;
    byId("problem").hidden = !text;
  },
  wantKey: () => {
    byId("key-wrong").hidden = !api.hasKey();
    byId("key").returnValue = "";
    if (!byId("key").open) byId("key").showModal();
  },
});

const actions = {
  again: (turn) => {
    if (!running) write(turn);
  },
  passage: async (turn, source) => {
    byId("passage-title").textContent = label(source) || "The text";
    const text = byId("passage-text"), found = document.createElement("mark");
    found.textContent = source.text;
    text.replaceChildren(found);
    try {
      const told = await api.passage(turn.model, source);
      byId("passage-title").textContent = label({ ...source, place: told.place || source.place });
      found.textContent = told.passage;
      text.replaceChildren(
        (told.cut_before ? "… " : "") + told.before, found, told.after + (told.cut_after ? " …" : ""),
      );
    } catch (error) {
      const problem = document.createElement("span");
      problem.className = "problem";
      problem.textContent = `\n\nThe text around it cannot be shown: ${error.message}`;
      text.append(problem);
    }
    byId("passage").showModal();
    found.scrollIntoView({ block: "center" });
  },
};

function add(turn) {
  const item = document.createElement("li");
  items.set(turn, item);
  show(item, turn, actions);
  byId("turns").append(item);
  byId("empty").hidden = true;
}

function setRunning(controller) {
  running = controller;
  byId("stop").hidden = !controller;
  byId("send").hidden = Boolean(controller);
  const focused = document.activeElement;
  if (focused.hidden) (focused === byId("send") ? byId("stop") : byId("question")).focus();
  byId("status").textContent = controller ? "Reading the question…" : "";
}

async function write(turn) {
  Object.assign(turn, { answer: "", thoughts: "", sources: [], error: "", state: "running" });
  const controller = new AbortController(), item = items.get(turn);
  setRunning(controller);
  show(item, turn, actions);
  save(turns);
  const atEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 80;
  item.scrollIntoView({ block: "nearest" });
  try {
    let next = 0; // when the answer is shown again: a long one takes a while, and must leave time for the rest
    let begun = false; // its first words are shown at once
    for await (const part of api.answer(turn.target, messages(turns, turn), controller.signal)) {
      take(turn, part);
      const now = performance.now();
      if (now < next && begun === Boolean(turn.answer)) continue;
      const follow = atEnd();
      show(item, turn, actions);
      if (follow) scrollTo(0, document.documentElement.scrollHeight);
      if (turn.answer && !begun) performance.mark("first-text");
      begun = Boolean(turn.answer);
      next = performance.now() + 4 * (performance.now() - now);
    }
  } catch (error) {
    turn.state = error.name === "AbortError" ? "stopped" : "failed";
    turn.error = error.name === "AbortError" ? "" : error.message;
    if (error.status === 401) documents.wantKey();
  }
  setRunning(null);
  byId("status").textContent = { done: "Answered.", cut: "Answered.", stopped: "Stopped.", failed: "" }[turn.state];
  show(item, turn, actions);
  save(turns);
}

// Takes one part of the stream.
function take(turn, part) {
  const choice = part.choices?.[0];
  turn.model = part.model;
  turn.answer += choice?.delta?.content ?? "";
  turn.thoughts += choice?.delta?.reasoning ?? "";
  for (const name of ["document", "place", "close", "still", "sources"]) if (name in part) turn[name] = part[name];
  if (choice?.delta?.content || choice?.delta?.reasoning) byId("status").textContent = "Answering…";
  if (choice?.finish_reason) turn.state = choice.finish_reason === "length" ? "cut" : "done";
}

function send() {
  const question = byId("question").value.trim();
  if (!question || running) return;
  if (documents.target === null) return documents.look(); // which says what is missing
  byId("question").value = "";
  const turn = { question, target: documents.target, answer: "" };
  turns.push(turn);
  add(turn);
  performance.clearMarks();
  performance.mark("sent");
  write(turn);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
});
addEventListener("pagehide", () => running && save(turns));
byId("clear").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  items.clear();
  byId("turns").replaceChildren();
  byId("empty").hidden = false;
  save(turns);
  byId("question").focus();
});
byId("export").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([asMarkdown(turns)], { type: "text/markdown" }));
  link.download = "nectar.md";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
});
byId("show-documents").addEventListener("click", () => {
  const open = byId("documents").classList.toggle("open");
  byId("show-documents").setAttribute("aria-expanded", String(open));
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setKey(byId("key-value").value.trim());
  byId("key").close("given");
  byId("key-value").value = "";
  documents.look();
});
byId("key").addEventListener("close", () => {
  if (byId("key").returnValue === "given") return;
  byId("problem").textContent = "Nothing can be asked without the server's key.";
  byId("problem").hidden = false;
});
for (const button of document.querySelectorAll("dialog .close")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}

turns.forEach(add);
documents.look();
byId("question").focus();
