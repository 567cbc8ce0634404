// The sheet of settings. Each change is in the conversation at once.

import { actOn, announce, el, find } from "./dom.js";
import { read } from "./sampling.js";
import { keep, recall } from "./store.js";

const showTheme = () => (document.documentElement.dataset.theme = recall("theme") ?? "auto");

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
    this.dialog.addEventListener("input", ({ target }) => this.#take(target));
    actOn(this.dialog, {
      example: () => this.#fill("tools", find("#set-tools").value || find("#example").content.textContent),
      savePreset: () => this.#savePreset(),
      removePreset: () => this.#removePreset(),
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
    const isOffered = this.hasTools || Boolean(settings.tools);
    [find("#tools").hidden, find("#no-tools").hidden] = [!isOffered, isOffered];
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

  #savePreset() {
    const name = find("#preset-name").value.trim();
    if (!name) return find("#preset-name").focus();
    keep("presets", { ...recall("presets"), [name]: find("#set-system").value });
    this.#listPresets(name);
    announce(`The preset ${name} is saved.`);
  }

  #removePreset() {
    const { [find("#preset").value]: removed, ...others } = recall("presets") ?? {};
    keep("presets", others);
    this.#listPresets("");
  }
}
