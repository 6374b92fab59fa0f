// The figures at the top of the page. Rates are computed from the growth between two polls.

import { Sparkline, byId, count, duration, percent, rate, say, tell } from "./dom.js";

const PLACES = 120;
const FIRST_TOKEN_SECONDS = 60;
const STEP_SECONDS = 5;

/** The growth per second between two polls. */
export class Growth {
  constructor(places = PLACES) {
    this.rates = [];
    this.places = places;
    this.before = null;
  }

  add(time, value) {
    if (this.before !== null && time > this.before.time) {
      const grown = value - this.before.value;
      // A restart of the server resets its counters.
      this.rates.push(grown < 0 ? 0 : grown / (time - this.before.time));
      if (this.rates.length > this.places) this.rates.shift();
    }
    this.before = { time, value };
  }

  /** The mean of the last few rates, because single ones vary too much. */
  get recent() {
    const last = this.rates.slice(-3);
    return last.length ? last.reduce((a, b) => a + b) / last.length : 0;
  }
}

const tokens = new Growth();
const plot = new Sparkline(320, 40, PLACES);
let looks = [];

export function start() {
  byId("rate-plot").append(plot.element);
  plot.draw([]);
}

/** Forget the earlier polls. */
export function reset() {
  tokens.before = null;
  looks = [];
}

const mean = (after, before) =>
  after.count > before.count ? (after.sum - before.sum) / (after.count - before.count) : null;

export function show(state) {
  const { figures, clock: time } = state;
  byId("figures").hidden = !figures;
  tell(byId("live-empty"), figures ? "" : "Live figures require a token with the role metrics.");
  if (!figures) return;
  tokens.add(time, figures.first_token.count + figures.inter_token.count);
  looks.push({ time, figures });
  while (looks.length > 1 && looks[1].time < time - FIRST_TOKEN_SECONDS) looks.shift();

  say(byId("rate"), tokens.rates.length ? rate(tokens.recent) : "–");
  plot.draw(tokens.rates);
  say(byId("running"), count(figures.sequences.running || 0));
  say(byId("waiting"), `${count(figures.sequences.waiting || 0)} waiting`);

  const { free = 0, used = 0, cached = 0 } = figures.kv_blocks;
  const share = used / Math.max(free + used + cached, 1);
  say(byId("kv"), percent(share));
  byId("kv-meter").value = share;

  const past = looks.find((look) => look.time >= time - STEP_SECONDS);
  const step = mean(figures.step, past.figures.step);
  say(byId("step"), step === null ? "–" : duration(step));
  say(byId("step-aside"), step === null ? (figures.sequences.running ? "none finished" : "idle") : `mean of ${STEP_SECONDS} s`);
  const first = mean(figures.first_token, looks[0].figures.first_token);
  say(byId("first"), first === null ? "–" : duration(first));
  say(byId("first-aside"), first === null ? "none in the last minute" : "mean of the last minute");
}
