// The page: a client of the server's API, which keeps conversations in this browser.

import { Api } from "./api.js";
import { Composer } from "./composer.js";
import { askKey, showError, showNotice } from "./dialogs.js";
import { announce, button, download, el } from "./dom.js";
import { aboutModel, tabs } from "./header.js";
import { Meter } from "./meter.js";
import { isContextFull, Runner } from "./runner.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { openStore } from "./store.js";
import { completionTab, infillTab } from "./tasks.js";
import { Thread } from "./thread.js";
import * as tree from "./tree.js";

const fileName = (title, ending) => `${title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}.${ending}`;

class Page {
  constructor(store, api, model) {
    Object.assign(this, { store, api, model, all: new Map(), shown: tree.newConversation() });
    this.settings = new Settings(model, store);
    this.settings.current = () => this.shown.settings; // of the tabs without a dialog
    this.meter = new Meter(api, model);
    this.thread = new Thread(api, (name, message, value) => this.act(name, message, value));
    this.composer = new Composer(store, {
      onSend: (text, files) => this.send(text, files),
      onStop: () => this.runner.stop(this.shown.id),
      onError: showError,
    });
    this.runner = new Runner(api, model, store, {
      onStart: (id) => id === this.shown.id && this.composer.setRunning(true),
      onPiece: (id, message) => id === this.shown.id && this.thread.grow(message),
      onEnd: (id, message, error) => this.end(id, message, error),
    });
    this.sidebar = new Sidebar({
      create: () => this.open(tree.newConversation(), true),
      open: (id) => this.open(this.all.get(id), true),
      rename: (id, title) => this.change(id, (conversation) => (conversation.title = title)),
      remove: (id) => this.remove(id),
      exportJson: (ids = [...this.all.keys()]) => this.exportJson(ids),
      exportMarkdown: (id) => this.exportMarkdown(this.all.get(id)),
      importFiles: (files) => this.importFiles(files),
    });
    store.onChange((change) => this.changed(change));
  }

  async start() {
    for (const conversation of await this.store.all()) this.all.set(conversation.id, conversation);
    this.build();
    addEventListener("hashchange", () => this.openNamed());
    this.openNamed();
    for (const conversation of this.all.values()) this.runner.watch(conversation);
    if (!this.store.isLasting) {
      showError("This browser keeps nothing: export conversations before you close this tab.");
    }
  }

  build() {
    const { meta = {} } = this.model;
    const page = document.getElementById("page");
    const inner = el("div", { class: "inner" }, this.composer.element, this.meter.element);
    const chat = el("div", { class: "panel" }, this.thread.element, inner);
    this.composer.takeDropsOn(chat);
    const panels = meta.chats === false ? {} : { Chat: chat };
    const task = (make) => el("div", { class: "panel task-panel" }, make(this.api, this.model, this.settings));
    panels.Completion = task(completionTab);
    if (meta.infills) panels.Infilling = task(infillTab);
    const drawer = (isOpen) => {
      page.classList.toggle("open", isOpen);
      toggle.setAttribute("aria-expanded", String(isOpen));
    };
    this.closeDrawer = () => drawer(false);
    const flip = () => drawer(!page.classList.contains("open"));
    const controls = { "aria-controls": "conversations", "aria-expanded": "false" };
    const toggle = button("Conversations", flip, { class: "toggle", ...controls });
    const names = el("div", { class: "names" }, el("h1", {}, this.model.id), el("p", {}, aboutModel(this.model)));
    const list = tabs(panels, (name) => page.classList.toggle("chats", name === "Chat"));
    const settings = button("Settings", () => this.openSettings());
    const header = el("header", { class: "top" }, toggle, names, list, settings);
    page.replaceChildren(this.sidebar.element, el("main", {}, header, ...Object.values(panels)));
    page.append(el("div", { class: "shade", onclick: this.closeDrawer }), this.settings.element);
    page.addEventListener("keydown", (event) => event.key === "Escape" && this.closeDrawer());
    page.classList.toggle("chats", "Chat" in panels);
  }

  // What is shown.

  openNamed() {
    const named = this.all.get(location.hash.slice(1));
    if (!named || named.id !== this.shown.id) this.open(named ?? tree.newConversation());
  }

  open(conversation, isChosen = false) {
    this.shown = conversation;
    const hash = this.all.has(conversation.id) ? `#${conversation.id}` : "";
    if (isChosen) history.pushState(null, "", hash || location.pathname + location.search);
    this.composer.open(this.all.has(conversation.id) ? conversation.id : "new");
    this.show(conversation);
    if (isChosen) {
      this.closeDrawer();
      this.composer.box.focus();
    }
  }

  show(conversation) {
    this.shown = conversation;
    document.title = conversation.leaf ? `${conversation.title} · ${this.model.id}` : this.model.id;
    this.thread.show(conversation);
    this.composer.setRunning(this.runner.isRunning(conversation.id));
    this.sidebar.update([...this.all.values()], conversation.id);
    if (!this.runner.isRunning(conversation.id)) this.meter.update(conversation);
  }

  changed({ name, id, record }) {
    if (name !== "conversations") return;
    if (record) this.all.set(id, record);
    else this.all.delete(id);
    if (record) this.runner.watch(record);
    if (id !== this.shown.id) this.sidebar.update([...this.all.values()], this.shown.id);
    else if (record) this.show(record);
    else this.open(tree.newConversation(), true);
  }

  // What a person does.

  async change(id, change) {
    try {
      if (id === this.shown.id && !this.all.has(id)) await this.keep();
      return await this.store.update(id, change);
    } catch (error) {
      showError(`It couldn't be kept: ${error.message}`);
      return null;
    }
  }

  // A conversation is kept from its first message or setting on.
  async keep() {
    const { id } = this.shown;
    await this.store.put(this.shown);
    history.replaceState(null, "", `#${id}`);
    this.composer.id = id;
    await this.store.removeDraft("new");
  }

  /** Return the ids to drop so that a conversation fits, null if it isn't to be sent. */
  async dropped(conversation) {
    let ids = [];
    try {
      const isFitting = await this.meter.offerToDrop(conversation, (some) => (ids = some));
      return isFitting ? ids : null;
    } catch (error) {
      if (error.code !== "unreachable" && error.status !== 401) return []; // asking will tell
      showError(error.message);
      return null;
    }
  }

  async send(text, attachments) {
    const { id } = this.shown;
    const message = tree.newMessage("user", text, { attachments });
    const planned = structuredClone(this.shown);
    tree.addMessage(planned, message);
    const ids = await this.dropped(planned);
    if (!ids) return false;
    const add = (conversation) => {
      conversation.dropped.push(...ids);
      tree.addMessage(conversation, message);
    };
    if (!(await this.change(id, add))) return false;
    this.thread.isAtEnd = true;
    this.runner.answer(id);
    return true;
  }

  async act(name, { id, parent, role }, value) {
    const at = this.shown.id;
    if (name !== "walk") await this.runner.stop(at);
    if (name === "continue") this.runner.continue(at, id);
    if (name === "retry") this.runner.answer(at, role === "assistant" ? parent : id);
    if (name === "walk") {
      const now = await this.change(at, (conversation) => tree.walk(conversation, id, value));
      const place = now && tree.siblings(now, id).indexOf(id) + value;
      if (now) this.thread.focus(tree.siblings(now, id)[place], value > 0 ? "Next version" : "Previous version");
    }
    if (name === "edit") {
      await this.change(at, (conversation) => tree.edit(conversation, id, value));
      if (role !== "assistant") this.runner.answer(at);
    }
    if (name === "result") this.result(at, ...value);
    if (name === "remove") this.removeTurn(at, id);
  }

  async result(at, call, text) {
    const message = tree.newMessage("tool", text, { tool_call_id: call.id });
    const now = await this.change(at, (conversation) => tree.addMessage(conversation, message));
    if (now && !tree.openCalls(now).length) this.runner.answer(at);
  }

  async removeTurn(at, id) {
    const before = structuredClone(this.shown);
    await this.change(at, (conversation) => tree.removeTurn(conversation, id));
    showNotice("The turn is deleted.", () => this.store.put(before));
    this.thread.element.focus();
  }

  async remove(id) {
    await this.runner.stop(id);
    const conversation = this.all.get(id);
    await this.store.remove(id);
    const undo = async () => {
      await this.store.put(conversation);
      this.open(conversation, true);
    };
    showNotice(`“${conversation.title}” is deleted.`, undo);
  }

  exportJson(ids) {
    const chosen = ids.map((id) => this.all.get(id));
    const name = ids.length === 1 ? chosen[0].title : "conversations";
    download(fileName(name, "json"), "application/json", tree.toJson(chosen));
  }

  exportMarkdown(conversation) {
    download(fileName(conversation.title, "md"), "text/markdown", tree.toMarkdown(conversation));
  }

  async importFiles(files) {
    for (const file of files) {
      try {
        const found = tree.fromJson(await file.text());
        for (const one of found) {
          if (this.all.has(one.id)) one.id = tree.newId();
          await this.store.put(one);
        }
        announce(`${found.length} imported.`);
        if (found.length) this.open(this.all.get(found.at(-1).id), true);
      } catch (error) {
        showError(`${file.name} can't be imported. ${error.message}`);
      }
    }
  }

  openSettings() {
    const { id } = this.shown;
    const change = (changes) => this.change(id, (conversation) => Object.assign(conversation, changes));
    this.settings.open(structuredClone(this.shown), change);
  }

  async end(id, message, error) {
    if (id === this.shown.id) this.show(this.all.get(id) ?? this.shown);
    if (error && isContextFull(error)) {
      const ids = await this.dropped(this.all.get(id));
      if (!ids?.length) return showError(error.message);
      await this.change(id, (conversation) => conversation.dropped.push(...ids));
      return this.runner.continue(id, message.id);
    }
    if (error) return showError(error.message);
    announce(message.content ? `The assistant says: ${message.content}` : "The answer has ended.");
  }
}

async function start() {
  const api = new Api(askKey);
  try {
    const [model] = await api.models();
    const store = await openStore();
    await new Page(store, api, model).start();
  } catch (error) {
    document.getElementById("loading").textContent = "The model's name isn't known yet.";
    showError(error.message, { label: "Try again", run: start });
  }
}

start();
