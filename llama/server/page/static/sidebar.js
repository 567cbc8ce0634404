// The list of conversations: search, rename, delete, export and import.

import { actOn, copyOf, el, find } from "./dom.js";

const textOf = ({ title, system, messages }) =>
  [title, system, ...Object.values(messages).map(({ content }) => content)].join("\n");

export class Sidebar {
  /**
   * `actions` has `create()`, `exportAll()` and `importFiles(files)`, and `open(id)`, `remove(id)`,
   * `exportJson(id)`, `exportMarkdown(id)` and `rename(id, title)`.
   */
  constructor(element, actions) {
    Object.assign(this, { element, actions, conversations: [] });
    const files = find("input[type=file]", element);
    files.addEventListener("change", async () => {
      await actions.importFiles([...files.files]);
      files.value = "";
    });
    find("input[type=search]", element).addEventListener("input", () => this.list());
    const { create, exportAll } = actions;
    actOn(element, { create, exportAll, choose: () => files.click() });
  }

  update(conversations, shownId) {
    const order = [...conversations].sort((one, other) => other.created - one.created);
    Object.assign(this, { conversations: order, shownId });
    this.list();
  }

  list() {
    const words = find("input[type=search]", this.element).value.trim().toLowerCase();
    const has = (one) => !words || textOf(one).toLowerCase().includes(words);
    const found = this.conversations.filter(has);
    // An answer that grows changes a conversation twice a second, and its item never.
    const named = found.map(({ id, title }) => [id, title]);
    const mark = JSON.stringify([this.shownId, words, named]);
    if (mark === this.mark) return;
    this.mark = mark;
    find(".items", this.element).replaceChildren(...found.map((one) => this.item(one)));
    const isEmpty = !this.conversations.length;
    const says = isEmpty ? "Conversations stay in this browser." : `Nothing has “${words}”.`;
    find(".note", this.element).textContent = found.length ? "" : says;
    find("[data-do=exportAll]", this.element).disabled = isEmpty;
  }

  item({ id, title }) {
    const item = copyOf("item");
    const open = find(".title", item);
    open.textContent = title;
    item.classList.toggle("shown", id === this.shownId);
    if (id === this.shownId) open.setAttribute("aria-current", "page");
    const named = ["open", "remove", "exportJson", "exportMarkdown"];
    const actions = named.map((name) => [name, () => this.actions[name](id)]);
    const rename = () => open.replaceWith(this.renaming(id, title));
    actOn(item, { ...Object.fromEntries(actions), rename });
    return item;
  }

  renaming(id, title) {
    const box = el("input", { "aria-label": "Title", value: title, dir: "auto" });
    const end = () => {
      const text = box.value.trim() || title;
      box.value = title; // for the blur that follows an Enter
      this.mark = null;
      if (text === title) this.list();
      else this.actions.rename(id, text);
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") box.value = title;
      if (["Enter", "Escape"].includes(event.key) && !event.isComposing) end();
    });
    box.addEventListener("blur", end);
    setTimeout(() => box.select());
    return box;
  }
}
