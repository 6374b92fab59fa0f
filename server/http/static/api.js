// Requests to the server, with the visitor's token.

const KEY = "turret-token";

export const token = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

/** An error from the server; `status` is 0 if the server did not answer. */
export class Refused extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function send(method, path, body, signal, type = "application/json") {
  const headers = {};
  if (token.get()) headers.authorization = `Bearer ${token.get()}`;
  if (body !== undefined) headers["content-type"] = type;
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers,
      body,
      signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer.", "");
  }
  if (answer.ok) return answer;
  let said = {};
  try {
    said = (await answer.json()).error || {};
  } catch {
    // The body is not the server's JSON, so a proxy answered.
  }
  throw new Refused(answer.status, said.message || `The server answered ${answer.status}.`, said.code || "");
}

export const getJson = async (path, signal) => (await send("GET", path, undefined, signal)).json();
export const post = (path, body) => send("POST", path, JSON.stringify(body));
export const upload = (path, tar) => send("POST", path, tar, undefined, "application/x-tar");

/** The events of a streamed answer, parsed. */
export async function* events(path, body, signal) {
  const answer = await send("POST", path, JSON.stringify(body), signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(200, event.error.message, event.error.code);
      yield event;
    }
  }
}
