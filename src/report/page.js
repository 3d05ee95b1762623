"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#84cc16", "#ec4899"];

function el(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "text", "rect", "circle", "g"].includes(tag);
  const e = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [k, v] of Object.entries(attributes || {})) {
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (k === "style") e.style.cssText = v; // set by script: no inline style attribute in the page
    else e.setAttribute(k, v);
  }
  for (const c of children.flat()) if (c !== null && c !== undefined) e.append(c);
  return e;
}

function show(v) {
  if (typeof v !== "number") return String(v);
  if (Number.isInteger(v) && Math.abs(v) < 1e7) return v.toLocaleString("en");
  const a = Math.abs(v);
  return a !== 0 && (a < 1e-3 || a >= 1e6) ? v.toExponential(2) : String(+v.toPrecision(4));
}

// As `show`, short enough for an axis.
function short(v) {
  const a = Math.abs(v);
  for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (a >= size * 10 || (a >= size && size > 1e3)) return +(v / size).toPrecision(4) + letter;
  return a !== 0 && a < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(4));
}

// Round numbers that cover low..high in about n steps.
function ticks(low, high, n) {
  const raw = (high - low) / n, base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [1, 2, 5, 10].find((m) => base * m >= raw);
  const out = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) out.push(Math.abs(t) < step * 1e-9 ? 0 : t);
  return out;
}

// Exponential moving average with the bias of its start taken off; gaps stay gaps.
function smooth(points, weight) {
  let sum = 0, norm = 0;
  return points.map(([x, y]) => {
    if (y === null) return [x, null];
    sum = weight * sum + (1 - weight) * y;
    norm = weight * norm + (1 - weight);
    return [x, sum / norm];
  });
}

// Lines of one metric: { points, colour, run, label, dashed }.
class Chart {
  constructor(group, name, lines) {
    this.group = group;
    this.name = name;
    this.all = lines;
    this.value = el("span");
    this.svg = el("svg", { viewBox: "0 0 320 170", preserveAspectRatio: "none", role: "img", "aria-label": name });
    const keys = lines.length > 1 && lines.some((l) => l.dashed) && !group.legend
      ? el("small", {}, lines.flatMap((l) => [key(l), l.label + " "])) : null;
    this.card = el("div", { class: "card" }, el("h4", {}, el("b", {}, name, keys ? " " : "", keys), this.value), this.svg);
    this.svg.addEventListener("pointerdown", (e) => {
      this.from = this.at(e);
      this.svg.setPointerCapture(e.pointerId);
    });
    this.svg.addEventListener("pointermove", (e) => this.hover(this.at(e)));
    this.svg.addEventListener("pointerleave", () => this.draw());
    this.svg.addEventListener("pointerup", (e) => {
      const range = [this.from, this.at(e)].sort((a, b) => a - b);
      const wide = (range[1] - range[0]) / (this.x1 - this.x0) > 0.02;
      this.from = undefined;
      if (wide) this.group.zoom(range);
    });
    this.svg.addEventListener("dblclick", () => this.group.zoom(null));
  }

  at(e) {
    const box = this.svg.getBoundingClientRect();
    const f = (e.clientX - box.left - this.left) / (this.w - this.left - this.right);
    return this.x0 + Math.min(1, Math.max(0, f)) * (this.x1 - this.x0);
  }

  px(x) { return this.left + (x - this.x0) / (this.x1 - this.x0 || 1) * (this.w - this.left - this.right); }
  py(y) { return this.h - 20 - (y - this.y0) / (this.y1 - this.y0 || 1) * (this.h - 30); }

  path(points) {
    let d = "", pen = "M";
    for (const [x, y] of points) {
      if (y === null) { pen = "M"; continue; }
      d += `${pen}${this.px(x).toFixed(1)} ${this.py(y).toFixed(1)}`;
      pen = "L";
    }
    return d;
  }

  draw() {
    this.w = Math.max(200, this.svg.clientWidth || 320);
    this.h = 170;
    this.left = 46;
    this.right = 16;
    this.svg.setAttribute("viewBox", `0 0 ${this.w} ${this.h}`);
    const range = this.group.range;
    const inside = ([x]) => !range || (x >= range[0] && x <= range[1]);
    this.lines = this.all.filter((l) => !this.group.hidden.has(l.run)).map((l) => ({
      ...l, raw: l.points.filter(inside), points: smooth(l.points, this.group.weight).filter(inside) }));
    const xs = this.all.flatMap((l) => l.points.map((p) => p[0]));
    const least = (list) => list.reduce((a, b) => Math.min(a, b)), most = (list) => list.reduce((a, b) => Math.max(a, b));
    [this.x0, this.x1] = range || [least(xs), most(xs)];
    if (this.x0 === this.x1) [this.x0, this.x1] = [this.x0 - 1, this.x1 + 1];
    const ys = this.lines.flatMap((l) => l.raw.concat(l.points)).map((p) => p[1]).filter((y) => y !== null);
    if (!ys.length) ys.push(0);
    const [low, high] = [least(ys), most(ys)];
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    [this.y0, this.y1] = [low - pad, high + pad];
    const parts = [];
    for (const t of ticks(this.y0, this.y1, 5)) {
      const y = this.py(t);
      parts.push(el("line", { class: "grid", x1: this.left, x2: this.w - this.right, y1: y, y2: y }),
        el("text", { x: this.left - 6, y: y + 3.5, "text-anchor": "end" }, short(t)));
    }
    for (const t of ticks(this.x0, this.x1, Math.max(2, Math.floor(this.w / 90))))
      if (Number.isInteger(t)) parts.push(el("text", { x: this.px(t), y: this.h - 5, "text-anchor": "middle" }, short(t)));
    for (const line of this.lines) {
      if (this.group.weight > 0) parts.push(el("path", { class: "raw", d: this.path(line.raw), style: `stroke:${line.colour}` }));
      parts.push(el("path", { class: line.dashed ? "line dashed" : "line", d: this.path(line.points), style: `stroke:${line.colour}` }));
      const points = line.points.filter((p) => p[1] !== null);
      if (points.length < 2 || (line.dashed && points.length < 30)) for (const p of points) parts.push(this.dot(line, p, 2.5));
    }
    this.svg.replaceChildren(...parts);
    this.tell("", this.lines.map((l) => [l, l.points.filter((p) => p[1] !== null).at(-1)]));
  }

  dot(line, [x, y], r) {
    return el("circle", { cx: this.px(x), cy: this.py(y), r, style: `fill:${line.colour}` });
  }

  // Values of lines, beside the name.
  tell(step, found) {
    const known = found.filter(([, p]) => p);
    const values = known.map(([l, p]) => [known.length > 1 ? key(l) : "", show(p[1]), " "]);
    this.value.replaceChildren(step, ...values.flat().filter((v) => v !== ""), ...(known.length ? [] : ["no number"]));
  }

  hover(x) {
    this.draw();
    if (this.from !== undefined) {
      const [a, b] = [this.px(this.from), this.px(x)].sort((p, q) => p - q);
      this.svg.append(el("rect", { class: "pick", x: a, y: 6, width: b - a, height: this.h - 26 }));
      return;
    }
    const nearest = (points) => points.reduce((best, p) => Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best);
    const found = this.lines.map((l) => [l, l.points.filter((p) => p[1] !== null)]).filter(([, p]) => p.length)
      .map(([l, p]) => [l, nearest(p)]);
    if (!found.length) return;
    const near = nearest(found.map(([, p]) => p)), at = this.px(near[0]);
    this.svg.append(el("line", { class: "hair", x1: at, x2: at, y1: 6, y2: this.h - 20 }), ...found.map(([l, p]) => this.dot(l, p, 3.5)));
    this.tell(`step ${show(near[0])}: `, found);
  }
}

function key(line) { return el("i", { class: "key", style: `background:${line.colour}` }); }

// The lines of each chart of a layout.
function charted(layout, runs) {
  return layout.charts.map(([name, lines]) => [name, lines.map(([run, at, dashed]) => ({
    points: runs[run].series[at][1], run, dashed, label: dashed ? "evaluation" : runs.length > 1 ? runs[run].name : "training",
    colour: COLOURS[(runs.length > 1 ? run : dashed ? 1 : 0) % COLOURS.length] }))]);
}

// All charts of a run share their zoom and their smoothing.
class Group {
  constructor(charts, runs) {
    this.weight = 0;
    this.range = null;
    this.hidden = new Set();
    this.legend = runs.length > 1;
    this.charts = charts.map(([name, lines]) => new Chart(this, name, lines));
    const label = el("output", {}, "0");
    const slide = (e) => { this.weight = e.target.value / 100; label.textContent = this.weight.toFixed(2); this.draw(); };
    this.reset = el("button", { type: "button", onclick: () => this.zoom(null) }, "Whole run");
    this.bar = el("div", { class: "bar" },
      el("label", {}, "Smoothing ", el("input", { type: "range", min: 0, max: 98, value: 0, oninput: slide }), " ", label),
      this.reset, el("span", {}, "Drag across a chart to zoom all of them; double-click for the whole run."));
    const flip = (i) => (e) => { if (e.target.checked) this.hidden.delete(i); else this.hidden.add(i); this.draw(); };
    this.names = !this.legend ? null : el("div", { class: "bar legend" }, runs.map((run, i) => el("label", {},
      el("input", { type: "checkbox", checked: "", onchange: flip(i) }), " ", key({ colour: COLOURS[i % COLOURS.length] }), run.name)),
      charts.some(([, lines]) => lines.some((l) => l.dashed)) ? el("span", {}, "dashed: evaluation") : null);
  }
  zoom(range) { this.range = range; this.draw(); }
  draw() { this.reset.disabled = !this.range; this.charts.forEach((c) => c.draw()); }
}

function table(t) {
  const numeric = (text) => /^[-+]?[\d.,]+\s?(%|s|x)?$/.test(String(text).trim());
  const row = (tag, cells) => el("tr", {}, cells.map((c) => el(tag, { class: numeric(c) ? "num" : "" }, show(c))));
  const number = t.columns.map((_, i) => t.rows.length > 0 && t.rows.every((r) => numeric(r[i] ?? "")));
  return el("div", { class: "card scroll" }, t.caption ? el("p", { class: "note" }, t.caption) : null,
    el("table", {}, el("thead", {}, el("tr", {}, t.columns.map((c, i) => el("th", { class: number[i] ? "num" : "" }, c)))),
      el("tbody", {}, t.rows.map((r) => row("td", r)))));
}

function timeSplit(series) {
  const parts = series.map(([name, points]) => [name.slice(5), points.reduce((s, p) => s + (p[1] || 0), 0), points.length]);
  parts.sort((a, b) => b[1] - a[1]);
  const total = parts.reduce((s, p) => s + p[1], 0) || 1;
  const colour = (i) => COLOURS[i % COLOURS.length];
  const strip = el("div", { class: "split" }, parts.map(([name, s], i) =>
    el("div", { title: name, style: `width:${100 * s / total}%;background:${colour(i)}` })));
  const rows = parts.map(([name, s, n], i) => el("tr", {},
    el("td", {}, el("i", { class: "key", style: `background:${colour(i)}` }), name),
    el("td", { class: "num" }, (100 * s / total).toFixed(1) + "%"), el("td", { class: "num" }, show(s / n) + " s a logged step")));
  return el("div", { class: "card" }, strip, el("table", {}, el("tbody", {}, rows)));
}

function sampleText(v) {
  if (Array.isArray(v)) return v.map((m) => `${m.role || "?"}: ${typeof m.content === "string" ? m.content : JSON.stringify(m.content)}`).join("\n");
  return typeof v === "string" ? v : JSON.stringify(v);
}

function samples(rows) {
  const PAGE = 12;
  let order = "newest", step = "", count = PAGE;
  const reward = (r) => typeof r.reward === "number" ? r.reward : -Infinity;
  const box = el("div"), more = el("button", { type: "button", onclick: () => { count += PAGE; draw(); } }, "More");
  const chip = ([name, v]) => el("span", { class: "chip" + (/^reward/.test(name) && typeof v === "number" ? v > 0 ? " good" : v < 0 ? " bad" : "" : "") },
    name + " ", el("b", {}, v === null ? "none" : show(v)));
  function draw() {
    let list = rows.filter((r) => step === "" || String(r.step) === step);
    if (order === "best") list.sort((a, b) => reward(b) - reward(a));
    if (order === "worst") list.sort((a, b) => reward(a) - reward(b));
    if (order === "newest") list.reverse();
    box.replaceChildren(...list.slice(0, count).map((r) => el("div", { class: "card sample" },
      el("div", { class: "chips" }, r.chips.map(chip)),
      el("div", { class: "text prompt" }, sampleText(r.prompt)), el("div", { class: "text" }, sampleText(r.completion)))));
    more.style.display = list.length > count ? "" : "none";
  }
  const steps = [...new Set(rows.map((r) => r.step).filter((s) => s !== undefined && s !== null))];
  const choose = (set) => (e) => { set(e.target.value); count = PAGE; draw(); };
  draw();
  return el("div", {}, el("div", { class: "bar" },
    el("label", {}, "Order ", el("select", { onchange: choose((v) => { order = v; }) }, ["newest", "best", "worst"].map((o) => el("option", {}, o)))),
    steps.length > 1 ? el("label", {}, "Step ", el("select", { onchange: choose((v) => { step = v; }) },
      el("option", { value: "" }, "all"), steps.map((s) => el("option", { value: s }, show(s))))) : null), box, more);
}

function masks(rows) {
  return el("div", { class: "card" }, el("p", { class: "note" }, "The loss is on the marked tokens."),
    rows.map((r) => el("div", { class: "mask" }, r.tokens.map((t, i) => el("span", { class: r.mask[i] ? "on" : "" }, t)))));
}

// What a run is and what it took.
function facts(list) {
  return el("div", { class: "card" }, el("dl", { class: "facts" }, list.map(([name, value]) =>
    el("div", { class: name === "command" || value.length > 60 ? "wide" : "" }, el("dt", {}, name),
      el("dd", {}, name === "command" ? el("code", {}, value) : value)))));
}

const groups = [];
function metrics(layout, runs) {
  const charts = charted(layout, runs), still = layout.still, parts = [];
  if (charts.length) {
    const group = new Group(charts, runs);
    groups.push(group);
    parts.push(el("h3", {}, "Metrics"), group.names, group.bar, el("div", { class: "cards" }, group.charts.map((c) => c.card)));
  }
  const columns = ["metric", ...(runs.length > 1 ? runs.map((run) => run.name) : ["value"])];
  if (still.length) parts.push(el("details", {}, el("summary", {}, `${still.length} metrics that never change`),
    table({ columns, rows: still.map((row) => row.map((v) => typeof v === "number" ? show(v) : v === null ? "" : v)) })));
  return parts.filter((p) => p);
}

const main = document.getElementById("main"), nav = document.getElementById("nav");
document.getElementById("title").textContent = data.title;
if (data.table) main.append(el("h3", {}, "Before and after"), table(data.table));
if (data.overlay) main.append(...metrics(data.layouts[0], data.runs));
data.runs.forEach((run, i) => {
  const id = "run-" + i, part = el("section", { class: "run", id });
  main.append(part);
  if (data.runs.length > 1) {
    nav.append(el("a", { href: "#" + id }, run.name));
    part.append(el("h2", {}, run.name));
  }
  if (run.facts.length) part.append(facts(run.facts));
  run.notes.forEach((n) => part.append(el("p", { class: "note" }, n)));
  if (run.table) part.append(el("h3", {}, "Before and after"), table(run.table));
  if (!data.overlay) part.append(...metrics(data.layouts[i], [run]));
  const times = run.series.filter(([name]) => name.startsWith("time/"));
  if (times.length) part.append(el("h3", {}, "Where the time goes"), timeSplit(times));
  if (run.samples.length) part.append(el("h3", {}, "Samples and their rewards"), samples(run.samples));
  if (run.masks.length) part.append(el("h3", {}, "Loss mask"), masks(run.masks));
  if (run.config) part.append(el("details", {}, el("summary", {}, "config.toml"), el("div", { class: "card" }, el("pre", {}, run.config))));
});
const draw = () => groups.forEach((g) => g.draw());
draw();
window.addEventListener("resize", draw);
