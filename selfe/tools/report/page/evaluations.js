// Quality of generated images over the number of sampling steps, from the evaluations of sampling jobs.

const QUALITY_AXES = { steps: "sampling steps", nfe: "network evaluations (NFE)" };
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const quality = { axis: "steps" };

class QualityCurve extends Panel {
  constructor(extractor, metric, several) {
    super(`evaluation/${extractor}/${metric}`, several ? `${metric}, ${extractor}` : metric);
    Object.assign(this, { extractor, metric });
    this.axisButton = this.button("NFE", "Network evaluations on the x axis: two per step with guidance", () => {
      quality.axis = quality.axis === "steps" ? "nfe" : "steps";
      redraw();
    });
    this.button("PNG", "Save this chart as an image", () => this.png());
    this.button("CSV", "Save the numbers of this chart", () =>
      download(`${this.id.replaceAll("/", "_")}.csv`, this.csv()));
  }

  draw() {
    this.axisButton.setAttribute("aria-pressed", quality.axis === "nfe");
    this.warn([this.id]);
    super.draw();
  }

  /** The curves of a run in this chart. */
  curvesOf(run) {
    return run.evaluations.filter(({ extractor, metric }) => extractor === this.extractor && metric === this.metric);
  }

  traces() {
    return shownRuns().flatMap(({ run, colour: ink }) => this.curvesOf(run).map(({ label, points }, i) => ({
      type: "scatter",
      mode: "lines+markers",
      name: escaped(data.runs.length > 1 ? `${shortened(run.name)}, ${label}` : label),
      x: points.map((point) => point[quality.axis]),
      y: points.map(({ value }) => value),
      error_y: {
        type: "data", symmetric: false, thickness: 1, width: 3,
        array: points.map(({ value, high }) => (high === null ? 0 : high - value)),
        arrayminus: points.map(({ value, low }) => (low === null ? 0 : value - low)),
      },
      line: { color: data.runs.length > 1 ? ink : colour(i), width: 1.6, dash: DASHES[i % DASHES.length] },
      marker: { size: 5 },
      hovertemplate: "%{y:.5~g}",
    })));
  }

  layout(traces) {
    const layout = trainingLayout(this, traces.length, 340);
    const values = [...new Set(traces.flatMap(({ x }) => x))].sort((a, b) => a - b);
    layout.xaxis = {
      ...layout.xaxis,
      title: { ...layout.xaxis.title, text: QUALITY_AXES[quality.axis] },
      type: "log",
      range: undefined,
      autorange: true,
      tickvals: values,
      ticktext: values.map(String),
      uirevision: quality.axis,
    };
    return layout;
  }

  /** A zoom is that of this chart alone. */
  zoomed() {}

  csv() {
    const rows = [["run", "setting", "steps", "nfe", "value", "low", "high"]];
    for (const run of data.runs) {
      for (const { label, points } of this.curvesOf(run)) {
        for (const { steps, nfe, value, low, high } of points) rows.push([run.name, label, steps, nfe, value, low, high]);
      }
    }
    return rows.map((row) => row.map(csvField).join(",") + "\n").join("");
  }
}

function buildEvaluations() {
  const curves = data.runs.flatMap((run) => run.evaluations);
  if (!curves.length) return;

  const node = section("quality", "Quality over sampling steps");
  const grid = node.querySelector(".grid") ?? node.appendChild(element("div", { className: "grid" }));
  const several = new Set(curves.map(({ extractor }) => extractor)).size > 1;
  for (const { extractor, metric } of curves) {
    const panel = new QualityCurve(extractor, metric, several);
    if (!panels.has(panel.id)) addPanel(grid, panel);
  }
  const specs = [...panels.values()].filter((panel) => panel instanceof QualityCurve)
    .map(({ id }) => ({ lines: [{ metric: id }] }));
  showWarnings(node, specs);
}
