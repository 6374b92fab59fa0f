// The table of adapters, and an administrator's actions on them.

import { Sparkline, announce, byId, bytes, count, make, rate, say, tell } from "./dom.js";
import { post, upload } from "./api.js";
import { archive } from "./archive.js";
import { Growth } from "./live.js";

const SHARED = ["base", "other"];
const rows = new Map();
const growth = new Map();
let state = null;
let onChange = () => {};
let onChoose = () => {};

const isAdmin = () => state.manages_adapters && state.roles.includes("admin");
/** The label under which the metrics count an adapter. */
const labelOf = (name) => (SHARED.includes(name) ? `adapter:${name}` : name);

export function start(changed, chosen) {
  onChange = changed;
  onChoose = chosen;
  byId("load-open").addEventListener("click", () => openLoad());
  byId("load-files").addEventListener("change", requirePath);
  act("load", async () => {
    const name = byId("load-name").value.trim();
    const isReplaced = byId("load-name").readOnly;
    const options = { lora_name: name, load_inplace: isReplaced, pinned: byId("load-pinned").checked };
    const { files } = byId("load-files");
    if (files.length) await upload(`v1/upload_lora_adapter?${new URLSearchParams(options)}`, archive(files));
    else await post("v1/load_lora_adapter", { ...options, lora_path: byId("load-path").value.trim() });
    byId("load-form").reset();
    return `${isReplaced ? "Replaced" : "Loaded"} ${name}`;
  });
  act("unload", async () => {
    const name = byId("unload-name").textContent;
    await post("v1/unload_lora_adapter", { lora_name: name });
    return `Unloaded ${name}`;
  });
}

/** A directory is needed unless files are chosen. */
function requirePath() {
  const hasFiles = byId("load-files").files.length > 0;
  byId("load-path").required = !hasFiles;
  byId("load-path").disabled = hasFiles;
}

/** Open the dialog for a new adapter, or for the next generation of one. */
function openLoad(replaced = "") {
  byId("load-form").reset();
  requirePath();
  byId("load-name").value = replaced;
  byId("load-name").readOnly = Boolean(replaced);
  byId("load-pinned").parentElement.hidden = Boolean(replaced);
  say(byId("load-title"), replaced ? "Replace an adapter" : "Load an adapter");
  say(byId("load-go"), replaced ? "Replace" : "Load");
  tell(byId("load-failed"), "");
  byId("load-dialog").showModal();
}

/** An error message with the dialog's labels in place of the API's field names. */
const labelled = (message) => message.replace("lora_name: ", "Name: ").replace("lora_path: ", "Directory: ");

/** Run a dialog's action when its form is submitted; if that fails, the dialog stays open and shows the reason. */
function act(kind, work) {
  byId(`${kind}-form`).addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = byId(`${kind}-go`);
    button.disabled = true;
    tell(byId(`${kind}-failed`), "");
    try {
      announce(await work());
      byId(`${kind}-dialog`).close();
    } catch (error) {
      tell(byId(`${kind}-failed`), labelled(error.message));
    } finally {
      button.disabled = false;
      onChange();
    }
  });
}

export function show(next) {
  state = next;
  const found = state.adapters;
  const searched = byId("find").value.trim();
  byId("load-open").hidden = !isAdmin();
  tell(byId("merged"), state.merged ? ofMerge(state.merged) : "");
  say(byId("adapters-count"), found ? count(found.total) : "");
  byId("adapters-scroll").hidden = !found || found.shown.length === 0;
  tell(byId("adapters-empty"), found ? whyNone(found, searched) : "The list of adapters requires a token with the role inference.");
  byId("find").parentElement.hidden = !found || (found.total < 2 && !searched);
  const isCut = found && found.matching > found.shown.length;
  tell(byId("adapters-more"), isCut
    ? `The first ${count(found.shown.length)} of ${count(found.matching)} by name. Use Find to see others.` : "");
  if (!found) return;
  if (state.figures) countTraffic(state.clock, state.figures.traffic);
  const body = byId("adapters-rows");
  const names = new Set(found.shown.map((adapter) => adapter.name));
  for (const [name, row] of rows) {
    if (!names.has(name)) {
      row.element.remove();
      rows.delete(name);
    }
  }
  let before = null;
  for (const adapter of found.shown) {
    let row = rows.get(adapter.name);
    if (!row) {
      row = new Row(adapter.name);
      rows.set(adapter.name, row);
    }
    const place = before ? before.nextSibling : body.firstChild;
    if (place !== row.element) body.insertBefore(row.element, place);
    row.show(adapter);
    before = row.element;
  }
}

const ofMerge = ({ mix, precision, base_generation }) =>
  `Merged into the base model, so part of every answer: ${mix} (${precision}, base generation ${base_generation}).`;

function whyNone(found, searched) {
  if (found.shown.length) return "";
  if (searched && found.total) return `No adapter's name contains “${searched}”.`;
  if (!state.manages_adapters) return "No adapters yet. Load them at the server's --admin-address.";
  if (!isAdmin()) return "No adapters yet. To load one, use a token with the role admin.";
  return "No adapters yet. Load one from a directory below --adapter-root, or start the server with --preload NAME=DIRECTORY.";
}

function countTraffic(time, traffic) {
  for (const label of growth.keys()) if (!Object.hasOwn(traffic, label)) growth.delete(label);
  for (const [label, counts] of Object.entries(traffic)) {
    if (!growth.has(label)) growth.set(label, new Growth(60));
    growth.get(label).add(time, counts.tokens);
  }
}

const RESIDENCY = { device: "device", host: "host memory", disk: "disk" };

class Row {
  constructor(name) {
    this.name = name;
    const cell = (className = "") => make("td", { className });
    const number = () => cell("number");
    this.plot = new Sparkline(96, 20, 60);
    this.rate = make("span", { className: "number" });
    this.pinned = make("span", { className: "pin", hidden: true }, "pinned");
    this.note = make("span", { className: "warn", hidden: true });
    this.title = make("button", { type: "button", className: "name", onclick: () => onChoose(name) }, name);
    this.title.setAttribute("aria-label", `Ask ${name} in the playground`);
    this.cells = {
      method: cell(), rank: number(), residency: cell(), size: number(),
      running: number(), requests: number(), tokens: number(),
    };
    this.pin = make("button", { type: "button", onclick: () => this.togglePin() });
    this.replace = make("button", { type: "button", onclick: () => openLoad(name) }, "Replace");
    this.replace.setAttribute("aria-label", `Replace ${name}`);
    this.unload = make("button", { type: "button", onclick: () => this.askUnload() }, "Unload");
    this.unload.setAttribute("aria-label", `Unload ${name}`);
    this.actions = make("td", { className: "acts" }, this.pin, this.replace, this.unload);
    this.element = make(
      "tr", {},
      make("th", { scope: "row" }, this.title, this.pinned, this.note),
      ...Object.values(this.cells),
      make("td", { className: "trace" }, this.plot.element, this.rate),
      this.actions,
    );
  }

  show(adapter) {
    const { cells } = this;
    const label = labelOf(this.name);
    const all = state.figures?.traffic || {};
    // An adapter may have the name of a property of every object, such as constructor.
    const traffic = Object.hasOwn(all, label) ? all[label] : null;
    this.adapter = adapter;
    this.pinned.hidden = !adapter.pinned;
    const warnings = adapter.warnings || [];
    tell(this.note, warnings.length ? `${warnings.length} warning${warnings.length > 1 ? "s" : ""}` : "");
    this.note.title = warnings.join("\n");
    say(cells.method, adapter.method);
    say(cells.rank, ranks(adapter.ranks));
    say(cells.residency, RESIDENCY[adapter.residency] || adapter.residency);
    cells.residency.dataset.tier = adapter.residency;
    say(cells.size, adapter.bytes === undefined ? "–" : bytes(adapter.bytes));
    say(cells.running, adapter.in_flight === undefined ? "–" : count(adapter.in_flight));
    say(cells.requests, traffic ? count(traffic.requests) : state.figures ? "0" : "–");
    say(cells.tokens, traffic ? count(traffic.tokens) : state.figures ? "0" : "–");
    for (const cell of Object.values(cells)) {
      cell.classList.toggle("none", cell.textContent === "–");
      cell.classList.toggle("zero", cell.textContent === "0");
      cell.classList.toggle("one", cell.textContent === "1");
    }
    const seen = growth.get(label);
    this.plot.draw(seen ? seen.rates : []);
    say(this.rate, seen && seen.recent > 0 ? rate(seen.recent) : "");
    this.actions.hidden = !isAdmin();
    say(this.pin, adapter.pinned ? "Unpin" : "Pin");
    this.pin.setAttribute("aria-label", `${adapter.pinned ? "Unpin" : "Pin"} ${this.name}`);
  }

  async togglePin() {
    const verb = this.adapter.pinned ? "unpin" : "pin";
    this.pin.disabled = true;
    try {
      await post(`v1/${verb}_lora_adapter`, { lora_name: this.name });
      announce(`${this.name} is ${verb}ned`);
    } catch (error) {
      onChange(error);
    } finally {
      this.pin.disabled = false;
      onChange();
    }
  }

  askUnload() {
    say(byId("unload-name"), this.name);
    tell(byId("unload-failed"), "");
    byId("unload-dialog").showModal();
  }
}

function ranks(values) {
  if (!values || !values.length) return "–";
  const least = Math.min(...values);
  const most = Math.max(...values);
  return least === most ? `${most}` : `${least}–${most}`;
}
