// The sheet of settings. Each change is in the conversation at once.

import { actOn, find } from "./dom.js";
import { read } from "./sampling.js";
import { keep, recall } from "./store.js";

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
    this.#followTheme(find("#theme"));
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

  // The style sheet knows the colours of the chosen one.
  #followTheme(box) {
    const show = () => (box.value = recall("theme") ?? "auto");
    box.addEventListener("input", () => keep("theme", box.value));
    addEventListener("storage", show); // another tab's choice
    show();
  }
}
