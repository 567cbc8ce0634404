// The box in which a message is written, with the files that go along.

import { button, count, el, later } from "./dom.js";

const MAX_BYTES = 200_000; // of a file

async function readText(file) {
  if (file.size > MAX_BYTES) {
    const size = count(Math.ceil(file.size / 1000));
    throw new Error(`${file.name} has ${size} kB, and ${MAX_BYTES / 1000} kB are taken.`);
  }
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (!text.includes("\0")) return { name: file.name, text };
  } catch {
    // As with a text that has zero bytes.
  }
  throw new Error(`${file.name} is no text in UTF-8: only texts are taken.`);
}

export class Composer {
  /**
   * `onSend(text, attachments)` resolves to false if they weren't sent: they return to the box
   * then.
   */
  constructor(store, { onSend, onStop, onError }) {
    Object.assign(this, { store, onSend, onStop, onError, files: [], id: null });
    const props = { "aria-label": "Message", placeholder: "Message", rows: "1", dir: "auto" };
    this.box = el("textarea", props);
    this.chips = el("ul", { class: "chips", "aria-label": "Attached files", hidden: true });
    this.input = el("input", { type: "file", multiple: true, hidden: true });
    this.stop = button("Stop", () => this.onStop(), { class: "primary", hidden: true });
    this.send = el("button", { type: "submit", class: "primary" }, "Send");
    const attach = button("Attach files", () => this.input.click());
    const row = el("div", { class: "row" }, attach, this.input, this.send, this.stop);
    this.element = el("form", { class: "composer" }, this.chips, this.box, row);
    this.save = later(200, () => this.keep());
    this.listen();
  }

  listen() {
    this.element.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.box.addEventListener("keydown", (event) => {
      // Safari ends a composition before its Enter, which only the old key code tells.
      const isComposing = event.isComposing || event.keyCode === 229;
      if (event.key !== "Enter" || event.shiftKey || isComposing) return;
      event.preventDefault();
      this.submit();
    });
    this.box.addEventListener("input", () => {
      this.fit();
      this.save();
    });
    this.input.addEventListener("change", async () => {
      await this.attach([...this.input.files]);
      this.input.value = "";
    });
    addEventListener("pagehide", () => this.keep());
  }

  /** Take files that are dropped on an element. */
  takeDropsOn(element) {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    element.addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      this.element.classList.add("target");
    });
    element.addEventListener("dragleave", () => this.element.classList.remove("target"));
    element.addEventListener("drop", (event) => {
      this.element.classList.remove("target");
      if (!hasFiles(event)) return;
      event.preventDefault();
      this.attach([...event.dataTransfer.files]);
    });
  }

  async attach(files) {
    for (const file of files) {
      try {
        this.files.push(await readText(file));
      } catch (error) {
        this.onError(error.message);
      }
    }
    this.showFiles();
    this.save();
    this.box.focus();
  }

  showFiles() {
    const chips = this.files.map((file) => {
      const remove = () => {
        this.files = this.files.filter((other) => other !== file);
        this.showFiles();
        this.save();
        this.box.focus();
      };
      return el("li", {}, file.name, button("×", remove, { "aria-label": `Remove ${file.name}` }));
    });
    this.chips.replaceChildren(...chips);
    this.chips.hidden = !chips.length;
  }

  // Grow with the text, up to a third of the window.
  fit() {
    this.box.style.height = "auto";
    this.box.style.height = `${Math.min(this.box.scrollHeight, innerHeight / 3)}px`;
  }

  set(text, files) {
    this.box.value = text;
    this.files = files;
    this.showFiles();
    this.fit();
  }

  /** Show the draft of a conversation, and keep that of the one before. */
  async open(id) {
    if (this.id !== null) this.keep();
    this.id = id;
    this.set("", []);
    const draft = await this.store.draft(id);
    // A person may have begun to write meanwhile.
    if (this.id === id && draft && !this.box.value) this.set(draft.text, draft.attachments);
  }

  async keep(id = this.id, text = this.box.value, attachments = this.files) {
    if (id === null) return;
    if (text || attachments.length) await this.store.putDraft(id, { text, attachments });
    else await this.store.removeDraft(id);
  }

  async submit() {
    const [id, text, attachments] = [this.id, this.box.value, this.files];
    if (!this.stop.hidden || (!text.trim() && !attachments.length)) return;
    this.set("", []);
    this.box.focus();
    const isSent = await this.onSend(text, attachments);
    if (isSent) await this.keep();
    else if (this.id === id) this.set(this.box.value || text, attachments);
    else await this.keep(id, text, attachments);
  }

  setRunning(isRunning) {
    const hadFocus = [this.send, this.stop].includes(document.activeElement);
    this.stop.hidden = !isRunning;
    this.send.hidden = isRunning;
    if (hadFocus) this.box.focus();
  }
}
