// The See tab: the place under the pointer is compared with all others. `props.view` has the map as unit vectors.
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const zone = element.querySelector('.zone'), output = element.querySelector('output');
const [imageCanvas, mapCanvas, heatCanvas] = element.querySelectorAll('canvas');
let view = null, images = [], place = null, turns = 0;

function colour(cosine) {
  const at = Math.max(0, Math.min(1, (cosine + 1) / 2)) * (VIRIDIS.length - 1), low = Math.min(Math.floor(at), 3);
  return VIRIDIS[low].map((part, i) => Math.round(part + (VIRIDIS[low + 1][i] - part) * (at - low)));
}

async function show() {
  const next = props.view, turn = ++turns;
  element.querySelector('.three').hidden = element.querySelector('.again').hidden = !next;
  element.querySelector('.empty').hidden = !!next;
  if (!next) return;
  const loaded = await Promise.all([next.image, next.map].filter(Boolean).map(load));
  if (turn !== turns) return;  // Another view has come meanwhile.
  [view, images] = [next, loaded];
  mapCanvas.parentElement.hidden = heatCanvas.parentElement.hidden = !view.map;
  for (const canvas of [imageCanvas, mapCanvas, heatCanvas]) canvas.height = Math.round(256 * view.height / view.width);
  place = view.map ? [Math.floor(view.rows / 2), Math.floor(view.columns / 2)] : null;
  draw();
}

function draw() {
  [imageCanvas, mapCanvas].slice(0, images.length).forEach((canvas, i) => {
    const pen = canvas.getContext('2d');
    pen.imageSmoothingEnabled = i === 0 && images[i].width >= canvas.width / 2;
    pen.drawImage(images[i], 0, 0, canvas.width, canvas.height);
  });
  if (!place) return;
  const { rows, columns, places } = view, cell = [heatCanvas.width / columns, heatCanvas.height / rows];
  const own = places[place[0]][place[1]], pen = heatCanvas.getContext('2d');
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const cosine = places[row][column].reduce((sum, part, i) => sum + part * own[i], 0);
      pen.fillStyle = `rgb(${colour(cosine)})`;
      pen.fillRect(column * cell[0], row * cell[1], cell[0] + 1, cell[1] + 1);
    }
  }
  for (const canvas of [imageCanvas, mapCanvas, heatCanvas]) {
    const mark = canvas.getContext('2d');
    for (const [line, ink] of [[4, '#000'], [2, '#fff']]) {
      mark.lineWidth = line;
      mark.strokeStyle = ink;
      mark.strokeRect(place[1] * cell[0] + 1, place[0] * cell[1] + 1, cell[0] - 2, cell[1] - 2);
    }
  }
  output.textContent = `· cosine with row ${place[0] + 1}, column ${place[1] + 1}`;
}

function go(row, column) {
  place = [Math.max(0, Math.min(view.rows - 1, row)), Math.max(0, Math.min(view.columns - 1, column))];
  draw();
}

for (const canvas of [imageCanvas, mapCanvas, heatCanvas]) {
  for (const name of ['pointermove', 'pointerdown']) {
    canvas.addEventListener(name, (event) => {
      if (!place) return;
      const area = canvas.getBoundingClientRect();
      go(Math.floor((event.clientY - area.top) / area.height * view.rows),
        Math.floor((event.clientX - area.left) / area.width * view.columns));
    });
  }
}
zone.addEventListener('keydown', (event) => {
  const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!by || !place) return;
  event.preventDefault();
  go(place[0] + by[0], place[1] + by[1]);
});
watch('view', show);
show();
