// The canvas of the Edit tab: a mask, classes and a piece of the map, over an image. Masks and classes are bytes for
// cells that cover the image evenly; pieces snap to the cells of the map. `props.value` is all of it as JSON.
const FREE = 255, SIDE = 512;
const zone = element.querySelector('.zone'), canvas = element.querySelector('canvas');
const context = canvas.getContext('2d');
const brush = element.querySelector('.brush input'), mirror = element.querySelector('.mirror input');
const showMap = element.querySelector('.show-map input'), palette = element.querySelector('.palette');
let view = null, picture = null, map = null, scale = 1;
let mask = null, labels = null, label = 0, tool = 'mask', piece = null, drag = null, loaded = null, turns = 0;

async function show() {
  const next = props.view, turn = ++turns;
  canvas.hidden = !next;
  element.querySelector('.empty').hidden = !!next;
  if (!next) return;
  const images = await Promise.all([load(next.image), load(next.map)]);
  if (turn !== turns) return;  // Another view has come meanwhile.
  [picture, map] = images;
  view = next;
  const [rows, columns] = view.cells;
  if (loaded !== view.serial) {
    mask = new Uint8Array(rows * columns);
    labels = new Uint8Array(rows * columns).fill(FREE);
    piece = null;
    loaded = view.serial;
  }
  scale = SIDE / Math.max(view.width, view.height);
  canvas.width = Math.round(view.width * scale);
  canvas.height = Math.round(view.height * scale);
  palette.innerHTML = view.palette.map(([number, colour], i) =>
    `<button type="button" role="radio" data-label="${number}" aria-checked="${i === 0}" aria-label="class ${number}"
      title="class ${number}"><i style="background:${colour}"></i>${number}</button>`).join('');
  if (view.palette.length) label = view.palette[0][0];
  choose(tool === 'paint' && !view.palette.length ? 'mask' : tool);
  send();
}

function choose(name) {
  tool = name;
  for (const button of element.querySelectorAll('[data-tool]')) {
    button.setAttribute('aria-pressed', button.dataset.tool === tool);
    if (button.dataset.tool === 'paint') button.hidden = !(view && view.palette.length);
    if (button.dataset.tool === 'piece') button.hidden = !!(view && !view.map);
  }
  element.querySelector('.mirror').hidden = tool !== 'piece';
  element.querySelector('.brush').hidden = tool === 'piece';
  element.querySelector('.show-map').hidden = !!(view && !view.map);
  palette.hidden = tool !== 'paint';
  draw();
}

function layer(colour_of) {
  const [rows, columns] = view.cells, sheet = document.createElement('canvas');
  sheet.width = columns;
  sheet.height = rows;
  const pen = sheet.getContext('2d'), pixels = pen.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const colour = colour_of(i);
    if (colour) pixels.data.set(colour, 4 * i);
  }
  pen.putImageData(pixels, 0, 0);
  return sheet;
}

function draw() {
  if (!view) return;
  const { width, height } = canvas, [left, top, right, bottom] = view.box.map((edge) => edge * scale);
  const [rows, columns] = view.grid, cell = [(right - left) / columns, (bottom - top) / rows];
  context.imageSmoothingEnabled = scale < 2;
  context.drawImage(picture, 0, 0, width, height);
  context.imageSmoothingEnabled = false;
  if (map && (showMap.checked || tool === 'piece')) {
    context.globalAlpha = 0.65;
    context.drawImage(map, left, top, right - left, bottom - top);
    context.globalAlpha = 1;
  }
  context.fillStyle = 'rgba(127,127,127,.6)';  // What the model does not see.
  context.fillRect(0, 0, width, top);
  context.fillRect(0, bottom, width, height - bottom);
  context.fillRect(0, top, left, bottom - top);
  context.fillRect(right, top, width - right, bottom - top);
  const colours = new Map(view.palette.map(([number, colour]) =>
    [number, [...colour.match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16)), 190]]));
  context.drawImage(layer((i) => labels[i] !== FREE && colours.get(labels[i])), 0, 0, width, height);
  context.drawImage(layer((i) => mask[i] && [255, 60, 60, 130]), 0, 0, width, height);
  if (!piece) return;
  const [l, t, r, b] = piece.box, [x, y] = piece.at, size = [(r - l) * cell[0], (b - t) * cell[1]];
  const from = [left + l * cell[0], top + t * cell[1]], to = [left + x * cell[0], top + y * cell[1]];
  if (map) {
    const pixel = [map.width / columns, map.height / rows];
    context.save();
    context.translate(to[0] + (mirror.checked ? size[0] : 0), to[1]);
    context.scale(mirror.checked ? -1 : 1, 1);
    context.drawImage(map, l * pixel[0], t * pixel[1], (r - l) * pixel[0], (b - t) * pixel[1], 0, 0, ...size);
    context.restore();
  }
  for (const [place, dash] of [[from, [6, 4]], [to, []]]) {
    for (const [colour, line] of [['#000', 4], ['#fff', 2]]) {
      context.setLineDash(dash);
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.strokeRect(...place, ...size);
    }
  }
}

function base64(bytes) {
  let text = '';
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

function send() {
  draw();
  const [rows, columns] = view.cells, [left, top, right, bottom] = view.box;
  const across = (c) => Math.round(left + (right - left) * c / view.grid[1]);
  const down = (c) => Math.round(top + (bottom - top) * c / view.grid[0]);
  const there = [mask.some((one) => one) && 'a mask', labels.some((one) => one !== FREE) && 'painted classes', piece && 'a piece'];
  canvas.setAttribute('aria-label', ['the image at hand', ...there.filter(Boolean)].join(', '));
  props.value = JSON.stringify({
    rows, columns,
    mask: mask.some((one) => one) ? base64(mask) : '',
    labels: labels.some((one) => one !== FREE) ? base64(labels) : '',
    piece: piece && {
      box: [across(piece.box[0]), down(piece.box[1]), across(piece.box[2]), down(piece.box[3])],
      at: [across(piece.at[0]), down(piece.at[1])],
      mirror: mirror.checked,
    },
  });
}

function position(event) {
  const area = canvas.getBoundingClientRect();
  return [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
}

function cellAt([x, y]) {  // of the map, within it
  const [left, top, right, bottom] = view.box, [rows, columns] = view.grid;
  const across = Math.floor((x * view.width - left) / (right - left) * columns);
  const down = Math.floor((y * view.height - top) / (bottom - top) * rows);
  return [Math.max(0, Math.min(columns - 1, across)), Math.max(0, Math.min(rows - 1, down))];
}

function stroke(from, to) {
  const [rows, columns] = view.cells, radius = brush.value / 200 * Math.max(rows, columns);
  const start = [from[0] * columns, from[1] * rows], end = [to[0] * columns, to[1] * rows];
  const steps = Math.max(1, Math.ceil(Math.hypot(end[0] - start[0], end[1] - start[1])));
  for (let i = 0; i <= steps; i++) {
    const x = start[0] + (end[0] - start[0]) * i / steps, y = start[1] + (end[1] - start[1]) * i / steps;
    for (let row = Math.max(0, Math.floor(y - radius)); row <= Math.min(rows - 1, y + radius); row++) {
      for (let column = Math.max(0, Math.floor(x - radius)); column <= Math.min(columns - 1, x + radius); column++) {
        if (Math.hypot(column + 0.5 - x, row + 0.5 - y) > Math.max(radius, 0.71)) continue;
        const cell = row * columns + column;
        if (tool === 'mask') mask[cell] = 1;
        if (tool === 'paint') labels[cell] = label;
        if (tool === 'erase') [mask[cell], labels[cell]] = [0, FREE];
      }
    }
  }
}

function move(x, y) {
  const [l, t, r, b] = piece.box, [rows, columns] = view.grid;
  piece.at = [Math.max(0, Math.min(columns - (r - l), x)), Math.max(0, Math.min(rows - (b - t), y))];
}

canvas.addEventListener('pointerdown', (event) => {
  if (!view) return;
  zone.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  const at = position(event), cell = cellAt(at);
  if (tool !== 'piece') {
    drag = { last: at };
    stroke(at, at);
    return draw();
  }
  const size = piece && [piece.box[2] - piece.box[0], piece.box[3] - piece.box[1]];
  const inside = piece && [0, 1].every((axis) => cell[axis] >= piece.at[axis] && cell[axis] < piece.at[axis] + size[axis]);
  drag = inside ? { held: [cell[0] - piece.at[0], cell[1] - piece.at[1]] } : { first: cell };
  if (!inside) piece = { box: [...cell, cell[0] + 1, cell[1] + 1], at: [...cell] };
  draw();
});
canvas.addEventListener('pointermove', (event) => {
  if (!drag) return;
  const at = position(event), cell = cellAt(at);
  if (drag.last) {
    stroke(drag.last, at);
    drag.last = at;
  } else if (drag.held) {
    move(cell[0] - drag.held[0], cell[1] - drag.held[1]);
  } else {
    const [low, high] = [0, 1].map((axis) => [Math.min(drag.first[axis], cell[axis]), Math.max(drag.first[axis], cell[axis]) + 1])
      .reduce(([lows, highs], [low, high]) => [[...lows, low], [...highs, high]], [[], []]);
    piece = { box: [...low, ...high], at: low };
  }
  draw();
});
for (const name of ['pointerup', 'pointercancel']) {
  canvas.addEventListener(name, () => {
    if (drag) send();
    drag = null;
  });
}
zone.addEventListener('keydown', (event) => {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!piece) return;
  if (by) move(piece.at[0] + by[0], piece.at[1] + by[1]);
  else if (event.key === 'm' || event.key === 'M') mirror.checked = !mirror.checked;
  else if (event.key === 'Escape') piece = null;
  else return;
  event.preventDefault();
  send();
});
element.querySelector('.tools').addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button || !view) return;
  if (button.dataset.tool) choose(button.dataset.tool);
  if (button.dataset.label) {
    label = Number(button.dataset.label);
    for (const one of palette.children) one.setAttribute('aria-checked', one === button);
  }
  if (button.dataset.action === 'clear') {
    mask.fill(0);
    labels.fill(FREE);
    piece = null;
    send();
  }
});
mirror.addEventListener('change', send);
showMap.addEventListener('change', draw);
watch('view', show);
show();
