// The sheet of settings. Each change is in the conversation at once.

import { actOn, el, find } from "./dom.js";
import { read } from "./sampling.js";
import { keep, recall } from "./store.js";

const showTheme = () => (document.documentElement.dataset.theme = recall("theme"));

export class Settings {
  dialog = find("#settings");

  boxes = this.dialog.querySelectorAll("[name]");

  constructor({ meta }) {
    for (const [name, value] of Object.entries(meta.sampling)) {
      find(`#set-${name}`)?.setAttribute("placeholder", value);
    }
    const most = Math.min(5, meta.top_logprobs);
    find("#set-logprobs").value = most;
    find("#set-logprobs").closest(".switch").hidden = most === 0;
    this.hasTools = meta.tools;
    const example = find("#example").content.textContent;
    this.dialog.addEventListener("input", ({ target }) => this.#take(target));
    actOn(this.dialog, {
      example: () => this.#fill("tools", find("#set-tools").value || example),
      savePreset: () => this.#keepPreset(find("#preset-name").value, find("#set-system").value),
      removePreset: () => this.#keepPreset(find("#preset").value, undefined),
    });
    addEventListener("storage", showTheme); // another tab's choice
    showTheme();
  }

  /** Show the sheet; `onChange` is called with all settings after each change. */
  open(settings, onChange) {
    Object.assign(this, { settings, onChange });
    const values = { ...settings, theme: recall("theme") ?? "auto" };
    for (const box of this.boxes) {
      const value = values[box.name] ?? "";
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
    const value = box.type === "checkbox" && !box.checked ? "" : box.value;
    if (box.name === "theme") {
      keep("theme", value);
      return showTheme();
    }
    this.settings = { ...this.settings, [box.name]: value };
    this.#check(box);
    this.onChange(this.settings);
  }

  #fill(name, value) {
    const box = find(`#set-${name}`);
    box.value = value;
    this.#take(box);
  }

  #check(box) {
    const error = find(`#${box.id}-error`);
    if (!error) return;
    error.textContent = "";
    try {
      read(this.settings, box.name);
    } catch ({ message }) {
      error.textContent = message;
    }
    box.setAttribute("aria-invalid", String(error.textContent !== ""));
  }

  #listPresets(chosen) {
    const options = ["", ...Object.keys(recall("presets") ?? {})];
    const shown = options.map((name) => el("option", { value: name }, name || "none"));
    find("#preset").replaceChildren(...shown);
    [find("#preset").value, find("#preset-name").value] = [chosen, chosen];
  }

  /** Keep a preset; without a text it is removed. */
  #keepPreset(name, text) {
    keep("presets", { ...recall("presets"), [name]: text });
    this.#listPresets(text === undefined ? "" : name);
  }
}
