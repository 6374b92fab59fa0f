// Elements and texts. No code of this page turns a text into markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; strings become text nodes. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.includes("-")) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** Set a text, unless it is the same already. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show a text in an element; an empty text hides the element. */
export function tell(element, text) {
  say(element, text || "");
  element.hidden = !text;
}

/** Announce a text to screen readers. */
export const announce = (text) => say(byId("said"), text);

// Numbers

const whole = new Intl.NumberFormat("en");
const tenths = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

export const count = (number) => whole.format(Math.round(number));
export const rate = (number) => (number >= 100 ? count(number) : tenths.format(number));

export function percent(share) {
  return `${share > 0 && share < 0.1 ? tenths.format(100 * share) : count(100 * share)}%`;
}

export function duration(seconds) {
  if (seconds >= 100) return `${count(seconds)} s`;
  if (seconds >= 1) return `${seconds.toFixed(seconds >= 10 ? 1 : 2)} s`;
  return `${(1000 * seconds).toFixed(seconds >= 0.1 ? 0 : 1)} ms`;
}

/** A size with three digits and a binary unit, as in the command. */
export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) {
    number /= 1024;
    unit += 1;
  }
  return `${number >= 100 ? Math.round(number) : Number(number.toPrecision(3))} ${units[unit]}`;
}

export function ago(seconds) {
  if (seconds < 5) return "now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

/** A line through values, the newest on the right; `places` is the maximum number of values. */
export class Sparkline {
  constructor(width, height, places) {
    this.width = width;
    this.height = height;
    this.places = places;
    this.element = document.createElementNS(SVG, "svg");
    this.element.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.element.setAttribute("preserveAspectRatio", "none");
    this.element.setAttribute("class", "spark");
    this.element.setAttribute("aria-hidden", "true");
    this.area = document.createElementNS(SVG, "path");
    this.area.setAttribute("class", "area");
    this.line = document.createElementNS(SVG, "path");
    this.line.setAttribute("class", "line");
    this.element.append(this.area, this.line);
  }

  draw(values) {
    const shown = values.slice(-this.places);
    const most = Math.max(...shown, 1e-9);
    this.element.classList.toggle("still", most < 1e-6);
    const step = this.width / (this.places - 1);
    const bottom = this.height - 1;
    const points = shown.map((value, index) => {
      const x = this.width - (shown.length - 1 - index) * step;
      return `${x.toFixed(1)},${(bottom - (value / most) * (bottom - 2)).toFixed(1)}`;
    });
    if (points.length < 2 || most < 1e-6) {
      this.line.setAttribute("d", `M0,${bottom} L${this.width},${bottom}`);
      this.area.setAttribute("d", "");
      return;
    }
    const first = points[0].split(",")[0];
    this.line.setAttribute("d", `M${points.join(" L")}`);
    this.area.setAttribute("d", `M${first},${this.height} L${points.join(" L")} L${this.width},${this.height} Z`);
  }
}
