// Polls the server once a second, and updates the parts of the page. While the token is rejected,
// it waits for another one instead.

import { byId, make, say, tell } from "./dom.js";
import { getJson, token } from "./api.js";
import * as adapters from "./adapters.js";
import * as failures from "./failures.js";
import * as live from "./live.js";
import * as playground from "./playground.js";

const PERIOD = 1000;
const PATIENCE = 5000;
let timer = 0;
let looking = null;
let isLocked = false;
let notice = { text: "", until: 0 };

async function look() {
  clearTimeout(timer);
  looking?.abort();
  const mine = (looking = new AbortController());
  const patience = setTimeout(() => mine.abort(), PATIENCE);
  const find = byId("find").value.trim();
  try {
    const state = await getJson(`console/state?find=${encodeURIComponent(find)}`, mine.signal);
    if (mine !== looking) return;
    isLocked = false;
    status("ok", "Serving");
    inform();
    document.body.dataset.known = "";
    for (const part of [playground, live, adapters, failures]) part.show(state);
    showRoles(state);
  } catch (error) {
    if (mine !== looking) return;
    refuse(error);
  } finally {
    clearTimeout(patience);
    if (mine === looking && !document.hidden && !isLocked) timer = setTimeout(look, PERIOD);
  }
}

function status(kind, text) {
  byId("status").dataset.state = kind;
  say(byId("status"), text);
}

/** Show why the page cannot be updated, and the next step. */
function refuse(error) {
  live.reset();
  delete document.body.dataset.known;
  isLocked = error.status === 401;
  if (isLocked) {
    status("wait", "Locked");
    const text = token.get()
      ? "The server does not know this token. Check the line in its --token-file."
      : "This server requires a token. Enter one to see its state.";
    inform("error", text, make("button", { type: "button", onclick: openToken }, "Token"));
  } else if (error.status === 503) {
    status("wait", "Not serving");
    inform("wait", `${sentence(error.message)} This page looks again every second.`);
  } else if (error.status === 0 || error.name === "AbortError") {
    status("bad", "Unreachable");
    inform("error", "The server does not answer. It may have stopped, or the network may be down; this page retries every second.");
  } else {
    status("bad", "Error");
    inform("error", sentence(error.message));
  }
}

const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1).replace(/\.$/, "")}.`;

function inform(kind = "", text = "", ...more) {
  const place = byId("notice");
  if (Date.now() < notice.until && kind === "") return;
  if (notice.text === text) return;
  notice = { text, until: 0 };
  place.hidden = !text;
  place.dataset.kind = kind;
  place.replaceChildren(make("span", {}, text), ...more);
}

/** Report a change, or the error of a failed one. */
function changed(error) {
  if (error instanceof Error) {
    inform("error", sentence(error.message));
    notice.until = Date.now() + 8000;
  }
  look();
}

// The token

function openToken() {
  byId("token").value = token.get();
  byId("token-dialog").showModal();
}

function showRoles(state) {
  const has = state.roles.join(", ");
  say(byId("token-roles"), token.get() ? `This token has the roles ${has}.` : `Without a token you have the roles ${has}.`);
  // Without a token, only a server without a token file answers, and then the button has no use.
  byId("token-open").hidden = !token.get();
}

function start() {
  live.start();
  playground.start();
  adapters.start(changed, playground.choose);
  byId("token-open").addEventListener("click", openToken);
  byId("token-form").addEventListener("submit", () => {
    token.set(byId("token").value.trim());
    look();
  });
  byId("token-forget").addEventListener("click", () => {
    token.set("");
    tell(byId("token-roles"), "");
    byId("token-dialog").close();
    look();
  });
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  byId("find").addEventListener("input", look);
  // A hidden tab does not poll the server.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) clearTimeout(timer);
    else {
      live.reset();
      look();
    }
  });
  look();
}

start();
