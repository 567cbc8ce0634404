// The settings of a conversation as fields of a request. Settings are the texts as they were
// typed, so that one that is wrong stays to be mended.

import { find } from "./dom.js";

const number = (least, most) => (text) => {
  const value = Number(text.replace(",", "."));
  if (value >= least && value <= most) return value;
  throw new Error(`expected a number from ${least} to ${most}`);
};

const whole = (least) => (text) => {
  const value = Number(text);
  if (/^-?\d+$/.test(text) && Number.isSafeInteger(value) && value >= least) return value;
  throw new Error(`expected a whole number${least > -Infinity ? `, ${least} or more` : ""}`);
};

const stops = (text) =>
  text.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));

function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`this is no JSON: ${error.message}`);
  }
}

const schema = (text) => ({
  type: "json_schema",
  json_schema: { name: "answer", schema: parseJson(text) },
});

function tools(text) {
  const found = parseJson(text);
  if (Array.isArray(found)) return found;
  throw new Error("expected a list: [ … ]");
}

/** How the texts are read, by their names in a request. */
const FIELDS = {
  temperature: number(0, 100),
  top_p: number(0, 1),
  top_k: whole(-1),
  min_p: number(0, 1),
  repetition_penalty: number(0.001, 1000),
  presence_penalty: number(-2, 2),
  frequency_penalty: number(-2, 2),
  seed: whole(-Infinity),
  max_tokens: whole(1),
  min_tokens: whole(0),
  stop: stops,
  response_format: schema,
  tools,
};

/** Return the value of a setting, undefined if it is empty; raise an Error that says its fault. */
export function read(settings, name, remedy = "") {
  const text = String(settings[name] ?? "");
  try {
    return text.trim() === "" ? undefined : FIELDS[name]?.(text);
  } catch (error) {
    const label = find(`label[for=set-${name}]`).textContent;
    throw new Error(`${label}: ${error.message}.${remedy}`);
  }
}

/** Return the fields of a request for chat, without those that are the server's defaults. */
export function requestFields(settings, defaults) {
  const found = {};
  for (const name of Object.keys(FIELDS)) {
    const value = read(settings, name, " Change it in the settings.");
    if (value !== undefined && value !== defaults[name]) found[name] = value;
  }
  if (settings.ignore_eos) found.ignore_eos = true;
  if (!settings.logprobs) return found;
  return { ...found, logprobs: true, top_logprobs: Number(settings.logprobs) };
}
