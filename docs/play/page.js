// What the page does with the model.
import * as ort from "./ort/ort.wasm.min.mjs";
import { load } from "./model.js";

const element = (id) => document.getElementById(id);
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? navigator.hardwareConcurrency : 1;

let model, stopped = false, chosen = null, marks = [];

function say(text) {
  element("status").textContent = text;
}

function value(id) {
  const field = element(id);
  const number = Math.min(Math.max(Number(field.value) || 0, Number(field.min)), Number(field.max || Infinity));
  field.value = number;
  return number;
}

/** Draws, and shows the pictures in `target`; `held` makes of a count what stays. */
async function drawInto(target, labels, held = {}, offset = 0) {
  const started = performance.now(), steps = Math.round(value("steps"));
  busy(true);
  try {
    const state = await model.draw({
      labels, held, steps, seed: Math.round(value("seed")) + offset, guidance: value("guidance"),
      step: async (share) => {
        element("progress").value = share;
        say(`Step ${Math.round(share * steps)} of ${steps}`);
        await new Promise((done) => setTimeout(done)); // The page stays alive between steps.
        return stopped;
      },
    });
    if (!state) return say("Stopped.");
    const pictures = await model.decode(state);
    target.replaceChildren(...pictures.map((picture, i) => canvasOf(picture, labels[i], part(state, i))));
    say(`${pictures.length} pictures in ${((performance.now() - started) / 1000).toFixed(1)} seconds.`);
  } catch (error) {
    say(`It failed: ${error.message}`);
  } finally {
    busy(false);
  }
}

function busy(on) {
  stopped = false;
  for (const id of ["draw", "redraw"]) element(id).disabled = on;
  element("stop").disabled = !on;
  if (!on) element("progress").value = 0;
}

function part(state, i) {
  return Object.fromEntries(model.modalities.map((m) => {
    const size = m.shape.reduce((a, b) => a * b, 1);
    return [m.name, state[m.name].slice(i * size, (i + 1) * size)];
  }));
}

function canvasOf(picture, label, state) {
  const canvas = document.createElement("canvas");
  canvas.width = model.width, canvas.height = model.height;
  canvas.getContext("2d").putImageData(picture, 0, 0);
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "button");
  canvas.setAttribute("aria-label", `${model.classes[label] ?? "picture"}: choose it to redraw it`);
  const pick = () => choose({ picture, label, state }, canvas);
  canvas.addEventListener("click", pick);
  canvas.addEventListener("keydown", (event) => event.key === "Enter" && pick());
  return canvas;
}

function choose(what, canvas) {
  chosen = what;
  for (const other of document.querySelectorAll("[aria-pressed]")) other.removeAttribute("aria-pressed");
  canvas?.setAttribute("aria-pressed", "true");
  element("edit").hidden = false;
  clearMarks();
}

function grid() {
  const [, rows, columns] = model.modalities[0].shape;
  return { rows, columns };
}

function clearMarks() {
  const { rows, columns } = grid();
  marks = new Array(rows * columns).fill(0);
  showSource();
}

function showSource() {
  const canvas = element("source"), context = canvas.getContext("2d"), { rows, columns } = grid();
  canvas.width = model.width, canvas.height = model.height;
  context.putImageData(chosen.picture, 0, 0);
  context.fillStyle = "rgb(10 143 127 / 60%)";
  const [w, h] = [model.width / columns, model.height / rows];
  marks.forEach((mark, i) => mark && context.fillRect((i % columns) * w, Math.floor(i / columns) * h, w, h));
}

function mark(event) {
  if (!chosen || !(event.buttons & 1)) return;
  const box = element("source").getBoundingClientRect(), { rows, columns } = grid();
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  if (column < 0 || row < 0 || column >= columns || row >= rows) return;
  marks[row * columns + column] = 1;
  showSource();
}

async function upload(file) {
  try {
    const bitmap = await createImageBitmap(file), side = Math.min(bitmap.width / model.width, bitmap.height / model.height);
    const [w, h] = [model.width * side, model.height * side];
    const canvas = new OffscreenCanvas(model.width, model.height), context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, (bitmap.width - w) / 2, (bitmap.height - h) / 2, w, h, 0, 0, model.width, model.height);
    const picture = context.getImageData(0, 0, model.width, model.height);
    choose({ picture, label: Number(element("class").value), state: await model.encode(picture) });
    say("Your picture is on the easel. Mark what is to be drawn anew, or nothing.");
  } catch {
    say(`${file.name} cannot be read as a picture.`);
  }
}

element("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  const label = Number(element("class").value), all = label < 0;
  const labels = Array.from({ length: Math.round(value("count")) }, (_, i) => (all ? i % model.classes.length : label));
  drawInto(element("pictures"), labels);
});
element("stop").addEventListener("click", () => { stopped = true; });
element("redraw").addEventListener("click", () => {
  const labels = new Array(4).fill(chosen.label);
  // Another noise than the picture's own, which would be drawn again.
  drawInto(element("edits"), labels, model.held(chosen.state, marks, labels.length), 1000003);
});
element("clear").addEventListener("click", clearMarks);
for (const type of ["pointerdown", "pointermove"]) element("source").addEventListener(type, mark);
element("upload").addEventListener("change", ({ target }) => target.files[0] && upload(target.files[0]));

try {
  model = await load(ort, "model", say);
  const every = model.classes.length ? [new Option("each in turn", "-1")] : [new Option("none", "0")];
  element("class").append(...every, ...model.classes.map((name, i) => new Option(name, String(i))));
  element("upload").disabled = !model.sessions.encoder;
  element("draw").disabled = false;
  say("Ready.");
} catch (error) {
  say(`The model cannot be loaded: ${error.message}`);
}
