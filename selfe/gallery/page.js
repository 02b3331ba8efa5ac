// Script of the gallery page. Prompts are untrusted: they are set as text content, never as markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, name, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};

const steps = [...new Set(data.sweeps.flatMap((sweep) => Object.keys(sweep.files).map(Number)))].sort((a, b) => a - b);
const words = (n) => `${n} ${n === 1 ? "step" : "steps"}`;
const state = { at: Math.max(steps.findIndex((n) => n >= 4), 0), query: "", hidden: new Set(), open: null, zoom: 0, ab: null };
const current = () => steps[state.at];

// Guidance, and the times between which it applies.
function guidance(sweep) {
  const interval = sweep.guidance_interval;
  return `guidance ${sweep.cfg_scale}` + (interval ? ` in ${interval[0]} to ${interval[1]}` : "");
}

// Settings in which the images of a prompt may differ, and their labels.
const sides = [
  ["folder", (sweep) => data.folders[sweep.folder].name],
  ["weights", (sweep) => (sweep.weights === "ema" ? "EMA" : sweep.weights)],
  ["guidance", guidance],
  ["s ratio", (sweep) => `s ratio ${sweep.s_ratio}`],
  ["sampler", (sweep) => [sweep.sampler, ...Object.entries(sweep.parameters).map((pair) => pair.join(" "))].join(", ")],
  ["size", (sweep) => `${sweep.width} × ${sweep.height}`],
  ["seed", (sweep) => `seed ${sweep.seed}`],
  ["negative", (sweep) => (sweep.negative_prompt ? `not: ${sweep.negative_prompt}` : "no negative prompt")],
  ["sample", (sweep) => `sample ${sweep.sample}`],
].map(([name, of]) => ({ name, of, values: [...new Set(data.sweeps.map(of))] })).filter((side) => side.values.length > 1);
const rows = data.prompts.map((prompt) => ({ prompt, sweeps: [] }));
for (const sweep of data.sweeps) rows[sweep.prompt].sweeps.push(sweep);
const isHidden = (side, value) => state.hidden.has(`${side.name}\n${value}`);
// With A/B on, both images of a pair are in the page and one of them is hidden: 0 or 1, and -1 for other values.
const abIndex = (sweep) => (state.ab ? state.ab.values.indexOf(state.ab.side.of(sweep)) : 0);
const visible = (sweep) => sides.every((side) => !isHidden(side, side.of(sweep))) && abIndex(sweep) >= 0;

// ---- rows: empty placeholders, filled while they are near the viewport ----

const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) isIntersecting ? fill(target) : clear(target);
}, { rootMargin: "900px 0px" });

function layout() {
  near.disconnect();
  const query = state.query.toLowerCase().split(/\s+/).filter(Boolean);

  // one placeholder per prompt that matches the search and has visible sweeps
  const shells = [];
  for (const row of rows) {
    const shown = row.sweeps.filter(visible);
    const text = row.prompt.toLowerCase();
    if (!shown.length || !query.every((word) => text.includes(word))) continue;
    const shell = make("article", "row");
    shell.sweeps = shown;
    const label = make("div");
    label.append(make("h2", "", row.prompt || "(empty prompt)"));
    label.lastChild.title = row.prompt;
    if (!sides.some((side) => side.name === "seed")) label.append(make("div", "soft", `seed ${row.sweeps[0].seed}`));
    shell.append(label, make("div", shown.length === 1 ? "cells single" : "cells"));
    shells.push(shell);
  }

  const nothing = make("p", "", "No prompt contains all of these words.");
  nothing.id = "nothing";
  $("rows").replaceChildren(...(shells.length ? shells : [nothing]));

  // cards if every prompt shows one image, columns otherwise
  const strips = document.body.classList.contains("strips");
  const most = shells.reduce((most, shell) => Math.max(most, shell.sweeps.filter((sweep) => abIndex(sweep) === 0).length), 1);
  document.body.classList.toggle("cards", most === 1 && !strips);
  document.body.style.setProperty("--n", strips ? steps.length : Math.min(most, 6));
  shells.forEach((shell) => near.observe(shell));

  // summary line
  const total = data.sweeps.reduce((sum, sweep) => sum + Object.keys(sweep.files).length, 0);
  const part = shells.length < rows.length ? `${shells.length.toLocaleString("en")} of ` : "";
  $("about").textContent = `${part}${rows.length.toLocaleString("en")} prompts, ${total.toLocaleString("en")} images · ${data.about}`;
  $("about").title = $("about").textContent;
}

function fill(shell) {
  if (shell.filled) return;
  shell.filled = true;
  shell.style.minHeight = "";
  shell.lastChild.replaceChildren(...shell.sweeps.map(cell));
}

function clear(shell) {
  if (!shell.filled || shell.contains(document.activeElement)) return;
  shell.filled = false;
  shell.style.minHeight = `${shell.offsetHeight}px`;
  shell.lastChild.replaceChildren();
}

function cell(sweep) {
  const figure = make("figure", "cell");
  const strip = make("div", "strip");
  for (const n of document.body.classList.contains("strips") ? steps : [current()]) strip.append(shot(sweep, n));
  figure.append(strip);
  if (sides.length && sweep.captioned) {
    const caption = make("figcaption");
    sides.forEach((side, i) => caption.append(make(i ? "span" : "b", "", side.of(sweep))));
    figure.append(caption);
  }
  if (state.ab) figure.dataset.ab = abIndex(sweep);
  figure.sweep = sweep;
  return figure;
}

function shot(sweep, n) {
  const button = make("button", "shot");
  button.style.aspectRatio = `${sweep.width} / ${sweep.height}`;
  if (!sweep.files[n]) {
    button.classList.add("none");
    button.disabled = true;
    button.textContent = `no ${words(n)}`;
    return button;
  }

  const image = make("img", sweep.width <= 64 ? "tiny" : "");
  image.loading = state.ab ? "eager" : "lazy";
  image.decoding = "async";
  image.alt = `${data.prompts[sweep.prompt]}, ${words(n)}`;
  image.src = (sweep.thumbs || sweep.files)[n];
  button.append(image);
  if (document.body.classList.contains("strips")) button.append(make("span", "", words(n)));
  button.addEventListener("click", () => show(sweep, n));
  return button;
}

for (const row of rows) for (const sweep of row.sweeps) sweep.captioned = row.sweeps.length > 1;

// ---- controls ----

function setStep(at) {
  state.at = Math.min(Math.max(at, 0), steps.length - 1);
  $("slider").value = state.at;
  $("slider").setAttribute("aria-valuetext", words(current()));
  $("number").replaceChildren(make("b", "", current()), ` ${current() === 1 ? "step" : "steps"}`);
  [...$("ticks").children].forEach((tick, i) => tick.setAttribute("aria-pressed", i === state.at));

  // only the images change; rows keep their position
  if (!document.body.classList.contains("strips")) {
    for (const figure of document.querySelectorAll(".cell")) figure.firstChild.replaceChildren(shot(figure.sweep, current()));
  }
  if (state.open?.files[current()]) show(state.open, current());
}

function controls() {
  $("title").textContent = document.title = data.title;
  $("slider").max = steps.length - 1;
  $("track").hidden = $("strips").hidden = steps.length < 2;
  $("slider").addEventListener("input", () => setStep(Number($("slider").value)));

  // slider ticks
  steps.forEach((n, i) => {
    const tick = make("button", "", n);
    tick.title = words(n);
    tick.addEventListener("click", () => setStep(i));
    $("ticks").append(tick);
  });

  // search, and a filter chip for every value of a setting that differs
  $("search").addEventListener("input", () => { state.query = $("search").value; layout(); });
  for (const side of sides.filter((side) => side.values.length <= 12)) {
    const group = make("fieldset");
    group.append(make("legend", "", side.name));
    for (const value of side.values) {
      const chip = make("button", "", value);
      chip.setAttribute("aria-pressed", "true");
      chip.addEventListener("click", () => {
        const key = `${side.name}\n${value}`;
        state.hidden.has(key) ? state.hidden.delete(key) : state.hidden.add(key);
        chip.setAttribute("aria-pressed", !state.hidden.has(key));
        layout();
      });
      group.append(chip);
    }
    $("chips").append(group);
  }
  $("chips").hidden = !sides.length;
  compareControls();
  sizeControl();

  $("strips").addEventListener("click", () => {
    $("strips").setAttribute("aria-pressed", document.body.classList.toggle("strips"));
    layout();
  });

  // colour scheme: that of the system until the button is pressed
  const dark = (on) => document.documentElement.classList.toggle("dark", on);
  const preference = matchMedia("(prefers-color-scheme: dark)");
  dark(preference.matches);
  preference.addEventListener("change", () => dark(preference.matches));
  $("theme").addEventListener("click", () => dark());
}

// A/B: two values of a setting in the same place. The first two that no chip hides are compared.
function compareControls() {
  if (!sides.length) return;
  const group = make("fieldset");
  const select = make("select");
  const button = make("button");
  select.id = "ab";
  button.id = "switch";
  button.title = "Switch between A and B (b)";
  button.hidden = true;
  select.append(...["off", ...sides.map((side) => side.name)].map((name) => make("option", "", name)));
  select.setAttribute("aria-label", "Setting to compare in place");
  group.append(make("legend", "", "A/B"), select, button);
  $("chips").append(group);

  select.addEventListener("change", () => {
    const side = sides[select.selectedIndex - 1];
    state.ab = side ? { side, at: 0, values: side.values.filter((value) => !isHidden(side, value)).slice(0, 2) } : null;
    button.hidden = !side;
    labelSwitch();
    layout();
  });
  button.addEventListener("click", switchSides);
}

function labelSwitch() {
  if (state.ab) {
    document.body.dataset.ab = state.ab.at;
    $("switch").textContent = `${"AB"[state.ab.at]}: ${state.ab.values[state.ab.at]}`;
  } else delete document.body.dataset.ab;
}

function switchSides() {
  if (!state.ab) return;
  state.ab.at = state.ab.values.length - 1 - state.ab.at;
  labelSwitch();
}

// Size of the images: that of the style sheet until the slider is moved. Small images have no captions.
function sizeControl() {
  const set = (pixels) => {
    document.body.style.setProperty("--cell", pixels);
    document.body.style.setProperty("--tile", pixels);
    document.body.classList.toggle("compact", parseInt(pixels, 10) < 120);
  };
  $("size").value = 260;
  $("size").addEventListener("input", () => set(`${$("size").value}px`));
  $("size").addEventListener("dblclick", () => { set(""); $("size").value = 260; });
}

// ---- image viewer ----

function show(sweep, n) {
  state.open = sweep;
  state.at = steps.indexOf(n);
  $("full").src = sweep.files[n];
  zoom(state.zoom);
  links(sweep, n);
  $("full").alt = $("words").textContent = data.prompts[sweep.prompt];

  // thumbnails of all step counts
  $("sizes").replaceChildren(...steps.filter((m) => sweep.files[m]).map((m) => {
    const button = make("button");
    const image = make("img");
    image.src = (sweep.thumbs || sweep.files)[m];
    image.alt = "";
    button.append(image, String(m));
    button.title = words(m);
    button.setAttribute("aria-pressed", m === n);
    button.addEventListener("click", () => setStep(steps.indexOf(m)));
    return button;
  }));

  // settings, and the command that generates the image again
  const folder = data.folders[sweep.folder];
  const facts = {
    steps: n, guidance: guidance(sweep).replace("guidance ", ""), "s ratio": sweep.s_ratio, sampler: sweep.sampler, ...sweep.parameters,
    seed: sweep.seed, sample: sweep.sample, size: `${sweep.width} × ${sweep.height}`, negative: sweep.negative_prompt || "none",
    weights: `${sweep.weights === "ema" ? "EMA" : sweep.weights} of step ${folder.step.toLocaleString("en")}`, fingerprint: sweep.fingerprint,
    checkpoint: folder.checkpoint, folder: folder.name,
  };
  $("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
  $("command").textContent = command(sweep, n);
  $("copy").textContent = "Copy command";

  if (!$("viewer").open) {
    $("viewer").showModal();
    document.body.classList.add("busy");
    zoom(0);
    setStep(state.at);
  }
}

// The image to save or to open. Browsers do not open embedded images in a tab.
function links(sweep, n) {
  const file = sweep.files[n];
  const embedded = file.startsWith("data:");
  $("download").href = $("original").href = file;
  $("download").download = embedded ? sweep.names[n] : decodeURIComponent(file.split("/").pop());
  $("original").hidden = embedded;

  const other = counterpart(sweep, n);
  $("flip").hidden = !other;
  if (other) $("flip").textContent = `Switch to ${other.side.of(other.sweep)}`;
}

// The image of the same prompt that differs in one setting: that of A/B, otherwise the first that varies.
function counterpart(sweep, n) {
  for (const side of state.ab ? [state.ab.side] : sides) {
    const values = state.ab ? state.ab.values : side.values;
    const alike = rows[sweep.prompt].sweeps.filter((other) => other.files[n] && values.includes(side.of(other))
      && sides.every((each) => each === side || each.of(other) === each.of(sweep)));
    const next = alike[(alike.indexOf(sweep) + 1) % alike.length];
    if (next && next !== sweep) return { sweep: next, side };
  }
  return null;
}

function flip() {
  const other = counterpart(state.open, current());
  if (other) show(other.sweep, current());
}

// Scale in pixels of the screen per pixel of the image; 0 fits the image into the window. The centre stays, or a point.
function zoom(scale, x = $("stage").clientWidth / 2, y = $("stage").clientHeight / 2) {
  const [stage, image, sweep] = [$("stage"), $("full"), state.open];
  const before = image.getBoundingClientRect();
  const frame = stage.getBoundingClientRect();
  const place = [(frame.left + x - before.left) / before.width || 0.5, (frame.top + y - before.top) / before.height || 0.5];

  state.zoom = scale;
  stage.classList.toggle("zoomed", scale > 0);
  image.style.width = scale ? `${(sweep.width * scale) / devicePixelRatio}px` : "";
  image.style.marginTop = scale ? `${Math.max(0, (stage.clientHeight - (sweep.height * scale) / devicePixelRatio) / 2)}px` : "";
  image.className = sweep.width <= 64 || scale >= 2 ? "tiny" : "";
  $("zoom").textContent = scale ? `${Math.round(scale * 100)} %` : "fit";

  const after = image.getBoundingClientRect();
  stage.scrollLeft += after.left + place[0] * after.width - frame.left - x;
  stage.scrollTop += after.top + place[1] * after.height - frame.top - y;
}

function zoomBy(factor, x, y) {
  const scale = state.zoom || ($("full").clientWidth * devicePixelRatio) / state.open.width;
  zoom(Math.min(Math.max(scale * factor, 0.05), 32), x, y);
}

function move(by) {
  const shown = [...document.querySelectorAll(".row")].flatMap((shell) => shell.sweeps)
    .filter((sweep) => !state.ab || sweep === state.open || abIndex(sweep) === abIndex(state.open));
  const next = shown[shown.indexOf(state.open) + by];
  if (!next) return;
  const has = steps.filter((n) => next.files[n]);
  show(next, has.includes(current()) ? current() : has[0]);
  setStep(state.at);
}

// JSON of a value as YAML of a config: `${` is escaped, as are characters that YAML or a terminal does not accept.
function yaml(json) {
  return json.replace(/(\\*)\$\{/g, (_, slashes) => slashes + slashes + "\\\\${")
    .replace(/[\u007f-\u009f\u2028\u2029\ufeff\ufffe\uffff]/g, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}

// The shell command that generates an image again.
function command(sweep, n) {
  const folder = data.folders[sweep.folder];
  const text = (value) => yaml(JSON.stringify(value));
  const defaults = {
    seed: sweep.seed, first_sample: sweep.sample, num_samples: 1, num_steps: `[${n}]`, cfg_scale: sweep.cfg_scale, s_ratio: sweep.s_ratio,
    height: sweep.height, width: sweep.width, negative_prompt: text(sweep.negative_prompt), sampler: yaml(sweep.sampler_setting),
  };
  if (sweep.guidance_interval) defaults.guidance_interval = `[${sweep.guidance_interval.join(", ")}]`;
  const settings = {
    prompts: `[${text(data.prompts[sweep.prompt])}]`, ckpt_dir: text(folder.checkpoint), weights: sweep.weights, layout: "flat",
    output_dir: text(`${folder.path}/again`), ...Object.fromEntries(Object.entries(defaults).map(([key, value]) => [`defaults.${key}`, value])),
  };
  const quote = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);
  const words = ["./infer.sh", folder.config, "1", ...Object.entries(settings).map(([key, value]) => `inferencer.${key}=${value}`)];
  const path = folder.python_path && `PYTHONPATH=${quote(folder.python_path)} `;
  return path + words.map(quote).join(" ");
}

function viewer() {
  $("viewer").addEventListener("close", () => {
    state.open = null;
    document.body.classList.remove("busy");
  });
  $("close").addEventListener("click", () => $("viewer").close());
  $("previous").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  $("flip").addEventListener("click", flip);
  $("in").addEventListener("click", () => zoomBy(1.5));
  $("out").addEventListener("click", () => zoomBy(1 / 1.5));
  $("fit").addEventListener("click", () => zoom(0));
  $("actual").addEventListener("click", () => zoom(1));
  pointer();
  $("copy").addEventListener("click", () => {
    getSelection().selectAllChildren($("command"));
    $("copy").textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl-C";
  });
}

// Zoom with the wheel and a double click, pan by dragging with the mouse; touch screens scroll and zoom by themselves.
function pointer() {
  const stage = $("stage");
  const at = (event) => [event.clientX - stage.getBoundingClientRect().left, event.clientY - stage.getBoundingClientRect().top];
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomBy(Math.exp(-event.deltaY / 400), ...at(event));
  }, { passive: false });
  stage.addEventListener("dblclick", (event) => zoom(state.zoom ? 0 : 1, ...at(event)));
  stage.addEventListener("dragstart", (event) => event.preventDefault());
  stage.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse" && event.buttons === 1) stage.scrollBy(-event.movementX, -event.movementY);
  });
}

function keyboard() {
  const rowBy = (by) => {
    const shells = [...document.querySelectorAll(".row")];
    const top = document.querySelector("header").offsetHeight;
    const at = shells.findIndex((shell) => shell.getBoundingClientRect().bottom > top + 20);
    const shell = shells[Math.min(Math.max(at + by, 0), shells.length - 1)];
    if (!shell) return;
    fill(shell);
    scrollBy({ top: shell.getBoundingClientRect().top - top });
    shell.querySelector(".shot:enabled")?.focus({ preventScroll: true });
  };
  const anywhere = { ArrowLeft: () => setStep(state.at - 1), ArrowRight: () => setStep(state.at + 1), t: () => $("theme").click() };
  const outside = { "/": () => $("search").focus(), a: () => $("strips").click(), j: () => rowBy(1), k: () => rowBy(-1), b: switchSides };
  const inside = { ArrowUp: () => move(-1), ArrowDown: () => move(1), j: () => move(1), k: () => move(-1), b: flip,
    0: () => zoom(0), 1: () => zoom(1), "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5) };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === $("search")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const action = (state.open ? inside : outside)[event.key] || (event.target === $("slider") ? undefined : anywhere[event.key]);
    if (action) { event.preventDefault(); action(); }
  });
}

controls();
viewer();
keyboard();
if (location.hash === "#all") $("strips").click();
layout();
setStep(state.at);
