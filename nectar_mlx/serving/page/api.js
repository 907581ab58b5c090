// Requests to the server. Every failure is an Error whose message a person can read; `status` is HTTP's, 0 for none.

const KEY = "nectar.key"; // of this tab alone

export class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer. Is `nectar serve` still running?", 0);
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Failure(told?.error?.message ?? `The server answers with status ${response.status}.`, response.status);
}

const json = async (path, options) => (await send(path, options)).json();

export const library = () => json("/api/library");

export const passage = (model, source) =>
  json(`/api/library/passage/${source.start}/${source.end}/${encodeURIComponent(model)}`);

export const remove = (id) => json(`/api/library/documents/${id}`, { method: "DELETE" });

export const update = () =>
  json("/api/library/update", { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" });

export const upload = (file) =>
  json(`/api/library/files/${encodeURIComponent(file.name)}`, {
    method: "PUT",
    headers: { "Content-Type": "application/octet-stream" },
    body: file,
  });

// Yields the parts of an answer as they come: chunks of OpenAI's chat completions.
export async function* answer(model, messages, signal) {
  const response = await send("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, messages, stream: true, sources: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", ended = false;
  while (!ended) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      break;
    }
    if (read.done) break;
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6);
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      const part = JSON.parse(data);
      if (part.error) throw new Failure(part.error.message, 500);
      yield part;
    }
  }
  if (!ended) throw new Failure("The connection broke before the answer's end.", 0);
}
