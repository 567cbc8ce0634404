// The box in which a message is written, with the files that go along.

import { actOn, copyOf, count, find, takeFiles, tell } from "./dom.js";
import { keep, recall } from "./store.js";

const MAX_KB = 200; // of a file

async function readFile(file) {
  const [name, kB] = [file.name, Math.ceil(file.size / 1000)];
  if (kB > MAX_KB) throw new Error(`It has ${count(kB)} kB, and ${MAX_KB} are taken.`);
  try {
    const decoder = new TextDecoder("utf-8", { fatal: true });
    return { name, text: decoder.decode(await file.arrayBuffer()) };
  } catch {
    throw new Error("It is no text in UTF-8: only texts are taken.");
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
    takeFiles(find("#chat"), this.attach);
    actOn(element, { removeFile: (i) => this.setFiles(this.files.toSpliced(i, 1)) });
    element.addEventListener("submit", () => this.submit());
    this.box.addEventListener("keydown", (event) => {
      // Safari ends a composition before its Enter, which only the old key code tells.
      const isComposing = event.isComposing || event.keyCode === 229;
      if (event.key !== "Enter" || event.shiftKey || isComposing) return;
      event.preventDefault();
      this.submit();
    });
    this.box.addEventListener("input", () => this.keep());
  }

  attach = (file) => readFile(file).then((read) => this.setFiles([...this.files, read]));

  setFiles(files) {
    this.set(this.box.value, files);
    this.keep();
    this.box.focus();
  }

  set(text, files) {
    const chips = files.map(({ name }, id) => copyOf("chip", { id, name }));
    find(".chips", this.element).replaceChildren(...chips);
    this.box.value = text;
    this.files = files;
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
    if (this.element.matches(".running") || (!text.trim() && !files.length)) return;
    this.set("", []);
    this.box.focus();
    const isSent = await this.send(text, files);
    keepDraft(id, isSent ? "" : text, isSent ? [] : files);
    if (isSent) this.keep();
    else if (this.id === id) this.set(text, files);
  }
}
