// The conversation: kept in this browser, shown, and written as Markdown. Each tab has its own, which a reload keeps; a
// new tab begins with the one that was changed last.
// A turn: {question, target, answer, thoughts, model, document, place, close, still, sources, state, error}; its state
// is "running", "done", "cut", "stopped" or "failed".

import { render } from "./markdown.js";

const KEPT = "nectar.conversation";
const MOST = 200; // turns

export function load() {
  try {
    const turns = JSON.parse(sessionStorage.getItem(KEPT) ?? localStorage.getItem(KEPT) ?? "[]");
    for (const turn of turns) if (turn.state === "running") turn.state = "stopped"; // the page was left
    return turns.filter((turn) => typeof turn.question === "string" && typeof turn.answer === "string");
  } catch {
    return [];
  }
}

export function save(turns) {
  for (const storage of [() => sessionStorage, () => localStorage]) keep(storage, turns.slice(-MOST));
}

function keep(storage, turns) {
  for (let kept = turns; ; kept = kept.slice(Math.ceil(kept.length / 2))) {
    try {
      return storage().setItem(KEPT, JSON.stringify(kept));
    } catch {
      if (kept.length < 2) return; // private mode, or an answer larger than all there is room for
    }
  }
}

const NOTES = { stopped: "Stopped.", cut: "The answer was cut at its longest length." };

function element(name, className, text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

export const label = (source) => [source.document, source.place].filter(Boolean).join(", ");

// Shows a turn in its element. actions: {passage(turn, source), again(turn)}.
export function show(item, turn, actions) {
  const answer = element("div", "answer");
  answer.setAttribute("aria-busy", String(turn.state === "running"));
  answer.append(render(turn.answer));
  const parts = [element("h2", "question", turn.question)];
  if (turn.document) {
    const close = turn.close?.length ? ` (close to it: ${turn.close.join("; ")})` : "";
    const from = turn.still ? "The question names no document: still from" : "From";
    parts.push(element("p", "from", `${from} ${[turn.document, turn.place].filter(Boolean).join(", ")}${close}`));
  }
  if (turn.thoughts) {
    const thoughts = element("details", "thoughts");
    thoughts.open = item.querySelector(".thoughts")?.open ?? false;
    thoughts.append(element("summary", "", "Thoughts"), element("p", "", turn.thoughts));
    parts.push(thoughts);
  }
  parts.push(answer);
  if (NOTES[turn.state]) parts.push(element("p", "note", NOTES[turn.state]));
  if (turn.state === "failed") {
    const again = element("button", "", "Ask again");
    again.type = "button";
    again.addEventListener("click", () => actions.again(turn));
    parts.push(element("p", "problem", turn.error), again);
  }
  if (turn.sources?.length) {
    const list = element("ol", "sources");
    list.setAttribute("aria-label", "Sources");
    for (const source of turn.sources) {
      const button = element("button", "source", label(source) || "the text");
      button.type = "button";
      button.title = source.text.slice(0, 300);
      button.addEventListener("click", () => actions.passage(turn, source));
      const entry = element("li");
      entry.append(button);
      list.append(entry);
    }
    parts.push(list);
  }
  item.replaceChildren(...parts);
}

export function asMarkdown(turns) {
  const parts = ["# Questions and answers\n"];
  for (const turn of turns) {
    parts.push(`## ${turn.question.replaceAll("\n", " ")}\n`);
    if (turn.document) parts.push(`*From ${[turn.document, turn.place].filter(Boolean).join(", ")}*\n`);
    if (turn.answer) parts.push(`${turn.answer.trim()}\n`);
    if (NOTES[turn.state]) parts.push(`*${NOTES[turn.state]}*\n`);
    if (turn.error) parts.push(`*${turn.error}*\n`);
    const quoted = (turn.sources ?? []).map(
      (source, n) => `${n + 1}. ${label(source)}: “${source.text.replace(/\s+/g, " ").trim()}”`,
    );
    if (quoted.length) parts.push(`Sources:\n\n${quoted.join("\n")}\n`);
  }
  return parts.join("\n");
}

// What the model is told of the turns before: those that were answered from what is asked now.
export function messages(turns, turn) {
  const before = turns.slice(0, turns.indexOf(turn));
  const told = before.filter((t) => t.target === turn.target && t.answer && ["done", "cut"].includes(t.state)).slice(-8);
  return [
    ...told.flatMap((t) => [
      { role: "user", content: t.question },
      { role: "assistant", content: t.answer },
    ]),
    { role: "user", content: turn.question },
  ];
}
