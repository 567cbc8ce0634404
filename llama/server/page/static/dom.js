// Elements, and what people are told.

export const find = (selector, root = document) => root.querySelector(selector);

export const copyOf = (id) => find(`template#${id}`).content.firstElementChild.cloneNode(true);

export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function button(label, onclick, attributes = {}) {
  const made = el("button", { type: "button", ...attributes }, label);
  made.addEventListener("click", onclick);
  return made;
}

/** Call, at each click, the action that the button's data-do names; it gets the data-id around. */
export function actOn(root, actions) {
  root.addEventListener("click", ({ target }) => {
    const name = target.closest("[data-do]")?.dataset.do;
    actions[name]?.(target.closest("[data-id]")?.dataset.id);
  });
}

/** Take the files that are chosen by the button "files" of an element. */
export function chooseFiles(root, take) {
  const input = find("input[type=file]", root);
  actOn(root, { files: () => input.click() });
  input.addEventListener("change", async () => {
    await take([...input.files]);
    input.value = ""; // so that the same file can be chosen again
  });
}

/** Show the button that stops what an element's other one starts, or else that one. */
export function showRunning(root, isRunning) {
  const [start, stop] = [find(".start", root), find(".stop", root)];
  const hadFocus = [start, stop].includes(document.activeElement);
  [start.hidden, stop.hidden] = [isRunning, !isRunning];
  if (hadFocus) (isRunning ? stop : start).focus();
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

/** Have a screen reader say a text, after what it is saying now. */
export const announce = (text) => find("#announcements").replaceChildren(el("p", {}, text));

/** Tell something until it is dismissed, with a button that does something about it. */
export function tell(text, label = "", run = null, role = "alert") {
  const told = copyOf("told");
  told.setAttribute("role", role);
  find("p", told).textContent = text;
  const act = find("[data-do=act]", told);
  [act.textContent, act.hidden] = [label, !run];
  const dismiss = () => told.remove();
  actOn(told, { dismiss, act: () => (dismiss(), run()) });
  const isOver = (old) => find("p", old).textContent === text;
  [...find("#errors").children].filter(isOver).forEach((old) => old.remove());
  find("#errors").append(told);
}

export const tellError = ({ message }) => tell(message);

/** Show a dialog; return the value of the button that closed it, "" if none did. */
export function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  const closed = (resolve) => dialog.addEventListener("close", resolve, { once: true });
  return new Promise(closed).then(() => dialog.returnValue);
}

/** Ask for a text in a dialog's box; return "" if it is cancelled. */
export async function askText(dialog, text) {
  const box = find("input, textarea", dialog);
  box.value = text;
  return (await ask(dialog)) && box.value;
}

export function copy(text) {
  const [box, focused] = [el("textarea", { class: "unseen" }), document.activeElement];
  box.value = text;
  document.body.append(box);
  box.select();
  document.execCommand("copy"); // what replaces it needs HTTPS or localhost
  box.remove();
  focused.focus();
  announce("Copied.");
}

export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name.replace(/[^\p{L}\p{N}.]+/gu, "-").slice(-80) }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
