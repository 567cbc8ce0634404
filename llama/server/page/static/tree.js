// A conversation as a tree of messages, of which one branch is shown. No DOM, no network.

export const NAMES = { user: "You", assistant: "Assistant", tool: "Tool" };
const UNNAMED = "New conversation";

// crypto.randomUUID needs HTTPS or localhost.
export const newId = () => `m${crypto.getRandomValues(new Uint32Array(3)).join("-")}`;

export const newConversation = () => ({
  ...{ id: newId(), title: UNNAMED, created: Date.now(), settings: { system: "", tools: "" } },
  ...{ messages: {}, leaf: null, dropped: [] },
});

export const newMessage = (role, content, fields = {}) => ({
  ...{ id: newId(), parent: null, role, content, state: "complete", error: "", attachments: [] },
  ...{ finish_reason: null, usage: null, seconds: null, logprobs: null },
  ...{ tool_calls: null, tool_call_id: null, call: null, ...fields },
});

/** Add a message behind its parent, by default the shown end, and show it. */
export function addMessage(conversation, message, parent = conversation.leaf) {
  if (conversation.title === UNNAMED && !Object.keys(conversation.messages).length) {
    const line = message.content.trim().split("\n", 1)[0] || message.attachments[0]?.name;
    conversation.title = line.slice(0, 60);
  }
  conversation.messages[message.id] = { ...message, parent };
  conversation.leaf = message.id;
}

/** Return the messages from the first one to the shown end. */
export function path({ messages, leaf }) {
  const found = [];
  for (let id = leaf; id !== null; id = messages[id].parent) found.unshift(messages[id]);
  return found;
}

/** Return the messages behind each one's id, from the oldest; behind null are the first. */
export const childrenOf = ({ messages }) =>
  Map.groupBy(Object.values(messages), ({ parent }) => parent);

/** Show the newest branch behind a message, or of all (null). */
export function showNewest(conversation, id) {
  const children = childrenOf(conversation);
  while (children.has(id)) id = children.get(id).at(-1).id;
  conversation.leaf = id;
}

/** Add another version of a message beside it, as a branch of its own. */
export function edit(conversation, id, content) {
  const { role, parent, attachments, tool_call_id, call } = conversation.messages[id];
  addMessage(conversation, newMessage(role, content, { attachments, tool_call_id, call }), parent);
}

/** Remove a message with all that answers it; the next question follows what was before it. */
export function removeTurn(conversation, id) {
  const [{ messages }, children, removed] = [conversation, childrenOf(conversation), new Set([id])];
  const { parent } = messages[id];
  for (const one of removed) {
    for (const child of children.get(one) ?? []) {
      if (child.role === "user") child.parent = parent;
      else removed.add(child.id);
    }
    delete messages[one];
  }
  conversation.dropped = conversation.dropped.filter((one) => !removed.has(one));
  if (removed.has(conversation.leaf)) showNewest(conversation, parent);
}

/** Return the calls at the shown end that have no result yet, and the id of their message. */
export function openCalls(conversation) {
  const shown = path(conversation);
  const caller = shown.findLast(({ role }) => role !== "tool");
  const results = shown.slice(shown.indexOf(caller)).map(({ tool_call_id }) => tool_call_id);
  const calls = (caller?.tool_calls ?? []).filter(({ id }) => !results.includes(id));
  return { calls, caller: caller?.id };
}

// The fence is longer than any in the text, so that the text can't end it.
function fenced({ name, text }) {
  const fences = Array.from(text.matchAll(/`{3,}/g), ([ticks]) => `${ticks}\``);
  const fence = fences.sort().at(-1) ?? "```";
  return `${name}:\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
}

/** Return a message's text with its attachments. */
export const contentOf = ({ content, attachments }) =>
  [content, ...attachments.map(fenced)].filter(Boolean).join("\n\n");

function toMessage(message) {
  const { role, tool_calls, tool_call_id } = message;
  const called = tool_calls?.map(({ id, ...call }) => ({ id, type: "function", function: call }));
  const content = contentOf(message) || (called ? null : "");
  return { role, content, tool_calls: called, tool_call_id: tool_call_id ?? undefined };
}

/** Return the messages that the API gets. */
export function toMessages(conversation) {
  const { settings, dropped } = conversation;
  const isSent = ({ id, role, content, tool_calls }) =>
    !dropped.includes(id) && (role !== "assistant" || content || tool_calls);
  const sent = path(conversation).filter(isSent).map(toMessage);
  return settings.system.trim() ? [{ role: "system", content: settings.system }, ...sent] : sent;
}

export function toMarkdown(conversation) {
  const { title, settings } = conversation;
  const parts = [`# ${title}`, ...(settings.system ? ["## System prompt", settings.system] : [])];
  for (const message of path(conversation)) {
    const called = (call) => fenced({ name: `Call of ${call.name}`, text: call.arguments });
    const calls = (message.tool_calls ?? []).map(called);
    parts.push(`## ${NAMES[message.role]}`, contentOf(message), ...calls);
  }
  return `${parts.filter(Boolean).join("\n\n")}\n`;
}

export const toJson = (conversations) =>
  JSON.stringify({ format: "llama-conversations", version: 1, conversations }, null, 2);
