// The list of documents: asked for again and again, faster while something is being fitted.

import * as api from "./api.js";

const BUSY = 1000, IDLE = 5000; // milliseconds between two looks
const GRADES = { close: "close to the text", usable: "usable", "not faithful": "not faithful" };
const byId = (id) => document.getElementById(id);

function size(bytes) {
  return bytes >= 1e6 ? `${(bytes / 1e6).toFixed(1)} MB` : `${Math.max(1, Math.round(bytes / 1e3))} kB`;
}

function facts(doc) {
  if (doc.state === "ready") {
    const places = doc.places ? `${doc.places} ${doc.unit}${doc.places > 1 ? "s" : ""}` : "";
    const found = [GRADES[doc.grade] ?? "not checked", places, doc.bytes === null ? "" : size(doc.bytes)];
    return [...found, doc.missing ? "gone from the disk" : ""].filter(Boolean).join(" · ");
  }
  if (doc.progress) {
    const left = doc.progress.seconds_left;
    const time = left === null ? "" : left < 90 ? ` · ${Math.ceil(left)} s left` : ` · ${Math.ceil(left / 60)} min left`;
    return `${Math.round(100 * doc.progress.share)}% · ${doc.progress.stage || "starting"}${time}`;
  }
  return doc.reason ? `${doc.state}: ${doc.reason}` : doc.state;
}

export class Documents {
  // changed: called when the target has changed. problem: with a text, "" for none. wantKey: the key is missing.
  constructor({ changed, problem, wantKey }) {
    Object.assign(this, { changed, problem, wantKey, target: null, models: [], shown: "" });
    byId("choose").addEventListener("click", () => byId("files").click());
    byId("files").addEventListener("change", () => {
      this.add([...byId("files").files]);
      byId("files").value = "";
    });
    byId("update").addEventListener("click", () => api.update().then(() => this.look(), this.failed));
    this.dropping();
  }

  failed = (error) => (error.status === 401 ? this.wantKey() : this.problem(error.message));

  async look() {
    clearTimeout(this.timer);
    let busy = false;
    try {
      const told = await api.library();
      busy = told.busy || told.documents.some((doc) => doc.state === "fitting");
      this.problem(told.message);
      this.show(told);
    } catch (error) {
      this.failed(error);
      if (error.status === 401) return;
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.look(), busy ? BUSY : IDLE);
  }

  show(told) {
    this.library = told.library;
    this.limit = told.max_upload;
    byId("add").hidden = !told.library;
    this.models = [...(told.library ? [told.library] : []), ...told.documents.map((d) => d.model).filter(Boolean)];
    if (!this.models.includes(this.target)) this.choose(this.models[0] ?? null);
    const state = JSON.stringify([told, this.target]);
    if (state === this.shown) return;
    this.shown = state;
    const list = byId("document-list"), focused = document.activeElement?.dataset?.focus;
    const all = told.library ? [this.entry({ model: told.library, name: "All documents" })] : [];
    list.replaceChildren(...all, ...told.documents.map((doc) => this.entry(doc)));
    if (focused) list.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
  }

  entry(doc) {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.className = "document";
    button.dataset.focus = `ask ${doc.id}`;
    button.setAttribute("aria-pressed", String(doc.model !== null && doc.model === this.target));
    button.disabled = doc.model === null;
    button.addEventListener("click", () => this.choose(doc.model));
    const name = document.createElement("span");
    name.className = "name";
    name.textContent = doc.name;
    button.append(name);
    item.append(button);
    if (!doc.id) return item;
    const told = document.createElement("p");
    told.className = `facts ${doc.state === "ready" ? (doc.grade ?? "").replace(" ", "-") : doc.state.replace(" ", "-")}`;
    told.textContent = facts(doc);
    told.title = doc.verdict ?? "";
    item.append(told);
    if (doc.left_out?.length) told.append(` · left out: ${doc.left_out.join("; ")}`);
    if (doc.progress) {
      const bar = document.createElement("progress");
      bar.value = doc.progress.share;
      bar.setAttribute("aria-label", `Fit of ${doc.name}`);
      item.append(bar);
    }
    if (this.library && "title" in doc) item.append(this.removing(doc));
    return item;
  }

  removing(doc) {
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "remove";
    remove.dataset.focus = `remove ${doc.id}`;
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${doc.name}`);
    remove.addEventListener("click", () => {
      const dialog = byId("confirm");
      byId("confirm-text").textContent = `Remove ${doc.name} from the library?`;
      dialog.querySelector(".yes").onclick = () => {
        dialog.close();
        api.remove(doc.id).then(() => this.look(), this.failed);
      };
      dialog.showModal();
    });
    return remove;
  }

  choose(model) {
    if (this.target === model) return;
    this.target = model;
    this.changed(model);
    for (const button of document.querySelectorAll("button.document")) button.setAttribute("aria-pressed", "false");
    this.shown = "";
    this.look();
  }

  async add(files) {
    for (const file of files) {
      try {
        if (file.size > this.limit) throw new Error(`larger than ${size(this.limit)}`);
        await api.upload(file);
        this.look();
      } catch (error) {
        if (error.status === 401) return this.wantKey();
        this.notice(`${file.name}: ${error.message}`);
      }
    }
  }

  notice(text) {
    const item = document.createElement("li"), close = document.createElement("button");
    item.className = "problem";
    item.setAttribute("role", "alert");
    close.type = "button";
    close.textContent = "×";
    close.setAttribute("aria-label", "Dismiss");
    close.addEventListener("click", () => item.remove());
    item.append(`${text} `, close);
    byId("notices").append(item);
  }

  dropping() {
    const cover = byId("drop"), hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault(); // or the browser would leave the page and open the file
      cover.hidden = !this.library;
    });
    addEventListener("dragleave", (event) => (cover.hidden = event.relatedTarget === null || cover.hidden));
    addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      cover.hidden = true;
      if (!this.library) return this.notice("Files are added where `nectar serve library` runs.");
      const items = [...event.dataTransfer.items].filter((item) => item.kind === "file");
      const folders = items.map((item) => item.webkitGetAsEntry()).filter((entry) => entry?.isDirectory);
      for (const folder of folders) this.notice(`${folder.name} is a folder: \`nectar add\` takes folders.`);
      const names = new Set(folders.map((folder) => folder.name));
      this.add([...event.dataTransfer.files].filter((file) => !names.has(file.name)));
    });
  }
}
