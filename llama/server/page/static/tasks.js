// The tabs, of what the model can do, and those for texts without a dialog.

import { answerInfo } from "./details.js";
import { actOn, find, moveByArrows, showRunning } from "./dom.js";
import { receive } from "./runner.js";
import { keep, recall } from "./store.js";
import { newMessage } from "./tree.js";

/** Show the tabs of what the model can do, and the first one's panel. */
export function showTabs({ chats, infills }) {
  if (!chats) find("#tab-chat").remove();
  if (!infills) find("#tab-infilling").remove();
  const [list, tabs] = [find(".tabs"), [...find(".tabs").children]];
  const show = (shown) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab === shown);
      tab.tabIndex = tab === shown ? 0 : -1;
      find(`#${tab.getAttribute("aria-controls")}`).hidden = tab !== shown;
    }
  };
  const take = ({ target }) => tabs.includes(target) && show(target);
  for (const type of ["click", "focusin"]) list.addEventListener(type, take);
  moveByArrows(list);
  show(tabs[0]);
}

/** Have a tab's texts continued by /v1/completions; `fields()` returns those of the settings. */
export function runTask(panel, api, model, fields) {
  const inputs = [...panel.querySelectorAll("textarea")];
  const parts = ["result", "status", "problem"].map((name) => find(`.${name}`, panel));
  const [result, status, problem] = parts;
  let running = null;
  const texts = () => Object.fromEntries(inputs.map(({ name, value }) => [name, value]));
  const save = () => keep(panel.id, { ...texts(), result: result.textContent });

  const run = async () => {
    running = new AbortController();
    for (const part of parts) part.replaceChildren();
    showRunning(panel, true);
    const answer = newMessage("assistant", "");
    try {
      const { logprobs, top_logprobs, tools, max_tokens = null, ...sampling } = fields();
      const body = { model: model.id, ...texts(), ...sampling, max_tokens }; // null: as fit
      const stream = api.stream("v1/completions", body, running.signal);
      await receive(answer, stream, ({ content }) => {
        result.textContent = content;
        save();
      });
    } catch (error) {
      if (!running.signal.aborted) problem.textContent = error.message;
    }
    status.replaceChildren(answerInfo(answer));
    showRunning(panel, false);
  };

  actOn(panel, { run, halt: () => running.abort() });
  panel.addEventListener("input", save);
  const kept = recall(panel.id) ?? {};
  for (const input of inputs) input.value = kept[input.name] ?? "";
  result.textContent = kept.result ?? "";
}
