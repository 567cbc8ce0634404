// The tabs for texts without a dialog: "Completion" and "Infilling".

import { answerInfo } from "./answer_info.js";
import { button, el } from "./dom.js";
import { labelled, textBox } from "./fields.js";
import { requestFields } from "./sampling.js";

const SAVE_INTERVAL = 500; // milliseconds
const CODE = { class: "code", spellcheck: "false" };

/** Return the body of a request to /v1/completions. */
function completionBody(texts, model, settings) {
  const fields = requestFields(settings, model.meta?.sampling);
  const { logprobs, top_logprobs, max_tokens = null, ...sampling } = fields;
  return { model: model.id, ...texts, ...sampling, max_tokens }; // null: as many as fit
}

/** Show one of two buttons; it has the focus if the other had it. */
function swap(shown, hidden) {
  const hadFocus = document.activeElement === hidden;
  [shown.hidden, hidden.hidden] = [false, true];
  if (hadFocus) shown.focus();
}

/**
 * Return a tab whose texts are continued by /v1/completions, and kept as the draft `name`.
 *
 * @param labels of the texts, by their names in a request.
 * @param action the button's label.
 */
function taskTab(name, labels, action, api, model, settings) {
  const make = (field) => [field, textBox(`${name}-${field}`, "", 6, CODE)];
  const inputs = Object.keys(labels).map(make);
  const result = el("pre", { tabindex: 0, dir: "auto", role: "region", "aria-label": "Result" });
  const status = el("div", { role: "status" });
  const problem = el("p", { role: "alert", class: "field-error" });
  let running = null;

  const texts = () => Object.fromEntries(inputs.map(([field, input]) => [field, input.value]));
  const fail = (error) => (problem.textContent = error.message);
  const keep = () =>
    settings.store.putDraft(name, { ...texts(), result: result.textContent }).catch(fail);
  const run = async () => {
    const { signal } = (running = new AbortController());
    for (const each of [result, status, problem]) each.replaceChildren();
    swap(stop, go);
    const timer = setInterval(keep, SAVE_INTERVAL);
    const [answer, start] = [{}, performance.now()];
    try {
      await settings.saved; // what was set just now
      const body = completionBody(texts(), model, settings.current());
      for await (const chunk of api.complete(body, signal)) {
        const [choice] = chunk.choices ?? [];
        result.append(choice?.text ?? "");
        answer.finish_reason = choice?.finish_reason ?? answer.finish_reason;
        answer.usage = chunk.usage ?? answer.usage;
      }
    } catch (error) {
      if (!signal.aborted) fail(error);
    }
    answer.seconds = (performance.now() - start) / 1000;
    status.replaceChildren(answerInfo(answer));
    swap(go, stop);
    clearInterval(timer);
    keep();
  };
  const runByKey = ({ key, ctrlKey, metaKey }) =>
    key === "Enter" && (ctrlKey || metaKey) && !go.hidden && run();
  const go = button(action, run, { class: "primary" });
  const stop = button("Stop", () => running.abort(), { hidden: true, class: "primary" });
  const element = el(
    "div",
    { class: "task", oninput: keep, onkeydown: runByKey },
    ...inputs.map(([field, input]) => labelled(labels[field], input)),
    el("div", { class: "task-buttons" }, go, stop),
    problem,
    result,
    status,
  );
  settings.store.draft(name).then((draft) => {
    for (const [field, input] of inputs) input.value ||= draft?.[field] ?? "";
    result.textContent ||= draft?.result ?? "";
  });
  return element;
}

export function completionTab(api, model, settings) {
  const labels = { prompt: "Text to continue" };
  return taskTab("completion", labels, "Continue", api, model, settings);
}

export function infillTab(api, model, settings) {
  const labels = { prompt: "Before", suffix: "After" };
  return taskTab("infilling", labels, "Fill in", api, model, settings);
}
