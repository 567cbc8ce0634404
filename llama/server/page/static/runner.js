// Answers being written: asked for, kept as they grow, stopped, continued.

import { requestFields } from "./settings.js";
import { keep, recall } from "./store.js";
import { addMessage, newId, newMessage, toMessages } from "./tree.js";

const SAVE_INTERVAL = 500; // milliseconds

function requestBody(conversation, { content }, { id, meta }) {
  const fields = requestFields(conversation.settings, meta.sampling);
  const continued = content && { continue_final_message: true };
  return { model: id, messages: toMessages(conversation), ...fields, ...continued };
}

function addCalls(message, deltas) {
  for (const { index, id, function: called } of deltas) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[index] ??= { id: "", name: "", arguments: "" });
    call.id ||= id ?? "";
    call.name ||= called?.name ?? "";
    call.arguments += called?.arguments ?? "";
  }
}

const brief = ({ token, logprob }) => ({ token, logprob });

/** Add the events of a stream to a message; `onPiece` is called after each. */
export async function receive(message, stream, onPiece) {
  const [{ usage: before, seconds }, start] = [message, performance.now()];
  let n = 0;
  try {
    for await (const { choices, usage } of stream) {
      const [{ text, delta = { content: text }, logprobs, finish_reason } = {}] = choices;
      if (delta.content) n += 1;
      message.content += delta.content ?? "";
      message.finish_reason = finish_reason ?? message.finish_reason;
      addCalls(message, delta.tool_calls ?? []);
      for (const each of logprobs?.content ?? []) {
        (message.logprobs ??= []).push({ ...brief(each), top: each.top_logprobs.map(brief) });
      }
      // The server counts at the end alone: a stopped answer has the number of its events.
      message.usage = {
        prompt_tokens: before?.prompt_tokens || (usage?.prompt_tokens ?? 0),
        completion_tokens: (before?.completion_tokens ?? 0) + (usage?.completion_tokens ?? n),
      };
      onPiece(message);
    }
  } finally {
    message.seconds = seconds + (performance.now() - start) / 1000;
  }
}

// While a tab has the lock, others know that it writes the answer. Locks need HTTPS or localhost.
const withLock = (messageId, work) =>
  navigator.locks ? navigator.locks.request(`llama-answer-${messageId}`, work) : work();

export class Runner {
  running = new Map(); // by the conversation's id

  watched = new Set();

  /** `page.onPiece(message)` and `page.onEnd(id, message, error)` are called; id: the dialog's. */
  constructor(api, model, store, page) {
    Object.assign(this, { api, model, store, page });
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
    const { signal } = run.controller;
    let error = null;
    const save = () => this.save(id, run).catch(() => {}); // the end will tell
    try {
      const conversation = await this.store.update(id, begin);
      run.message = conversation.messages[run.messageId];
      const body = requestBody(conversation, run.message, this.model);
      const stream = this.api.stream("v1/chat/completions", body, signal);
      await receive(run.message, stream, (message) => {
        run.timer ??= setTimeout(save, SAVE_INTERVAL);
        this.page.onPiece(message);
      });
      run.message.state = run.message.finish_reason === "length" ? "cut" : "complete";
    } catch (failure) {
      error = signal.aborted ? null : failure;
      Object.assign(run.message ?? {}, { state: "cut", error: error?.message ?? "" });
    }
    await this.save(id, run).catch((failure) => (error ??= failure));
    this.running.delete(id);
    this.page.onEnd(id, run.message, error);
  }

  save(id, run) {
    const { message, controller, timer } = run;
    clearTimeout(timer);
    run.timer = null;
    return this.store.update(id, ({ messages }) => {
      if (!messages[message?.id]) return controller.abort(); // it was deleted
      messages[message.id] = { ...message, parent: messages[message.id].parent };
    });
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
