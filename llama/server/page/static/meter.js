// How much of the context a conversation uses, and the offer to drop its oldest turns when it is
// full. Tokens are counted by the server, as it will count them.

import { button, count, el } from "./dom.js";
import { parseTools } from "./tools.js";
import { path, toMessages } from "./tree.js";

const SHARE = 8; // the part of the context, an eighth, that is free for an answer after dropping

/** Return the turns that are still sent, oldest first: each a question and what answers it. */
function turns(conversation) {
  const found = [];
  for (const message of path(conversation).filter(({ id }) => !conversation.dropped.includes(id))) {
    if (message.role === "user" || !found.length) found.push([]);
    found.at(-1).push(message);
  }
  return found;
}

export class Meter {
  constructor(api, model) {
    Object.assign(this, { api, limit: model.max_model_len });
    this.bar = el("span", { class: "meter-bar" });
    this.text = el("span", { class: "meter-text" });
    const range = { "aria-valuemin": 0, "aria-valuemax": this.limit };
    const props = { class: "meter", role: "meter", "aria-label": "Context used", ...range };
    this.element = el("div", props, this.bar, this.text);
    this.#show(0);
  }

  /** Count what a conversation would send: one at a time, as each key that is typed may ask. */
  async update(conversation) {
    this.next = conversation;
    if (this.isCounting) return;
    this.isCounting = true;
    while (this.next) {
      const now = this.next;
      this.next = null;
      // What keeps the server from counting is told where a message is sent.
      const n = await this.#count(now).catch(() => null);
      if (n !== null && !this.next) this.#show(n);
    }
    this.isCounting = false;
  }

  /**
   * Ask whether to drop the oldest turns, if what would be sent leaves no room for an answer.
   *
   * @param onDrop called with the ids of the messages, if the person agrees.
   * @returns true if it fits, or if turns have been dropped so that it does.
   */
  async offerToDrop(conversation, onDrop) {
    const all = turns(conversation);
    const ids = (n) => all.slice(0, n).flat().map((message) => message.id);
    const without = (n) => ({ ...conversation, dropped: [...conversation.dropped, ...ids(n)] });
    const used = (n) => this.#count(without(n));
    if ((await used(0)) < this.limit) return true;
    const room = this.limit - Math.floor(this.limit / SHARE);
    let [n, most] = [0, Math.max(0, all.length - 1)]; // the last one is what is asked
    while (n < most) {
      const middle = (n + most) >> 1;
      if ((await used(middle)) <= room) most = middle;
      else n = middle + 1;
    }
    const agreed = await this.#ask(all.slice(0, n), await used(n));
    if (agreed) onDrop(ids(n));
    return agreed;
  }

  #show(n) {
    const left = Math.max(0, this.limit - n);
    const text = `${count(n)} of ${count(this.limit)} tokens used, ${count(left)} left`;
    this.text.textContent = text;
    this.bar.style.width = `${Math.min(100, (100 * n) / this.limit)}%`;
    this.element.setAttribute("aria-valuenow", Math.min(n, this.limit));
    this.element.setAttribute("aria-valuetext", text);
    this.element.classList.toggle("meter-full", left < this.limit / SHARE);
  }

  async #count(conversation) {
    const [messages, tools] = [toMessages(conversation), parseTools(conversation.tools)];
    if (!messages.length) return 0;
    return this.api.count(tools.length ? { messages, tools } : { messages });
  }

  #ask(dropped, left) {
    const fits = left < this.limit;
    const [used, limit] = [count(left), count(this.limit)];
    const says = fits
      ? `No answer fits any more. Without these turns ${used} of ${limit} tokens are used. ` +
        "They stay here to be read, but aren't sent any more:"
      : `The last message, with the system prompt and tools, has ${used} tokens. With an answer ` +
        `${limit} fit: shorten it, or have the server started with a larger --max_seq_len.`;
    return new Promise((resolve) => {
      const end = (agreed) => {
        dialog.remove();
        resolve(agreed);
      };
      const agree = button("Drop them and go on", () => end(true), { class: "primary" });
      const dialog = el(
        "dialog",
        { role: "alertdialog", "aria-labelledby": "full-title", "aria-describedby": "full-text" },
        el("h2", { id: "full-title" }, "The context is full"),
        el("p", { id: "full-text" }, says),
        fits ? [el("ul", {}, dropped.map(describe)), agree] : null,
        button("Cancel", () => end(false), { autofocus: true }),
      );
      dialog.addEventListener("cancel", () => end(false)); // the key Escape
      document.body.append(dialog);
      dialog.showModal();
    });
  }
}

function describe(turn) {
  const text = turn[0].content.trim().replace(/\s+/g, " ");
  const cut = text.length > 80 ? `${text.slice(0, 80)}…` : text;
  const more = turn.length > 1 ? `, and ${turn.length - 1} that followed` : "";
  return el("li", {}, el("q", {}, cut), more);
}
