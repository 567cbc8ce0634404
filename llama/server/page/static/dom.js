// Elements, and what a screen reader is told.

const PROPERTIES = new Set(["value", "textContent", "className"]);

/**
 * Return a new element. Functions named on* listen, strings become attributes, and what is null or
 * false is left out.
 */
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

export function button(label, onclick, props = {}) {
  return el("button", { type: "button", onclick, ...props }, label);
}

/** Have a screen reader say a text, after what it is saying now. */
export function announce(text) {
  const region = document.getElementById("announcements");
  region.textContent = "";
  // A region whose text is the same as before isn't read again.
  setTimeout(() => (region.textContent = text), 50);
}

/** Return a text of a number as people write it: 2,048. */
export const count = (number) => number.toLocaleString("en");

export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Return a function that calls another once, when it hasn't been called for a while. */
export function later(milliseconds, callback) {
  let timer = null;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(callback, milliseconds, ...args);
  };
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyBySelection(text); // the clipboard's API needs HTTPS or localhost
  }
  announce("Copied.");
}

function copyBySelection(text) {
  const box = el("textarea", { class: "unseen", value: text });
  const focused = document.activeElement;
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
  focused?.focus();
}
