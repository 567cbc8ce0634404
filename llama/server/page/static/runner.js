// Answers being written: asked for, kept as they grow, stopped, continued.

import { requestFields } from "./settings.js";
import { parseTools } from "./tools.js";
import { addMessage, newMessage, toMessages } from "./tree.js";

const SAVE_INTERVAL = 500; // milliseconds

function requestBody(conversation, { id, parent, content }, model) {
  const tools = parseTools(conversation.tools);
  const fields = requestFields(conversation.settings, model.meta?.sampling);
  const messages = toMessages(conversation, content ? id : parent);
  const continued = content ? { continue_final_message: true } : {};
  return { model: model.id, messages, ...fields, ...(tools.length && { tools }), ...continued };
}

/** Add a stream's event to the message. */
function take(message, { choices, usage }) {
  const [{ delta, logprobs, finish_reason } = {}] = choices ?? [];
  message.content += delta?.content ?? "";
  message.finish_reason = finish_reason ?? message.finish_reason;
  for (const { index, id, function: called } of delta?.tool_calls ?? []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[index] ??= { id: "", name: "", arguments: "" });
    call.id ||= id ?? "";
    call.name ||= called?.name ?? "";
    call.arguments += called?.arguments ?? "";
  }
  for (const { token, logprob, top_logprobs } of logprobs?.content ?? []) {
    const top = top_logprobs.map((other) => ({ token: other.token, logprob: other.logprob }));
    (message.logprobs ??= []).push({ token, logprob, top });
  }
  if (usage) {
    const before = message.usage; // it was continued
    const n = (before?.completion_tokens ?? 0) + usage.completion_tokens;
    message.usage = { prompt_tokens: (before ?? usage).prompt_tokens, completion_tokens: n };
  }
}

// While a tab has the lock, others know that it writes the answer. Locks need HTTPS or localhost.
const withLock = (messageId, work) =>
  navigator.locks ? navigator.locks.request(`llama-answer-${messageId}`, work) : work();

export class Runner {
  /**
   * `onStart(id)` and `onEnd(id, message, error)` are called around an answer in a conversation,
   * and `onPiece(id, message)` as it grows. The error is null if it ended by itself or was stopped.
   */
  constructor(api, model, store, callbacks) {
    Object.assign(this, { api, model, store, ...callbacks });
    this.running = new Map(); // what is being written, by the conversation's id
    this.ending = new Map(); // what isn't written any more, and isn't saved yet
    this.watched = new Set();
    addEventListener("pagehide", () => {
      // A browser may have ended the request before.
      for (const [id, { message }] of [...this.running, ...this.ending]) {
        if (message) store.atEnd("conversations", id, message);
      }
    });
  }

  isRunning = (id) => this.running.has(id);

  async stop(id) {
    const run = this.running.get(id);
    run?.controller.abort();
    await run?.ended;
  }

  /** Answer a message. */
  answer(id, parent) {
    const message = newMessage("assistant", "", { state: "writing" });
    return this.run(id, message.id, (conversation) => addMessage(conversation, message, parent));
  }

  /** Go on with an answer that was cut, from where it ends. */
  continue(id, messageId) {
    const again = { state: "writing", error: "", finish_reason: null };
    return this.run(id, messageId, ({ messages }) => Object.assign(messages[messageId], again));
  }

  run(id, messageId, begin) {
    if (this.running.has(id)) return;
    const run = { messageId, controller: new AbortController() };
    this.running.set(id, run);
    this.onStart(id);
    run.ended = withLock(messageId, () => this.write(id, run, begin));
  }

  async write(id, run, begin) {
    const { signal } = run.controller;
    let [message, failure] = [null, null];
    try {
      const conversation = await this.store.update(id, begin);
      message = run.message = conversation.messages[run.messageId];
      await this.receive(conversation, message, run);
      message.state = message.finish_reason === "length" ? "cut" : "complete";
    } catch (error) {
      failure = signal.aborted ? null : error;
      if (message) Object.assign(message, { state: "cut", error: failure?.message ?? "" });
    }
    this.running.delete(id);
    this.ending.set(id, run);
    await run.save?.().catch((error) => (failure ??= error));
    this.ending.delete(id);
    this.onEnd(id, message, failure);
  }

  async receive(conversation, message, run) {
    const [{ id }, start] = [conversation, performance.now()];
    const before = message.usage ? message.seconds : 0; // of a stopped answer no usage is known
    let isSaved = true;
    run.save = () => {
      isSaved = true;
      return this.store.update(id, ({ messages }) => {
        if (!messages[message.id]) return run.controller.abort(); // it was deleted
        messages[message.id] = { ...message, parent: messages[message.id].parent };
      });
    };
    const timer = setInterval(() => isSaved || run.save().catch(() => {}), SAVE_INTERVAL);
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
  watch({ id, messages }) {
    for (const { id: messageId, state } of Object.values(messages)) {
      const isMine = this.running.get(id)?.messageId === messageId;
      if (state !== "writing" || isMine || this.watched.has(messageId)) continue;
      this.watched.add(messageId);
      withLock(messageId, () => {
        this.watched.delete(messageId);
        return this.store.update(id, ({ messages: { [messageId]: found } }) => {
          if (found?.state === "writing") found.state = "cut";
        });
      });
    }
  }
}
