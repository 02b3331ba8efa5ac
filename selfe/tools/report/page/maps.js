// Means over cells of (t, s), with a slider over training and one colour scale for all runs.

// at: step of the slider; scale: one for all steps (`training`), or that of the step shown (`step`)
const maps = { at: Infinity, scale: "training" };

/** A slider over training steps that follows the newest step as long as it is at its end. */
function stepSlider(node, label, settings, redrawSection) {
  const input = element("input", { type: "range", min: 0, step: 1, "aria-label": label });
  const output = element("output", {});
  const bar = element("div", { className: "slider" }, element("label", {}, label, input, output));
  node.append(bar);

  const slider = {
    bar,
    steps: [],
    update(steps) {
      slider.steps = steps;
      input.max = Math.max(steps.length - 1, 0);
      input.disabled = steps.length < 2;
      const place = steps.findLastIndex((step) => step <= settings.at);
      input.value = place < 0 ? steps.length - 1 : place;
      output.textContent = `step ${count(slider.step())}`;
    },
    step: () => slider.steps[Number(input.value)],
  };
  input.addEventListener("input", () => {
    settings.at = Number(input.value) === slider.steps.length - 1 ? Infinity : slider.step();
    output.textContent = `step ${count(slider.step())}`;
    redrawSection();
  });
  return slider;
}

/** All steps of several runs, in order. */
function unionOfSteps(lists) {
  return [...new Set(lists.flat())].sort((a, b) => a - b);
}

class CellMap extends Panel {
  constructor(metric) {
    super(`cells ${metric}`, metric);
    this.metric = metric;
    this.button("PNG", "Save these maps as an image", () => this.png());
    this.button("CSV", "Save the numbers of these maps", () => download(`cells_${metric}.csv`, this.csv()));
  }

  draw() {
    this.warn([`train/${this.metric}`]);
    super.draw();
  }

  /** Per shown run with maps: its newest table at or before the step of the slider, null if it has none. */
  tables() {
    return shownRuns().filter(({ run }) => run.cells.steps.length).map(({ run }) => {
      const tables = run.cells.tables[this.metric] ?? [];
      const place = run.cells.steps.findLastIndex((step, i) => step <= maps.slider.step() && tables[i]);
      return { run, step: run.cells.steps[place], table: place < 0 ? null : tables[place] };
    });
  }

  /** Smallest and largest value over all shown runs. */
  range() {
    const chosen = maps.scale === "training"
      ? shownRuns().flatMap(({ run }) => run.cells.tables[this.metric] ?? [])
      : this.tables().map(({ table }) => table);
    const values = chosen.filter(Boolean).flat(2).filter((value) => value !== null);
    if (!values.length) return [0, 1];
    const low = values.reduce((a, b) => Math.min(a, b));
    const high = values.reduce((a, b) => Math.max(a, b));
    if (low < 0 && high > 0) return [-Math.max(-low, high), Math.max(-low, high)];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }

  traces() {
    return this.tables().map(({ table }, i) => {
      const size = table?.length ?? 8;
      const edges = Array.from({ length: size + 1 }, (_, k) => k / size);
      const z = Array.from({ length: size }, (_, s) => Array.from({ length: size }, (_, t) => table?.[t][s] ?? null));
      const hovertemplate = "t %{x:.3f}, s %{y:.3f}: %{z:.4~g}<extra></extra>";
      const axes = { xaxis: `x${i + 1}`, yaxis: `y${i + 1}`, coloraxis: "coloraxis" };
      return { type: "heatmap", x: edges, y: edges, z, ...axes, hovertemplate, xgap: 1, ygap: 1 };
    });
  }

  layout(traces) {
    const stacked = this.node.clientWidth < 200 * traces.length + 80;
    const [rows, columns] = stacked ? [traces.length, 1] : [1, traces.length];
    const width = (this.node.clientWidth - 130) / columns;
    const height = Math.min(Math.max(width, 190), 300);
    const [low, high] = this.range();
    const layout = {
      height: rows * (height + 58) + 20,
      margin: { l: 48, r: 8, t: 24, b: 40 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "#f1efea",
      font: { family: "system-ui, sans-serif", size: 11.5, color: "#45423d" },
      dragmode: false,
      grid: { rows, columns, pattern: "independent", xgap: 0.08, ygap: 0.28 },
      coloraxis: {
        cmin: low,
        cmax: high,
        colorscale: low < 0 && high > 0 ? "RdBu" : "Viridis",
        colorbar: { thickness: 12, outlinewidth: 0, tickformat: ".3~g", len: rows > 1 ? 0.6 : 1 },
      },
      annotations: [],
    };
    this.tables().forEach(({ run, step }, i) => {
      const tickvals = [0, 0.25, 0.5, 0.75, 1];
      const ticks = { range: [0, 1], tickvals, fixedrange: true, showgrid: false, zeroline: false };
      const title = (text) => ({ text, standoff: 8, font: { size: 12 } });
      layout[`xaxis${i + 1}`] = { ...ticks, title: title("t") };
      layout[`yaxis${i + 1}`] = i % columns ? { ...ticks, showticklabels: false } : { ...ticks, title: title("s") };
      const when = step === undefined ? "no values" : `step ${count(step)}`;
      const text = data.runs.length > 1 ? `${escaped(shortened(run.name, 24))}, ${when}` : when;
      layout.annotations.push({
        text, showarrow: false, xref: `x${i + 1} domain`, yref: `y${i + 1} domain`, x: 0, y: 1, xanchor: "left",
        yanchor: "bottom", font: { size: 11.5 },
      });
    });
    return layout;
  }

  csv() {
    const rows = [["run", "step", "t_low", "s_low", "bin_width", this.metric]];
    for (const { run } of shownRuns()) {
      (run.cells.tables[this.metric] ?? []).forEach((table, i) => table?.forEach((row, t) => row.forEach((value, s) => {
        const width = 1 / row.length;
        if (value !== null) rows.push([run.name, run.cells.steps[i], t * width, s * width, width, value]);
      })));
    }
    return rows.map((row) => row.map(csvField).join(",") + "\n").join("");
  }

  zoomed() {} // not over training
}

function buildMaps() {
  const metrics = [...new Set(data.runs.flatMap((run) => Object.keys(run.cells.tables)))];
  metrics.sort((a, b) => (b === "loss") - (a === "loss")); // the others in their order
  if (!metrics.length) return;

  const node = section("maps", "Means over (t, s)");
  if (!maps.slider) {
    node.append(element("p", { className: "soft" },
      "Training samples by their times t and s, since the table before. Empty cells had no samples. "
      + "All runs of a chart share one colour scale."));
    maps.slider = stepSlider(node, "Training", maps, redrawMaps);
    const scale = element("button", { title: "Colours from the range of all steps, or of the step shown" });
    const label = () => { scale.textContent = maps.scale === "training" ? "Scale: all steps" : "Scale: this step"; };
    scale.onclick = () => {
      maps.scale = maps.scale === "training" ? "step" : "training";
      label();
      redrawMaps();
    };
    label();
    maps.slider.bar.append(scale);
    maps.thinned = node.appendChild(element("p", { className: "soft" }));
    maps.grid = node.appendChild(element("div", { className: "maps" }));
  }

  const withCells = data.runs.filter((run) => run.cells.steps.length).length;
  maps.grid.style.setProperty("--map-width", `${Math.min(withCells, 4) * 230 + 110}px`);
  maps.slider.update(unionOfSteps(data.runs.map((run) => run.cells.steps)));
  const thinned = data.runs.filter((run) => run.cells.steps.length < run.cells.total);
  maps.thinned.textContent = thinned
    .map((run) => `${run.name}: ${run.cells.steps.length} of ${count(run.cells.total)} tables are shown.`).join(" ");
  for (const metric of metrics) {
    if (!panels.has(`cells ${metric}`)) addPanel(maps.grid, new CellMap(metric));
  }
}

function redrawMaps() {
  for (const panel of panels.values()) {
    if (panel instanceof CellMap) {
      panel.stale = true;
      if (panel.visible) panel.draw();
    }
  }
}
