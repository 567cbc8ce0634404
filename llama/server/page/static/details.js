// What stands below a message: figures of an answer, its tokens' alternatives, calls of tools.

import { copyOf, count, moveByArrows, parseJson } from "./dom.js";

const ENDS = {
  stop: "ended by itself",
  length: "cut: the longest answer was reached",
  tool_calls: "calls tools",
  content_filter: "refused by the server's guard",
};

const tokens = (n) => `${count(n)} token${n === 1 ? "" : "s"}`;

/** Return a line about an answer that has ended: its tokens, speed, and why it ended. */
export function answerInfo({ usage, seconds, finish_reason }) {
  const { completion_tokens: n, prompt_tokens } = usage ?? {};
  const parts = [
    usage && tokens(n),
    usage && seconds > 0 && `${(n / seconds).toFixed(1)} tokens/s`,
    prompt_tokens && `after ${tokens(prompt_tokens)} of prompt`,
    ENDS[finish_reason],
  ];
  return copyOf("answer-info", { text: parts.filter(Boolean).join(" · ") });
}

function alternative({ token, logprob }, chosen) {
  const percent = (100 * Math.exp(logprob)).toFixed(1);
  const kind = token === chosen ? "chosen" : "other";
  return copyOf("alternative", { kind, percent, token: JSON.stringify(token) });
}

/** Return an answer's tokens, each with its alternatives on hover and focus; arrow keys move. */
export function probabilities({ id, logprobs }) {
  const group = copyOf("probabilities", { id });
  const [list, tip] = group.children;
  const show = ({ token, logprob, top }) => {
    const others = top.length ? top : [{ token, logprob }];
    tip.replaceChildren(...others.map((one) => alternative(one, token)));
    tip.hidden = false;
  };
  const hide = () => (tip.hidden = true);
  for (const [i, each] of logprobs.entries()) {
    const level = Math.min(4, Math.floor(5 * Math.exp(each.logprob)));
    const text = each.token.replaceAll("\n", "↵\n").replaceAll("\t", "⇥");
    const shown = copyOf("token", { id, level, text, tabindex: i ? -1 : 0 });
    for (const type of ["mouseenter", "focus"]) shown.addEventListener(type, () => show(each));
    list.append(shown);
  }
  for (const type of ["mouseleave", "focusout"]) list.addEventListener(type, hide);
  list.addEventListener("keydown", ({ key }) => key === "Escape" && hide());
  moveByArrows(list);
  return group;
}

/** Return the card of a tool's call, with its result, or a box for it (null). */
export function callCard({ id, name, arguments: text }, result) {
  const values = parseJson(text, () => null); // one that was cut has none
  const shown = values === null ? text : JSON.stringify(values, null, 2);
  return copyOf(result === null ? "open-call" : "call", { id, name, shown, result });
}
