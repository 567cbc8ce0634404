// Elements, texts as people read and write them, and what people are told.

export const find = (selector, root = document) => root.querySelector(selector);

/** Return a copy of a template, with values in the place of the {names} in its texts. */
export function copyOf(id, values = {}) {
  const copy = find(`template#${id}`).content.firstElementChild.cloneNode(true);
  const fill = (text) => text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  for (const element of [copy, ...copy.querySelectorAll("*")]) {
    for (const attribute of element.attributes) attribute.value = fill(attribute.value);
    if (!element.children.length) element.textContent = fill(element.textContent);
  }
  return copy;
}

/** Call, at each click, the action that a button's data-do names: with the data-id around it. */
export function actOn(root, actions) {
  root.addEventListener("click", ({ target }) => {
    const button = target.closest("[data-do]");
    actions[button?.dataset.do]?.(button.closest("[data-id]")?.dataset.id, button);
  });
}

/**
 * Take each of the files that are dropped on an element, or chosen by its button "files"; tell of
 * one that is refused by an error.
 */
export function takeFiles(root, take) {
  const input = find("input[type=file]", root);
  const takeEach = async (files) => {
    input.value = ""; // so that the same file can be chosen again
    for (const file of files) {
      await take(file).catch(({ message }) => tell(`${file.name} can't be added. ${message}`));
    }
  };
  actOn(root, { files: () => input.click() });
  input.addEventListener("change", () => takeEach([...input.files]));
  for (const type of ["dragover", "drop"]) {
    root.addEventListener(type, (event) => {
      const { types, files } = event.dataTransfer;
      if (!types.includes("Files")) return;
      event.preventDefault();
      if (type === "drop") takeEach([...files]);
    });
  }
}

/** Show the button that stops what an element's other one starts, or else that one. */
export function showRunning(root, isRunning) {
  const hadFocus = find(":is(.start, .stop):focus", root);
  root.classList.toggle("running", isRunning);
  if (hadFocus) find(isRunning ? ".stop" : ".start", root).focus();
}

/** Have the arrow keys move the focus between an element's children. */
export function moveByArrows(list) {
  list.addEventListener("keydown", (event) => {
    const { key, target } = event;
    const beside = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" };
    const next = target[beside[key]];
    if (!next) return;
    event.preventDefault();
    [target.tabIndex, next.tabIndex] = [-1, 0];
    next.focus();
  });
}

/** Return a number as people write it: 2,048. */
export const count = (number) => number.toLocaleString("en");

/** Return the value of a JSON text; of any other text what `otherwise` makes of its fault. */
export function parseJson(text, otherwise) {
  try {
    return JSON.parse(text);
  } catch ({ message }) {
    return otherwise(message);
  }
}

/** Have a screen reader say a text, after what it is saying now. */
export const announce = (text) => find("#announcements").replaceChildren(copyOf("say", { text }));

/** Tell something until it is dismissed, with a button that does something about it. */
export function tell(text, label = "", run = null, role = "alert") {
  const told = copyOf("told", { text, label, role });
  const dismiss = () => told.remove();
  actOn(told, { dismiss, act: () => (dismiss(), run()) });
  const all = [...find("#errors").children];
  all.find((old) => find("p", old).textContent === text)?.remove();
  find("#errors").append(told);
}

/** Show a dialog with a text in its box; return the text that the box has then, "" if cancelled. */
export function ask(id, text) {
  const [dialog, box] = [find(`dialog#${id}`), find(`dialog#${id} :is(input, textarea)`)];
  [box.value, dialog.returnValue] = [text, ""];
  dialog.showModal();
  const closed = (resolve) => dialog.addEventListener("close", resolve, { once: true });
  return new Promise(closed).then(() => dialog.returnValue && box.value);
}

export function copy(text) {
  const [box, focused] = [find("#copied"), document.activeElement];
  box.value = text;
  box.select();
  document.execCommand("copy"); // what replaces it needs HTTPS or localhost
  focused.focus();
  announce("Copied.");
}

const TYPES = { json: "application/json", md: "text/markdown" };

export function download(title, kind, text) {
  const href = URL.createObjectURL(new Blob([text], { type: TYPES[kind] }));
  const name = `${title}.${kind}`.replace(/[^\p{L}\p{N}.]+/gu, "-").slice(-80);
  Object.assign(document.createElement("a"), { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}
