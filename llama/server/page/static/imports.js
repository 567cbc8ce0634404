// Conversations of a file that anybody may have written.

import { parseJson } from "./dom.js";
import { NAMES, newConversation, newId, newMessage } from "./tree.js";

// Examples of what is taken: texts, numbers, lists of what their first item is like.
const TOKEN = { token: "", logprob: 0 };
const CALL = { name: "", arguments: "" };
const MESSAGE = {
  ...newMessage("user", ""),
  ...{ parent: "", finish_reason: "", usage: { prompt_tokens: 0, completion_tokens: 0 } },
  ...{ seconds: 0, logprobs: [{ ...TOKEN, top: [TOKEN] }], tool_calls: [{ id: "", ...CALL }] },
  ...{ call: CALL, tool_call_id: "", attachments: [{ name: "", text: "" }] },
};
const CONVERSATION = { ...newConversation(), leaf: "", dropped: [""] };

const isObject = (value) => value instanceof Object && !Array.isArray(value);

function isLike(value, example) {
  if (Array.isArray(example)) {
    return Array.isArray(value) && value.every((one) => isLike(one, example[0]));
  }
  if (!isObject(example)) return typeof value === typeof example;
  return isObject(value) && Object.keys(example).every((key) => isLike(value[key], example[key]));
}

function refuse(text) {
  throw new Error(`This is no file of exported conversations: ${text}.`);
}

/** Return the defaults with what is given, if that is like the example's fields. */
function checked(given, defaults, example, where) {
  const found = { ...defaults, ...given };
  for (const [name, like] of Object.entries(example)) {
    if (found[name] === defaults[name] || isLike(found[name], like)) continue;
    refuse(`${where} has ${name} ${JSON.stringify(found[name]).slice(0, 80)}`);
  }
  return found;
}

function messageOf([id, given]) {
  const where = `message ${id}`;
  const message = checked({ ...given, id }, newMessage("", ""), MESSAGE, where);
  if (!/^[A-Za-z][\w-]{0,63}$/.test(id)) refuse(`${where} has id ${id}`);
  if (!Object.hasOwn(NAMES, message.role)) refuse(`${where} has role ${message.role}`);
  return [id, { ...message, state: message.state === "complete" ? "complete" : "cut" }];
}

function conversationOf(given, number) {
  const where = `conversation ${number + 1}`;
  const found = checked(given, newConversation(), CONVERSATION, where);
  const messages = Object.fromEntries(Object.entries(found.messages).map(messageOf));
  const ids = Object.keys(messages);
  for (const start of [found.leaf, ...ids]) {
    let n = 0;
    for (let id = start; id !== null; id = messages[id].parent) {
      if (!Object.hasOwn(messages, id)) refuse(`${where} lacks the message ${id}`);
      if (++n > ids.length) refuse(`the message ${id} of ${where} follows itself`);
    }
  }
  if (found.leaf === null && ids.length) refuse(`${where} shows none of its messages`);
  return { ...found, messages, id: /^[\w-]{1,64}$/.test(found.id) ? found.id : newId() };
}

/** Return the conversations in the text of an exported file; raise an Error if it is another. */
export function fromJson(text) {
  const file = parseJson(text, (fault) => refuse(`it isn't JSON, ${fault}`));
  if (file?.format !== "llama-conversations") refuse("its format isn't llama-conversations");
  if (!Array.isArray(file.conversations)) refuse("it has no list of conversations");
  return file.conversations.map(conversationOf);
}
