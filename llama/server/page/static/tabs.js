// The tabs, of what the model can do.

import { find } from "./dom.js";
import { completionTab, infillTab } from "./tasks.js";

/** Show the tabs of what the model can do, and the first one's panel. */
export function showTabs(api, model, settings) {
  const { chats = true, infills = false } = model.meta ?? {};
  find("#completion").append(completionTab(api, model, settings));
  if (infills) find("#infilling").append(infillTab(api, model, settings));
  const can = { "tab-chat": chats, "tab-completion": true, "tab-infilling": infills };
  const tabs = [...document.querySelectorAll("[role=tab]")].filter((tab) => can[tab.id]);
  find(".tabs").replaceChildren(...tabs);
  find(".sidebar").hidden = find(".toggle").hidden = !chats;
  const show = (shown) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab === shown));
      tab.tabIndex = tab === shown ? 0 : -1;
    }
    for (const panel of document.querySelectorAll("[role=tabpanel]")) {
      panel.hidden = panel.id !== shown.getAttribute("aria-controls");
    }
  };
  for (const tab of tabs) tab.addEventListener("click", () => show(tab));
  find(".tabs").addEventListener("keydown", ({ key, target }) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
    if (!step) return;
    const next = tabs.at((tabs.indexOf(target) + step) % tabs.length);
    next.focus();
    show(next);
  });
  show(tabs[0]);
}
