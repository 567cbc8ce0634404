// The settings of a conversation as fields of a request. Settings are the texts as they were
// typed, so that one that is wrong stays to be mended; boxes of the sheet tell what they are.

import { find, parseJson } from "./dom.js";

function json(text) {
  return parseJson(text, (fault) => {
    throw new Error(`this is no JSON: ${fault}`);
  });
}

/** How texts are read, by the data-kind of their box, with its data-least and data-most. */
const KINDS = {
  number(text, { least, most }) {
    const value = Number(text.replace(",", "."));
    if (value >= least && value <= most) return value;
    throw new Error(`expected a number from ${least} to ${most}`);
  },
  whole(text, { least }) {
    const value = Number(text);
    const isWhole = /^-?\d+$/.test(text) && Number.isSafeInteger(value);
    if (isWhole && value >= (least ?? -Infinity)) return value;
    throw new Error(`expected a whole number${least ? `, ${least} or more` : ""}`);
  },
  lines: (text) => Array.from(text.matchAll(/[^\n]+/g), ([line]) => line.replaceAll("\\n", "\n")),
  schema: (text) => ({ type: "json_schema", json_schema: { name: "answer", schema: json(text) } }),
  list(text) {
    const found = json(text);
    if (Array.isArray(found)) return found;
    throw new Error("expected a list: [ … ]");
  },
};

/** Return the value of a box's setting, undefined if it is empty or has a fault; and the fault. */
export function read({ name, labels, dataset }, settings) {
  const text = String(settings[name] ?? "");
  try {
    return { value: text.trim() === "" ? undefined : KINDS[dataset.kind](text, dataset) };
  } catch ({ message }) {
    return { fault: `${labels[0].textContent}: ${message}.` };
  }
}

/** Return the fields of a request for chat, without those that are the server's defaults. */
export function requestFields(settings, defaults) {
  const found = {};
  for (const box of find("#settings").querySelectorAll("[data-kind]")) {
    const { value, fault } = read(box, settings);
    if (fault) throw new Error(`${fault} Change it in the settings.`);
    if (value !== undefined && value !== defaults[box.name]) found[box.name] = value;
  }
  if (settings.ignore_eos) found.ignore_eos = true;
  if (!settings.logprobs) return found;
  return { ...found, logprobs: true, top_logprobs: Number(settings.logprobs) };
}
