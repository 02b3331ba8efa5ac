// Sample grids with a slider over training: every prompt with its numbers of sampling steps, runs side by side.

const samples = { at: Infinity, weights: "ema", loaded: new Map() };
const WEIGHTS = { ema: ["ema"], live: ["live"], both: ["ema", "live"] };
const WEIGHT_NAMES = { ema: "EMA weights", live: "live weights" };
const SMALL = 128; // images of up to this side are enlarged without interpolation

function buildSamples() {
  const steps = unionOfSteps(data.runs.flatMap(({ sheets }) => ["ema", "live"].map((weights) =>
    sheets[weights].map(({ step }) => step))));
  if (!steps.length) return;

  const node = section("samples", "Samples");
  if (!samples.slider) {
    node.append(element("p", { className: "soft" },
      "A row has the same noise at every step of training and for every number of sampling steps."));
    samples.slider = stepSlider(node, "Training", samples, redrawSamples);
    const choice = element("fieldset", { id: "weights" }, element("legend", {}, "weights"));
    for (const [name, label] of [["ema", "EMA"], ["live", "live"], ["both", "both"]]) {
      choice.append(element("button", {
        data: { weights: name },
        onclick: () => {
          samples.weights = name;
          redrawSamples();
        },
      }, label));
    }
    samples.slider.bar.append(choice);
    samples.note = node.appendChild(element("p", { className: "soft" }));
    samples.list = node.appendChild(element("div", {}));
  }
  samples.slider.update(steps);

  const thinned = data.runs.filter(({ sheets }) => sheets.ema.length < sheets.totals.ema);
  samples.note.textContent = thinned.map(({ name, sheets }) =>
    `${name}: ${sheets.ema.length} of ${count(sheets.totals.ema)} sheets are in this page (--sheets).`).join(" ");
  redrawSamples();
}

/** A decoded image by its source; the newest ones are kept. */
function loadImage(source) {
  if (!samples.loaded.has(source)) {
    const image = new Image();
    image.src = source;
    samples.loaded.set(source, image.decode().then(() => image));
    if (samples.loaded.size > 64) samples.loaded.delete(samples.loaded.keys().next().value);
  }
  return samples.loaded.get(source);
}

/** The newest sheet of a run at or before the step of the slider. */
function sheetAt(run, weights) {
  const listed = run.sheets[weights];
  return listed[listed.findLastIndex(({ step }) => step <= samples.slider.step())];
}

function redrawSamples() {
  for (const button of document.querySelectorAll("#weights button")) {
    button.setAttribute("aria-pressed", button.dataset.weights === samples.weights);
  }

  const shownSheets = shownRuns().flatMap((shown) =>
    WEIGHTS[samples.weights].map((weights) => ({ shown, weights, sheet: sheetAt(shown.run, weights) })))
    .filter(({ sheet }) => sheet);
  const sources = shownSheets.map(({ shown, weights, sheet }) =>
    [shown.run.name, weights, sheet.step, sheet.source.slice(-80)]);
  if (!hasChanged(samples.list, sources)) return;

  const cards = new Map(); // prompt -> strips
  const unlabelled = [];
  for (const { shown, weights, sheet } of shownSheets) {
    if (!sheet.cell) {
      unlabelled.push(plainSheet(shown, weights, sheet));
      continue;
    }
    sheet.prompts.forEach((prompt, row) => {
      if (!cards.has(prompt)) cards.set(prompt, []);
      cards.get(prompt).push(strip(shown, weights, sheet, row));
    });
  }

  // rows that stay keep their place, so that moving the slider does not move the page
  samples.list.style.minHeight = `${samples.list.offsetHeight}px`;
  samples.list.replaceChildren(...[...cards].map(([prompt, strips]) =>
    element("div", { className: "card prompt" }, element("h3", {}, prompt || "(empty prompt)"),
      element("div", { className: "strips" }, ...strips))), ...unlabelled);
  samples.list.style.minHeight = "";
}

function stripTitle({ run, index }, weights, sheet) {
  const origin = `${WEIGHT_NAMES[weights]}, step ${count(sheet.step)}`;
  return element("h4", {}, key(index), element("b", {}, run.name), origin);
}

/** The images of a prompt, labelled with their numbers of sampling steps. */
function strip(shown, weights, sheet, row) {
  const [left, top, width, height, across, down] = sheet.cell;
  const cells = sheet.num_steps.map((steps, column) => {
    const canvas = element("canvas", { width, height, className: Math.max(width, height) <= SMALL ? "small" : "" });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${sheet.prompts[row]}, ${steps} steps`);
    loadImage(sheet.source).then((image) => canvas.getContext("2d").drawImage(
      image, left + column * across, top + row * down, width, height, 0, 0, width, height),
    () => samples.loaded.delete(sheet.source)); // the file is being written, and listed again when it is complete
    return element("figure", {}, canvas, element("figcaption", {}, steps === 1 ? "1 step" : `${steps} steps`));
  });
  return element("div", { className: "strip", data: { run: shown.run.name, weights } },
    stripTitle(shown, weights, sheet),
    element("div", { className: "cells", style: { "--columns": cells.length } }, ...cells));
}

/** A sheet that does not record where its images are. */
function plainSheet(shown, weights, sheet) {
  return element("div", { className: "card prompt strip" }, stripTitle(shown, weights, sheet),
    element("p", { className: "soft" }, "The file does not record its prompts."),
    element("img", { src: sheet.source, alt: "" }));
}
