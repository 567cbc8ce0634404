// Elements, and what people are told.

const PROPERTIES = new Set(["value", "textContent", "className"]);

/** Return a new element. Functions named on* listen, strings become attributes. */
export function el(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const button = (label, onclick, props = {}) =>
  el("button", { type: "button", onclick, ...props }, label);

export const find = (selector, root = document) => root.querySelector(selector);

export const copyOf = (id) => find(`template#${id}`).content.firstElementChild.cloneNode(true);

/** Call, at each click, the action that the button's data-do names; it gets the button. */
export function actOn(root, actions) {
  root.addEventListener("click", ({ target }) => {
    const chosen = target.closest("[data-do]");
    if (chosen) actions[chosen.dataset.do]?.(chosen);
  });
}

/** Return a number as people write it: 2,048. */
export const count = (number) => number.toLocaleString("en");

/** Have a screen reader say a text, after what it is saying now. */
export function announce(text) {
  const region = find("#announcements");
  region.textContent = "";
  setTimeout(() => (region.textContent = text), 50); // the same text again is read again
  setTimeout(() => (region.textContent = ""), 2000);
}

/** Tell something until it is dismissed, with a button that does something about it. */
export function tell(text, { label = "", run = null, role = "alert" } = {}) {
  const told = copyOf("told");
  told.className = role;
  told.setAttribute("role", role);
  find("p", told).textContent = text;
  const act = find("[data-do=act]", told);
  [act.textContent, act.hidden] = [label, !run];
  const dismiss = () => told.remove();
  actOn(told, { dismiss, act: () => (dismiss(), run()) });
  const isOver = (old) => find("p", old).textContent === text || old.className === "status";
  [...find("#errors").children].filter(isOver).forEach((old) => old.remove());
  find("#errors").append(told);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const box = el("textarea", { className: "unseen", value: text });
    document.body.append(box);
    box.select();
    document.execCommand("copy"); // the clipboard needs HTTPS or localhost
    box.remove();
  }
  announce("Copied.");
}

export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name.replace(/[^\p{L}\p{N}.]+/gu, "-").slice(-80) }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
