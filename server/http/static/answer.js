// One answer as it arrives: its text, the probability of each token, and the speed.

import { duration, make, percent, rate, say, tell } from "./dom.js";
import { events } from "./api.js";

// A token's class, by its probability.
const LEAST = [0.9, 0.6, 0.3, 0.1];
const classOf = (logprob) => {
  const place = LEAST.findIndex((least) => Math.exp(logprob) >= least);
  return `q${place < 0 ? LEAST.length + 1 : place + 1}`;
};
/** A token's text with visible white space. */
const visible = (text) => text.replaceAll("\n", "↵").replaceAll(" ", "␣") || "(part of a character)";

export class Answer {
  constructor(title) {
    this.title = title;
    this.text = make("div", { className: "text", tabIndex: 0, role: "group", "aria-label": `Answer of ${title}` });
    this.facts = make("p", { className: "facts" });
    this.detail = make("p", { className: "detail", "aria-live": "polite" });
    this.failure = make("p", { className: "failed", hidden: true });
    this.advice = make("p", { className: "empty", hidden: true });
    this.nothing = make("p", { className: "empty", hidden: true });
    this.element = make("div", { className: "answer" }, this.advice, this.failure, this.nothing, this.text, this.facts, this.detail);
    this.details = new WeakMap();
    this.chosen = null;
    this.text.addEventListener("keydown", (event) => this.walk(event));
    this.text.addEventListener("pointerover", (event) => this.point(event.target));
    this.text.addEventListener("click", (event) => this.point(event.target));
  }

  /** Show what must be done first; an empty text hides the advice. */
  advise(text) {
    tell(this.advice, text);
  }

  /** Ask, and show the answer as it arrives; returns a summary for a screen reader. */
  async ask(body, signal) {
    this.text.replaceChildren();
    this.choose(null);
    tell(this.failure, "");
    tell(this.nothing, "");
    say(this.facts, "…");
    this.element.dataset.busy = "";
    const start = performance.now();
    let first = 0;
    let tokens = 0;
    let reason = "";
    try {
      for await (const event of events("v1/chat/completions", body, signal)) {
        const [choice] = event.choices;
        if (event.usage) tokens = event.usage.completion_tokens;
        if (!choice) continue;
        const content = choice.delta.content;
        const logprobs = choice.logprobs?.content || [];
        if (content || logprobs.length) {
          first ||= performance.now();
          this.append(content || "", logprobs);
          tokens += logprobs.length;
          this.tellFacts(tokens, start, first);
        }
        reason = choice.finish_reason || reason;
      }
      this.tellFacts(tokens, start, first, reason === "length" ? "cut at the limit" : "");
      if (!this.text.textContent) tell(this.nothing, reason === "stop" ? "(empty: the model ended at once)" : "(no text)");
      return `${this.title} has answered.`;
    } catch (error) {
      const isStopped = error.name === "AbortError";
      if (first) this.tellFacts(tokens, start, first, isStopped ? "stopped" : "");
      else say(this.facts, isStopped ? "stopped" : "");
      if (isStopped) return `${this.title} was stopped.`;
      tell(this.failure, error.message || "The answer was interrupted.");
      return `${this.title} failed: ${error.message}`;
    } finally {
      delete this.element.dataset.busy;
    }
  }

  tellFacts(tokens, start, first, end = "") {
    const seconds = (performance.now() - first) / 1000;
    const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
    if (tokens > 1 && seconds > 0) parts.push(`${rate((tokens - 1) / seconds)} a second`);
    if (first) parts.push(`first after ${duration((first - start) / 1000)}`);
    if (end) parts.push(end);
    say(this.facts, parts.join(" · "));
  }

  /**
   * Add a part of the text: a span for each token that matches the text, then one for the rest. The
   * last token of an answer may have no text.
   */
  append(content, logprobs) {
    let number = 0;
    for (; number < logprobs.length && content.startsWith(logprobs[number].token); number += 1) {
      this.span(logprobs[number].token, logprobs[number]);
      content = content.slice(logprobs[number].token.length);
    }
    const left = logprobs.slice(number);
    if (!content) return;
    if (left.length) this.span(content, left.reduce((a, b) => (a.logprob < b.logprob ? a : b)));
    else this.text.append(content);
  }

  span(text, token) {
    const span = make("span", { className: classOf(token.logprob) }, text);
    this.details.set(span, token);
    this.text.append(span);
  }

  point(target) {
    if (this.details.has(target)) this.choose(target);
  }

  walk(event) {
    const spans = [...this.text.querySelectorAll("span")];
    const place = spans.indexOf(this.chosen);
    const to = { ArrowRight: place + 1, ArrowLeft: Math.max(place - 1, 0), Home: 0, End: spans.length - 1 }[event.key];
    if (event.key === "Escape") this.choose(null);
    if (to === undefined || !spans[to]) return;
    event.preventDefault();
    this.choose(spans[to]);
  }

  choose(span) {
    this.chosen?.classList.remove("chosen");
    this.chosen = span;
    if (!span) {
      this.detail.replaceChildren();
      return;
    }
    span.classList.add("chosen");
    const token = this.details.get(span);
    const others = token.top_logprobs.filter((other) => other.token !== token.token).slice(0, 3);
    const entry = ({ token: text, logprob }) => [make("code", {}, visible(text)), ` ${percent(Math.exp(logprob))}`];
    this.detail.replaceChildren(
      ...entry(token),
      ...(others.length ? [" — else "] : []),
      ...others.flatMap((other, place) => [...(place ? [", "] : []), ...entry(other)]),
    );
  }
}
