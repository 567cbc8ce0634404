// The sheet of settings, and settings as fields of a request. They are the texts as they were typed,
// so that one that is wrong stays to be mended; the boxes of the sheet tell how they are read.

import { actOn, find, parseJson } from "./dom.js";
import { keep, recall } from "./store.js";

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
  json(text, { shape }) {
    const found = json(text);
    if (found instanceof Object && Array.isArray(found) === (shape === "list")) return found;
    throw new Error(`expected ${shape === "list" ? "a list: [ … ]" : "an object: { … }"}`);
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

/** The sheet of settings. Each change is in the conversation at once. */
export class Settings {
  dialog = find("#settings");

  form = find("#settings-form");

  constructor({ meta }) {
    for (const [name, value] of Object.entries(meta.sampling)) {
      find(`#set-${name}`)?.setAttribute("placeholder", value);
    }
    const most = Math.min(5, meta.top_logprobs);
    Object.assign(find("#set-logprobs"), { value: most, disabled: most === 0 });
    this.hasTools = meta.tools;
    const example = find("#example").content.textContent;
    this.form.addEventListener("input", ({ target }) => this.#take(target));
    actOn(this.form, {
      example: () => this.#fill("tools", find("#set-tools").value || example),
      savePreset: () => this.#keepPreset(find("#preset-name").value, find("#set-system").value),
      removePreset: () => this.#keepPreset(find("#preset").value, undefined),
    });
    const theme = find("#theme"); // whose colours the style sheet has
    const showTheme = () => (theme.value = recall("theme") ?? "auto");
    theme.addEventListener("input", () => keep("theme", theme.value));
    addEventListener("storage", showTheme); // another tab's choice
    showTheme();
  }

  /** Show the sheet; `onChange` is called with all settings after each change. */
  open(settings, onChange) {
    Object.assign(this, { settings, onChange });
    for (const box of this.form.elements) {
      const value = settings[box.name] ?? "";
      if (box.type === "checkbox") box.checked = value !== "";
      else box.value = value;
      this.#check(box);
    }
    find("#tools").hidden = !this.hasTools && !settings.tools;
    this.#listPresets("");
    this.dialog.showModal();
    this.dialog.scrollTo(0, 0);
  }

  #take(box) {
    if (box.id === "preset" && box.value) this.#fill("system", recall("presets")[box.value]);
    if (!box.name) return;
    this.settings = Object.fromEntries(new FormData(this.form));
    this.#check(box);
    this.onChange(this.settings);
  }

  #fill(name, value) {
    const box = find(`#set-${name}`);
    box.value = value;
    this.#take(box);
  }

  #check(box) {
    if (!box.dataset.kind) return;
    const { fault = "" } = read(box, this.settings);
    find(`#${box.id}-error`).textContent = fault;
    box.setAttribute("aria-invalid", fault !== "");
  }

  #listPresets(chosen) {
    const options = ["", ...Object.keys(recall("presets") ?? {})];
    find("#preset").replaceChildren(...options.map((name) => new Option(name || "none", name)));
    [find("#preset").value, find("#preset-name").value] = [chosen, chosen];
  }

  /** Keep a preset; without a text it is removed. */
  #keepPreset(name, text) {
    keep("presets", { ...recall("presets"), [name]: text });
    this.#listPresets(text === undefined ? "" : name);
  }
}
