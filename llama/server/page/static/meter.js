// How much of the context a conversation uses, and the offer to drop its oldest turns when it is
// full. Tokens are counted by the server, as it will count them.

import { ask, copyOf, count, find } from "./dom.js";
import { read } from "./settings.js";
import { path, toMessages } from "./tree.js";

const SHARE = 8; // the part of the context, an eighth, that is free for an answer after dropping

/** Return the turns that are still sent, oldest first: each a question and what answers it. */
function turns(conversation) {
  let n = 0;
  const sent = path(conversation).filter(({ id }) => !conversation.dropped.includes(id));
  return [...Map.groupBy(sent, ({ role }) => (role === "user" ? ++n : n)).values()];
}

function describe([{ content }, ...more]) {
  const text = content.length > 80 ? `${content.slice(0, 80)}…` : content;
  const followed = more.length ? `, and ${more.length} that followed` : "";
  return copyOf("turn", { text, followed });
}

export class Meter {
  counting = Promise.resolve();

  constructor(api, model) {
    Object.assign(this, { api, limit: model.max_model_len, element: find(".meter") });
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
    const [all, taken, ids] = [turns(conversation), [], []];
    const room = this.limit - Math.floor(this.limit / SHARE);
    // The last turn is what is asked.
    while (used > room && all.length > 1) {
      taken.push(all.shift());
      ids.push(...taken.at(-1).map(({ id }) => id));
      used = await this.#count({ ...conversation, dropped: [...conversation.dropped, ...ids] });
    }
    return (await this.#agrees(taken, used)) ? ids : null;
  }

  #show(n) {
    const { element, limit } = this;
    const used = Math.min(n, limit);
    const text = `${count(n)} of ${count(limit)} tokens used, ${count(limit - used)} left`;
    find(".meter-text", element).textContent = text;
    find(".meter-bar", element).style.width = `${(100 * used) / limit}%`;
    Object.assign(element, { ariaValueNow: used, ariaValueMax: limit, ariaValueText: text });
    element.classList.toggle("meter-full", limit - used < limit / SHARE);
  }

  async #count(conversation) {
    const messages = toMessages(conversation);
    const { value: tools } = read(find("#set-tools"), conversation.settings);
    return messages.length ? (await this.api.json("tokenize", { messages, tools })).count : 0;
  }

  #agrees(dropped, left) {
    const [dialog, fits] = [find("#full"), left < this.limit];
    const figures = { used: count(left), limit: count(this.limit) };
    const text = copyOf(fits ? "full-fits" : "full-too-long", figures);
    find("#full-text").replaceChildren(text);
    find("ul", dialog).replaceChildren(...(fits ? dropped.map(describe) : []));
    find(".primary", dialog).hidden = !fits;
    return ask("full", "yes");
  }
}
