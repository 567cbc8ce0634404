// About an answer: its tokens and speed, and the alternatives of each of its tokens.

import { count, el, moveByArrows } from "./dom.js";

const ENDS = {
  stop: "ended by itself",
  length: "cut: the longest answer was reached",
  tool_calls: "calls tools",
  content_filter: "refused by the server's guard",
};

const tokens = (n) => `${count(n)} token${n === 1 ? "" : "s"}`;

/** Return a line about an answer that has ended: its tokens, speed, and why it ended. */
export function answerInfo({ usage, seconds, finish_reason }) {
  const parts = [];
  if (usage) {
    parts.push(tokens(usage.completion_tokens));
    if (seconds > 0) parts.push(`${(usage.completion_tokens / seconds).toFixed(1)} tokens/s`);
    if (usage.prompt_tokens) parts.push(`after ${tokens(usage.prompt_tokens)} of prompt`);
  }
  parts.push(ENDS[finish_reason]);
  return el("p", { class: "answer-info" }, parts.filter(Boolean).join(" · "));
}

function alternative({ token, logprob }, chosen) {
  const percent = ` ${(100 * Math.exp(logprob)).toFixed(1)} %`;
  const props = { class: token === chosen ? "chosen" : "" };
  return el("li", props, el("code", {}, JSON.stringify(token)), percent);
}

/** Return an answer's tokens, each with its alternatives on hover and focus; arrow keys move. */
export function probabilities({ id, logprobs }) {
  const tip = el("ul", { class: "tip", role: "tooltip", id: `tip-${id}`, hidden: "" });
  const list = el("div", { class: "tokens", role: "list", dir: "auto" });
  const show = (each) => {
    const top = each.top.length ? each.top : [each];
    tip.replaceChildren(...top.map((one) => alternative(one, each.token)));
    tip.hidden = false;
  };
  const hide = () => (tip.hidden = true);
  for (const [i, each] of logprobs.entries()) {
    const level = Math.min(4, Math.floor(5 * Math.exp(each.logprob)));
    const props = { class: `token p${level}`, role: "listitem", "aria-describedby": tip.id };
    const text = each.token.replaceAll("\n", "↵\n").replaceAll("\t", "⇥");
    const shown = el("span", { ...props, tabindex: i ? -1 : 0 }, text);
    for (const type of ["mouseenter", "focus"]) shown.addEventListener(type, () => show(each));
    list.append(shown);
  }
  for (const type of ["mouseleave", "focusout"]) list.addEventListener(type, hide);
  list.addEventListener("keydown", ({ key }) => key === "Escape" && hide());
  moveByArrows(list);
  const props = { class: "probabilities", role: "group", "aria-label": "Probabilities" };
  return el("div", props, list, tip);
}
