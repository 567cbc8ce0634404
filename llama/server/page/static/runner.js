// Answers being written: asked for, kept as they grow, stopped, continued.

import { requestFields } from "./sampling.js";
import { keep, recall } from "./store.js";
import { addMessage, newId, newMessage, toMessages } from "./tree.js";

const SAVE_INTERVAL = 500; // milliseconds

function requestBody(conversation, { content }, model) {
  const fields = requestFields(conversation.settings, model.meta.sampling);
  const continued = content ? { continue_final_message: true } : {};
  return { model: model.id, messages: toMessages(conversation), ...fields, ...continued };
}

/** Add a stream's event to the message. */
function take(message, { choices, usage }, before, n) {
  const [{ delta, logprobs, finish_reason } = {}] = choices;
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
  // The server counts at the end alone: a stopped answer has the number of its events.
  message.usage = {
    prompt_tokens: before?.prompt_tokens || (usage?.prompt_tokens ?? 0),
    completion_tokens: (before?.completion_tokens ?? 0) + (usage?.completion_tokens ?? n),
  };
}

// While a tab has the lock, others know that it writes the answer. Locks need HTTPS or localhost.
const withLock = (messageId, work) =>
  navigator.locks ? navigator.locks.request(`llama-answer-${messageId}`, work) : work();

export class Runner {
  running = new Map(); // by the conversation's id

  watched = new Set();

  /** `onPiece(message)` and `onEnd(id, message, error)` are called with the conversation's id. */
  constructor(api, model, store, { onPiece, onEnd }) {
    Object.assign(this, { api, model, store, onPiece, onEnd });
    addEventListener("pagehide", () => {
      for (const { messageId, message } of this.running.values()) {
        if (message) keep(`end ${messageId}`, message); // the database is too slow for it
      }
    });
  }

  async stop(id) {
    const run = this.running.get(id);
    run?.controller.abort();
    await run?.ended;
  }

  /** Answer the shown end of a conversation, or go on with an answer that was cut. */
  run(id, cutId = null) {
    if (this.running.has(id)) return;
    const messageId = cutId ?? newId();
    const begin = (conversation) => {
      if (!cutId) addMessage(conversation, newMessage("assistant", "", { id: messageId }));
      const again = { state: "writing", error: "", finish_reason: null };
      Object.assign(conversation.messages[messageId], again);
    };
    const run = { messageId, controller: new AbortController() };
    this.running.set(id, run);
    run.ended = withLock(messageId, () => this.write(id, run, begin));
  }

  async write(id, run, begin) {
    let error = null;
    try {
      const conversation = await this.store.update(id, begin);
      run.message = conversation.messages[run.messageId];
      await this.receive(conversation, run);
      run.message.state = run.message.finish_reason === "length" ? "cut" : "complete";
    } catch (failure) {
      error = run.controller.signal.aborted ? null : failure;
      Object.assign(run.message ?? {}, { state: "cut", error: error?.message ?? "" });
    }
    await this.save(id, run).catch((failure) => (error ??= failure));
    this.running.delete(id);
    this.onEnd(id, run.message, error);
  }

  save(id, { message, controller }) {
    return this.store.update(id, ({ messages }) => {
      if (!messages[message?.id]) return controller.abort(); // it was deleted
      messages[message.id] = { ...message, parent: messages[message.id].parent };
    });
  }

  async receive(conversation, run) {
    const { message, controller } = run;
    const [{ usage, seconds }, start] = [message, performance.now()];
    let [n, isSaved] = [0, true];
    const timer = setInterval(() => {
      if (!isSaved) this.save(conversation.id, run).catch(() => {}); // the end will tell
      isSaved = true;
    }, SAVE_INTERVAL);
    try {
      const body = requestBody(conversation, message, this.model);
      for await (const event of this.api.stream("v1/chat/completions", body, controller.signal)) {
        if (event.choices[0]?.delta.content) n += 1;
        take(message, event, usage, n);
        isSaved = false;
        this.onPiece(message);
      }
    } finally {
      clearInterval(timer);
      message.seconds = seconds + (performance.now() - start) / 1000;
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
          if (found?.state !== "writing") return;
          const end = recall(`end ${messageId}`);
          if (end?.content.length > found.content.length) Object.assign(found, end);
          found.state = "cut";
          keep(`end ${messageId}`, null);
        });
      });
    }
  }
}
