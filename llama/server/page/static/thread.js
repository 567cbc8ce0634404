// The messages of a conversation, as far as its shown branch goes.

import { answerInfo, probabilities } from "./answer_info.js";
import { blockEnd } from "./blocks.js";
import { button, copy, el } from "./dom.js";
import { callCard } from "./tools.js";
import { childrenOf, contentOf, openCalls, path } from "./tree.js";

const NAMES = { user: "You", assistant: "Assistant", tool: "Tool" };

/** Add to a block's HTML what it needs to be used: wide parts scroll, code can be copied. */
function furnish(block) {
  for (const wide of block.querySelectorAll("pre, table, math[display=block]")) {
    const scroller = el("div", { class: "wide", tabindex: "0" });
    wide.replaceWith(scroller);
    scroller.append(wide);
    if (wide.tagName !== "PRE") continue;
    const text = wide.textContent;
    scroller.before(button("Copy code", () => copy(text), { class: "copy-code" }));
  }
}

class MessageView {
  constructor(thread, message) {
    Object.assign(this, { thread, message, done: 0, isNear: false, mark: "" });
    this.cards = new Map();
    this.blocks = el("div");
    this.tail = el("div", { class: "plain" });
    this.text = el("div", { class: "text", dir: "auto" }, this.blocks, this.tail);
    this.more = el("div", { class: "more" });
    this.actions = el("div", { class: "actions" });
    const props = { class: `message ${message.role}`, "aria-label": NAMES[message.role] };
    this.element = el("article", props, this.text, this.more, this.actions);
  }

  /** Show the message; `context` has what other messages make of it. */
  update(message, context) {
    const wasWriting = this.message.state === "writing";
    this.message = message;
    const { state, content, error, logprobs, tool_calls, usage } = message;
    const mark = JSON.stringify([state, content.length, error, tool_calls, usage, context]);
    if (mark === this.mark) return;
    const isContinued = this.mark && state === "writing" && !wasWriting;
    this.mark = mark;
    if (isContinued) this.restart();
    this.write();
    this.element.classList.toggle("writing", state === "writing");
    this.element.classList.toggle("dropped", context.isDropped);
    const isOpen = this.more.querySelector(":scope > [aria-label=Probabilities]") && logprobs;
    this.more.replaceChildren(...this.details(context));
    if (isOpen) this.more.append(probabilities(message));
    this.actions.replaceChildren(...this.buttons(context));
  }

  restart() {
    this.done = 0;
    this.blocks.replaceChildren();
  }

  // What is finished is rendered, once and in one piece; what is being written stays as it is.
  write() {
    const { role, content, state } = this.message;
    while (role === "assistant" && (this.isNear || state === "writing")) {
      const rest = content.slice(this.done);
      const end = state === "writing" ? blockEnd(rest) : rest.length;
      if (end <= 0) break;
      this.done += end;
      const block = el("div", { class: "plain" }, rest.slice(0, end));
      this.blocks.append(block);
      if (rest.trim()) this.thread.render(block, rest.slice(0, end));
    }
    this.tail.textContent = role === "tool" ? "" : content.slice(this.done);
  }

  *details({ isDropped, pending, call }) {
    const { role, state, content, error, attachments } = this.message;
    if (call) yield callCard(call, content);
    for (const { name, text } of attachments) {
      const file = el("details", { class: "file" }, el("summary", {}, name));
      yield (file.append(el("pre", { tabindex: "0" }, text)), file);
    }
    for (const one of pending) {
      const send = (result) => this.thread.act("result", this.message, [one, result]);
      if (!this.cards.has(one.id)) this.cards.set(one.id, callCard(one, undefined, send));
      yield this.cards.get(one.id); // with what was typed there
    }
    if (isDropped) yield el("p", { class: "note" }, "The model isn't sent this any more.");
    if (state === "cut") yield el("p", { class: "note cut" }, `This answer was cut. ${error}`);
    if (state === "writing") yield el("p", { class: "note" }, "Writing…");
    else if (role === "assistant") yield answerInfo(this.message);
  }

  *buttons({ place, versions, isLast }) {
    const { role, parent, state, content, logprobs, tool_calls } = this.message;
    const action = (label, name, value) =>
      button(label, () => this.thread.act(name, this.message, value), { "data-action": label });
    if (versions > 1) {
      const of = el("span", { class: "versions" }, `${place} of ${versions}`);
      yield place > 1 ? action("Previous version", "walk", -1) : null;
      yield of;
      yield place < versions ? action("Next version", "walk", 1) : null;
    }
    if (state === "writing") return;
    if (state === "cut" && content && isLast) yield action("Continue", "continue");
    if (role === "assistant" ? parent : isLast) yield action("Retry", "retry");
    yield button("Copy", () => copy(contentOf(this.message)));
    if (!tool_calls) yield button("Edit", () => this.edit());
    if (logprobs) yield button("Probabilities", () => this.toggle());
    yield action("Delete", "remove");
  }

  toggle() {
    const shown = this.more.querySelector(":scope > [aria-label=Probabilities]");
    if (shown) shown.remove();
    else this.more.append(probabilities(this.message));
  }

  edit() {
    if (this.editor) return;
    const value = this.message.content;
    const box = el("textarea", { "aria-label": "New text", dir: "auto", value });
    const close = () => {
      this.editor.remove();
      this.editor = null;
      this.element.classList.remove("edited");
    };
    const save = () => {
      close();
      this.thread.act("edit", this.message, box.value);
    };
    const says = this.message.role === "assistant" ? "Save" : "Save and ask";
    const row = el("div", { class: "row" }, button(says, save), button("Cancel", close));
    this.editor = el("div", { class: "editor" }, box, row);
    this.element.classList.add("edited");
    this.actions.before(this.editor);
    box.style.height = `${Math.min(400, box.scrollHeight + 4)}px`;
    box.focus();
  }
}

export class Thread {
  /** `act(name, message, value)` is called for what a person does to a message. */
  constructor(api, act) {
    Object.assign(this, { api, act, views: new Map(), html: new Map(), id: null, isAtEnd: true });
    this.last = Promise.resolve();
    this.list = el("div", { class: "list" });
    const props = { role: "log", "aria-label": "Messages", "aria-live": "off", tabindex: "0" };
    this.element = el("div", { class: "thread", ...props }, this.list);
    this.element.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.element;
      this.isAtEnd = scrollHeight - scrollTop - clientHeight < 60;
    });
    const toEnd = () => this.isAtEnd && this.element.scrollTo(0, this.element.scrollHeight);
    const resized = new ResizeObserver(toEnd);
    resized.observe(this.list);
    resized.observe(this.element);
    const options = { root: this.element, rootMargin: "600px" };
    this.near = new IntersectionObserver((entries) => this.approach(entries), options);
  }

  approach(entries) {
    for (const { isIntersecting, target } of entries) {
      const view = isIntersecting && this.views.get(target.dataset.id);
      if (!view) continue;
      this.near.unobserve(target);
      view.isNear = true;
      view.write();
    }
  }

  /** Have the server render a block, one after another; what fails stays as it was written. */
  render(block, text) {
    const show = async () => {
      try {
        if (!this.html.has(text)) this.html.set(text, await this.api.render(text));
      } catch {
        return;
      }
      block.className = "block";
      block.innerHTML = this.html.get(text);
      furnish(block);
    };
    this.last = this.last.then(show);
  }

  show(conversation) {
    if (conversation.id !== this.id) this.clear(conversation.id);
    const shown = path(conversation);
    const ids = new Set(shown.map(({ id }) => id));
    for (const [id, view] of this.views) {
      if (ids.has(id)) continue;
      view.element.remove();
      this.views.delete(id);
    }
    const [children, open] = [childrenOf(conversation), openCalls(conversation)];
    const asking = shown.findLastIndex(({ role }) => role !== "tool");
    let next = this.list.firstElementChild;
    shown.forEach((message, i) => {
      const view = this.views.get(message.id) ?? this.add(message);
      if (view.element === next) next = next.nextElementSibling;
      else this.list.insertBefore(view.element, next);
      const versions = children.get(message.parent);
      const place = versions.indexOf(message.id) + 1;
      const isDropped = conversation.dropped.includes(message.id);
      const isLast = i === shown.length - 1;
      const call = message.role === "tool" ? callOf(shown, i) : null;
      const pending = i === asking && message.state !== "writing" ? open : [];
      const context = { place, versions: versions.length, isDropped, isLast, pending, call };
      view.update(message, context);
    });
  }

  add(message) {
    const view = new MessageView(this, message);
    view.element.dataset.id = message.id;
    this.views.set(message.id, view);
    this.near.observe(view.element);
    return view;
  }

  clear(id) {
    this.id = id;
    this.isAtEnd = true;
    this.views.clear();
    this.near.disconnect();
    this.list.replaceChildren();
  }

  /** Show what has been added to an answer, at most once a frame. */
  grow(message) {
    const view = this.views.get(message.id);
    if (!view) return;
    view.message = message;
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      view.write();
    });
  }

  focus(id, label) {
    const found = this.views.get(id)?.element.querySelector(`[data-action="${label}"]`);
    (found ?? this.element).focus();
  }
}

/** Return the call whose result a message is. */
function callOf(shown, i) {
  const caller = shown.slice(0, i).findLast(({ role }) => role !== "tool");
  return caller?.tool_calls?.find(({ id }) => id === shown[i].tool_call_id) ?? null;
}
