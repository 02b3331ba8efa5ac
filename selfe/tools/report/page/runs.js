// What each run does and how it was started; what differs between the configs.

function buildRuns() {
  const node = section("runs", "Runs");
  node.querySelector("h2").hidden = true; // the first section needs no title
  const list = node.querySelector(".runs") ?? node.appendChild(element("div", { className: "runs" }));
  data.runs.forEach((run, index) => {
    const card = list.children[index] ?? list.appendChild(runCard(run, index));
    const state = data.states[index];
    if (hasChanged(card.children[0], state)) card.children[0].replaceChildren(...currentState(run, index, state));
    const origin = [run.starts, run.marks, run.notes];
    if (hasChanged(card.children[1], origin)) card.children[1].replaceChildren(...originOf(run));
  });
}

function runCard(run, index) {
  return element("div", { className: "card run", data: { run: run.name }, style: { "--key": colour(index) } },
    element("div", {}), element("div", {}));
}

/** Name, state, progress and the latest figures. */
function currentState(run, index, state) {
  const share = state.end ? Math.min(state.step / state.end, 1) : 1;
  return [
    element("h3", {}, key(index), element("span", {}, run.name),
      element("span", { className: `badge ${state.state}` }, state.state)),
    element("div", { className: "progress" }, element("div", { style: { width: `${100 * share}%` } })),
    element("dl", { className: "facts" }, ...facts(state).map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
  ];
}

/** The command of the latest start, folder, version, and planned changes during training. */
function originOf(run) {
  const start = run.starts.at(-1);
  const version = start?.version && `selfe ${start.version}`;
  const origin = [run.path, version, start?.revision?.slice(0, 10), plural(run.starts.length, "start")];
  const texts = [origin.filter(Boolean).join(" · ")];
  if (run.marks.length) {
    const changes = run.marks.map(({ step, text }) => `${text} after step ${count(step)}`);
    texts.push(`Changes during training: ${changes.join("; ")}.`);
  }
  const typed = start?.command
    ? [element("pre", { className: "command", title: "command of the latest start" }, command(start.command))]
    : [];
  return [...typed, ...[...texts, ...run.notes].map((text) => element("p", { className: "soft" }, text))];
}

function facts(now) {
  const facts = [
    ["Step", now.end ? `${count(now.step)} of ${count(now.end)}` : count(now.step)],
    ["Loss", figure(now.loss)],
    ["Seconds per step", figure(now.seconds_per_step)],
    ["Images per second", figure(now.images_per_second)],
    ["Trained for", duration(now.elapsed)],
  ];
  if (now.eta !== null) facts.splice(1, 0, ["Remaining", duration(now.eta)]);
  const saved = now.checkpoint ? `step ${count(now.checkpoint.step)}, ${duration(now.checkpoint.age)} ago` : "none";
  facts.push(["Last checkpoint", saved], ["Skipped steps", figure(now.skipped)]);
  facts.push(["Memory", now.memory_gib === null ? "–" : `${figure(now.memory_gib)} GiB`]);
  facts.push(["MFU", now.mfu === null ? "–" : `${(100 * now.mfu).toFixed(1)} %`]);
  if (now.state === "running") facts.push(["Last line", now.age === null ? "–" : `${duration(now.age)} ago`]);
  return facts;
}

function plural(number, noun) {
  return number === 1 ? `1 ${noun}` : `${count(number)} ${noun}s`;
}

/** A command as it is typed in a shell. */
function command(words) {
  const quoted = words.map((word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`));
  return quoted.join(" ");
}

function buildConfigs() {
  const node = section("configs", "Configs and starts");
  if (!hasChanged(node, data.runs.map((run) => [run.config, run.starts]))) return;
  node.querySelectorAll(":scope > .card").forEach((old) => old.remove());
  const keys = [...new Set(data.runs.flatMap((run) => Object.keys(run.config)))];
  const differing = keys.filter((name) => new Set(data.runs.map((run) => run.config[name])).size > 1);

  if (data.runs.length > 1) {
    const rows = differing.length ? configTable(differing) : element("p", { className: "soft" }, "All keys are equal.");
    node.append(element("div", { className: "card table", id: "config-differences" },
      element("h3", {}, `Keys that differ (${differing.length} of ${keys.length})`), rows));
  }
  if (keys.length) {
    const all = element("details", { id: "config-all" }, element("summary", {}, `All ${keys.length} keys`));
    all.append(configTable(keys));
    node.append(element("div", { className: "card table" }, all));
  }
  node.append(startsTable());
}

function configTable(keys) {
  const head = element("tr", {}, element("th", {}, "key"), ...data.runs.map((run, index) =>
    element("th", {}, key(index), ` ${run.name}`)));
  const rows = keys.map((name) => element("tr", {}, element("td", {}, name), ...data.runs.map((run) =>
    element("td", {}, run.config[name] ?? "(none)"))));
  return table(head, rows);
}

function startsTable() {
  const names = ["run", "time", "processes", "command", "changes of the config"];
  const head = element("tr", {}, ...names.map((name) => element("th", {}, name)));
  const rows = data.runs.flatMap((run, index) => run.starts.map((start) => element("tr", {},
    element("td", {}, key(index), ` ${run.name}`),
    element("td", {}, start.time ?? ""),
    element("td", {}, String(start.processes ?? "")),
    element("td", {}, element("code", {}, command(start.command ?? []))),
    element("td", {}, (start.config_changes ?? []).join("\n")))));
  return element("div", { className: "card table" }, element("h3", {}, "Starts"), table(head, rows, "starts"));
}

/** A table that scrolls sideways where it is wider than the page. */
function table(head, rows, className = "") {
  return element("div", { className: "scroll" },
    element("table", { className }, element("thead", {}, head), element("tbody", {}, ...rows)));
}
