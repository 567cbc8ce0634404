// Conversations of a file that anybody may have written.

import { newConversation, newId, newMessage } from "./tree.js";

const isText = (value) => typeof value === "string";
const isNumber = (value) => Number.isFinite(value);
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const oneOf = (...values) => (value) => values.includes(value);
const orNull = (is) => (value) => value === null || is(value);
const listOf = (is) => (value) => Array.isArray(value) && value.every(is);
const having = (shape) => (value) =>
  isObject(value) && Object.entries(shape).every(([name, is]) => is(value[name]));

const token = { token: isText, logprob: orNull(isNumber) };
const MESSAGE = {
  id: (id) => isText(id) && /^[A-Za-z][\w-]{0,63}$/.test(id),
  parent: orNull(isText),
  role: oneOf("user", "assistant", "tool"),
  content: isText,
  state: oneOf("complete", "writing", "cut"),
  finish_reason: orNull(isText),
  usage: orNull(having({ prompt_tokens: isNumber, completion_tokens: isNumber })),
  seconds: orNull(isNumber),
  logprobs: orNull(listOf(having({ ...token, top: listOf(having(token)) }))),
  error: isText,
  tool_calls: orNull(listOf(having({ id: isText, name: isText, arguments: isText }))),
  tool_call_id: orNull(isText),
  attachments: listOf(having({ name: isText, text: isText })),
};
const CONVERSATION = {
  ...{ id: isText, title: isText, created: isNumber, updated: isNumber, system: isText },
  ...{ settings: isObject, tools: isText, messages: isObject, leaf: orNull(isText) },
  dropped: listOf(isText),
};

function refuse(text) {
  throw new Error(`This is no file of exported conversations: ${text}.`);
}

/** Return the fields that a shape names, checked; those that are missing are the defaults. */
function checked(given, defaults, shape, where) {
  if (!isObject(given)) refuse(`${where} is no object`);
  const fields = Object.entries(shape).map(([name, is]) => {
    const value = Object.hasOwn(given, name) ? given[name] : defaults[name];
    if (!is(value)) refuse(`${where} has ${name} ${(JSON.stringify(value) ?? "").slice(0, 80)}`);
    return [name, value];
  });
  return Object.fromEntries(fields);
}

function conversationOf(given, number) {
  const where = `conversation ${number + 1}`;
  const found = checked(given, newConversation(), CONVERSATION, where);
  const messages = Object.entries(found.messages).map(([id, one]) => {
    const message = checked({ ...one, id }, newMessage("", ""), MESSAGE, `message ${id}`);
    return [id, { ...message, state: message.state === "complete" ? "complete" : "cut" }];
  });
  found.messages = Object.fromEntries(messages);
  const rooted = new Set([null]); // followed up to a first message
  for (const start of [found.leaf, ...Object.keys(found.messages)]) {
    const trail = new Set();
    for (let id = start; !rooted.has(id); id = found.messages[id].parent) {
      if (!Object.hasOwn(found.messages, id)) refuse(`${where} lacks the message ${id}`);
      if (trail.has(id)) refuse(`the message ${id} of ${where} follows itself`);
      trail.add(id);
    }
    trail.forEach((id) => rooted.add(id));
  }
  if (found.leaf === null && messages.length) refuse(`${where} shows none of its messages`);
  return /^[\w-]{1,64}$/.test(found.id) ? found : { ...found, id: newId() };
}

/**
 * Return the conversations in the text of an exported file.
 *
 * @throws Error it is something else; the message says what was found.
 */
export function fromJson(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch (error) {
    refuse(`it isn't JSON, ${error.message}`);
  }
  if (file?.format !== "llama-conversations") refuse("its format isn't llama-conversations");
  if (!Array.isArray(file.conversations)) refuse("it has no list of conversations");
  return file.conversations.map(conversationOf);
}
