// The page: a client of the server's API, which keeps conversations in this browser.

import { Api } from "./api.js";
import { Composer } from "./composer.js";
import { actOn, announce, count, download, find, tell } from "./dom.js";
import { fromJson } from "./imports.js";
import { Meter } from "./meter.js";
import { Runner } from "./runner.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { openStore } from "./store.js";
import { showTabs } from "./tabs.js";
import { Thread } from "./thread.js";
import * as tree from "./tree.js";

const exportJson = (conversations, title) =>
  download(`${title}.json`, "application/json", tree.toJson(conversations));

const exportMarkdown = (conversation) =>
  download(`${conversation.title}.md`, "text/markdown", tree.toMarkdown(conversation));

const undoable = (text, run) => tell(text, { label: "Undo", run, role: "status" });

class Page {
  constructor(store, api, model) {
    Object.assign(this, { store, model, all: new Map(), shown: tree.newConversation() });
    this.settings = new Settings(model, store);
    this.settings.current = () => this.shown.settings; // for the tabs without a dialog
    this.meter = new Meter(api, model);
    this.thread = new Thread(find(".thread"), api, (...what) => this.act(...what));
    this.composer = new Composer(find(".composer"), store, {
      onSend: (text, attachments) => this.send(text, attachments),
      onStop: () => this.runner.stop(this.shown.id),
      onError: tell,
    });
    this.runner = new Runner(api, model, store, {
      onStart: (id) => id === this.shown.id && this.composer.setRunning(true),
      onPiece: (id, message) => id === this.shown.id && this.thread.grow(message),
      onEnd: (id, message, error) => this.end(id, message, error),
    });
    this.sidebar = new Sidebar(find(".sidebar"), {
      create: () => this.choose(tree.newConversation()),
      open: (id) => this.choose(this.all.get(id)),
      rename: (id, title) => this.change(id, (conversation) => (conversation.title = title)),
      remove: (id) => this.remove(id),
      exportAll: () => exportJson([...this.all.values()], "conversations"),
      exportJson: (id) => exportJson([this.all.get(id)], this.all.get(id).title),
      exportMarkdown: (id) => exportMarkdown(this.all.get(id)),
      importFiles: (files) => this.importFiles(files),
    });
    this.build(api);
  }

  build(api) {
    const { meta, max_model_len, id } = this.model;
    find("h1").textContent = id;
    const format = meta?.chat_format && `chat format “${meta.chat_format}”`;
    const context = `${count(max_model_len)} tokens of context`;
    const about = [meta?.description, meta?.precision, format, context].filter(Boolean);
    find(".names p").textContent = about.join(" · ");
    find(".inner").append(this.meter.element);
    this.composer.takeDropsOn(find("#chat"));
    showTabs(api, this.model, this.settings);
    const [page, drawer] = [find("#page"), find("[data-do=drawer]")];
    page.append(this.settings.element);
    this.drawer = (isOpen) => {
      page.classList.toggle("open", isOpen);
      drawer.setAttribute("aria-expanded", String(isOpen));
    };
    const flip = () => this.drawer(!page.classList.contains("open"));
    actOn(page, { drawer: flip, settings: () => this.openSettings() });
    page.addEventListener("keydown", (event) => event.key === "Escape" && this.drawer(false));
  }

  async start() {
    for (const found of await this.store.all()) this.all.set(found.id, found);
    this.store.onChange((change) => this.changed(change));
    addEventListener("hashchange", this.openNamed);
    this.openNamed();
    for (const conversation of this.all.values()) this.runner.watch(conversation);
    [find("#loading").hidden, find("#page").hidden] = [true, false];
    this.composer.fit();
    if (!this.store.isLasting) tell("This browser keeps nothing: export what you want to keep.");
  }

  openNamed = () => this.open(this.all.get(location.hash.slice(1)) ?? tree.newConversation());

  /** Open a conversation that a person asked for. */
  choose(conversation) {
    const hash = this.all.has(conversation.id) ? `#${conversation.id}` : "";
    history.pushState(null, "", location.pathname + location.search + hash);
    this.open(conversation);
    find("#tab-chat").click();
    this.drawer(false);
    this.composer.box.focus();
  }

  open(conversation) {
    this.composer.open(this.all.has(conversation.id) ? conversation.id : "new");
    this.show(conversation);
  }

  show(conversation) {
    this.shown = conversation;
    const { id, leaf, title } = conversation;
    document.title = leaf ? `${title} · ${this.model.id}` : this.model.id;
    this.thread.show(conversation);
    this.composer.setRunning(this.runner.isRunning(id));
    this.sidebar.update(this.all.values(), id);
    if (conversation.messages[leaf]?.state !== "writing") this.meter.update(conversation);
  }

  /** Show what this tab or another one has changed. */
  changed({ name, id, record }) {
    if (name !== "conversations") return;
    if (!record) this.all.delete(id);
    else this.runner.watch(this.all.set(id, record).get(id));
    if (id !== this.shown.id) this.sidebar.update(this.all.values(), this.shown.id);
    else if (record) this.show(record);
    else this.choose(tree.newConversation());
  }

  async change(id, change) {
    try {
      if (id === this.shown.id && !this.all.has(id)) await this.keep();
      return await this.store.update(id, change);
    } catch (error) {
      tell(`It couldn't be kept: ${error.message}. Export and delete some, then try again.`);
      return null;
    }
  }

  // A conversation is kept from its first message or setting on.
  async keep() {
    await this.store.put(this.shown);
    history.replaceState(null, "", `${location.pathname}${location.search}#${this.shown.id}`);
    this.composer.id = this.shown.id;
    await this.store.removeDraft("new");
  }

  /** Return the ids of messages to drop so that the rest fits, null if it isn't to be sent. */
  async idsToDrop(conversation) {
    let ids = [];
    try {
      return (await this.meter.offerToDrop(conversation, (some) => (ids = some))) ? ids : null;
    } catch (error) {
      if (error.code !== "unreachable" && error.status !== 401) return []; // the answer will tell
      tell(error.message);
      return null;
    }
  }

  async send(text, attachments) {
    const [{ id }, planned] = [this.shown, structuredClone(this.shown)];
    const message = tree.newMessage("user", text, { attachments });
    tree.addMessage(planned, message);
    const ids = await this.idsToDrop(planned);
    const add = (conversation) => {
      conversation.dropped.push(...ids);
      tree.addMessage(conversation, message);
    };
    if (!ids || !(await this.change(id, add))) return false;
    this.thread.isAtEnd = true;
    this.runner.answer(id, message.id);
    return true;
  }

  /** Do what a person asks for at a message. */
  async act(name, { id, parent, role }, value) {
    const at = this.shown.id;
    const changed = (change) => this.change(at, change);
    if (name === "walk") {
      let other;
      await changed((conversation) => (other = tree.walk(conversation, id, value)));
      return this.thread.focusVersion(other, value > 0 ? "next" : "previous");
    }
    await this.runner.stop(at);
    if (name === "continue") this.runner.continue(at, id);
    if (name === "retry") this.runner.answer(at, role === "assistant" ? parent : id);
    if (name === "change") {
      const now = await changed((conversation) => tree.edit(conversation, id, value));
      if (now && role !== "assistant") this.runner.answer(at, now.leaf);
    }
    if (name === "result") {
      const message = tree.newMessage("tool", value[1], { tool_call_id: value[0] });
      const now = await changed((conversation) => tree.addMessage(conversation, message));
      if (now && !tree.openCalls(now).calls.length) this.runner.answer(at, now.leaf);
    }
    if (name === "remove") {
      const before = structuredClone(this.shown);
      await changed((conversation) => tree.removeTurn(conversation, id));
      undoable("The turn is deleted.", () => this.store.put(before));
      this.thread.element.focus();
    }
  }

  async remove(id) {
    await this.runner.stop(id);
    const conversation = this.all.get(id);
    await this.store.remove(id);
    undoable(`“${conversation.title}” is deleted.`, async () => {
      await this.store.put(conversation);
      this.choose(conversation);
    });
  }

  async importFiles(files) {
    for (const file of files) {
      try {
        const found = fromJson(await file.text());
        for (const one of found) {
          if (this.all.has(one.id)) one.id = tree.newId();
          await this.store.put(one);
        }
        announce(`${found.length} conversations are imported.`);
        if (found.length) this.choose(this.all.get(found.at(-1).id));
      } catch (error) {
        tell(`${file.name} can't be imported. ${error.message}`);
      }
    }
  }

  openSettings() {
    const { id } = this.shown;
    this.settings.open(structuredClone(this.shown), (changes) =>
      this.change(id, (conversation) => Object.assign(conversation, changes)),
    );
  }

  /** Show that an answer has ended; one that doesn't fit is offered with fewer turns. */
  async end(id, message, error) {
    if (id === this.shown.id) this.show(this.all.get(id) ?? this.shown);
    if (!error) return announce(message?.content ? `Answer: ${message.content}` : "It has ended.");
    const isFull = error.code === "context_length_exceeded";
    const ids = isFull ? await this.idsToDrop(this.all.get(id)) : [];
    if (!ids?.length) return tell(error.message);
    await this.change(id, (conversation) => conversation.dropped.push(...ids));
    return this.runner.continue(id, message.id);
  }
}

function askKey(isWrong) {
  const [dialog, box] = [find("#key"), find("#key-box")];
  const says = isWrong ? "The server refused that wrong key." : "This server asks for a key.";
  find("#key-text").textContent = `${says} It is kept until this tab is closed.`;
  box.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue || null);
    find("form", dialog).onsubmit = (event) => {
      event.preventDefault();
      dialog.close(box.value.trim());
    };
    find("[data-do=cancel]", dialog).onclick = () => dialog.close("");
  });
}

async function start() {
  try {
    const api = new Api(askKey);
    const [model] = await api.models();
    await new Page(await openStore(), api, model).start();
  } catch (error) {
    tell(error.message, { label: "Try again", run: start });
  }
}

start();
