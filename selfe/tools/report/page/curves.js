// Charts of metrics over training, in groups.

const EMA = { label: "EMA weights", dash: "solid" };
const LIVE = { label: "live weights", dash: "dot" };
const GROUPS = [
  { id: "loss", title: "Loss", pattern: /^train\/(.*_)?loss$/ },
  { id: "validation", title: "Validation", pattern: /^val/ },
  { id: "evaluation", title: "Evaluation during training", pattern: /^eval\// },
  { id: "self-evaluation", title: "Self-evaluation", pattern: /^train\/(self_weight|norm_ratio|cosine)$/ },
  { id: "optimisation", title: "Optimisation", pattern: /^train\/(lr|grad_norm|ema_distance|skipped|replaced)$/ },
  { id: "training", title: "Other measurements of training", pattern: /^train\// },
  { id: "speed", title: "Speed and memory", pattern: /^(speed|memory)\// },
  { id: "other", title: "Other metrics", pattern: /^(?!time\/)/ },
];
const FIRST = [
  "train/loss", "train/data_loss", "train/self_loss", "train/aux_loss", "val_plain/loss", "val/loss", "train/lr",
  "train/grad_norm", "speed/seconds_per_step", "speed/images_per_second", "speed/mfu",
];
const EVALUATED = /^(eval\/.*)\/steps_(\d+)$/;
const LOGARITHMIC = new Set(["train/grad_norm", "train/ema_distance"]);
const WITH_MARKS = new Set(["loss", "validation", "evaluation", "self-evaluation", "optimisation"]);
const WITH_MARK_TEXTS = new Set(["train/loss", "val/loss"]);
const NOTES = {
  "train/loss": "the objective, mean over the batch",
  "train/data_loss": "flow matching loss of all rows",
  "train/self_loss": "rows with s < t against their pseudo-target",
  "train/aux_loss": "auxiliary term",
  "train/self_weight": "weight of self-evaluation (Eq. 17)",
  "train/norm_ratio": "norm of the target before rescaling, relative to the data (Eq. 19)",
  "train/cosine": "between the directions of data and self-evaluation",
  "train/grad_norm": "before clipping",
  "train/ema_distance": "|EMA - live weights| / |live weights|",
  "train/skipped": "skipped steps so far",
  "train/replaced": "bad images replaced since the last line",
  "val_plain/loss": "objective of step 0, EMA weights: comparable over a complete run",
  "val/loss": "objective of the current step",
  "speed/mfu": "model FLOPs, relative to the bf16 peak",
};

const panels = new Map(); // id -> panel

/** The panels that the metrics call for: id, group, title, and lines of {metric, dash, label}. */
function wantedPanels() {
  const wanted = [];
  const names = metricNames();
  const ranked = [...FIRST.filter((name) => names.includes(name)), ...names.filter((name) => !FIRST.includes(name))];
  for (const name of ranked) {
    const group = GROUPS.find(({ pattern }) => pattern.test(name));
    if (!group) continue;

    // live and EMA weights share a panel
    if (name.startsWith("val_ema/") && names.includes(name.replace("val_ema/", "val/"))) continue;
    const pair = name.replace("val/", "val_ema/");
    const evaluated = EVALUATED.exec(name);
    if (evaluated) {
      // the numbers of sampling steps share a panel
      const [, metric] = evaluated;
      if (!wanted.some(({ id }) => id === metric)) {
        wanted.push({ id: metric, group, title: metric.slice("eval/".length), lines: evaluatedLines(metric, names) });
      }
    } else if (name.startsWith("val/") && names.includes(pair)) {
      const lines = [{ metric: pair, ...EMA }, { metric: name, ...LIVE }];
      wanted.push({ id: name, group, title: `${name}, ${pair}`, lines });
    } else {
      wanted.push({ id: name, group, title: name, lines: [{ metric: name, label: "", dash: "solid" }] });
    }
  }
  return wanted;
}

/** A line for each number of sampling steps of an evaluated metric. */
function evaluatedLines(metric, names) {
  const counts = names.map((name) => EVALUATED.exec(name)).filter((match) => match?.[1] === metric)
    .map(([, , count]) => Number(count));
  return counts.sort((a, b) => a - b).map((count, i) => ({
    metric: `${metric}/steps_${count}`,
    label: count === 1 ? "1 step" : `${count} steps`,
    dash: DASHES[i % DASHES.length],
  }));
}

function isZero(spec) {
  return spec.lines.every(({ metric }) =>
    data.runs.every((run) => (run.columns[metric] ?? []).every((value) => value === null || value === 0)));
}

/** Create the panels that are new; metrics that are always zero are named in one line. */
function buildCurves() {
  const specs = wantedPanels();
  for (const group of GROUPS) {
    const mine = specs.filter((spec) => spec.group === group);
    if (!mine.length) continue;
    const node = section(group.id, group.title);
    const grid = node.querySelector(".grid") ?? node.appendChild(element("div", { className: "grid" }));

    for (const spec of mine.filter((each) => !isZero(each))) {
      if (!panels.has(spec.id)) addPanel(grid, new Curve(spec));
    }

    const zeros = mine.filter((spec) => isZero(spec)).map((spec) => spec.title);
    node.querySelector(".zeros")?.remove();
    if (zeros.length) node.append(element("p", { className: "soft zeros" }, `Always 0: ${zeros.join(", ")}.`));
    showWarnings(node, mine);
  }
}

/** Warnings about the metrics of a group, above its charts. */
function showWarnings(node, specs) {
  node.querySelectorAll(":scope > .warning").forEach((old) => old.remove());
  const metrics = specs.flatMap((spec) => spec.lines.map(({ metric }) => metric));
  const texts = data.warnings.filter((each) => metrics.some((name) => applies(each, name))).map(({ text }) => text);
  node.querySelector("h2").after(...texts.map((text) => element("p", { className: "warning" }, text)));
}

function applies(warning, metric) {
  return new RegExp(warning.metrics).test(metric);
}

// ---- panels that are drawn when they come into view ----

const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const panel = panels.get(target.dataset.panel);
    panel.visible = isIntersecting;
    if (isIntersecting && panel.stale) panel.draw();
  }
}, { rootMargin: "300px" });

function addPanel(parent, panel) {
  panels.set(panel.id, panel);
  parent.append(panel.node);
  watcher.observe(panel.node);
}

/** Redraw all panels, those out of view when they come into view. */
function redraw() {
  for (const panel of panels.values()) {
    panel.node.hidden = state.hidden.has(panel.run); // a chart of one run
    panel.stale = true;
    if (panel.visible) panel.draw();
  }
  byId("reset").hidden = state.zoom === null;
}

/** A card with a title, buttons and a chart. Subclasses have `traces()` and `layout()`. */
class Panel {
  constructor(id, title, note = "") {
    Object.assign(this, { id, title, visible: false, stale: true });
    this.chart = element("div", { className: "chart" });
    this.tools = element("div", { className: "tools" });
    this.heading = element("h3", {}, title);
    this.note = element("p", { className: "note" }, note);
    this.node = element("div", { className: "card panel", data: { panel: id } },
      element("div", { className: "head" }, this.heading, this.tools), this.note, this.chart);
  }

  button(label, title, action) {
    const button = element("button", { title, onclick: action }, label);
    this.tools.append(button);
    return button;
  }

  /** A mark in the heading if the runs must not be compared by one of these metrics. */
  warn(metrics) {
    this.heading.querySelector(".mark")?.remove();
    const warning = data.warnings.find((each) => metrics.some((metric) => applies(each, metric)));
    if (warning) this.heading.prepend(element("span", { className: "mark", title: warning.text }, "⚠"));
  }

  draw() {
    this.stale = false;
    const traces = this.traces();
    const layout = this.layout(traces);
    this.chart.style.height = `${layout.height}px`; // known before the library has drawn, so that nothing jumps
    const first = !this.chart.layout;
    Plotly.react(this.chart, traces, layout, { displayModeBar: false, responsive: true, doubleClick: "reset" });
    if (first) this.chart.on("plotly_relayout", (changes) => this.zoomed(changes));
  }

  /** A zoom along x applies to all charts over training. */
  zoomed(changes) {
    if ("xaxis.range[0]" in changes) state.zoom = [changes["xaxis.range[0]"], changes["xaxis.range[1]"]];
    else if (changes["xaxis.autorange"]) state.zoom = null;
    else return;
    redraw();
  }

  png() {
    const traces = this.traces();
    const layout = this.layout(traces);
    layout.title = { text: escaped(this.title), font: { size: 16 } };
    layout.margin = { ...layout.margin, t: 48 };
    layout.paper_bgcolor = "#fff";
    layout.showlegend = true;
    const size = { format: "png", width: 1000, height: 600, scale: 2 };
    return Plotly.downloadImage({ data: traces, layout }, { ...size, filename: this.id.replaceAll("/", "_") });
  }
}

/** Layout that charts over training have in common; the legend below has `entries` of `entryWidth` pixels. */
function trainingLayout(panel, entries, entryWidth) {
  const perRow = Math.max(1, Math.floor((panel.node.clientWidth - 80) / entryWidth));
  const legendHeight = 20 * Math.ceil(entries / perRow);
  const [plotHeight, top, bottom] = [230, 6, 44];
  const line = "#cfcabf";
  const axis = { gridcolor: "#ece9e2", zerolinecolor: "#d9d5cb", linecolor: line, ticks: "outside", tickcolor: line };
  return {
    height: top + plotHeight + bottom + legendHeight,
    autosize: true,
    margin: { l: 58, r: 12, t: top, b: bottom + legendHeight },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "#fff",
    font: { family: "system-ui, sans-serif", size: 11.5, color: "#45423d" },
    hovermode: "x unified",
    hoverlabel: { font: { size: 11.5 }, bgcolor: "rgba(255,255,255,.94)", bordercolor: "#cfcabf" },
    dragmode: state.drag ? "zoom" : false,
    xaxis: {
      ...axis,
      title: { text: AXES[state.axis].title, standoff: 6, font: { size: 11.5 } },
      type: state.logX ? "log" : "linear",
      uirevision: `${state.axis} ${state.logX} ${state.zoom} ${state.resets}`,
      range: state.zoom ? [...state.zoom] : undefined,
      autorange: !state.zoom,
      fixedrange: !state.drag,
      showline: true,
      hoverformat: state.axis === "hours" ? ".4~g" : ",.0f",
    },
    yaxis: {
      ...axis,
      uirevision: `${state.axis} ${state.resets} ${state.log[panel.id]}`,
      fixedrange: !state.drag,
      tickformat: ".4~g",
    },
    showlegend: entries > 0,
    legend: { orientation: "h", x: 0, y: -bottom / plotHeight, yanchor: "top", font: { size: 11.5 } },
    uirevision: "kept", // which lines were hidden in the legend
  };
}

/** Exponential moving average, corrected for its start; missing values are passed over. */
function smooth(values, weight) {
  let sum = 0;
  let remaining = 1;
  return values.map((value) => {
    if (typeof value !== "number") return null;
    sum = sum * weight + (1 - weight) * value;
    remaining *= weight;
    return sum / (1 - remaining);
  });
}

/** Where a number of completed steps is on the x axis of a run; null beyond its last line. */
function placeOfStep(run, step) {
  const steps = run.columns.step;
  const xs = AXES[state.axis].values(run);
  const after = steps.findIndex((each) => each >= step);
  if (!xs || after < 0) return null;
  if (after === 0 || steps[after] === step) return xs[after];
  const share = (step - steps[after - 1]) / (steps[after] - steps[after - 1]);
  return xs[after - 1] + share * (xs[after] - xs[after - 1]);
}

/** A metric over training: a line per run, or one per run and kind of weights. */
class Curve extends Panel {
  constructor(spec) {
    super(spec.id, spec.title);
    this.spec = spec;
    this.logButton = this.button("log", "Logarithmic y axis", () => {
      state.log[this.id] = !this.isLog();
      this.draw();
    });
    this.button("PNG", "Save this chart as an image", () => this.png());
    this.button("CSV", "Save the numbers of this chart", () =>
      download(`${this.id.replaceAll("/", "_")}.csv`, csv(this.spec.lines.map(({ metric }) => metric))));
  }

  isLog() {
    return state.log[this.id] ?? LOGARITHMIC.has(this.id);
  }

  draw() {
    this.logButton.setAttribute("aria-pressed", this.isLog());
    this.describe();
    super.draw();
  }

  /** Description, values that cannot be drawn, and a mark where the runs must not be compared. */
  describe() {
    const metrics = this.spec.lines.map(({ metric }) => metric);
    const texts = [NOTES[this.id] ?? ""];
    for (const { run } of shownRuns()) {
      const missing = metrics.reduce((sum, metric) => sum + (run.not_finite[metric] ?? 0), 0);
      if (missing) texts.push(`${missing} values of ${run.name} are not finite`);
    }
    this.note.textContent = texts.filter(Boolean).join("; ");

    this.warn(metrics);
  }

  traces() {
    const traces = [];
    for (const { run, colour: ink } of shownRuns()) {
      for (const { metric, dash, label } of this.spec.lines) {
        const xs = AXES[state.axis].values(run);
        if (!run.columns[metric] || !xs) continue;
        const known = xs.map((_, i) => i).filter((i) => typeof run.columns[metric][i] === "number" && xs[i] !== null);
        const x = known.map((i) => xs[i]);
        const raw = known.map((i) => run.columns[metric][i]);
        const name = escaped([shortened(run.name), label].filter(Boolean).join(", "));
        const line = { color: ink, width: 1.6, dash };
        const mode = known.length > 60 ? "lines" : "lines+markers";
        const common = { type: "scatter", x, mode, line, marker: { size: 4 }, name };

        if (!state.smoothing) {
          traces.push({ ...common, y: raw, hovertemplate: "%{y:.5~g}" });
        } else {
          const faint = { opacity: 0.25, hoverinfo: "skip", showlegend: false };
          traces.push({ ...common, ...faint, y: raw, mode: "lines", legendgroup: name });
          const y = smooth(raw, state.smoothing);
          const hovertemplate = "%{y:.5~g} (logged: %{customdata:.5~g})";
          traces.push({ ...common, y, mode: "lines", customdata: raw, legendgroup: name, hovertemplate });
        }
      }
    }
    return traces;
  }

  layout(traces) {
    const entries = traces.filter((trace) => trace.showlegend !== false).length;
    const layout = trainingLayout(this, data.runs.length > 1 || entries > 1 ? entries : 0, 170);
    layout.yaxis.type = this.isLog() ? "log" : "linear";
    if (WITH_MARKS.has(this.spec.group.id)) Object.assign(layout, this.marks());
    return layout;
  }

  /** Dotted lines where objective or schedule of a run change; with texts in the main charts of a single run. */
  marks() {
    const marks = [];
    for (const { run, colour: ink } of shownRuns()) {
      for (const { step, text } of run.marks) {
        const x = placeOfStep(run, step);
        if (x !== null) marks.push({ x, text, ink });
      }
    }
    const several = shownRuns().length > 1;
    const shapes = marks.map(({ x, ink }) => ({
      type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, layer: "below",
      line: { color: several ? ink : "#8a857b", width: 1, dash: "dot" },
    }));
    const annotations = several || !WITH_MARK_TEXTS.has(this.id) ? [] : marks.map(({ x, text }) => ({
      x: state.logX ? Math.log10(x) : x, y: 1, yref: "paper", xanchor: "right", yanchor: "top", showarrow: false,
      text: escaped(shortened(text, 34)), textangle: -90, font: { size: 10, color: "#6d6a64" },
    }));
    return { shapes, annotations };
  }
}
