// The messages of a conversation, as far as its shown branch goes.

import { blockEnd } from "./blocks.js";
import { answerInfo, callCard, probabilities } from "./details.js";
import { copyOf, find } from "./dom.js";
import { childrenOf, NAMES, openCalls, path } from "./tree.js";

class MessageView {
  constructor(thread, message) {
    Object.assign(this, { thread, message, done: 0, isNear: false, cards: {} });
    this.element = copyOf("message", { ...message, name: NAMES[message.role] });
    const parts = ["text", "tail", "more", "actions", "versions"];
    for (const name of parts) this[name] = find(`.${name}`, this.element);
    this.element.addEventListener("contentvisibilityautostatechange", ({ skipped }) => {
      this.isNear ||= !skipped;
      this.write();
    });
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
    this.mark = mark;
    this.write(message);
    this.more.replaceChildren(...this.details(context));
    this.offer(context);
  }

  // What is finished is rendered, once and in one piece; what is being written stays as it is.
  write(message = this.message) {
    this.message = message;
    const { role, content, state } = message;
    const isWriting = state === "writing";
    while (role === "assistant" && (this.isNear || isWriting)) {
      const rest = content.slice(this.done);
      const end = isWriting ? blockEnd(rest) : rest.length;
      if (end <= 0) break;
      const block = copyOf("block", { text: rest.slice(0, end) });
      this.tail.before(block);
      this.thread.render(block);
      this.done += end;
    }
    this.tail.textContent = role === "tool" ? "" : content.slice(this.done);
  }

  *details({ isDropped, pending }) {
    const { role, state, content, call, error, attachments } = this.message;
    const note = (text) => copyOf("note", { text });
    if (call) yield callCard(call, content);
    for (const file of attachments) yield copyOf("attachment", file);
    // A card that is there already has what was typed into it.
    for (const open of pending) yield (this.cards[open.id] ??= callCard(open, null));
    if (isDropped) yield note("The model isn't sent this any more.");
    if (state === "cut") yield copyOf("cut", { error });
    if (state === "writing") yield note("Writing…");
    else if (role === "assistant") yield answerInfo(this.message);
  }

  // The rest of what is offered is told by the style sheet.
  offer({ versions, isDropped }) {
    const { id, state, logprobs, tool_calls } = this.message;
    const kind = { state, isDropped, calls: Boolean(tool_calls), counts: Boolean(logprobs) };
    Object.assign(this.element.dataset, kind);
    const place = versions.indexOf(id);
    for (const button of this.actions.querySelectorAll("[data-step]")) {
      const other = versions[place + Number(button.dataset.step)];
      [button.dataset.id, button.hidden] = [other, !other];
    }
    this.versions.textContent = versions.length > 1 ? `${place + 1} of ${versions.length}` : "";
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

  constructor(element, api) {
    Object.assign(this, { element, api, list: find(".list", element) });
  }

  /** Have the server render blocks, one after another; one that fails stays as it was written. */
  render(block) {
    const text = block.textContent;
    if (!text.trim()) return block.remove();
    this.rendering = this.rendering
      .then(async () => {
        const { html } = await this.api.json("render", { text, kind: "markdown" });
        block.className = "block";
        block.innerHTML = html;
        for (const code of block.querySelectorAll(".wide:has(pre)")) {
          code.before(copyOf("copy-code"));
        }
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
        versions: versions.map(({ id }) => id),
        isDropped: conversation.dropped.includes(message.id),
        pending: message.id === caller && message.state !== "writing" ? calls : [],
      });
    }
  }

  // It counts from its end, so that it stays there as it grows.
  toEnd = () => this.element.scrollTo(0, 0);

  /** Show what has been added to an answer. */
  grow = (message) => this.views.get(message.id)?.write(message);

  /** Focus the button of a message that takes the same step to a version, or else the other one. */
  focusStep(id, step) {
    const { actions } = this.views.get(id);
    // A button that isn't shown takes no focus.
    for (const one of [-step, step]) find(`[data-step="${one}"]`, actions).focus();
  }
}
