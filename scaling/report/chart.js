"use strict";
// Charts drawn by hand in SVG. All of a page share one x axis: to zoom one is to zoom all, and the cursor of one is on all.

const data = JSON.parse(document.getElementById("data").textContent);
const view = { axis: "step", domain: null, halfLife: 0, x: null, from: null, hidden: new Set(), printing: false };
const charts = [];

// ---------------------------------------------------------------- elements

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
const h = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// ---------------------------------------------------------------- numbers as people read them

const SCALES = {
  bytes: [[2 ** 40, " TiB"], [2 ** 30, " GiB"], [2 ** 20, " MiB"], [2 ** 10, " KiB"], [1, " B"]],
  rate: [[1e9, "B"], [1e6, "M"], [1e3, "k"], [1, ""]],
  seconds: [[3600, " h"], [60, " min"], [1, " s"], [1e-3, " ms"], [1e-6, " µs"]],
  percent: [[0.01, " %"]], watts: [[1, " W"]], celsius: [[1, " °C"]], megahertz: [[1, " MHz"]],
};
const COLOURS = 8;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 4", "6 2 2 2"];

function scaleOf(unit, top) {
  const scales = SCALES[unit] || [[1, ""]];
  return scales.find(([size]) => Math.abs(top) >= size * (unit === "seconds" && size > 1 ? 5 : 1)) || scales[scales.length - 1];
}
function number(value, digits) {
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7) return value.toExponential(2).replace("e+", "e").replace("-", "−").replace("e−", "e-");
  return value.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, Math.floor(Math.log10(Math.abs(value))) + 1) });
}
function told(unit, value, digits = 4) {
  if (value === null || value === undefined) return "n/a";
  if (unit === "seconds" && value >= 60) return duration(value);
  const [size, suffix] = scaleOf(unit, value);
  return number(value / size, digits) + suffix;
}
function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${number(seconds, 3)} s`;
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]], first = parts.findIndex(([size]) => whole >= size);
  const [[size, unit], [least, small]] = [parts[first], parts[first + 1]], rest = Math.round((whole % size) / least);
  if (rest * least === size) return `${Math.floor(whole / size) + 1} ${unit}`;
  return `${Math.floor(whole / size)} ${unit}${rest ? ` ${rest} ${small}` : ""}`;
}
function place(value) { // a place on the x axis
  if (view.axis === "time") return duration(value);
  return view.axis === "tokens" ? told("rate", value) : Math.round(value).toLocaleString("en");
}

// ---------------------------------------------------------------- ticks

function steps(low, high, count, nice = [1, 2, 2.5, 5, 10]) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = nice.map((n) => n * power).find((n) => n >= rough * 0.999) || 10 * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step + 0);  // -0 becomes 0
  return found;
}
function timeTicks(low, high, count) {
  const rough = (high - low) / count;
  const step = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400]
    .find((n) => n >= rough);
  return step && rough > 0.5 ? steps(low, high, (high - low) / step, [1, 1.2, 1.5, 1.8, 2, 3, 3.6, 4.32, 5, 6, 7.2, 8.64, 9, 10]) : steps(low, high, count);
}
function logTicks(low, high, count) {
  const decades = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) decades.push(10 ** power);
  const all = [[1], [1, 3], [1, 2, 5], [1, 2, 3, 4, 5, 7]].map((nice) => decades.flatMap((decade) => nice.map((n) => n * decade))
    .filter((tick) => tick >= low * 0.999 && tick <= high * 1.001));
  const found = all.find((ticks) => ticks.length >= count - 1) || all[all.length - 1];
  return found.length > 2 ? found : steps(low, high, count).filter((tick) => tick > 0);
}

// ---------------------------------------------------------------- readings: the points of a series

// Steps, times and tokens of a run, to place what is known by its step alone.
const references = [];
function learn(chart) {
  for (const series of chart.series) {
    const grid = data.grids[series.grid], known = references[series.run];
    if (grid.tokens && (!known || grid.step.length > known.step.length)) references[series.run] = grid;
  }
}
function lookUp(run, step, axis) {
  const grid = references[run];
  if (axis === "step" || !grid || !grid[axis]) return step;
  const i = firstAt(grid.step, step);
  const [x0, x1] = [i > 0 ? grid.step[i - 1] : 0, grid.step[Math.min(i, grid.step.length - 1)]];
  const [y0, y1] = [i > 0 ? grid[axis][i - 1] : 0, grid[axis][Math.min(i, grid.step.length - 1)]];
  return y1 === null ? step : x1 === x0 ? y1 : y0 + (y1 - y0) * Math.min(1, (step - x0) / (x1 - x0));
}
function firstAt(sorted, value) { // the first place whose value is not below
  let low = 0, high = sorted.length;
  while (low < high) { const middle = (low + high) >> 1; if (sorted[middle] < value) low = middle + 1; else high = middle; }
  return low;
}
function placesOf(grid, run) {
  const column = grid[view.axis];
  return grid.step.map((step, i) => column && column[i] !== null ? column[i] : lookUp(run, step, view.axis));
}
function smoothed(places, values) { // a mean in which a value counts half as much every `halfLife` steps, to both sides: it lags nowhere
  const means = new Array(values.length).fill(null), behind = trail(places, values, 1), ahead = trail(places, values, -1);
  values.forEach((value, i) => {
    if (value !== null) means[i] = (behind[i][0] + ahead[i][0] - value) / (behind[i][1] + ahead[i][1] - 1);
  });
  return means;
}
function trail(places, values, way) { // at each value the weighed sum up to it, and the weights
  const found = new Array(values.length);
  let sum = 0, weight = 0, last = null;
  for (let i = way > 0 ? 0 : values.length - 1; i >= 0 && i < values.length; i += way) {
    if (values[i] === null) continue;
    const decay = last === null ? 0 : 0.5 ** (Math.abs(places[i] - last) / view.halfLife);
    last = places[i]; sum = sum * decay + values[i]; weight = weight * decay + 1;
    found[i] = [sum, weight];
  }
  return found;
}
function ordered(x, columns) { // steps that were taken again come later in time, and earlier in the list
  if (x.every((value, i) => i === 0 || x[i - 1] <= value)) return { x, ...columns };
  const order = x.map((_, i) => i).sort((a, b) => x[a] - x[b]);
  const pick = (column) => column && order.map((i) => column[i]);
  return { x: pick(x), ...Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, pick(column)])) };
}
function reading(series) {
  const key = `${view.axis} ${series.smooth ? view.halfLife : 0}`;
  if (series.key_ === key) return series.reading_;
  const grid = data.grids[series.grid];
  const found = ordered(placesOf(grid, series.run), { y: series.values, low: series.low, high: series.high });
  if (series.smooth && view.halfLife > 0) {
    const means = series.means || series, meanGrid = data.grids[means.grid];
    found.smooth = ordered(placesOf(meanGrid, series.run), { y: smoothed(meanGrid.step, means.values) });
  }
  series.key_ = key;
  series.reading_ = found;
  return found;
}
function extent() { // of the x axis, over all runs that are shown
  let low = Infinity, high = -Infinity;
  for (const chart of charts) for (const series of chart.shown()) {
    const { x } = reading(series);
    // The first bar begins before the record that it is of.
    const before = chart.spec.kind === "bars" && x.length > 1 ? (x[x.length - 1] - x[0]) / (x.length - 1) : 0;
    if (x.length) { low = Math.min(low, Math.max(0, x[0] - before)); high = Math.max(high, x[x.length - 1]); }
  }
  return low < high ? [low, high] : Number.isFinite(low) ? [low - 1, high + 1] : [0, 1];
}

// ---------------------------------------------------------------- a chart

const GLYPHS = { // colour is not the only sign: each kind has a shape of its own
  restart: "M0-5 5 4H-5Z", rollback: "M-5 0 4-5V5Z", checkpoint: "M0-4 4 0 0 4-4 0Z",
  failed: "M0-5 5 0 0 5-5 0ZM-3-3 3 3", refused: "M-4-4 4 4M-4 4 4-4",
};
const swatch = (series, kind) => s("svg", { class: "swatch", width: 22, height: 10, "aria-hidden": "true" },
  kind === "bars" ? s("rect", { width: 12, height: 10, x: 5, rx: 2, fill: colour(series, kind) })
    : series.style === "dots" ? s("circle", { cx: 11, cy: 5, r: 3.5, fill: colour(series, kind) })
      : s("path", { d: "M0 5H22", stroke: colour(series, kind), "stroke-width": 2.5,
        "stroke-dasharray": series.dash }));
const colour = (series, kind) => kind === "bars" ? `var(--${series.key.replace(/\W/g, "_")}, var(--other))` : `var(--c${series.colour % COLOURS})`;

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.log = false;
    this.hidden = new Set();
    spec.series.filter((series) => series.style !== "dots")
      .forEach((series, i) => { series.dash = DASHES[(data.runs.length > 1 ? series.run : i) % DASHES.length]; });
    if (spec.smooth) for (const series of spec.series) if (series.style !== "dots") series.smooth = true;
    learn(spec);
    this.levels = spec.levels || [];
    this.host = h("div", { class: "plot", tabindex: 0, role: "group", "aria-label": this.told(),
      "aria-description": "Arrow keys move the cursor, plus and minus zoom, 0 shows all" });
    this.tip = h("div", { class: "tip", "aria-live": "polite", hidden: true });
    const log = spec.log && h("button", { type: "button", class: "small", "aria-pressed": "false", title: "logarithmic y axis",
      onclick: (event) => { this.log = !this.log; event.currentTarget.setAttribute("aria-pressed", this.log); this.draw(); } }, "log");
    this.element = h("figure", { class: `chart${spec.wide ? " wide" : ""}`, id: `chart-${spec.id}` },
      h("figcaption", {}, h("h3", {}, spec.title), log), this.legend(), this.host, spec.note && h("p", { class: "soft" }, spec.note));
    this.listen();
    charts.push(this);
  }

  told() { // what the chart shows, in a sentence
    const parts = this.spec.series.slice(0, 8).map((series) => {
      const known = series.values.filter((value) => value !== null);
      return `${series.name} from ${told(this.spec.unit, known[0])} to ${told(this.spec.unit, known[known.length - 1])}`;
    });
    return `${this.spec.title}: ${parts.join("; ")}`;
  }

  legend() {
    const { series, kind } = this.spec;
    const levels = this.levels.map((level) => h("span", { class: "level" }, s("svg", { class: "swatch", width: 22, height: 10 },
      s("path", { d: "M0 5H22", class: "level" })), `${level.name} ${told(this.spec.unit, level.value, 3)}`));
    if (kind === "band") return h("div", { class: "legend soft" }, "mean, between the lowest and the highest rank");
    if ((series.length < 2 && !levels.length) || (data.runs.length > 1 && !levels.length)) return null;
    const toggles = series.length < 2 ? h("span", {}, swatch(series[0], kind), series[0].name) : series.map((one) => h("button", { type: "button", class: "toggle", "aria-pressed": "true",
      onclick: (event) => {
        this.hidden.has(one) ? this.hidden.delete(one) : this.hidden.add(one);
        event.currentTarget.setAttribute("aria-pressed", !this.hidden.has(one));
        redraw();
      } }, swatch(one, kind), one.name));
    return h("div", { class: "legend" }, toggles, levels);
  }

  shown() { return this.spec.series.filter((series) => !this.hidden.has(series) && !view.hidden.has(series.run)); }

  // ------------------------------------------------------------ geometry

  measure() {
    const { wide, kind, unit } = this.spec;
    const width = view.printing ? 680 : Math.max(240, this.host.clientWidth);
    const height = (wide ? (width < 520 ? 230 : 310) : 200) + 34;
    const [x0, x1] = view.domain || extent();
    const [low, high] = this.range(x0, x1, kind);
    const count = height > 250 ? 6 : 5;
    const [size, suffix] = scaleOf(unit, this.log ? high : Math.max(Math.abs(low), Math.abs(high)));
    const ticks = this.log ? logTicks(low, high, count) : steps(low / size, high / size, count).map((tick) => tick * size);
    const labels = ticks.map((tick) => this.log ? told(unit, tick, 3) : this.label(tick, size, suffix, ticks));
    const left = 12 + 6.4 * Math.max(3, ...labels.map((label) => label.length)), right = width - 14, top = 8, bottom = height - 38;
    const y = this.log ? (value) => bottom - (bottom - top) * (Math.log(Math.max(value, low)) - Math.log(low)) / (Math.log(high) - Math.log(low))
      : (value) => bottom - (bottom - top) * (value - low) / (high - low);
    const x = (value) => left + (right - left) * (value - x0) / (x1 - x0);
    const back = (pixel) => x0 + (x1 - x0) * (pixel - left) / (right - left);
    this.at = { width, height, x0, x1, low, high, ticks, labels, left, right, top, bottom, x, y, back };
    return this.at;
  }

  label(tick, size, suffix, ticks) {
    const value = tick / size, step = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) / size : Math.abs(value) || 1;
    if (Math.abs(value) < step / 1e6) return "0";
    if (step < 1e-3) return value.toExponential(1).replace(".0e", "e") + suffix;
    const digits = [0, 1, 2, 3, 4].find((n) => ticks.every((one) => Math.abs((one / size) * 10 ** n % 1) < 1e-6 || Math.abs((one / size) * 10 ** n % 1) > 1 - 1e-6));
    return value.toLocaleString("en", { maximumFractionDigits: digits === undefined ? 4 : digits }) + suffix;
  }

  range(x0, x1, kind) { // of the y axis, over what is in view
    let low = Infinity, high = -Infinity;
    const take = (value) => {
      if (value === null || value === undefined || (this.log && value <= 0)) return;
      low = Math.min(low, value); high = Math.max(high, value);
    };
    if (kind === "bars") { low = 0; for (const bar of this.bars(x0, x1, 1)) take(bar.sum); }
    else for (const series of this.shown()) {
      const found = reading(series);
      for (const { x, y, low: under, high: over } of [found, found.smooth].filter(Boolean)) {
        for (let i = Math.max(0, firstAt(x, x0) - 1); i < x.length && x[i] <= x1; i++) {
          take(y[i]);
          if (under) { take(under[i]); take(over[i]); }
        }
      }
    }
    for (const level of this.levels) if (!this.log || level.value > 0) take(level.value);
    if (low > high) return [this.log ? 0.1 : 0, 1];
    if (this.log) { const pad = Math.max(1.02, (high / low) ** 0.04); return [low / pad, high * pad]; }
    if (this.spec.zero || kind === "bars") low = Math.min(0, low);
    const pad = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
    return [low === 0 && (this.spec.zero || kind === "bars") ? 0 : low - pad, high + pad];
  }

  // ------------------------------------------------------------ drawing

  draw() {
    const { width, height, left, right, top, bottom, x, y, ticks, labels, x0, x1 } = this.measure();
    const { kind, id, title } = this.spec;
    const count = Math.max(2, Math.floor((right - left) / 90));
    const places = view.axis === "time" ? timeTicks(x0, x1, count)
      : steps(x0, x1, count).filter((tick) => view.axis !== "step" || Math.abs(tick - Math.round(tick)) < 1e-6);  // no half steps
    const grid = s("g", { class: "grid" },
      ticks.map((tick, i) => [s("path", { d: `M${left} ${y(tick).toFixed(1)}H${right}` }),
        s("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, labels[i])]),
      places.map((tick) => s("text", { x: x(tick), y: height - 6, "text-anchor": x(tick) > right - 24 ? "end" : x(tick) < left + 12 ? "start" : "middle" }, place(tick))));
    this.cursor = s("g", { class: "cursor" });
    this.selection = s("rect", { class: "selection", y: top, height: bottom - top, width: 0 });
    const inside = s("g", { "clip-path": `url(#clip-${id})` },
      kind === "bars" ? this.drawBars() : this.shown().map((series) => this.drawSeries(series)),
      this.levels.map((level) => s("path", { class: "level", d: `M${left} ${y(level.value)}H${right}` })));
    const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": title },
      s("clipPath", { id: `clip-${id}` }, s("rect", { x: left - 5, y: top - 4, width: right - left + 10, height: bottom - top + 5 })),
      grid, s("path", { class: "axis", d: `M${left} ${bottom}H${right}` }), inside, this.drawMarks(), this.selection, this.cursor);
    this.host.replaceChildren(svg, this.tip);
    this.point();
  }

  drawSeries(series) {
    const found = reading(series), stroke = colour(series), { dash } = series;
    if (series.style === "dots") {
      return s("g", { fill: stroke, class: "dots" }, s("path", { d: this.path(found.x, found.y), stroke, class: "faint" }),
        found.x.map((value, i) => found.y[i] === null ? null
          : s("circle", { cx: this.at.x(value).toFixed(1), cy: this.at.y(found.y[i]).toFixed(1), r: 3.4 })));
    }
    const area = series.low && s("path", { class: "area", fill: stroke, d: this.area(found) });
    const raw = s("path", { class: found.smooth ? "raw" : "line", stroke, "stroke-dasharray": found.smooth ? "" : dash, d: this.path(found.x, found.y) });
    const strong = found.smooth && s("path", { class: "line", stroke, "stroke-dasharray": dash, d: this.path(found.smooth.x, found.smooth.y) });
    return [area, raw, strong].filter(Boolean);
  }

  path(xs, ys) {
    const { x, y, x0, x1 } = this.at, parts = [];
    let begun = false;
    for (let i = Math.max(0, firstAt(xs, x0) - 1); i < xs.length; i++) {
      const value = ys[i];
      if (value === null || (this.log && value <= 0)) { begun = false; continue; }
      parts.push(`${begun ? "L" : "M"}${x(xs[i]).toFixed(1)} ${y(value).toFixed(1)}`);
      if (!begun && (i + 1 === xs.length || ys[i + 1] === null)) parts.push("h.01"); // alone between gaps: a dot
      begun = true;
      if (xs[i] > x1) break;
    }
    return parts.join("");
  }

  area({ x: xs, low, high }) {
    const { x, y } = this.at, known = xs.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null);
    const edge = (list, values) => list.map((i) => `${x(xs[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`).join("L");
    return known.length ? `M${edge(known, high)}L${edge([...known].reverse(), low)}Z` : "";
  }

  bars(x0, x1, least) { // what is in view, joined until a bar is `least` pixels wide
    const shown = this.shown();
    if (!shown.length) return [];
    const { x } = reading(shown[0]), { weights } = this.spec, typical = x.length > 1 ? (x[x.length - 1] - x[0]) / (x.length - 1) : 1;
    const first = firstAt(x, x0), last = Math.min(x.length, firstAt(x, x1) + 1), pixels = this.at ? this.at.right - this.at.left : 600;
    const count = Math.min(last - first, Math.max(1, Math.floor(pixels / least))), found = [];
    for (let bar = 0; bar < count; bar++) {
      const begin = first + Math.floor((last - first) * bar / count), end = first + Math.floor((last - first) * (bar + 1) / count);
      const before = begin > 0 ? x[begin - 1] : x[begin] - typical;
      let weight = 0;
      for (let i = begin; i < end; i++) weight += weights[i];
      const layers = shown.map((series) => {
        const { y } = reading(series);
        let sum = 0;
        for (let i = begin; i < end; i++) sum += (y[i] || 0) * weights[i];
        return { series, value: sum / (weight || 1) };
      });
      found.push({ from: Math.max(before, x[begin] - 2 * typical), to: x[end - 1], layers, sum: layers.reduce((sum, layer) => sum + layer.value, 0) });
    }
    return found;
  }

  drawBars() {
    const { x, y, x0, x1 } = this.at, bars = this.bars(x0, x1, 6);
    return this.shown().map((series, place) => {
      const rects = bars.map((bar) => {
        const under = bar.layers.slice(0, place).reduce((sum, layer) => sum + layer.value, 0), value = bar.layers[place].value;
        const left = x(bar.from), gap = x(bar.to) - left > 4 ? 1 : 0;
        return value > 0 ? `M${(left + gap).toFixed(1)} ${y(under + value).toFixed(2)}H${x(bar.to).toFixed(1)}V${y(under).toFixed(2)}H${(left + gap).toFixed(1)}Z` : "";
      });
      return s("path", { fill: colour(series, "bars"), d: rects.join("") });
    });
  }

  marks() {
    const { x, left, right } = this.at;
    return data.marks.filter((mark) => !view.hidden.has(mark.run) && !view.hidden.has(mark.kind))
      .map((mark) => ({ ...mark, at: x(view.axis === "time" && mark.time !== null ? mark.time : lookUp(mark.run, mark.step, view.axis)) }))
      .filter((mark) => mark.at >= left - 1 && mark.at <= right + 1);
  }

  drawMarks() {
    const { top, bottom } = this.at, last = {};
    return s("g", { class: "marks" }, this.marks().map((mark) => {
      const crowded = last[mark.kind] !== undefined && mark.at - last[mark.kind] < 4;
      if (crowded) return null;
      last[mark.kind] = mark.at;
      const line = mark.kind === "checkpoint" || mark.kind === "failed" ? null : s("path", { class: "rule", d: `M${mark.at.toFixed(1)} ${top}V${bottom}` });
      return s("g", { class: mark.kind }, line, s("path", { class: "glyph", d: GLYPHS[mark.kind],
        transform: `translate(${mark.at.toFixed(1)} ${bottom + 9})` }));
    }));
  }

  // ------------------------------------------------------------ the cursor

  point() { // show the cursor where it is on all charts, with values on the one that has it
    const { x, left, right, top, bottom, y } = this.at;
    const at = view.x === null ? null : x(view.x);
    if (at === null || at < left - 1 || at > right + 1) { this.cursor.replaceChildren(); this.tip.hidden = true; return; }
    const { head, rows, dots } = this.values(view.x);
    this.cursor.replaceChildren(s("path", { d: `M${at.toFixed(1)} ${top}V${bottom}` }),
      ...dots.map(([place, value, stroke]) => s("circle", { cx: x(place), cy: y(value), r: 4, fill: stroke })));
    this.tip.hidden = view.from !== this;
    if (view.from !== this) return;
    const near = this.marks().filter((mark) => Math.abs(mark.at - at) < 7);
    this.tip.replaceChildren(h("b", {}, head), ...rows, ...near.slice(0, 6).map((mark) => h("span", { class: "what" }, mark.text)));
    const wide = this.tip.offsetWidth, gap = 14;
    this.tip.style.left = `${Math.max(0, at + gap + wide > this.at.width ? at - gap - wide : at + gap)}px`;
  }

  values(place_) {
    const row = (series, value) => h("span", {}, swatch(series, this.spec.kind), h("i", {}, series.name), value);
    const unit = this.spec.unit, axis = { step: "step ", tokens: "tokens ", time: "" }[view.axis];
    if (this.spec.kind === "bars") {
      const bar = this.bars(this.at.x0, this.at.x1, 6).find(({ to }) => to >= place_);
      if (!bar) return { head: axis + place(place_), rows: [], dots: [] };
      const rows = bar.layers.filter(({ value }) => value > 0).reverse()
        .map(({ series, value }) => row(series, `${told(unit, value, 3)} · ${(100 * value / bar.sum).toFixed(0)} %`));
      return { head: `${axis}${place(bar.from)} – ${place(bar.to)}`, rows: [...rows, h("span", {}, h("i", {}, "in all"), told(unit, bar.sum, 3))], dots: [] };
    }
    const rows = [], dots = [];
    for (const series of this.shown()) {
      const found = reading(series), i = nearest(found.x, place_);
      if (i < 0 || found.y[i] === null) continue;
      if (series.style === "dots" && Math.abs(this.at.x(found.x[i]) - this.at.x(place_)) > 12) continue;
      const near = found.smooth ? found.smooth.y[nearest(found.smooth.x, place_)] : null;
      const spread = series.low ? ` (${told(unit, series.low[i])} to ${told(unit, series.high[i])})` : "";
      rows.push(row(series, told(unit, found.y[i]) + spread + (near === null ? "" : ` · smooth ${told(unit, near)}`)));
      dots.push([found.x[i], found.y[i], colour(series)]);
    }
    return { head: axis + place(place_), rows, dots };
  }

  // ------------------------------------------------------------ hands

  listen() {
    const touches = new Map();
    let began = null, pinch = null;
    const pixel = (event) => {
      const box = this.host.getBoundingClientRect();
      return (event.clientX - box.left) * this.at.width / box.width;
    };
    const inside = (value) => Math.min(this.at.right, Math.max(this.at.left, value));
    this.host.addEventListener("pointerdown", (event) => {
      touches.set(event.pointerId, pixel(event));
      if (event.pointerType === "mouse" && event.button === 0) began = inside(pixel(event));
      else if (touches.size === 1) move(this, this.at.back(inside(pixel(event))));
      if (touches.size === 2) pinch = [...touches.values()].map((value) => this.at.back(value));
      if (event.isTrusted) this.host.setPointerCapture(event.pointerId);
    });
    this.host.addEventListener("pointermove", (event) => {
      if (touches.has(event.pointerId)) touches.set(event.pointerId, pixel(event));
      if (pinch && touches.size === 2) return this.pinch(pinch, [...touches.values()]);
      const now = inside(pixel(event));
      if (began !== null) {
        this.selection.setAttribute("x", Math.min(began, now));
        this.selection.setAttribute("width", Math.abs(now - began));
      }
      return move(this, this.at.back(now));
    });
    const end = (event) => {
      touches.delete(event.pointerId);
      if (touches.size < 2) pinch = null;
      if (began === null) return;
      const [from, to] = [began, inside(pixel(event))].sort((a, b) => a - b);
      began = null;
      this.selection.setAttribute("width", 0);
      if (event.type === "pointerup" && to - from > 6) zoom(this.at.back(from), this.at.back(to));
    };
    for (const kind of ["pointerup", "pointercancel"]) this.host.addEventListener(kind, end);
    this.host.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") move(null, null); });
    this.host.addEventListener("blur", () => move(null, null));
    this.host.addEventListener("dblclick", reset);
    this.host.addEventListener("keydown", (event) => this.key(event));
  }

  pinch([first, second], [a, b]) { // what was under the two fingers stays there
    const { left, right } = this.at, scale = (second - first) / (b - a);
    if (Number.isFinite(scale) && scale > 0) zoom(first - (a - left) * scale, second + (right - b) * scale);
  }

  key(event) {
    const { x0, x1 } = this.at, at = view.x === null ? (x0 + x1) / 2 : view.x, step = (x1 - x0) / (event.shiftKey ? 10 : 100);
    const near = (factor) => zoom(at - (at - x0) * factor, at + (x1 - at) * factor);
    const acts = { ArrowLeft: () => move(this, Math.max(x0, at - step)), ArrowRight: () => move(this, Math.min(x1, at + step)),
      "+": () => near(0.5), "=": () => near(0.5), "-": () => near(2), 0: reset, Escape: () => move(null, null) };
    if (!acts[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    acts[event.key]();
  }
}

function nearest(sorted, value) {
  const i = firstAt(sorted, value);
  return i === 0 ? sorted.length - 1 && 0 : i === sorted.length || value - sorted[i - 1] < sorted[i] - value ? i - 1 : i;
}

// ---------------------------------------------------------------- all charts at once

function redraw() { for (const chart of charts) chart.draw(); }
function move(chart, x) {
  view.x = x;
  view.from = chart;
  for (const one of charts) one.point();
}
function zoom(low, high) {
  const [first, last] = extent(), least = (last - first) / 1e5;
  const from = Math.max(first, low), to = Math.min(last, high);
  if (to - from < least) return;
  view.domain = from <= first && to >= last ? null : [from, to];
  document.dispatchEvent(new Event("zoomed"));
  redraw();
}
function reset() {
  view.domain = null;
  document.dispatchEvent(new Event("zoomed"));
  redraw();
}
