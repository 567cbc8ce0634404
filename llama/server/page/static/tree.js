// A conversation as a tree of messages, of which one branch is shown. No DOM, no network.

const ROLES = ["user", "assistant", "tool"];
const NAMES = { user: "You", assistant: "Assistant", tool: "Tool" };

// crypto.randomUUID is missing where the page has no HTTPS.
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(10));
  return "m" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(fields = {}) {
  const created = Date.now();
  const empty = { title: "New conversation", system: "", settings: {}, tools: "", messages: {} };
  return { id: newId(), created, updated: created, ...empty, leaf: null, dropped: [], ...fields };
}

export function newMessage(role, content, fields = {}) {
  const plain = { finish_reason: null, usage: null, seconds: null, logprobs: null };
  const calls = { tool_calls: null, tool_call_id: null, attachments: [], error: "" };
  const base = { id: newId(), parent: null, role, content, state: "complete" };
  return { ...base, ...plain, ...calls, ...fields };
}

const titleOf = (text) => {
  const line = text.trim().split("\n", 1)[0].trim();
  return line.length > 60 ? `${line.slice(0, 57).trim()}…` : line;
};

/** Add a message behind its parent, by default the shown end, and show it. */
export function addMessage(conversation, message, parent = conversation.leaf) {
  const isFirst = !Object.keys(conversation.messages).length;
  if (isFirst && conversation.title === "New conversation") {
    const named = titleOf(message.content) || message.attachments[0]?.name;
    conversation.title = named || conversation.title;
  }
  conversation.messages[message.id] = { ...message, parent };
  conversation.leaf = message.id;
  conversation.updated = Date.now();
  return message.id;
}

/** Return the messages from the first one to a message, by default the shown end. */
export function path(conversation, end = conversation.leaf) {
  const found = [];
  for (let id = end; id !== null; id = conversation.messages[id].parent) {
    found.push(conversation.messages[id]);
  }
  return found.reverse();
}

/** Return the ids of the messages behind each message, from the oldest; those of null are first. */
export function childrenOf(conversation) {
  const children = new Map();
  for (const { id, parent } of Object.values(conversation.messages)) {
    children.set(parent, [...(children.get(parent) ?? []), id]);
  }
  return children;
}

export function siblings(conversation, id) {
  return childrenOf(conversation).get(conversation.messages[id].parent);
}

/** Return the end of the newest branch behind a message, or of all (null). */
function newestEnd(conversation, id) {
  const children = childrenOf(conversation);
  while (children.has(id)) id = children.get(id).at(-1);
  return id;
}

/** Return the calls at the shown end that have no result yet. */
export function openCalls(conversation) {
  const shown = path(conversation);
  const at = shown.findLastIndex(({ role }) => role !== "tool");
  const results = shown.slice(at + 1).map(({ tool_call_id }) => tool_call_id);
  return (shown[at]?.tool_calls ?? []).filter(({ id }) => !results.includes(id));
}

/** Show the previous (-1) or next (1) version of a message, with what followed it. */
export function walk(conversation, id, step) {
  const versions = siblings(conversation, id);
  const other = versions[versions.indexOf(id) + step];
  if (other) conversation.leaf = newestEnd(conversation, other);
}

/** Add another version of a message beside it, as a branch of its own. */
export function edit(conversation, id, content) {
  const { role, parent, attachments, tool_call_id } = conversation.messages[id];
  const fields = { attachments: [...attachments], tool_call_id };
  return addMessage(conversation, newMessage(role, content, fields), parent);
}

/**
 * Remove a message, with the answers to it if it is the user's and the tools' results if it is the
 * assistant's. What came after it follows what was before it.
 */
export function removeTurn(conversation, id) {
  const { messages } = conversation;
  const children = childrenOf(conversation);
  const removed = new Set();
  const take = (at) => {
    removed.add(at);
    for (const child of children.get(at) ?? []) {
      const isResult = messages[child].role === "tool";
      const isAnswer = messages[child].role === "assistant" && messages[id].role === "user";
      if (isResult || isAnswer) take(child);
    }
  };
  take(id);
  const { parent } = messages[id];
  const wasShown = removed.has(conversation.leaf);
  for (const one of removed) delete messages[one];
  for (const message of Object.values(messages)) {
    if (removed.has(message.parent)) message.parent = parent;
  }
  conversation.dropped = conversation.dropped.filter((one) => !removed.has(one));
  if (wasShown) conversation.leaf = newestEnd(conversation, parent);
  conversation.updated = Date.now();
}

// The fence is longer than any in the text, so that the text can't end it.
function fenced({ name, text }) {
  const longest = Math.max(2, ...Array.from(text.matchAll(/`+/g), ([ticks]) => ticks.length));
  const fence = "`".repeat(longest + 1);
  return `${name}:\n${fence}\n${text}${text.endsWith("\n") ? "" : "\n"}${fence}`;
}

export const contentOf = ({ content, attachments }) =>
  [content, ...attachments.map(fenced)].filter(Boolean).join("\n\n");

function toMessage(message) {
  const { role, tool_calls, tool_call_id } = message;
  const sent = { role, content: contentOf(message) };
  if (tool_call_id) sent.tool_call_id = tool_call_id;
  if (tool_calls?.length) {
    sent.content ||= null;
    sent.tool_calls = tool_calls.map(({ id, name, arguments: text }) => ({
      id,
      type: "function",
      function: { name, arguments: text },
    }));
  }
  return sent;
}

/** Return the messages that the API gets, up to one, by default the shown end. */
export function toMessages(conversation, end = conversation.leaf) {
  const { system, dropped } = conversation;
  const isSent = ({ id, role, content, tool_calls }) =>
    !dropped.includes(id) && (role !== "assistant" || content || tool_calls?.length);
  const sent = path(conversation, end).filter(isSent).map(toMessage);
  return system.trim() ? [{ role: "system", content: system }, ...sent] : sent;
}

export function toMarkdown(conversation) {
  const { title, system } = conversation;
  const parts = [`# ${title}`];
  if (system.trim()) parts.push("## System prompt", system);
  for (const message of path(conversation)) {
    parts.push(`## ${NAMES[message.role]}`, contentOf(message));
    for (const { name, arguments: text } of message.tool_calls ?? []) {
      parts.push(fenced({ name: `Call of ${name}`, text }));
    }
  }
  return parts.join("\n\n") + "\n";
}

export const toJson = (conversations) =>
  JSON.stringify({ format: "llama-conversations", version: 1, conversations }, null, 2);

function expect(holds, text) {
  if (!holds) throw new Error(`This isn't a file of exported conversations: ${text}.`);
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isText = (value) => typeof value === "string";
const isName = (value) => isText(value) && /^[A-Za-z][\w-]{0,63}$/.test(value);
const isListOf = (value, check) => Array.isArray(value) && value.every(check);
const isLogprob = (one) =>
  isObject(one) && isText(one.token) && (one.logprob === null || Number.isFinite(one.logprob));

function checkedMessage(id, given) {
  const where = `message ${id}`;
  expect(isName(id) && isObject(given), `"${id}" is no message's id`);
  expect(ROLES.includes(given.role), `${where} has the role ${JSON.stringify(given.role)}`);
  expect(isText(given.content), `${where} has no text`);
  const message = newMessage(given.role, given.content, { id, parent: given.parent ?? null });
  const { attachments = [], tool_calls: calls, logprobs, usage } = given;
  const isFile = (file) => isObject(file) && isText(file.name) && isText(file.text);
  const isCall = (call) => isObject(call) && [call.id, call.name, call.arguments].every(isText);
  const isToken = (one) => isLogprob(one) && isListOf(one.top ?? [], isLogprob);
  expect(isListOf(attachments, isFile), `${where} has attachments without name or text`);
  expect(!calls || isListOf(calls, isCall), `${where} has calls without id, name or arguments`);
  expect(!logprobs || isListOf(logprobs, isToken), `${where} has wrong log-probabilities`);
  const hasUsage =
    isObject(usage) && [usage.prompt_tokens, usage.completion_tokens].every(Number.isFinite);
  return Object.assign(message, {
    state: given.state === "complete" ? "complete" : "cut",
    finish_reason: isText(given.finish_reason) ? given.finish_reason : null,
    usage: hasUsage ? usage : null,
    seconds: Number.isFinite(given.seconds) ? given.seconds : null,
    logprobs: logprobs ?? null,
    tool_calls: calls ?? null,
    tool_call_id: isText(given.tool_call_id) ? given.tool_call_id : null,
    attachments,
    error: isText(given.error) ? given.error : "",
  });
}

function checkParents(messages) {
  const isRooted = new Set([null]);
  for (const start of Object.keys(messages)) {
    const trail = new Set();
    for (let id = start; !isRooted.has(id); id = messages[id].parent) {
      const isThere = isText(id) && Object.hasOwn(messages, id);
      expect(isThere, `message ${start} follows one that is missing`);
      expect(!trail.has(id), `message ${start} follows itself`);
      trail.add(id);
    }
    for (const id of trail) isRooted.add(id);
  }
}

function checkedConversation(given) {
  expect(isObject(given) && isObject(given.messages), "a conversation has no messages");
  const { title, system = "", settings = {}, tools = "", leaf = null, dropped = [] } = given;
  expect([title, system, tools].every(isText), "a title, system prompt or tools are no text");
  expect(isObject(settings), "the settings are no object");
  const entries = Object.entries(given.messages);
  const messages = Object.fromEntries(entries.map(([id, one]) => [id, checkedMessage(id, one)]));
  checkParents(messages);
  const hasEnd = leaf === null ? !entries.length : isText(leaf) && Object.hasOwn(messages, leaf);
  expect(hasEnd, "the shown end is missing");
  expect(isListOf(dropped, isText), "the dropped messages are no list");
  const dates = ["created", "updated"].filter((name) => Number.isFinite(given[name]));
  const times = Object.fromEntries(dates.map((name) => [name, given[name]]));
  const kept = { title, system, settings, tools, messages, leaf, dropped, ...times };
  return newConversation({ ...kept, id: isName(given.id) ? given.id : newId() });
}

/**
 * Return the conversations in the text of an exported file.
 *
 * Throws an Error that says what was expected if it is something else.
 */
export function fromJson(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    expect(false, "it isn't JSON");
  }
  const isOurs = isObject(file) && file.format === "llama-conversations";
  expect(isOurs, "its format isn't llama-conversations");
  expect(Array.isArray(file.conversations), "it has no conversations");
  return file.conversations.map(checkedConversation);
}
