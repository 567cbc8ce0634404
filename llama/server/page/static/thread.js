// The messages of a conversation, as far as its shown branch goes.

import { answerInfo, probabilities } from "./answer_info.js";
import { blockEnd } from "./blocks.js";
import { button, copy, copyOf, el, find } from "./dom.js";
import { callCard } from "./tools.js";
import { childrenOf, NAMES, openCalls, path } from "./tree.js";

/** Add to rendered HTML what it needs to be used. */
function furnish(block) {
  const parts = block.querySelectorAll("p, li, h1, h2, h3, h4, h5, h6, th, td");
  for (const part of parts) part.dir = "auto";
  for (const wide of block.querySelectorAll("pre, table, math[display=block]")) {
    const scroller = el("div", { class: "wide", tabindex: "0" });
    wide.replaceWith(scroller);
    scroller.append(wide);
    if (wide.localName !== "pre") continue;
    const text = wide.textContent;
    scroller.before(button("Copy code", () => copy(text), { class: "copy-code" }));
  }
}

class MessageView {
  constructor(thread, message) {
    Object.assign(this, { thread, message, done: 0, isNear: false, cards: {} });
    this.element = copyOf("message");
    this.element.classList.add(message.role);
    this.element.setAttribute("aria-label", NAMES[message.role]);
    this.element.dataset.id = message.id;
    for (const name of ["text", "more", "actions"]) this[name] = find(`.${name}`, this.element);
    this.element.addEventListener("contentvisibilityautostatechange", ({ skipped }) => {
      this.isNear ||= !skipped;
      this.write();
    });
    this.tail = el("div", { class: "plain", dir: "auto" });
    this.text.append(this.tail);
  }

  /** Show the message; `context` has what other messages make of it. */
  update(message, context) {
    const { length } = this.message.content;
    // What has been saved is older than what is shown of an answer that grows here.
    if (message.state === "writing" && length > message.content.length) message = this.message;
    const { state, content, error, usage } = message;
    const mark = JSON.stringify([state, content.length, error, usage, context]);
    if (mark === this.mark) return;
    if (this.message.state === "cut" && state === "writing") {
      this.done = 0; // the last block goes on
      this.text.replaceChildren(this.tail);
    }
    Object.assign(this, { message, mark });
    this.write();
    this.element.dataset.state = state;
    this.element.classList.toggle("dropped", context.isDropped);
    this.more.replaceChildren(...this.details(context));
    this.offer(context);
  }

  // What is finished is rendered, once and in one piece; what is being written stays as it is.
  write() {
    const { role, content, state } = this.message;
    const isWriting = state === "writing";
    while (role === "assistant" && (this.isNear || isWriting)) {
      const rest = content.slice(this.done);
      const end = isWriting ? blockEnd(rest) : rest.length;
      if (end <= 0) break;
      const block = el("div", { class: "plain", dir: "auto" }, rest.slice(0, end));
      this.tail.before(block);
      this.thread.render(block);
      this.done += end;
    }
    this.tail.textContent = role === "tool" ? "" : content.slice(this.done);
  }

  *details({ isDropped, pending }) {
    const { role, state, content, call, error, attachments } = this.message;
    if (call) yield callCard(call, content);
    for (const { name, text } of attachments) {
      const shown = el("pre", { tabindex: "0" }, text);
      yield el("details", { class: "file" }, el("summary", {}, name), shown);
    }
    for (const open of pending) {
      const give = (result) => this.thread.giveResult(open, result);
      yield (this.cards[open.id] ??= callCard(open, null, give)); // with what was typed there
    }
    if (isDropped) yield el("p", { class: "note" }, "The model isn't sent this any more.");
    if (state === "cut") yield el("p", { class: "note cut" }, `This answer was cut. ${error}`);
    if (state === "writing") yield el("p", { class: "note" }, "Writing…");
    else if (role === "assistant") yield answerInfo(this.message);
  }

  // What is offered by its role, state and place the style sheet knows.
  offer({ place, versions }) {
    const { logprobs, tool_calls } = this.message;
    const hide = (name, isHidden) => (find(`[data-do=${name}]`, this.actions).hidden = isHidden);
    hide("previous", place === 1);
    hide("next", place === versions);
    hide("edit", tool_calls !== null);
    hide("probabilities", logprobs === null);
    find(".versions", this.actions).textContent = versions > 1 ? `${place} of ${versions}` : "";
  }

  toggleProbabilities() {
    const shown = find(".probabilities", this.more);
    if (shown) shown.remove();
    else this.more.append(probabilities(this.message));
  }
}

export class Thread {
  views = new Map();

  rendering = Promise.resolve();

  /** `giveResult(call, text)` is called when a person gives a call's result. */
  constructor(element, api, giveResult) {
    Object.assign(this, { element, api, giveResult, list: find(".list", element) });
  }

  /** Have the server render blocks, one after another; one that fails stays as it was written. */
  render(block) {
    const text = block.textContent;
    if (!text.trim()) return block.remove();
    this.rendering = this.rendering
      .then(() => this.api.render(text))
      .then((html) => {
        block.className = "block";
        block.innerHTML = html;
        furnish(block);
      })
      .catch(() => {});
  }

  show(conversation) {
    if (conversation.id !== this.id) {
      Object.assign(this, { id: conversation.id, views: new Map() });
      this.list.replaceChildren();
      this.toEnd();
    }
    const [shown, children] = [path(conversation), childrenOf(conversation)];
    const [{ calls, caller }, before] = [openCalls(conversation), this.views];
    const viewOf = (message) => before.get(message.id) ?? new MessageView(this, message);
    this.views = new Map(shown.map((message) => [message.id, viewOf(message)]));
    for (const [id, { element }] of before) if (!this.views.has(id)) element.remove();
    for (const [i, message] of shown.entries()) {
      const [view, versions] = [this.views.get(message.id), children.get(message.parent)];
      const there = this.list.children[i] ?? null;
      if (view.element !== there) this.list.insertBefore(view.element, there);
      view.update(message, {
        place: versions.indexOf(message) + 1,
        versions: versions.length,
        isDropped: conversation.dropped.includes(message.id),
        pending: message.id === caller && message.state !== "writing" ? calls : [],
      });
    }
  }

  // It counts from its end, so that it stays there as it grows.
  toEnd = () => this.element.scrollTo(0, 0);

  /** Show what has been added to an answer. */
  grow(message) {
    const view = this.views.get(message.id);
    if (!view) return;
    view.message = message;
    view.write();
  }

  /** Focus the button "next" or "previous" of a message, or else the other one of them. */
  focusVersion(id, name) {
    const { actions } = this.views.get(id);
    const offered = (one) => find(`[data-do=${one}]:not([hidden])`, actions);
    (offered(name) ?? offered("previous") ?? offered("next")).focus();
  }
}
