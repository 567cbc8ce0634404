// The box in which a message is written, with the files that go along.

import { button, chooseFiles, count, el, find, showRunning, tell, tellError } from "./dom.js";
import { keep, recall } from "./store.js";

const MAX_BYTES = 200_000; // of a file

async function readText(file) {
  if (file.size > MAX_BYTES) {
    const size = count(Math.ceil(file.size / 1000));
    throw new Error(`${file.name} has ${size} kB, and ${MAX_BYTES / 1000} kB are taken.`);
  }
  try {
    const decoder = new TextDecoder("utf-8", { fatal: true });
    return { name: file.name, text: decoder.decode(await file.arrayBuffer()) };
  } catch {
    throw new Error(`${file.name} is no text in UTF-8: only texts are taken.`);
  }
}

function keepDraft(id, text, attachments) {
  try {
    keep(`draft ${id}`, text || attachments.length ? { text, attachments } : null);
  } catch {
    tell("The draft is too long to be kept: send it, or remove files, before you leave the page.");
  }
}

export class Composer {
  /** `send(text, attachments)` resolves to false if they stay to be sent. */
  constructor(element, send) {
    Object.assign(this, { element, send, files: [], id: null, box: find("textarea", element) });
    chooseFiles(element, (files) => this.attach(files));
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
    this.box.addEventListener("input", () => this.keep());
    for (const type of ["dragover", "drop"]) {
      find("#chat").addEventListener(type, (event) => {
        const { types, files } = event.dataTransfer;
        if (!types.includes("Files")) return;
        event.preventDefault();
        if (type === "drop") this.attach([...files]);
      });
    }
  }

  async attach(files) {
    for (const file of files) {
      await readText(file).then((read) => this.setFiles([...this.files, read]), tellError);
    }
  }

  setFiles(files) {
    this.set(this.box.value, files);
    this.keep();
    this.box.focus();
  }

  set(text, files) {
    const chip = (file) => {
      const remove = () => this.setFiles(this.files.filter((other) => other !== file));
      return el("li", {}, file.name, button("×", remove, { "aria-label": `Remove ${file.name}` }));
    };
    this.files = files;
    this.box.value = text;
    find(".chips", this.element).replaceChildren(...files.map(chip));
    find(".chips", this.element).hidden = !files.length;
  }

  /** Show the draft of a conversation. */
  open(id) {
    this.id = id;
    const { text = "", attachments = [] } = recall(`draft ${id}`) ?? {};
    this.set(text, attachments);
  }

  /** Have the draft be another conversation's. */
  move(id) {
    keepDraft(this.id, "", []);
    this.id = id;
    this.keep();
  }

  keep = () => keepDraft(this.id, this.box.value, this.files);

  async submit() {
    const [id, text, files] = [this.id, this.box.value, this.files];
    if (!find(".stop", this.element).hidden || (!text.trim() && !files.length)) return;
    this.set("", []);
    this.box.focus();
    const isSent = await this.send(text, files);
    keepDraft(id, isSent ? "" : text, isSent ? [] : files);
    if (isSent) this.keep();
    else if (this.id === id) this.set(text, files);
  }

  setRunning = (isRunning) => showRunning(this.element, isRunning);
}
