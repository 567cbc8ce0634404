// Controls with their labels.

import { announce, el } from "./dom.js";

/** Return a control below its label, with what goes with it. */
export function labelled(label, control, ...more) {
  return el("div", { class: "field" }, el("label", { for: control.id }, label), control, ...more);
}

/** Return a list to choose from, of pairs of value and text. */
export function select(id, options, value, onChange) {
  const made = options.map(([name, text]) => el("option", { value: name }, text));
  const element = el("select", { id, onchange: () => onChange(element.value) }, ...made);
  element.value = value;
  return element;
}

/** Return a text box, of one line or of several. */
export function textBox(id, value, rows = 1, props = {}) {
  const all = { id, autocomplete: "off", dir: "auto", value: value ?? "", ...props };
  return rows > 1 ? el("textarea", { ...all, rows }) : el("input", all);
}

/**
 * Return a labelled text box, beside which stands what is wrong with its text.
 *
 * @param read raises an Error if the text is wrong.
 * @param onInput called with each text, also with one that is wrong.
 */
export function checked(label, box, hint, read, onInput) {
  const [errorId, hintId] = [`${box.id}-error`, `${box.id}-hint`];
  const error = el("p", { id: errorId, class: "field-error" });
  const check = () => {
    error.textContent = "";
    try {
      read(box.value);
    } catch (problem) {
      error.textContent = `${label}: ${problem.message}.`;
    }
    box.setAttribute("aria-invalid", String(error.textContent !== ""));
  };
  box.setAttribute("aria-describedby", `${errorId} ${hintId}`);
  box.addEventListener("input", () => (onInput(box.value), check()));
  box.addEventListener("change", () => error.textContent && announce(error.textContent));
  check();
  return { element: labelled(label, box, error, el("small", { id: hintId }, hint)), check };
}
