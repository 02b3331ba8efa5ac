"use strict";
// State of the page, formats, and small helpers that every section uses.

let data = JSON.parse(document.getElementById("data").textContent);

const COLOURS = [
  "#2563a8", "#d1581a", "#2f8f5b", "#8e4ab8", "#b8336a", "#6b7280", "#a07d00", "#0f7f8c", "#7c4a21", "#4b5bd1",
];
const AXES = {
  step: { title: "steps", values: (run) => run.columns.step },
  samples: { title: "samples", values: (run) => run.columns.samples },
  hours: { title: "hours of training", values: (run) => run.columns.elapsed?.map((value) => value && value / 3600) },
};
// the sections of the page
const ORDER = [
  "runs", "quality", "loss", "validation", "evaluation", "self-evaluation", "samples", "maps", "optimisation", "training",
  "time", "speed", "other", "configs",
];
const NOT_METRICS = new Set(["step", "samples", "elapsed", "time", "epoch"]);
const COARSE = matchMedia("(pointer: coarse)").matches;

const state = {
  axis: "step",
  logX: false,
  smoothing: 0,
  hidden: new Set(), // names of runs
  zoom: null, // range of the x axis of all charts, in units of state.axis, logarithms with logX
  resets: 0,
  log: {}, // panel -> whether its y axis is logarithmic, where that was chosen
  drag: !COARSE, // whether dragging in a chart zooms; on a touch screen it scrolls the page
};

function colour(index) {
  return COLOURS[index % COLOURS.length];
}

/** Runs that are not hidden, with their index and colour. */
function shownRuns() {
  return data.runs
    .map((run, index) => ({ run, index, colour: colour(index) }))
    .filter(({ run }) => !state.hidden.has(run.name));
}

function metricNames() {
  const names = new Set(data.runs.flatMap((run) => Object.keys(run.columns)));
  return [...names].filter((name) => !NOT_METRICS.has(name)).sort();
}

// ---- elements ----

/** An element with properties and children; strings become text. */
function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data" || name === "style") {
      for (const [key, item] of Object.entries(value)) {
        if (name === "data") node.dataset[key] = item;
        else node.style.setProperty(key, item);
      }
    } else if (name.startsWith("aria-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function byId(id) {
  return document.getElementById(id);
}

function key(index) {
  return element("span", { className: "key", style: { background: colour(index) } });
}

/** A section of the page, created at its place in `ORDER` when it is first asked for. */
function section(id, title) {
  const known = byId(id);
  if (known) return known;

  const node = element("section", { id }, element("h2", {}, title));
  const link = element("a", { href: `#${id}` }, title);
  const next = ORDER.slice(ORDER.indexOf(id) + 1).map(byId).find(Boolean);
  byId("main").insertBefore(node, next ?? null);
  byId("sections").insertBefore(link, next ? document.querySelector(`#sections a[href="#${next.id}"]`) : null);
  return node;
}

const lastShown = new WeakMap(); // element -> what it was built from

/**
 * Whether a part of the page has to be built again: its data differ from those of the last call.
 * A part that stays keeps the selection, the focus and what is unfolded.
 */
function hasChanged(node, source) {
  const text = JSON.stringify(source);
  if (lastShown.get(node) === text) return false;
  lastShown.set(node, text);
  return true;
}

/** The names of runs may look like the markup that the charting library reads. */
function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

function shortened(text, most = 30) {
  return text.length > most ? `…${text.slice(1 - most)}` : text;
}

// ---- formats ----

function count(value) {
  return value.toLocaleString("en-US");
}

/** A number with about four digits. */
function figure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  return Number(value.toPrecision(4)).toLocaleString("en-US", { maximumFractionDigits: 6 });
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

// ---- files ----

function download(name, text) {
  const link = element("a", { download: name, href: URL.createObjectURL(new Blob([text], { type: "text/csv" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function csvField(value) {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** A line per run and logged step, without smoothing; lines without any of the metrics are left out. */
function csv(metrics) {
  const axes = ["step", "samples", "elapsed", "time", "epoch"].filter((name) =>
    data.runs.some((run) => run.columns[name]));
  const rows = [["run", ...axes, ...metrics]];
  for (const run of data.runs) {
    run.columns.step.forEach((_, line) => {
      const values = metrics.map((name) => run.columns[name]?.[line] ?? null);
      if (values.some((value) => value !== null)) {
        rows.push([run.name, ...axes.map((name) => run.columns[name]?.[line]), ...values]);
      }
    });
  }
  return rows.map((row) => row.map(csvField).join(",") + "\n").join("");
}
