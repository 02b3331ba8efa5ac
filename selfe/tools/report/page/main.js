// The controls, and the updates of a served page.

/** Functions that build or update sections from the data. */
const SECTIONS = [buildRuns, buildEvaluations, buildCurves, buildShares, buildMaps, buildSamples, buildConfigs];

function buildPage() {
  SECTIONS.forEach((build) => build());
  buildLegend();
  for (const button of document.querySelectorAll("#axis button")) {
    const axis = button.dataset.axis;
    button.disabled = !data.runs.some((run) => AXES[axis].values(run));
    button.setAttribute("aria-pressed", axis === state.axis);
  }
  redraw();
}

/** A button per run that hides or shows its lines. */
function buildLegend() {
  if (!hasChanged(byId("legend"), data.runs.map((run) => run.name))) return;
  byId("legend").replaceChildren(...data.runs.map((run, index) => {
    const button = element("button", { title: run.path }, key(index), element("span", {}, run.name));
    button.setAttribute("aria-pressed", !state.hidden.has(run.name));
    button.onclick = () => {
      if (!state.hidden.delete(run.name)) state.hidden.add(run.name);
      button.setAttribute("aria-pressed", !state.hidden.has(run.name));
      redraw();
      if (samples.slider) redrawSamples();
    };
    return button;
  }));
  byId("legend").hidden = data.runs.length < 2;
}

function connectControls() {
  for (const button of document.querySelectorAll("#axis button")) {
    button.onclick = () => {
      state.axis = button.dataset.axis;
      state.zoom = null;
      document.querySelectorAll("#axis button").forEach((each) => each.setAttribute("aria-pressed", each === button));
      redraw();
    };
  }
  byId("log-x").onclick = ({ target }) => {
    state.logX = !state.logX;
    state.zoom = null;
    target.setAttribute("aria-pressed", state.logX);
    redraw();
  };
  byId("smoothing").oninput = ({ target }) => {
    state.smoothing = Number(target.value);
    byId("smoothing-value").textContent = target.value;
    redraw();
  };
  byId("reset").onclick = () => {
    state.zoom = null;
    state.resets += 1;
    redraw();
  };
  byId("drag").hidden = !COARSE;
  byId("drag").onclick = ({ target }) => {
    state.drag = !state.drag;
    target.setAttribute("aria-pressed", state.drag);
    redraw();
  };
  byId("csv").onclick = () => download("metrics.csv", csv(metricNames()));

  // sliders of sections stay below the header
  const measure = () => {
    const header = document.querySelector("header");
    const height = getComputedStyle(header).position === "sticky" ? header.offsetHeight : 0;
    document.documentElement.style.setProperty("--header", `${height}px`);
  };
  new ResizeObserver(measure).observe(document.querySelector("header"));
}

// ---- a served page asks for news ----

async function update() {
  if (!document.hidden) {
    try {
      const answer = await (await fetch(`data.json?${data.version.join(",")}`)).json();
      if (answer.error) return showProblem(answer.error);
      Object.assign(data, answer);
      if (answer.runs) buildPage();
      else buildRuns();
      showProblem(null);
    } catch {
      showProblem("The server does not answer: selfe report --serve has ended, or the connection is lost.");
    }
  }
}

function showProblem(text) {
  byId("problem").hidden = text === null;
  byId("problem").textContent = text ?? "";
  byId("made").classList.toggle("live", text === null);
  byId("made").textContent = text === null ? `live, read at ${new Date().toLocaleTimeString("en-GB")}` : "not live";
}

async function keepUpdating() {
  await update();
  setTimeout(keepUpdating, 1000 * data.refresh_seconds);
}

connectControls();
buildPage();
document.title = data.runs.length === 1 ? `${data.runs[0].name} - Self-E` : `${data.runs.length} Self-E runs`;
if (data.refresh_seconds) {
  showProblem(null);
  setTimeout(keepUpdating, 1000 * data.refresh_seconds);
} else {
  const format = { dateStyle: "medium", timeStyle: "short" };
  byId("made").textContent = `read on ${new Date(1000 * data.made).toLocaleString("en-GB", format)}`;
}
