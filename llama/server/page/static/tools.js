// The card of a call of a tool.

import { button, el } from "./dom.js";

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // a call that was cut
  }
}

/** Return a call's card, with its result or a box for it, of which `onResult` gets the text. */
export function callCard({ name, arguments: text }, result, onResult) {
  const code = (label, shown) => {
    const props = { tabindex: 0, dir: "auto", role: "region", "aria-label": `${label} of ${name}` };
    return el("pre", props, shown);
  };
  const box = el("textarea", { rows: 3, "aria-label": `Result of ${name}`, class: "code" });
  const open = [box, button("Send result", () => onResult(box.value))];
  return el(
    "div",
    { class: "call", role: "group", "aria-label": `Call of ${name}` },
    el("p", {}, "Call of ", el("code", {}, name)),
    code("Arguments", pretty(text)),
    ...(onResult ? open : [el("p", {}, "Result"), code("Result", result)]),
  );
}
