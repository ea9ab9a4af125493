// What stands on the page: the head, the tools for its charts, and its sections, each block by its kind.

const TICKS = { good: "✓", bad: "✕", open: "●", paused: "❚❚", error: "✕", warning: "!", advice: "i" };
const KINDS = { restart: "restarts", checkpoint: "checkpoints", failed: "failed saves", rollback: "rollbacks", refused: "refused updates" };
const MOST = 24; // stops of the smoothing slider

function head() {
  const { overline, title, status, facts, tiles, findings } = data;
  document.getElementById("head").append(
    h("p", { class: "overline" }, overline),
    h("div", { class: "title" }, h("h1", {}, title), status && h("p", { class: `pill ${status.kind}` }, h("span", { "aria-hidden": "true" }, TICKS[status.kind]), ` ${status.text}`)),
    facts.length ? h("p", { class: "facts" }, facts.join(" · ")) : "",
    status && status.reason ? h("p", { class: "quote" }, status.reason) : "",
    tiles.length ? h("dl", { class: `tiles of-${Math.ceil(tiles.length / Math.ceil(tiles.length / 6))}` }, tiles.map((tile) => h("div", {}, h("dt", {}, tile.name), h("dd", {}, tile.value), h("dd", { class: "soft" }, tile.detail)))) : "",
    data.thinned.length ? h("p", { class: "soft thinned" }, `Thinned: ${data.thinned.join("; ")}. The charts show fewer, the lowest and the highest of each stretch among them.`) : "",
    findings.length ? h("section", { id: "findings", "aria-label": "findings" }, h("h2", {}, "Findings"), findings.map(finding)) : "");
}
function finding(one) {
  return h("article", { class: `finding ${one.severity}` },
    h("h3", {}, h("span", { class: "sign", "aria-hidden": "true" }, TICKS[one.severity] || "i"), one.run ? `${one.run}: ` : null, h("span", { class: "first" }, one.title),
      h("small", {}, one.severity)),
    h("p", { class: "soft first" }, one.evidence, one.threshold ? ` Limit: ${one.threshold}.` : ""),
    h("p", {}, one.advice), one.set.length ? h("p", {}, h("code", {}, one.set.join(" "))) : null);
}

// ---------------------------------------------------------------- tools

function tools() {
  const axes = { step: "steps", time: data.clock, tokens: "tokens" };
  if (!data.grids.some((grid) => grid.tokens && grid.tokens.some((value) => value !== null))) delete axes.tokens;
  const form = h("form", { id: "tools", "aria-label": "what all charts show", onsubmit: (event) => event.preventDefault() },
    h("fieldset", { class: "segments" }, h("legend", {}, "x axis"), Object.entries(axes).map(([axis, name]) => h("label", {},
      h("input", { type: "radio", name: "axis", value: axis, checked: axis === "step", onchange: () => { view.axis = axis; view.x = null; reset(); } }), h("span", {}, name)))),
    smoothing() || "", runToggles() || "", markToggles() || "",
    h("button", { type: "button", id: "reset", hidden: true, onclick: reset }, "show all"));
  document.addEventListener("zoomed", () => { document.getElementById("reset").hidden = !view.domain; });
  const first = document.querySelector("section:has(.chart)");
  if (first) first.before(form);
}
function smoothing() {
  const some = charts.find((chart) => chart.spec.series.some((series) => series.smooth));
  if (!some) return null;
  const steps_ = some.spec.series.filter((series) => series.smooth).map((series) => data.grids[series.grid].step);
  const range = Math.max(...steps_.map((list) => list[list.length - 1] - list[0])), records = Math.max(...steps_.map((list) => list.length));
  if (records < 8) return null;
  const least = range / records, halfLife = (stop) => stop ? least * (range / 4 / least) ** ((stop - 1) / (MOST - 1)) : 0;
  const output = h("output", {}), input = h("input", { type: "range", id: "smoothing", min: 0, max: MOST, value: records > 60 ? Math.min(MOST, 1 + Math.round((MOST - 1) * Math.log(Math.max(1, records / 200)) / Math.log(records / 4))) : 0, "aria-label": "smoothing of loss and gradient norm" });
  const set = () => {
    view.halfLife = halfLife(Number(input.value));
    output.textContent = view.halfLife ? `half-life ${number(view.halfLife, 2)} steps` : "off";
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => { set(); for (const chart of charts) if (chart.spec.smooth) chart.draw(); });
  set();
  return h("label", { class: "smoothing" }, "smoothing ", input, output);
}
function toggle(key, ...children) {
  return h("button", { type: "button", class: "toggle", "aria-pressed": "true", onclick: (event) => {
    view.hidden.has(key) ? view.hidden.delete(key) : view.hidden.add(key);
    event.currentTarget.setAttribute("aria-pressed", !view.hidden.has(key));
    redraw();
  } }, ...children);
}
function runToggles() {
  if (data.runs.length < 2) return null;
  return h("div", { class: "legend", role: "group", "aria-label": "runs" }, data.runs.map((name, run) => toggle(run, swatch(runLine(run)), name)));
}
const runLine = (run) => ({ colour: run, dash: DASHES[run % DASHES.length] });
function markToggles() {
  const kinds = Object.keys(KINDS).filter((kind) => data.marks.some((mark) => mark.kind === kind));
  if (!kinds.length) return null;
  return h("div", { class: "legend marks", role: "group", "aria-label": "marks on the axis" }, kinds.map((kind) => toggle(kind,
    s("svg", { class: `swatch ${kind}`, width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true" }, s("path", { class: "glyph", d: GLYPHS[kind] })), KINDS[kind])));
}

// ---------------------------------------------------------------- blocks

const BLOCKS = {
  charts: (block) => h("div", { class: "charts" }, block.charts.map((spec) => new Chart(spec).element)),
  stack, table, document: json,
  text: (block) => h("p", { class: block.style }, block.text),
};
const shownStacks = [];

function stack(block) {
  const most = Math.max(...block.rows.map((row) => row.parts.reduce((sum, [, , value]) => sum + value, 0)));
  const keys = new Map(block.rows.flatMap((row) => row.parts.map(([key, name]) => [key, name])));
  const rows = block.rows.map((row) => {
    const whole = row.parts.reduce((sum, [, , value]) => sum + value, 0);
    const bar = h("div", { class: "bar", role: "img", "aria-label": `${row.name || block.title}: ${row.parts.map(([, name, value]) => `${name} ${told(block.unit, value, 3)}`).join(", ")}` });
    const draw = () => {
      const width = view.printing ? 560 : bar.clientWidth, parts = [];
      let at = 0;
      for (const [key, name, value] of row.parts) {
        const wide = width * value / most, text = `${name} ${told(block.unit, value, 3)}`;
        const words = [text, name, ""].find((one) => one.length * 6.7 + 10 < wide);
        parts.push(s("g", {}, s("title", {}, `${text} · ${(100 * value / whole).toFixed(1)} %`),
          s("rect", { x: at, y: 0, width: Math.max(0.75, wide - 1), height: 26, fill: colour({ key }, "bars") }),
          words ? s("text", { x: at + 6, y: 17 }, words) : null));
        at += wide;
      }
      bar.replaceChildren(s("svg", { viewBox: `0 0 ${width} 26`, width, height: 26 }, parts));
    };
    shownStacks.push(draw);
    const values = block.values && h("div", { class: "legend" }, row.parts.map(([key, name, value]) => h("span", {}, swatch({ key }, "bars"), name, " ",
      h("b", {}, told(block.unit, value, 3)))));
    return h("div", { class: "row" }, h("span", { class: "name" }, row.name, " ", h("b", {}, told(block.unit, whole, 3))), h("div", { class: "cell" }, bar, values));
  });
  const legend = block.values ? null : h("div", { class: "legend soft" }, [...keys].map(([key, name]) => h("span", {}, swatch({ key }, "bars"), name)));
  return h("figure", { class: "stack" }, h("figcaption", {}, h("h3", {}, block.title)), rows, legend);
}

function table(block) {
  const number_ = block.columns.map((name) => name.startsWith(">"));
  const head_ = block.columns.some((name) => name.replace(">", "")) ? h("thead", {}, h("tr", {}, block.columns.map((name, i) =>
    h("th", { scope: "col", class: number_[i] && "number" }, name.replace(">", ""))))) : null;
  const body = block.rows.map((row, place) => h("tr", {}, row.map((cell, i) => {
    const key = i === 0 && block.keys && block.keys[place], run = i === 0 && block.runs ? block.runs[place] : null;
    return h(i === 0 && !number_[0] ? "th" : "td", { scope: i === 0 && !number_[0] && "row", class: number_[i] && "number" },
      key ? swatch({ key }, "bars") : run === null ? null : swatch(runLine(run)), cell.startsWith("--set ") ? h("code", {}, cell) : cell);
  })));
  return h("figure", { class: `table${block.wide ? " wide" : ""}${block.runs ? " runs" : ""}` }, block.title ? h("figcaption", {}, h("h3", {}, block.title)) : null,
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": block.title || "table" }, h("table", {}, head_, h("tbody", {}, body))),
    block.note ? h("p", { class: "soft" }, block.note) : null);
}

function json(block) {
  const own = block.own && new Set(block.own);
  const render = (value, path, depth) => {
    const pad = "  ".repeat(depth + 1), inner = (key) => path ? `${path}.${key}` : String(key);
    if (Array.isArray(value) && value.every((item) => item === null || typeof item !== "object")) return scalar(value, own && ![...own].some((one) => one === path || one.startsWith(`${path}.`)));
    if (value !== null && typeof value === "object") {
      const entries = Object.entries(value), list = Array.isArray(value);
      if (!entries.length) return scalar(value, own && !own.has(path));
      return [list ? "[" : "{", "\n", entries.map(([key, item], i) => [pad,
        list ? null : h("span", { class: dims(item, inner(key)) ? "key dim" : "key" }, JSON.stringify(key)), list ? null : ": ", render(item, inner(key), depth + 1),
        i + 1 < entries.length ? "," : "", "\n"]), "  ".repeat(depth), list ? "]" : "}"];
    }
    return scalar(value, own && !own.has(path) && !path.endsWith(".kind"));
  };
  const dims = (value, path) => own && !path.endsWith(".kind") && !own.has(path) && ![...own].some((one) => one.startsWith(`${path}.`))
    && !(value !== null && typeof value === "object" && "kind" in value);
  const scalar = (value, dim) => {
    const text = Array.isArray(value) ? `[${value.map((item) => JSON.stringify(item)).join(", ")}]` : JSON.stringify(value);
    return h("span", { class: `${value === null ? "null" : typeof value}${dim ? " dim" : ""}` }, text);
  };
  return h("details", {}, h("summary", {}, block.title), block.note ? h("p", { class: "soft" }, block.note) : null,
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": block.title }, h("pre", {}, render(block.value, "", 0))));
}

// ---------------------------------------------------------------- the page

function main() {
  head();
  const sections = data.sections.map((section) => h("section", { id: section.id, class: section.alarm && "alarm" }, h("h2", {}, section.title),
    h("div", { class: "blocks" }, section.blocks.map((block) => BLOCKS[block.kind](block)))));
  document.getElementById("main").append(...sections);
  tools();
  const all = () => { redraw(); for (const draw of shownStacks) draw(); };
  let width = 0;
  new ResizeObserver(() => { // the first call draws the page
    const now = document.getElementById("main").clientWidth;
    if (now !== width && !view.printing) { width = now; all(); }
  }).observe(document.getElementById("main"));
  addEventListener("beforeprint", () => { view.printing = true; all(); });
  addEventListener("afterprint", () => { view.printing = false; all(); });
}
main();
