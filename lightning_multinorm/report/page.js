"use strict";

const report = JSON.parse(document.getElementById("data").textContent);
const controls = Object.fromEntries(["axis", "smoothing", "log", "theme"].map((id) => [id, document.getElementById(id)]));
const toggles = [...document.querySelectorAll("[data-toggles]")];
const views = new Map();
let turn = 0; // of drawing: an earlier one that is still under way gives up

/** Apply a change to a specification and to every layer in it. */
function everywhere(spec, change) {
  change(spec);
  (spec.layer ?? []).forEach((layer) => everywhere(layer, change));
}

/** The specification of a figure as the controls wish it. */
function adapted(figure, hidden) {
  const spec = structuredClone(figure.spec);
  spec.width = "container";
  spec.autosize = { type: "fit-x", contains: "padding" };
  everywhere(spec, (part) => {
    const { x, y, color } = part.encoding ?? {};
    if (x?.field in report.axes) part.encoding.x = report.axes[controls.axis.value];
    if (spec.usermeta?.may_be_log && y && controls.log.checked) y.scale = { type: "log", nice: false, padding: 8 };
    if (color?.field === "run") color.legend = null; // the toggles are one
    for (const step of part.transform ?? []) {
      if (!step.window) continue;
      const reach = Math.round((spec.usermeta.points * controls.smoothing.value) / 100);
      step.frame = [-reach, reach];
    }
  });
  if (hidden.length) spec.transform = [{ filter: { not: { field: "run", oneOf: hidden } } }, ...(spec.transform ?? [])];
  return spec;
}

async function draw() {
  const mine = ++turn;
  const hidden = toggles.filter((toggle) => !toggle.checked).map((toggle) => toggle.dataset.toggles);
  document.querySelectorAll("[data-run]").forEach((part) => (part.hidden = hidden.includes(part.dataset.run)));
  for (const figure of report.figures) {
    const place = document.getElementById(figure.name);
    if (place.closest("[hidden]")) continue;
    const alone = place.closest("[data-run]") !== null;
    const options = { actions: false, renderer: "svg", tooltip: { theme: "custom" } };
    const result = await vegaEmbed(place, adapted(figure, alone ? [] : hidden), options);
    views.get(figure.name)?.finalize();
    views.set(figure.name, result);
    await new Promise((resume) => setTimeout(resume)); // what the reader does comes first
    if (mine !== turn) return;
  }
  document.body.dataset.drawn = String(mine);
}

function dress() {
  if (controls.theme.value) document.documentElement.dataset.theme = controls.theme.value;
  else delete document.documentElement.dataset.theme;
}

controls.theme.addEventListener("change", dress); // figures are drawn in the colour of the text around them
[controls.axis, controls.smoothing, controls.log, ...toggles].forEach((control) => control.addEventListener("change", draw));
draw();
