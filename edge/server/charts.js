// Charts of what /stats says, as SVG: small lines of the last two minutes, and the memory ledger as bars.

const SPANS = [30, 60, 120]; // seconds of history that a chart may show: the first that holds what there is
const SECONDS = SPANS.at(-1);
const HEIGHT = 120, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 34;
const byId = (id) => document.getElementById(id);

// One after the other on the page. series: [name, its value in a sample]; stacked: areas on top of each other.
const CHARTS = [
  { name: "Decode", unit: "tokens/s", series: [["decode", (s) => s.decode]] },
  { name: "Prefill", unit: "tokens/s", series: [["prefill", (s) => s.prefill]] },
  {
    name: "KV cache",
    unit: "pages",
    stacked: true,
    series: [["used", (s) => s.pages.used], ["cached", (s) => s.pages.cached], ["free", (s) => s.pages.free]],
  },
  {
    name: "Load",
    unit: "requests",
    whole: true,
    series: [["running", (s) => s.requests.running], ["waiting", (s) => s.requests.waiting]],
  },
  { name: "Speculation", unit: "tokens/step", optional: true, series: [["accept length", (s) => s.length]] },
];

const samples = []; // of /stats, each with its arrival (ms) and rates; the latest last
let timer = 0, asking = false;

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function html(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** 1, 2 or 5 times a power of ten, so that about `count` steps reach `most`. */
function niceStep(most, count, isWhole) {
  const raw = most / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= raw * 0.999);
  return isWhole ? Math.max(1, Math.round(step)) : step;
}

export function number(value) {
  if (value === null || value === undefined) return "–";
  const digits = value >= 100 || Number.isInteger(value) ? 0 : value >= 10 ? 1 : 2;
  return value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
}

function bytes(value) {
  if (value === null) return "not measured";
  return value < 2 ** 30 ? `${number(value / 2 ** 20)} MiB` : `${number(value / 2 ** 30)} GiB`;
}

/** The latest sample's rates: what has come since the one before, over the engine's own seconds. */
function withRates(stats) {
  const last = samples.at(-1), seconds = last ? stats.time - last.time : 0;
  const sample = { ...stats, arrival: performance.now(), prefill: null, decode: null, length: null };
  if (seconds < 0) samples.length = 0; // the server was restarted
  if (seconds === 0 && last) return { ...sample, prefill: last.prefill, decode: last.decode, length: last.length };
  if (seconds <= 0 || seconds > 10) return sample; // the page was hidden
  sample.prefill = (stats.tokens.prompt - last.tokens.prompt) / seconds;
  sample.decode = (stats.tokens.reply - last.tokens.reply) / seconds;
  const steps = (stats.speculation?.steps ?? 0) - (last.speculation?.steps ?? 0);
  if (steps > 0) sample.length = (stats.speculation.emitted - last.speculation.emitted) / steps;
  return sample;
}

/** Values [series][sample], null where there is none; of stacked areas the sums up to each. */
function valuesOf(chart) {
  const rows = chart.series.map(([, value]) => samples.map(value));
  if (!chart.stacked) return rows;
  return rows.map((row, i) => row.map((_, at) => rows.slice(0, i + 1).reduce((sum, one) => sum + one[at], 0)));
}

/** A line's path; null values interrupt it, and one alone becomes a dot. */
function path(xs, ys) {
  const at = (i) => `${xs[i].toFixed(1)},${ys[i].toFixed(1)}`;
  return ys.map((y, i) => (y === null ? "" : i && ys[i - 1] !== null ? `L${at(i)}` : `M${at(i)}h0`)).join("");
}

function axes(width, most, step, span) {
  const group = svg("g"), base = HEIGHT - BOTTOM, scale = (base - TOP) / most;
  const ticks = [most]; // round ones below it, as far as they are not too near
  for (let value = 0; value < most - 0.6 * step; value += step) ticks.push(value);
  for (const value of ticks) {
    const y = base - value * scale;
    group.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }));
    group.append(svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, number(value)));
  }
  for (const share of [1, 2 / 3, 1 / 3, 0]) {
    const seconds = share * span, x = width - RIGHT - share * (width - LEFT - RIGHT);
    const label = seconds ? `−${seconds}` : "now";
    group.append(svg("text", { x, y: base + 15, "text-anchor": seconds ? "middle" : "end" }, label));
  }
  const title = svg("text", { class: "title", x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" });
  title.append("seconds");
  group.append(title);
  return group;
}

/** One sentence for each series: what a chart says to those who do not see it. */
function describe(chart) {
  const parts = chart.series.map(([name, value]) => {
    const all = samples.map(value).filter((x) => x !== null);
    if (!all.length) return `${name}: nothing yet.`;
    const [low, high] = [Math.min(...all), Math.max(...all)].map(number);
    return `${name}: ${number(value(samples.at(-1)))} now, between ${low} and ${high}.`;
  });
  return `In ${chart.unit}, the last ${SECONDS} seconds at most. ${parts.join(" ")}`;
}

function drawLines(chart, place) {
  const width = place.figure.clientWidth, now = samples.at(-1);
  const rows = valuesOf(chart), highest = Math.max(...rows.flat().filter((x) => x !== null), chart.whole ? 2 : 0.01);
  const step = niceStep(highest, 3, chart.whole), most = chart.stacked ? highest : Math.ceil(highest / step) * step;
  const age = (sample) => (now.arrival - sample.arrival) / 1000;
  const span = SPANS.find((seconds) => seconds >= age(samples[0])) ?? SECONDS;
  const xs = samples.map((sample) => width - RIGHT - (age(sample) / span) * (width - LEFT - RIGHT));
  const base = HEIGHT - BOTTOM, toY = (value) => (value === null ? null : base - (value / most) * (base - TOP));
  const parts = rows.map((row, i) => {
    const ys = row.map(toY);
    if (!chart.stacked) return svg("path", { class: `line s${i}`, d: path(xs, ys) });
    const below = i ? rows[i - 1].map(toY) : row.map(() => base);
    const back = path([...xs].reverse(), [...below].reverse()).replace("M", "L").replace("h0", "");
    return svg("path", { class: `area s${i}`, d: `${path(xs, ys)}${back}Z` });
  });
  const title = svg("title", {}, `${chart.name}, ${chart.unit}`), text = svg("desc", {}, describe(chart));
  place.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  place.svg.setAttribute("height", HEIGHT);
  place.svg.replaceChildren(title, text, axes(width, most, step, span), ...parts);
  chart.series.forEach(([, value], i) => (place.outputs[i].textContent = number(value(now))));
}

function drawLedger(place) {
  const { memory } = samples.at(-1), width = place.figure.clientWidth, row = 30, first = 4;
  const lines = memory.lines.filter((line) => line.where === "memory" && line.planned);
  const most = Math.max(1, ...lines.flatMap((line) => [line.planned, line.measured ?? 0]));
  const unit = most < 2 ** 30 ? 2 ** 20 : 2 ** 30, name = unit === 2 ** 20 ? "MiB" : "GiB";
  const scale = (width - RIGHT - 4) / most, height = first + row * lines.length + 34, base = height - 32;
  const parts = [svg("title", {}, "Memory by line of the ledger, planned and measured"), svg("desc", {}, memoryText())];
  const step = niceStep(most / unit, 4, false);
  for (let value = 0; value * unit <= most; value += step) {
    const x = 2 + value * unit * scale, anchor = value ? "middle" : "start";
    parts.push(svg("line", { class: "grid", x1: x, x2: x, y1: first, y2: base }));
    parts.push(svg("text", { x: Math.min(x, width - 14), y: base + 14, "text-anchor": anchor }, number(value)));
  }
  parts.push(svg("text", { class: "title", x: width / 2, y: height - 3, "text-anchor": "middle" }, name));
  lines.forEach((line, i) => {
    const y = first + i * row, measured = line.measured === null ? "not measured" : bytes(line.measured);
    parts.push(svg("text", { class: "name", x: 2, y: y + 13 }, line.name));
    const values = svg("text", { x: width - 2, y: y + 13, "text-anchor": "end" }, `${measured} of ${bytes(line.planned)}`);
    parts.push(values, bar("planned", y, line.planned * scale));
    if (line.measured !== null) parts.push(bar("measured", y + 3, line.measured * scale));
  });
  place.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  place.svg.setAttribute("height", height);
  place.svg.replaceChildren(...parts);
  place.outputs[0].textContent = memoryText(false);
}

function bar(kind, y, width) {
  return svg("rect", { class: kind, x: 2, y: y + 16, width: Math.max(width, 1), height: kind === "planned" ? 11 : 5 });
}

function memoryText(isWhole = true) {
  const { memory } = samples.at(-1), counted = memory.lines.filter((line) => line.where === "memory");
  const sum = (key) => counted.reduce((total, line) => total + (line[key] ?? 0), 0);
  const total = `${bytes(sum("measured"))} measured, ${bytes(sum("planned"))} planned, budget ${bytes(memory.budget)}`;
  if (!isWhole) return total;
  const lines = counted.map((l) => `${l.name}: ${bytes(l.measured)} measured, ${bytes(l.planned)} planned`);
  return `${total}. ${lines.join("; ")}.`;
}

/** A figure with its heading, the latest values, which are its legend too, and an empty drawing. */
function makeFigure(name, unit, series) {
  const outputs = series.map(() => html("strong", { textContent: "–" }));
  const legend = series.map((label, i) => {
    const isAlone = series.length === 1;
    const mark = isAlone ? "" : html("span", { className: `mark s${i}`, ariaHidden: "true" });
    return html("span", { className: "value" }, mark, outputs[i], ` ${isAlone ? unit : label}`);
  });
  const caption = html("figcaption", {}, html("h3", { textContent: unit && series.length > 1 ? `${name} (${unit})` : name }));
  caption.append(html("p", {}, ...legend));
  const drawing = svg("svg", { role: "img", width: "100%" });
  const figure = html("figure", {}, caption, drawing);
  byId("figures").append(figure);
  return { figure, svg: drawing, outputs };
}

function makePlaces() {
  const places = CHARTS.map((chart) => makeFigure(chart.name, chart.unit, chart.series.map(([name]) => name)));
  const memory = makeFigure("Memory", "", ["total"]);
  memory.figure.classList.add("wide");
  const marks = ["measured", "planned"].map((kind) =>
    html("span", { className: "value" }, html("span", { className: `mark ${kind}`, ariaHidden: "true" }), ` ${kind}`),
  );
  memory.figure.querySelector("figcaption").append(html("p", {}, ...marks));
  return { places, memory };
}

function table(caption, heads, rows) {
  const cells = (values, name) => values.map((text, i) => {
    const cell = html(i ? name : "th", { textContent: text });
    if (name === "th" || !i) cell.scope = name === "th" ? "col" : "row";
    return cell;
  });
  const head = html("thead", {}, html("tr", {}, ...cells(heads, "th")));
  const body = html("tbody", {}, ...rows.map((row) => html("tr", {}, ...cells(row, "td"))));
  return html("table", {}, html("caption", { textContent: caption }), head, body);
}

function drawTables() {
  const now = samples.at(-1);
  const figures = CHARTS.filter((chart) => !chart.optional || now.speculation).flatMap((chart) =>
    chart.series.map(([name, value]) => [`${chart.name}: ${name}`, number(value(now)), chart.unit]),
  );
  const totals = Object.entries(now.tokens).map(([name, count]) => [`Tokens: ${name}`, number(count), "since the start"]);
  const lines = now.memory.lines.map((l) => [l.name, bytes(l.planned), bytes(l.measured), l.where]);
  byId("tables").replaceChildren(
    table("Now", ["Figure", "Value", "Unit"], [...figures, ...totals]),
    table("Memory", ["Line", "Planned", "Measured", "Where"], lines),
  );
}

function draw({ places, memory }) {
  if (!samples.length) return;
  CHARTS.forEach((chart, i) => {
    places[i].figure.hidden = Boolean(chart.optional) && !samples.at(-1).speculation;
    if (!places[i].figure.hidden) drawLines(chart, places[i]);
  });
  drawLedger(memory);
  if (byId("tables").parentElement.open) drawTables();
}

/** Ask once a second while there is somebody to look at it. fetchStats: promises what /stats says. */
export function startCharts(fetchStats) {
  const all = makePlaces(), panel = byId("charts"), button = byId("toggle");
  const poll = async () => {
    clearTimeout(timer);
    if (asking || panel.hidden || document.hidden) return;
    asking = true;
    try {
      samples.push(withRates(await fetchStats()));
      while (samples[0].arrival < performance.now() - 1000 * SECONDS) samples.shift();
      draw(all);
      byId("charts-state").textContent = "";
    } catch (error) {
      byId("charts-state").textContent = error.message;
    }
    asking = false;
    timer = setTimeout(poll, 1000);
  };
  const toggle = (isShown) => {
    panel.hidden = !isShown;
    document.body.classList.toggle("with-charts", isShown);
    button.setAttribute("aria-expanded", String(isShown));
    poll();
  };
  button.addEventListener("click", () => {
    toggle(panel.hidden);
    if (!panel.hidden) panel.scrollIntoView({ block: "nearest" });
  });
  document.addEventListener("visibilitychange", poll);
  byId("tables").parentElement.addEventListener("toggle", () => draw(all));
  new ResizeObserver(() => draw(all)).observe(byId("figures"));
  toggle(matchMedia("(min-width: 60rem)").matches);
}
