// The box in which a message is written, with the files that go along.

import { actOn, button, count, el, find } from "./dom.js";

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
    // It is refused as one with zero bytes is.
  }
  throw new Error(`${file.name} is no text in UTF-8: only texts are taken.`);
}

export class Composer {
  /** `onSend(text, attachments)` resolves to false if they stay to be sent. */
  constructor(element, store, { onSend, onStop, onError }) {
    Object.assign(this, { element, store, onSend, onError, files: [], id: null });
    this.box = find("textarea", element);
    this.input = find("input", element);
    actOn(element, { choose: () => this.input.click(), stop: onStop });
    element.addEventListener("submit", (event) => {
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
    this.box.addEventListener("input", () => this.changed());
    this.input.addEventListener("change", async () => {
      await this.attach(this.input.files);
      this.input.value = "";
    });
    addEventListener("pagehide", () => {
      if (this.id === null) return;
      store.atEnd("drafts", this.id, { text: this.box.value, attachments: this.files });
    });
  }

  /** Take files that are dropped on an element. */
  takeDropsOn(element) {
    const on = (type, isTarget) =>
      element.addEventListener(type, (event) => {
        if (!event.dataTransfer.types.includes("Files")) return;
        event.preventDefault();
        this.element.classList.toggle("target", isTarget);
        if (type === "drop") this.attach(event.dataTransfer.files);
      });
    on("dragover", true);
    on("dragleave", false);
    on("drop", false);
  }

  async attach(files) {
    for (const file of [...files]) {
      await readText(file).then(
        (read) => this.set(this.box.value, [...this.files, read]),
        (error) => this.onError(error.message),
      );
    }
    this.changed();
    this.box.focus();
  }

  set(text, files) {
    const chip = (file) => {
      const remove = () => {
        this.set(this.box.value, this.files.filter((other) => other !== file));
        this.changed();
        this.box.focus();
      };
      return el("li", {}, file.name, button("×", remove, { "aria-label": `Remove ${file.name}` }));
    };
    this.files = files;
    const chips = find(".chips", this.element);
    chips.replaceChildren(...files.map(chip));
    chips.hidden = !files.length;
    this.box.value = text;
    this.fit();
  }

  // Grow with the text, up to a third of the window.
  fit() {
    this.box.style.height = "auto";
    this.box.style.height = `${Math.min(this.box.scrollHeight, innerHeight / 3)}px`;
  }

  changed() {
    this.fit();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.keep(), 200);
  }

  /** Show the draft of a conversation, and keep that of the one before. */
  async open(id) {
    this.keep();
    this.id = id;
    this.set("", []);
    const draft = await this.store.draft(id);
    const isUntouched = this.id === id && !this.box.value; // a person may have begun to write
    if (isUntouched && draft) this.set(draft.text, draft.attachments);
  }

  keep(id = this.id, text = this.box.value, attachments = this.files) {
    if (id === null) return null;
    if (!text && !attachments.length) return this.store.removeDraft(id);
    return this.store.putDraft(id, { text, attachments });
  }

  async submit() {
    const [id, text, files] = [this.id, this.box.value, this.files];
    if (this.isRunning || (!text.trim() && !files.length)) return;
    this.set("", []);
    this.box.focus();
    const isSent = await this.onSend(text, files);
    if (!isSent && this.id === id) this.set(text, files);
    await (isSent || this.id === id ? this.keep() : this.keep(id, text, files));
  }

  setRunning(isRunning) {
    const send = find("[type=submit]", this.element);
    const stop = find("[data-do=stop]", this.element);
    const hadFocus = [send, stop].includes(document.activeElement);
    [this.isRunning, send.hidden, stop.hidden] = [isRunning, isRunning, !isRunning];
    if (hadFocus) this.box.focus();
  }
}
