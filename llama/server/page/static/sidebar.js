// The list of conversations: search, rename, delete, export and import.

import { button, el } from "./dom.js";

const textOf = ({ title, system, messages }) =>
  [title, system, ...Object.values(messages).map(({ content }) => content)].join("\n").toLowerCase();

export class Sidebar {
  /**
   * `actions` has `create()`, `open(id)`, `rename(id, title)`, `remove(id)`, `exportJson(ids)`,
   * `exportMarkdown(id)` and `importFiles(files)`.
   */
  constructor(actions) {
    Object.assign(this, { actions, conversations: [], shownId: null, renamed: null });
    const search = { type: "search", "aria-label": "Search conversations", placeholder: "Search" };
    this.search = el("input", { ...search, oninput: () => this.list() });
    this.items = el("ul", { class: "items" });
    this.nothing = el("p", { class: "note", role: "status" });
    const files = el("input", { type: "file", accept: ".json", multiple: true, hidden: true });
    files.addEventListener("change", async () => {
      await actions.importFiles([...files.files]);
      files.value = "";
    });
    this.exportAll = button("Export all", () => actions.exportJson());
    this.element = el(
      "nav",
      { class: "sidebar", id: "conversations", "aria-label": "Conversations" },
      button("New conversation", () => actions.create(), { class: "primary" }),
      this.search,
      this.items,
      this.nothing,
      el("div", { class: "row" }, button("Import", () => files.click()), files, this.exportAll),
    );
  }

  update(conversations, shownId) {
    const order = [...conversations].sort((one, other) => other.created - one.created);
    Object.assign(this, { conversations: order, shownId });
    this.list();
  }

  list() {
    const words = this.search.value.trim().toLowerCase();
    const found = this.conversations.filter((one) => !words || textOf(one).includes(words));
    // An answer that grows changes a conversation twice a second, and its item never.
    const mark = JSON.stringify([this.shownId, found.map(({ id, title }) => [id, title])]);
    const isEmpty = !this.conversations.length;
    this.nothing.textContent = isEmpty ? "Conversations stay in this browser." : "";
    if (!isEmpty && !found.length) this.nothing.textContent = `Nothing has “${words}” in it.`;
    this.exportAll.disabled = isEmpty;
    if (mark === this.mark) return;
    this.mark = mark;
    this.items.replaceChildren(...found.map((one) => this.item(one)));
  }

  item({ id, title }) {
    const { actions } = this;
    const isShown = id === this.shownId;
    const open = button(title, () => actions.open(id), { class: "title", dir: "auto" });
    if (isShown) open.setAttribute("aria-current", "page");
    const rename = () => item.replaceChild(this.renaming(id, title, item), open);
    const tools = el(
      "div",
      { class: "row" },
      button("Rename", rename),
      button("Delete", () => actions.remove(id)),
      button("Export as JSON", () => actions.exportJson([id])),
      button("Export as Markdown", () => actions.exportMarkdown(id)),
    );
    const item = el("li", { class: isShown ? "item shown" : "item" }, open, tools);
    return item;
  }

  renaming(id, title) {
    const box = el("input", { "aria-label": "Title", value: title, dir: "auto" });
    const end = (isKept) => {
      if (this.renamed !== box) return;
      this.renamed = null;
      this.mark = null; // the item is to be made again
      const text = box.value.trim();
      if (isKept && text && text !== title) this.actions.rename(id, text);
      else this.list();
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) end(true);
      if (event.key === "Escape") end(false);
    });
    box.addEventListener("blur", () => end(true));
    this.renamed = box;
    setTimeout(() => box.select());
    return box;
  }
}
