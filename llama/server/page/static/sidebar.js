// The list of conversations: search, rename, delete, export and import.

import { copyOf, find, takeFiles } from "./dom.js";

const textOf = ({ title, settings, messages }) =>
  [title, settings.system, ...Object.values(messages).map(({ content }) => content)].join("\n");

export class Sidebar {
  constructor(element, importFile) {
    Object.assign(this, { element, conversations: [] });
    takeFiles(element, importFile);
    find("input[type=search]", element).addEventListener("input", () => this.list());
  }

  update(conversations, shownId) {
    const order = [...conversations].sort((one, other) => other.created - one.created);
    Object.assign(this, { conversations: order, shownId });
    this.list();
  }

  list() {
    const words = find("input[type=search]", this.element).value.trim().toLowerCase();
    const has = (one) => !words || textOf(one).toLowerCase().includes(words);
    const current = (id) => (id === this.shownId ? "page" : "false");
    const itemOf = ({ id, title }) => ({ id, title, current: current(id) });
    const found = this.conversations.filter(has).map(itemOf);
    // An answer that grows changes a conversation twice a second, and its item never.
    const mark = JSON.stringify([words, found]);
    if (mark === this.mark) return;
    this.mark = mark;
    find(".items", this.element).replaceChildren(...found.map((one) => copyOf("item", one)));
    const isEmpty = !this.conversations.length;
    const says = isEmpty ? "Conversations stay in this browser." : `Nothing has “${words}”.`;
    find(".note", this.element).textContent = found.length ? "" : says;
    find("[data-do=exportAll]", this.element).disabled = isEmpty;
  }
}
