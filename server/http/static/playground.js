// Sends one prompt to the base model, an adapter and a mix, and shows the answers side by side.

import { announce, byId, make, say, tell } from "./dom.js";
import { Answer } from "./answer.js";

const WEIGHTS = { min: -1.5, max: 1.5, step: 0.05 };
let names = [];
let canAsk = false;
let running = null;
let panes = [];

export function start() {
  panes = [new BasePane(), new AdapterPane(), new MixPane()];
  byId("panes").append(...panes.map((pane) => pane.element));
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    askAll();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      // Validate the settings first, as the button does.
      if (!running) byId("ask").requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("colour").addEventListener("change", colour);
  colour();
}

function colour() {
  const on = byId("colour").checked;
  byId("panes").classList.toggle("coloured", on);
  byId("legend").hidden = !on;
}

/** Show the state from the last poll. */
export function show(state) {
  canAsk = Boolean(state.model);
  tell(byId("ask-empty"), canAsk ? "" : "Asking requires a token with the role inference.");
  byId("go").disabled = !canAsk || running !== null;
  say(byId("model"), state.model ? state.model.name : "");
  const found = state.adapters ? state.adapters.shown.map((adapter) => adapter.name) : [];
  if (!byId("find").value.trim() && found.join() !== names.join()) {
    names = found;
    for (const pane of panes) pane.offer(names);
  }
}

/** Select an adapter in the second pane, and focus the prompt. */
export function choose(name) {
  panes[1].choose(name);
  byId("playground").scrollIntoView({ block: "start" });
  byId("prompt").focus();
}

async function askAll() {
  const prompt = byId("prompt").value.trim();
  if (!prompt) {
    announce("Write a prompt first.");
    byId("prompt").focus();
    return;
  }
  if (!canAsk) return;
  const body = {
    messages: [{ role: "user", content: prompt }],
    max_tokens: Number(byId("max-tokens").value) || 64,
    temperature: Number(byId("temperature").value) || 0,
    logprobs: true,
    top_logprobs: 4,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (byId("seed").value) body.seed = Number(byId("seed").value);
  running = new AbortController();
  busy(true);
  const asked = panes.filter((pane) => pane.isReady);
  const ends = await Promise.all(asked.map((pane) => pane.answer.ask({ ...body, ...pane.model() }, running.signal)));
  running = null;
  busy(false);
  announce(ends.join(" "));
}

function busy(on) {
  byId("stop").hidden = !on;
  byId("go").disabled = on || !canAsk;
}

class Pane {
  constructor(title, ...controls) {
    this.answer = new Answer(title);
    this.element = make(
      "article", { className: "pane", "aria-label": title },
      make("header", {}, make("h3", {}, title), ...controls),
      this.answer.element,
    );
  }

  offer() {}
}

class BasePane extends Pane {
  constructor() {
    super("Base");
    this.isReady = true;
  }

  model() {
    return { model: "base" };
  }
}

class AdapterPane extends Pane {
  constructor() {
    const select = make("select", { "aria-label": "Adapter" });
    super("Adapter", select);
    this.select = select;
    this.offer([]);
  }

  get isReady() {
    return this.select.value !== "";
  }

  offer(offered) {
    const before = this.select.value;
    this.select.replaceChildren(...offered.map((name) => make("option", { value: name }, name)));
    if (offered.includes(before)) this.select.value = before;
    this.select.disabled = !offered.length;
    if (!offered.length) {
      this.select.append(make("option", { value: "" }, "none yet"));
      this.answer.advise("Load an adapter to ask it.");
    } else {
      this.answer.advise("");
    }
  }

  choose(name) {
    if (![...this.select.options].some((option) => option.value === name)) {
      this.select.append(make("option", { value: name }, name));
    }
    this.select.value = name;
  }

  model() {
    return { model: `base:${this.select.value}` };
  }
}

class MixPane extends Pane {
  constructor() {
    const add = make("select", { "aria-label": "Add an adapter to the mix" });
    super("Mix", add);
    this.add = add;
    this.members = new Map();
    this.list = make("div", { className: "members" });
    this.element.firstChild.after(this.list);
    add.addEventListener("change", () => {
      if (!add.value) return;
      this.put(add.value, 1);
      this.offer(this.offered);
    });
    this.offer([]);
  }

  get isReady() {
    return this.members.size > 0;
  }

  offer(offered) {
    this.offered = offered;
    for (const name of [...this.members.keys()]) if (!offered.includes(name)) this.drop(name);
    const rest = offered.filter((name) => !this.members.has(name));
    this.add.replaceChildren(
      make("option", { value: "" }, "add"),
      ...rest.map((name) => make("option", { value: name }, name)),
    );
    this.add.disabled = !rest.length;
    this.answer.advise(this.members.size ? "" : offered.length ? "Add adapters to mix them." : "Load adapters to mix them.");
  }

  put(name, weight) {
    if (this.members.has(name)) return;
    const output = make("output", {}, "");
    const slider = make("input", { type: "range", ...WEIGHTS, "aria-label": `Weight of ${name}` });
    const shown = () => say(output, Number(slider.value).toFixed(2).replace("-", "−"));
    slider.value = weight;
    slider.addEventListener("input", shown);
    slider.addEventListener("dblclick", () => {
      slider.value = 1;
      shown();
    });
    shown();
    const remove = make("button", {
      type: "button", className: "plain", "aria-label": `Take ${name} out of the mix`,
      onclick: () => {
        this.drop(name);
        this.offer(this.offered);
        this.add.focus();
      },
    }, "×");
    const element = make("div", { className: "member" }, make("span", { className: "who", title: name }, name), slider, output, remove);
    this.members.set(name, { slider, element });
    this.list.append(element);
  }

  drop(name) {
    this.members.get(name).element.remove();
    this.members.delete(name);
  }

  model() {
    const adapters = [...this.members].map(([name, { slider }]) => ({ name, weight: Number(slider.value) }));
    return { model: "base", adapters };
  }
}
