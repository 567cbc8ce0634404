// The page: a client of the server's API, which keeps conversations in this browser.

import { Api } from "./api.js";
import { Composer } from "./composer.js";
import { actOn, announce, ask, copy, count, download, find, showRunning, tell } from "./dom.js";
import { fromJson } from "./imports.js";
import { Meter } from "./meter.js";
import { Runner } from "./runner.js";
import { requestFields, Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { runTask, showTabs } from "./tasks.js";
import { Thread } from "./thread.js";
import * as tree from "./tree.js";

const adding = (message) => (conversation) => tree.addMessage(conversation, message);

const exportJson = (title, ...all) => download(title, "json", tree.toJson(all));

/** Return in plain words what a model is. */
function describe({ max_model_len, meta }) {
  const format = meta.chat_format && `chat format “${meta.chat_format}”`;
  const context = `${count(max_model_len)} tokens of context`;
  return [meta.description, meta.precision, format, context].filter(Boolean).join(" · ");
}

/** The page. Buttons name its methods, which get the id of what they stand in, and the button. */
class Page {
  all = new Map();

  shown = tree.newConversation();

  constructor(store, api, model) {
    Object.assign(this, { store, model });
    this.settings = new Settings(model);
    this.meter = new Meter(api, model);
    this.thread = new Thread(find(".thread"), api);
    this.composer = new Composer(find(".composer"), this.send);
    this.runner = new Runner(api, model, store, this);
    this.sidebar = new Sidebar(find(".sidebar"), (file) => this.importFile(file));
    [find("h1").textContent, find(".names p").textContent] = [model.id, describe(model)];
    showTabs(model.meta);
    const fields = () => requestFields(this.shown.settings, model.meta.sampling);
    for (const panel of document.querySelectorAll(".task")) runTask(panel, api, model, fields);
    actOn(find("#page"), this);
  }

  exportAll = () => exportJson("conversations", ...this.all.values());

  exportJson = (id) => exportJson(this.all.get(id).title, this.all.get(id));

  exportMarkdown = (id) =>
    download(this.all.get(id).title, "md", tree.toMarkdown(this.all.get(id)));

  async rename(id) {
    const title = await ask("rename", this.all.get(id).title);
    if (title.trim()) await this.change(id, (conversation) => (conversation.title = title));
  }

  stopAnswer = () => this.runner.stop(this.shown.id);

  continue = (id) => this.answer(() => {}, id);

  copy = (id) => copy(tree.contentOf(this.shown.messages[id]));

  copyCode = (_, button) => copy(button.nextElementSibling.textContent);

  probabilities = (id) => this.thread.views.get(id).toggleProbabilities();

  async start() {
    for (const found of await this.store.all()) this.all.set(found.id, found);
    this.store.onChange = (id, record) => this.changed(id, record);
    addEventListener("hashchange", () => this.open());
    for (const conversation of this.all.values()) this.runner.watch(conversation);
    [find("#loading").hidden, find("#page").hidden] = [true, false];
    this.open();
  }

  /** Open a conversation that a person asked for, without an id a new one. */
  choose(id = "") {
    history.pushState(null, "", `${location.pathname}${location.search}${id && `#${id}`}`);
    this.open();
    find("#tab-chat").click();
    find("#conversations").hidePopover();
    this.composer.box.focus();
  }

  /** Open the conversation that the address names. */
  open() {
    const found = this.all.get(location.hash.slice(1));
    this.composer.open(found?.id ?? "new");
    this.show(found ?? tree.newConversation());
  }

  show(conversation) {
    this.shown = conversation;
    const { id, leaf, title } = conversation;
    document.title = leaf ? `${title} · ${this.model.id}` : this.model.id;
    this.thread.show(conversation);
    showRunning(this.composer.element, this.runner.running.has(id));
    this.sidebar.update(this.all.values(), id);
    if (conversation.messages[leaf]?.state !== "writing") this.meter.update(conversation);
  }

  /** Show what this tab or another one has changed. */
  changed(id, record) {
    if (!record) this.all.delete(id);
    else this.runner.watch(this.all.set(id, record).get(id));
    if (id !== this.shown.id) this.sidebar.update(this.all.values(), this.shown.id);
    else if (record) this.show(record);
    else this.choose();
  }

  async change(id, change) {
    find("#errors [role=status]")?.remove(); // an undo would take this back, too
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
    history.replaceState(null, "", `#${this.shown.id}`);
    this.composer.move(this.shown.id);
  }

  /**
   * Change the conversation and have its end answered, or the answer `cutId` continued, if that
   * fits; return false if nothing is done as it doesn't.
   */
  async answer(change, cutId = null) {
    const { id } = this.shown;
    await this.runner.stop(id);
    const planned = structuredClone(this.shown);
    change(planned);
    const dropped = await this.meter.idsToDrop(planned).catch(({ message }) => tell(message));
    const add = (conversation) => {
      conversation.dropped.push(...dropped);
      change(conversation);
    };
    if (!dropped || !(await this.change(id, add))) return false;
    if (id === this.shown.id) this.thread.toEnd();
    this.runner.run(id, cutId);
    return true;
  }

  send = (text, attachments) => this.answer(adding(tree.newMessage("user", text, { attachments })));

  retry(id) {
    const { role, parent } = this.shown.messages[id];
    return this.answer((conversation) => (conversation.leaf = role === "assistant" ? parent : id));
  }

  async edit(id) {
    const { content, role } = this.shown.messages[id];
    const text = await ask("edit", content);
    if (!text) return;
    const change = (conversation) => tree.edit(conversation, id, text);
    await (role === "assistant" ? this.change(this.shown.id, change) : this.answer(change));
  }

  giveResult(callId, button) {
    const { calls } = tree.openCalls(this.shown);
    const call = calls.find(({ id }) => id === callId);
    const { value } = button.previousElementSibling;
    const change = adding(tree.newMessage("tool", value, { tool_call_id: callId, call }));
    return calls.length === 1 ? this.answer(change) : this.change(this.shown.id, change);
  }

  async walk(versionId, { dataset: { step } }) {
    await this.change(this.shown.id, (conversation) => tree.showNewest(conversation, versionId));
    this.thread.focusStep(versionId, step);
  }

  async removeTurn(id) {
    await this.runner.stop(this.shown.id);
    const before = this.shown;
    await this.change(before.id, (conversation) => tree.removeTurn(conversation, id));
    tell("The turn is deleted.", "Undo", () => this.store.put(before), "status");
    this.thread.element.focus();
  }

  async remove(id) {
    await this.runner.stop(id);
    const conversation = this.all.get(id);
    await this.store.remove(id);
    const undo = () => this.store.put(conversation).then(() => this.choose(id));
    tell(`“${conversation.title}” is deleted.`, "Undo", undo, "status");
  }

  async importFile(file) {
    for (const one of fromJson(await file.text())) {
      if (this.all.has(one.id)) one.id = tree.newId();
      await this.store.put(one);
      this.choose(one.id);
    }
    announce(`${file.name} is imported.`);
  }

  openSettings() {
    const { id } = this.shown;
    this.settings.open(this.shown.settings, (settings) => {
      this.shown.settings = settings; // at once, for a task that is begun before they are kept
      this.change(id, (conversation) => (conversation.settings = settings));
    });
  }

  onPiece = (message) => this.thread.grow(message);

  onEnd(id, message, error) {
    if (id === this.shown.id) this.show(this.all.get(id) ?? this.shown);
    if (error) tell(error.message);
    else announce(message?.content ? `Answer: ${message.content}` : "The answer has ended.");
  }
}

async function askKey(isWrong) {
  const says = isWrong ? "The server refused that wrong key." : "This server asks for a key.";
  find("#key-text").textContent = `${says} It is kept until this tab is closed.`;
  return (await ask("key", "")).trim();
}

async function start() {
  try {
    const store = new Store();
    await store.open();
    const api = new Api(askKey);
    const [model] = (await api.json("v1/models")).data;
    await new Page(store, api, model).start();
  } catch (error) {
    tell(error.message, "Try again", start);
  }
}

start();
