// Shares of time by activity, stacked, a chart per run.

const ACTIVITIES = [
  "data", "encode", "forward", "self_evaluation", "backward", "objective", "optimizer", "checkpoint", "validation",
  "samples", "evaluation", "other",
];
const ACTIVITY_COLOURS = [
  "#b8336a", "#a07d00", "#2563a8", "#5d9bd5", "#1d3f66", "#8fb8dd", "#2f8f5b", "#d1581a", "#8e4ab8", "#c79be0",
  "#0f7f8c", "#b5b0a6",
];

class Shares extends Panel {
  constructor(run, names) {
    super(`time ${run.name}`, data.runs.length > 1 ? run.name : "Share of time by activity");
    this.run = run.name;
    this.names = names;
    this.button("PNG", "Save this chart as an image", () => this.png());
    this.button("CSV", "Save the numbers of this chart", () => download("time.csv", csv(this.names)));
  }

  draw() {
    const index = data.runs.findIndex((run) => run.name === this.run);
    if (!this.heading.querySelector(".key") && data.runs.length > 1) this.heading.prepend(key(index), " ");
    super.draw();
  }

  traces() {
    const run = data.runs.find((each) => each.name === this.run);
    const xs = AXES[state.axis].values(run);
    return this.names.filter((name) => run.columns[name] && xs).map((name) => {
      const activity = name.slice("time/".length);
      const place = ACTIVITIES.indexOf(activity);
      const known = xs.map((_, i) => i).filter((i) => typeof run.columns[name][i] === "number" && xs[i] !== null);
      const values = known.map((i) => 100 * run.columns[name][i]);
      return {
        type: "scatter",
        mode: "lines",
        stackgroup: "time",
        x: known.map((i) => xs[i]),
        y: state.smoothing ? smooth(values, state.smoothing) : values,
        name: activity.replaceAll("_", " "),
        line: { width: 0.5, color: place < 0 ? undefined : ACTIVITY_COLOURS[place] },
        hovertemplate: "%{y:.1f} %",
      };
    });
  }

  layout() {
    const layout = trainingLayout(this, this.names.length, 130);
    layout.legend.traceorder = "normal";
    layout.yaxis.title = { text: "% of time", standoff: 4, font: { size: 11.5 } };
    layout.yaxis.range = [0, 100];
    return layout;
  }
}

function buildShares() {
  const rank = (name) => (ACTIVITIES.indexOf(name.slice(5)) + ACTIVITIES.length + 1) % (ACTIVITIES.length + 1);
  const names = metricNames().filter((name) => name.startsWith("time/")).sort((a, b) => rank(a) - rank(b));
  if (!names.length) return;

  const node = section("time", "Time");
  const grid = node.querySelector(".grid") ?? node.appendChild(element("div", { className: "grid" }));
  for (const run of data.runs) {
    const panel = panels.get(`time ${run.name}`);
    if (panel) panel.names = names;
    else addPanel(grid, new Shares(run, names));
  }
}
