// About an answer: its tokens and speed, and the alternatives of each of its tokens.

import { count, el } from "./dom.js";

const ENDS = {
  stop: "ended by itself",
  length: "cut: the longest answer was reached",
  tool_calls: "calls tools",
  content_filter: "refused by the server's guard",
};

const tokens = (n) => `${count(n)} token${n === 1 ? "" : "s"}`;

/** Return a line about an answer that has ended: its tokens, speed, and why it ended. */
export function answerInfo(message) {
  const { usage, seconds, finish_reason: reason } = message;
  const parts = [];
  if (usage) {
    parts.push(tokens(usage.completion_tokens));
    if (seconds > 0) parts.push(`${(usage.completion_tokens / seconds).toFixed(1)} tokens/s`);
    parts.push(`after ${tokens(usage.prompt_tokens)} of prompt`);
  }
  if (Object.hasOwn(ENDS, reason ?? "")) parts.push(ENDS[reason]);
  return el("p", { class: "answer-info" }, parts.join(" · "));
}

const percent = (logprob) => (logprob === null ? "" : `${(100 * Math.exp(logprob)).toFixed(1)} %`);
const visible = (token) => token.replaceAll("\n", "↵\n").replaceAll("\t", "⇥");

let nTips = 0;

/** Return an answer's tokens, each with its alternatives on hover and focus; arrow keys move. */
export function probabilities(message) {
  const tip = el("div", { class: "tip", role: "tooltip", id: `tip-${++nTips}`, popover: "manual" });
  const spans = (message.logprobs ?? []).map((token, i) => {
    const level = Math.min(4, Math.floor(5 * Math.exp(token.logprob)));
    const props = { class: `token p${level}`, role: "listitem", "aria-describedby": tip.id };
    return el("span", { ...props, tabindex: i ? -1 : 0 }, visible(token.token));
  });
  const show = (span) => {
    const { token, logprob, top } = message.logprobs[spans.indexOf(span)];
    const rows = (top?.length ? top : [{ token, logprob }]).map((each) => {
      const text = el("code", {}, JSON.stringify(each.token));
      const props = { class: each.token === token && "chosen" };
      return el("li", props, text, ` ${percent(each.logprob)}`);
    });
    tip.replaceChildren(el("ul", {}, ...rows));
    tip.togglePopover(true); // above all else, as messages clip what leaves them
    const box = span.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(8, left)}px`;
    const above = box.top - tip.offsetHeight - 4;
    tip.style.top = `${above > 0 ? above : box.bottom + 4}px`;
  };
  const list = el("div", { class: "tokens", role: "list", dir: "auto" }, ...spans);
  const on = (type, react) => list.addEventListener(type, react);
  const shown = (event) => spans.includes(event.target) && show(event.target);
  on("mouseover", shown);
  on("focusin", shown);
  for (const type of ["mouseleave", "focusout"]) on(type, () => tip.togglePopover(false));
  on("keydown", (event) => {
    if (event.key === "Escape") tip.togglePopover(false);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const i = spans.indexOf(event.target);
    const next = step && spans[i + step];
    if (!next) return;
    event.preventDefault();
    [spans[i].tabIndex, next.tabIndex] = [-1, 0];
    next.focus();
  });
  return el("div", { role: "group", "aria-label": "Probabilities" }, list, tip);
}
