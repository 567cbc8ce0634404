// The page's head: the model in plain words, and the tabs.

import { button, count, el } from "./dom.js";

/** Return a text such as "Llama, 1.1 billion parameters · bfloat16 · 2,048 tokens of context". */
export function aboutModel({ meta = {}, max_model_len }) {
  const format = meta.chat_format ? `chat format “${meta.chat_format}”` : "";
  const context = `${count(max_model_len)} tokens of context`;
  return [meta.description, meta.precision, format, context].filter(Boolean).join(" · ");
}

/** Return a tablist of panels by their names; `onShow(name)` is called with each that is shown. */
export function tabs(panels, onShow) {
  const names = Object.keys(panels);
  const made = names.map((name) => {
    const id = name.toLowerCase();
    const controls = { id: `tab-${id}`, role: "tab", "aria-controls": `panel-${id}` };
    Object.assign(panels[name], { id: `panel-${id}`, role: "tabpanel" });
    panels[name].setAttribute("aria-labelledby", controls.id);
    return button(name, () => show(name), controls);
  });
  const show = (shown) => {
    names.forEach((name, i) => {
      panels[name].hidden = name !== shown;
      made[i].setAttribute("aria-selected", String(name === shown));
      made[i].tabIndex = name === shown ? 0 : -1;
    });
    onShow(shown);
  };
  const list = el("div", { role: "tablist", "aria-label": "Tasks", class: "tabs" }, ...made);
  list.hidden = names.length < 2;
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = made[(made.indexOf(event.target) + (step ?? 0) + made.length) % made.length];
    if (!step) return;
    event.preventDefault();
    next.focus();
    next.click();
  });
  show(names[0]);
  return list;
}
