// The last calls that failed.

import { ago, byId, make, say, tell } from "./dom.js";

let shown = "";

export function show(state) {
  const failures = state.failures;
  const why = !state.manages_adapters
    ? "Errors are not shown here, because the admin API has a separate address. See the server's log."
    : "The list of errors requires a token with the role admin.";
  tell(byId("failures-empty"), failures ? (failures.length ? "" : "No call has failed since the server started.") : why);
  const list = byId("failures-list");
  const key = failures ? failures.map((failure) => `${failure.time} ${failure.request_id}`).join() : "";
  if (key !== shown) {
    shown = key;
    list.replaceChildren(...(failures || []).map(entry));
  }
  for (const time of list.querySelectorAll("time")) say(time, ago(state.time - Number(time.dataset.at)));
}

function entry(failure) {
  const at = new Date(1000 * failure.time);
  return make(
    "li", {},
    make("time", { dateTime: at.toISOString(), title: at.toLocaleString(), "data-at": failure.time }),
    make("div", {},
      make("p", { className: "message" }, failure.message),
      make("p", { className: "where" },
        make("b", {}, failure.reason), " ",
        failure.method, failure.adapters.length ? ` on ${failure.adapters.join(" + ")}` : "",
        make("span", { className: "id", title: "The id of this call in the server's log" }, failure.request_id)),
    ),
  );
}
