// What the page says and asks: errors, notices, the key.

import { announce, button, el } from "./dom.js";

/** Show an error until it is dismissed. */
export function showError(text, action = null) {
  const region = document.getElementById("errors");
  const dismiss = () => error.remove();
  const act = action && button(action.label, () => (dismiss(), action.run()));
  const error = el(
    "div",
    { class: "error", role: "alert" },
    el("p", { dir: "auto" }, text),
    act,
    button("Dismiss", dismiss),
  );
  for (const old of region.children) if (old.firstChild.textContent === text) old.remove();
  region.append(error);
}

let notice = null;

/** Say what was done, with a button that undoes it, until it is dismissed or replaced. */
export function showNotice(text, undo) {
  notice?.remove();
  const end = () => notice?.remove();
  const takeBack = () => (end(), undo());
  const props = { class: "notice", role: "group", "aria-label": "Done" };
  notice = el("div", props, el("p", {}, text), button("Undo", takeBack), button("Dismiss", end));
  document.getElementById("errors").append(notice);
  announce(text);
}

/** Ask for the server's key; null if the person has none. */
export function askKey(isWrong) {
  return new Promise((resolve) => {
    const says = isWrong ? "The server doesn't know that key." : "This server asks for a key.";
    const box = el("input", { id: "key", type: "password", autocomplete: "off", required: true });
    const end = (key) => {
      dialog.remove();
      resolve(key);
    };
    const form = el(
      "form",
      {},
      el("h2", { id: "key-title" }, "API key"),
      el("p", { id: "key-text" }, `${says} It is kept until this tab is closed.`),
      el("div", { class: "field" }, el("label", { for: "key" }, "Key"), box),
      el(
        "div",
        { class: "row" },
        el("button", { type: "submit", class: "primary" }, "Use this key"),
        button("Cancel", () => end(null)),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      end(box.value.trim());
    });
    const named = { "aria-labelledby": "key-title", "aria-describedby": "key-text" };
    const dialog = el("dialog", { class: "ask", ...named }, form);
    dialog.addEventListener("cancel", () => end(null));
    document.body.append(dialog);
    dialog.showModal();
  });
}
