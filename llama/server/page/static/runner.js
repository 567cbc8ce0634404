// Answers being written: asked for, kept as they grow, stopped, continued.

import { ApiError } from "./api.js";
import { requestFields } from "./settings.js";
import { parseTools } from "./tools.js";
import { addMessage, newMessage, toMessages } from "./tree.js";

const SAVE_INTERVAL = 500; // milliseconds
const PATIENCE = 10_000; // for another tab's next save, where there are no locks

const lockOf = (messageId) => `llama-answer-${messageId}`;

function requestBody(conversation, message, model) {
  const tools = parseTools(conversation.tools);
  const isContinued = message.content !== "";
  return {
    model: model.id,
    messages: toMessages(conversation, isContinued ? message.id : message.parent),
    ...requestFields(conversation.settings, model.meta?.sampling),
    ...(tools.length ? { tools } : {}),
    ...(isContinued ? { continue_final_message: true } : {}),
  };
}

function takeCalls(message, deltas) {
  message.tool_calls ??= [];
  for (const { index, id, function: called } of deltas) {
    const call = (message.tool_calls[index] ??= { id: "", name: "", arguments: "" });
    call.id ||= id ?? "";
    call.name ||= called?.name ?? "";
    call.arguments += called?.arguments ?? "";
  }
}

/** Add a stream's event to the message. */
function take(message, { choices, usage }) {
  const [choice] = choices ?? [];
  const { delta, logprobs, finish_reason } = choice ?? {};
  message.content += delta?.content ?? "";
  if (delta?.tool_calls) takeCalls(message, delta.tool_calls);
  if (logprobs?.content) {
    const tokens = logprobs.content.map(({ token, logprob, top_logprobs }) => ({
      token,
      logprob,
      top: top_logprobs.map((other) => ({ token: other.token, logprob: other.logprob })),
    }));
    message.logprobs = [...(message.logprobs ?? []), ...tokens];
  }
  message.finish_reason = finish_reason ?? message.finish_reason;
  if (usage) {
    const { prompt_tokens, completion_tokens } = message.usage ?? usage;
    const more = message.usage ? usage.completion_tokens : 0; // it was continued
    message.usage = { prompt_tokens, completion_tokens: completion_tokens + more };
  }
}

export class Runner {
  /**
   * `onPiece(id, message)` is called with each piece of an answer in the conversation, `onStart(id)`
   * and `onEnd(id, message, error)` around it; without an error it ended by itself or was stopped.
   */
  constructor(api, model, store, callbacks) {
    Object.assign(this, { api, model, store, ...callbacks });
    this.running = new Map(); // conversations' ids -> what is being written there
    this.watched = new Set();
    addEventListener("pagehide", () => this.running.forEach((run) => run.save?.()));
  }

  isRunning(id) {
    return this.running.has(id);
  }

  async stop(id) {
    const run = this.running.get(id);
    run?.controller.abort();
    await run?.ended;
  }

  /** Answer a message, by default the last one that is shown. */
  answer(id, parent) {
    const message = newMessage("assistant", "", { state: "writing" });
    return this.#run(id, message.id, (conversation) =>
      addMessage(conversation, message, parent ?? conversation.leaf),
    );
  }

  /** Go on with an answer that was cut, from where it ends. */
  continue(id, messageId) {
    return this.#run(id, messageId, ({ messages }) => {
      Object.assign(messages[messageId], { state: "writing", error: "", finish_reason: null });
    });
  }

  #run(id, messageId, begin) {
    if (this.running.has(id)) return null;
    const run = { messageId, controller: new AbortController() };
    this.running.set(id, run);
    this.onStart(id);
    const write = () => this.#write(id, run, begin);
    // While this tab has the lock, others know that the answer is being written.
    run.ended = navigator.locks?.request(lockOf(messageId), write) ?? write();
    return run.ended;
  }

  async #write(id, run, begin) {
    const { messageId, controller } = run;
    let [message, failure] = [null, null];
    try {
      const conversation = await this.store.update(id, begin);
      message = conversation.messages[messageId];
      await this.#receive(id, conversation, message, run);
      message.state = message.finish_reason === "length" ? "cut" : "complete";
    } catch (error) {
      if (!controller.signal.aborted) failure = error;
      if (message) Object.assign(message, { state: "cut", error: failure?.message ?? "" });
    }
    this.running.delete(id);
    await run.save?.().catch((error) => (failure ??= error));
    this.onEnd(id, message, failure);
  }

  async #receive(id, conversation, message, run) {
    const [start, before] = [performance.now(), message.seconds ?? 0];
    let isSaved = true;
    run.save = () => {
      isSaved = true;
      return this.store.update(id, (now) => {
        if (!now.messages[message.id]) return run.controller.abort(); // it was deleted
        now.messages[message.id] = { ...message, parent: now.messages[message.id].parent };
        now.updated = Date.now();
      });
    };
    // Without locks the saves tell other tabs that this one is alive.
    const keep = () => (isSaved && navigator.locks ? null : run.save().catch(() => {}));
    const timer = setInterval(keep, SAVE_INTERVAL);
    try {
      const body = requestBody(conversation, message, this.model);
      for await (const event of this.api.chat(body, run.controller.signal)) {
        take(message, event);
        isSaved = false;
        this.onPiece(id, message);
      }
    } finally {
      clearInterval(timer);
      message.seconds = before + (performance.now() - start) / 1000;
    }
  }

  /** Mark answers that nobody writes any more as cut: their tab was closed or reloaded. */
  watch(conversation) {
    for (const { id, state } of Object.values(conversation.messages)) {
      const isMine = this.running.get(conversation.id)?.messageId === id;
      if (state !== "writing" || isMine || this.watched.has(id)) continue;
      this.watched.add(id);
      const mark = () => {
        this.watched.delete(id);
        return this.store.update(conversation.id, ({ messages, updated }) => {
          const isLive = !navigator.locks && updated > conversation.updated;
          if (messages[id]?.state === "writing" && !isLive) messages[id].state = "cut";
        });
      };
      if (navigator.locks) navigator.locks.request(lockOf(id), mark);
      else setTimeout(mark, PATIENCE);
    }
  }
}

export const isContextFull = (error) =>
  error instanceof ApiError && error.code === "context_length_exceeded";
