// The sheet of settings.

import { announce, button, el } from "./dom.js";
import { checked, labelled, select, textBox } from "./fields.js";
import { FIELDS, FORMS, read } from "./sampling.js";
import { toolsEditor } from "./tools.js";

export { requestFields } from "./sampling.js";

const ROWS = { stop: 3, response_format: 5 };
const THEMES = [["auto", "Auto"], ["light", "Light"], ["dark", "Dark"]];

/** The sheet "Settings" of a conversation. Each change is in the conversation at once. */
export class Settings {
  /** Returns the settings of the conversation that is shown; set by the page. */
  current = () => ({});

  constructor(model, store) {
    Object.assign(this, { model, store });
    const onclick = ({ target }) => target === this.element && this.element.close(); // beside it
    this.element = el("dialog", { class: "sheet", "aria-labelledby": "settings-title", onclick });
    const { dataset } = document.documentElement;
    const take = (record) => (dataset.theme = this.theme = record?.theme ?? "auto");
    store.draft("theme").then(take);
    store.onChange(({ id, record }) => id === "theme" && take(record)); // also another tab's choice
  }

  /**
   * Show the sheet.
   *
   * @param onChange called with what has changed: {system}, {settings} or {tools}; it resolves when
   *   `current` has it.
   */
  open(conversation, onChange) {
    this.settings = { ...conversation.settings };
    this.change = (changes) => {
      Object.assign(conversation, changes);
      this.saved = onChange(changes);
    };
    const chooseTheme = (theme) => this.store.putDraft("theme", { theme });
    const title = el("h2", { id: "settings-title" }, "Settings");
    this.element.replaceChildren(
      el("header", {}, title, button("Close", () => this.element.close())),
      this.#system(conversation),
      el("div", { class: "fields" }, ...this.#fields(), ...this.#switches()),
      toolsEditor(conversation, (tools) => this.change({ tools }), this.model),
      labelled("Theme", select("setting-theme", THEMES, this.theme, chooseTheme)),
    );
    this.element.showModal();
    this.element.scrollTo(0, 0);
  }

  #set(name, value) {
    this.settings = { ...this.settings, [name]: value };
    if (value === "" || value === false) delete this.settings[name];
    this.change({ settings: this.settings });
  }

  #fields() {
    const made = FIELDS.map((field) => {
      const [name, label, , hint] = field;
      const placeholder = this.model.meta?.sampling?.[name];
      const props = ROWS[name] ? {} : { inputmode: "decimal", placeholder };
      const box = textBox(`setting-${name}`, this.settings[name], ROWS[name], props);
      const check = () => read(field, this.settings);
      return checked(label, box, hint, check, (text) => this.#set(name, text));
    });
    const kinds = Object.entries(FORMS).map(([kind, [label]]) => [kind, label]);
    const kind = select("setting-form", kinds, this.settings.form ?? "json_schema", (form) => {
      this.#set("form", form);
      made.at(-1).check();
    });
    return [...made.map(({ element }) => element), labelled("The schema is a", kind)];
  }

  #switches() {
    const most = Math.min(5, this.model.meta?.top_logprobs ?? 5);
    const make = (name, label, value) => {
      const box = el("input", { type: "checkbox", id: `setting-${name}` });
      box.checked = Boolean(this.settings[name]);
      box.addEventListener("change", () => this.#set(name, box.checked && value));
      return el("div", { class: "switch" }, box, el("label", { for: box.id }, label));
    };
    const ends = make("ignore_eos", "Go on after the model's own end", true);
    return most > 0 ? [make("logprobs", "Show probabilities", most), ends] : [ends];
  }

  #system(conversation) {
    const text = textBox("setting-system", conversation.system, 4);
    const name = textBox("preset-name");
    const write = () => this.change({ system: text.value });
    text.addEventListener("input", write);
    let presets = [];
    const preset = select("preset", [], "", (chosen) => {
      const found = presets.find((each) => each.name === chosen);
      if (!found) return;
      [text.value, name.value] = [found.text, found.name];
      write();
    });
    const fill = async (chosen) => {
      presets = await this.store.presets();
      const options = ["", ...presets.map((each) => each.name)];
      preset.replaceChildren(...options.map((value) => el("option", { value }, value || "none")));
      preset.value = chosen;
    };
    const save = async () => {
      const chosen = name.value.trim();
      if (!chosen) return name.focus();
      await this.store.putPreset({ name: chosen, text: text.value });
      await fill(chosen);
      announce(`The preset ${chosen} is saved.`);
    };
    const remove = async () => {
      if (!preset.value) return;
      announce(`The preset ${preset.value} is deleted.`);
      await this.store.removePreset(preset.value);
      await fill("");
    };
    fill("");
    const choice = [labelled("Preset", preset), button("Delete preset", remove)];
    const saving = [labelled("Name of the preset", name), button("Save as preset", save)];
    const rows = [choice, saving].map((row) => el("div", { class: "preset" }, ...row));
    return el("div", {}, labelled("System prompt", text), ...rows);
  }
}
