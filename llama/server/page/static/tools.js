// Functions that the model may call: their list in the settings, and the card of a call.

import { button, el } from "./dom.js";
import { checked, textBox } from "./fields.js";
import { parseJson } from "./sampling.js";

const CITY = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const EXAMPLE = {
  type: "function",
  function: { name: "weather", description: "The weather of a city", parameters: CITY },
};

function read(text) {
  if (!text?.trim()) return [];
  const tools = parseJson(text);
  if (!Array.isArray(tools)) throw new Error("expected a list: [ … ]");
  tools.forEach((tool, i) => {
    const name = tool?.function?.name;
    if (tool?.type !== "function" || typeof name !== "string") {
      throw new Error(`number ${i + 1} isn't {"type": "function", "function": {"name": …}}`);
    }
    if (!/^[\w-]{1,64}$/.test(name)) {
      throw new Error(`the name "${name}" has more than 64 letters, digits, _ and -, or others`);
    }
  });
  return tools;
}

/**
 * Return the tools that a conversation's text lists, in the API's form; none if it is empty.
 *
 * @throws Error the text is no such list; its message says what was expected.
 */
export function parseTools(text) {
  try {
    return read(text);
  } catch (error) {
    throw new Error(`Tools: ${error.message}. Change it in the settings.`);
  }
}

/** Return the field "Tools" of a conversation; onChange gets its text after each change. */
export function toolsEditor(conversation, onChange, model) {
  if (model?.meta?.tools === false && !conversation.tools) {
    const says = "The model's chat format has no place for tools. A server that is started with ";
    return el("p", { class: "no-tools" }, `${says}--tool_format hermes describes them to it.`);
  }
  const box = textBox("setting-tools", conversation.tools, 6, { class: "code" });
  const hint = "functions that an answer may call: a JSON list, as the API takes it";
  const { element } = checked("Tools", box, hint, read, onChange);
  const example = () => {
    if (box.ariaInvalid === "true") return box.focus(); // what was typed stays
    box.value = JSON.stringify([...read(box.value), EXAMPLE], null, 2);
    box.dispatchEvent(new Event("input"));
  };
  element.append(button("Insert an example", example));
  return element;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // a call that was cut
  }
}

/**
 * Return the card of a call.
 *
 * @param result its text; null if the call has no result yet.
 * @param onResult called with the result that the person gives.
 */
export function callCard(call, result, onResult) {
  const code = (text, label) => {
    const props = { tabindex: 0, dir: "auto", role: "region" };
    return el("pre", { ...props, "aria-label": `${label} of ${call.name}` }, text);
  };
  const card = el(
    "div",
    { class: "call", role: "group", "aria-label": `Call of ${call.name}` },
    el("p", {}, "Call of ", el("code", {}, call.name)),
    code(pretty(call.arguments), "Arguments"),
  );
  if (typeof result === "string") {
    card.append(el("p", {}, "Result"), code(result, "Result"));
  } else if (onResult) {
    const text = el("textarea", { rows: 3, "aria-label": `Result of ${call.name}`, class: "code" });
    card.append(text, button("Send result", () => onResult(text.value)));
  }
  return card;
}
