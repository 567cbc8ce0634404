// How much of the context a conversation uses, and the offer to drop its oldest turns when it is
// full. Tokens are counted by the server, as it will count them.

import { ask, count, el, find } from "./dom.js";
import { read } from "./sampling.js";
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
  counting = Promise.resolve();

  constructor(api, model) {
    Object.assign(this, { api, limit: model.max_model_len, element: find(".meter") });
    this.element.setAttribute("aria-valuemax", this.limit);
    this.#show(0);
  }

  /** Count what a conversation would send: one at a time, as each key that is typed may ask. */
  update(conversation) {
    this.latest = conversation;
    this.counting = this.counting.then(async () => {
      if (this.latest !== conversation) return;
      // What keeps the server from counting is told where a message is sent.
      const n = await this.#count(conversation).catch(() => null);
      if (n !== null) this.#show(n);
    });
  }

  /**
   * Return the ids of the oldest turns' messages that a person agrees to drop so that an answer
   * fits: none if it does so already, null without consent.
   */
  async idsToDrop(conversation) {
    let used = await this.#count(conversation);
    if (used < this.limit) return [];
    const [all, ids] = [turns(conversation), []];
    const room = this.limit - Math.floor(this.limit / SHARE);
    let n = 0;
    while (used > room && n < all.length - 1) { // the last one is what is asked
      ids.push(...all[n].map(({ id }) => id));
      n += 1;
      used = await this.#count({ ...conversation, dropped: [...conversation.dropped, ...ids] });
    }
    return (await this.#agrees(all.slice(0, n), used)) ? ids : null;
  }

  #show(n) {
    const left = Math.max(0, this.limit - n);
    const text = `${count(n)} of ${count(this.limit)} tokens used, ${count(left)} left`;
    find(".meter-text", this.element).textContent = text;
    find(".meter-bar", this.element).style.width = `${Math.min(100, (100 * n) / this.limit)}%`;
    this.element.setAttribute("aria-valuenow", Math.min(n, this.limit));
    this.element.setAttribute("aria-valuetext", text);
    this.element.classList.toggle("meter-full", left < this.limit / SHARE);
  }

  async #count(conversation) {
    const [messages, tools] = [toMessages(conversation), read(conversation.settings, "tools")];
    return messages.length ? this.api.count({ messages, ...(tools && { tools }) }) : 0;
  }

  async #agrees(dropped, left) {
    const [dialog, used, limit] = [find("#full"), count(left), count(this.limit)];
    const fits = left < this.limit;
    find("#full-text").textContent = fits
      ? `No answer fits any more. Without these turns ${used} of ${limit} tokens are used. ` +
        "They stay here to be read, but aren't sent any more:"
      : `The last message, with the system prompt and tools, has ${used} tokens. With an answer ` +
        `${limit} fit: shorten it, or have the server started with a larger --max_seq_len.`;
    find("ul", dialog).replaceChildren(...(fits ? dropped.map(describe) : []));
    find(".primary", dialog).hidden = !fits;
    return (await ask(dialog)) === "drop";
  }
}

function describe([{ content }, ...more]) {
  const text = content.length > 80 ? `${content.slice(0, 80)}…` : content;
  const followed = more.length ? `, and ${more.length} that followed` : "";
  return el("li", {}, el("q", {}, text), followed);
}
