// Draws a frame with what was attended, what ran the FFN, and the order of its tokens.

// Dark to bright, readable without red and green: samples of the "inferno" colour map.
const COLORS = [
  [0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21],
  [250, 193, 39], [252, 255, 164],
];
const ALWAYS = [159, 180, 199];
const DROPPED = [236, 238, 242];

/** What a raster cell's cube is where it is in none: in no whole cube, or dropped by `prune`. */
const NO_CUBE = -1;
export const GONE = -2;

export function color(share) {
  const at = Math.min(Math.max(share, 0), 1) * (COLORS.length - 1);
  const low = Math.min(Math.floor(at), COLORS.length - 2);
  return COLORS[low].map((c, i) => Math.round(c + (COLORS[low + 1][i] - c) * (at - low)));
}

export const bit = (packed, n) => (packed[n >> 3] >> (n & 7)) & 1;

/** A video's geometry: which prompt token and which cube each raster cell is. */
export class Geometry {
  constructor(meta, number, tokensBefore) {
    const video = meta.videos[number];
    [this.frames, this.rows, this.columns] = video.grid;
    this.offset = video.offset;
    this.tokensBefore = tokensBefore; // video tokens of the videos before this one
    const raw = Uint8Array.from(atob(video.walk), (char) => char.charCodeAt(0));
    const walk = new DataView(raw.buffer);
    const cubes = new Map(meta.cube_starts.map((start, nth) => [start / meta.block_size, nth]));
    const count = this.frames * this.rows * this.columns;
    this.nth = new Int32Array(count).fill(-1); // by raster cell: its place in the walk, if any
    this.cube = new Int32Array(count).fill(GONE);
    for (let nth = 0; nth < video.tokens; nth++) {
      const cell = walk.getInt32(4 * nth, true);
      this.nth[cell] = nth;
      const block = Math.floor((video.offset + nth) / meta.block_size);
      this.cube[cell] = cubes.get(block) ?? NO_CUBE;
    }
  }

  cell(frame, row, column) {
    return (frame * this.rows + row) * this.columns + column;
  }
}

function hatch(context, x, y, w, h) {
  context.save();
  context.beginPath();
  context.rect(x, y, w, h);
  context.clip();
  context.strokeStyle = "rgba(200, 200, 200, .35)";
  context.lineWidth = 1;
  for (let d = -h; d < w; d += 6) {
    context.beginPath();
    context.moveTo(x + d, y + h);
    context.lineTo(x + d + h, y);
    context.stroke();
  }
  context.restore();
}

/**
 * One frame onto a canvas.
 * view: {geometry, frame, image, heat (per cube, null: later), ran (cell => share or null),
 *        showHeat, showFfn, showOrder, opacity, chosen (cube or -1)}
 */
export function drawStage(canvas, view) {
  const { geometry: g, frame } = view;
  const scale = Math.min(window.devicePixelRatio || 1, 2);
  const width = Math.round(canvas.clientWidth * scale) || 640;
  const height = Math.round(Math.min((width * g.rows) / g.columns, window.innerHeight * scale * 0.7));
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const w = width / g.columns;
  const h = height / g.rows;
  context.fillStyle = "#22252b";
  context.fillRect(0, 0, width, height);
  if (view.image) {
    context.imageSmoothingQuality = "high";
    // Under the heat map a coloured picture would change the colours of the scale.
    context.filter = view.showHeat ? "grayscale(1)" : "none";
    context.drawImage(view.image, 0, 0, width, height);
    context.filter = "none";
  } else {
    context.fillStyle = "#9aa3b2";
    context.font = `${14 * scale}px sans-serif`;
    context.textAlign = "center";
    context.fillText("no picture of this frame was kept", width / 2, height / 2);
  }
  const cells = [];
  for (let row = 0; row < g.rows; row++) {
    for (let column = 0; column < g.columns; column++) {
      const cell = g.cell(frame, row, column);
      const box = [column * w, row * h, w, h];
      cells.push({ cell, cube: g.cube[cell], row, column, box });
    }
  }
  if (view.showHeat) drawHeat(context, view, cells);
  if (view.showOrder) drawOrder(context, view, cells, scale);
  if (view.showFfn) drawFfn(context, view, cells, scale);
  if (view.chosen >= 0) {
    const mine = (cell) => g.cube[cell] === view.chosen;
    borders(context, g, frame, cells, (a, b) => mine(a) !== mine(b), mine, "#000", 4 * scale);
    borders(context, g, frame, cells, (a, b) => mine(a) !== mine(b), mine, "#fff", 2 * scale);
  }
}

function drawHeat(context, view, cells) {
  // One pixel a cell, then enlarged: cells drawn one by one would show seams.
  const { rows, columns } = view.geometry;
  const small = new OffscreenCanvas(columns, rows);
  const pixels = new ImageData(columns, rows);
  for (const { cube, row, column } of cells) {
    const share = cube < 0 ? undefined : view.heat[cube];
    const rgb = cube === GONE ? DROPPED
      : cube < 0 ? ALWAYS : share === null ? [0, 0, 0] : color(share);
    pixels.data.set([...rgb, 255], 4 * (row * columns + column));
  }
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.globalAlpha = view.opacity;
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, context.canvas.width, context.canvas.height);
  context.imageSmoothingEnabled = true;
  context.globalAlpha = 1;
  for (const { cube, box } of cells) {
    if (cube >= 0 && view.heat[cube] === null) hatch(context, ...box);
  }
}

function drawFfn(context, view, cells, scale) {
  for (const { cell, box } of cells) {
    const share = view.ran(cell);
    if (!share) continue;
    const radius = Math.max(1.5 * scale, Math.min(box[2], box[3]) * 0.22 * Math.sqrt(share));
    context.beginPath();
    context.arc(box[0] + box[2] / 2, box[1] + box[3] / 2, radius, 0, 7);
    context.fillStyle = "#fff";
    context.fill();
    context.lineWidth = 1.5 * scale;
    context.strokeStyle = "#000";
    context.stroke();
  }
}

/** The walk through this frame, early tokens blue, late ones yellow, and the edges of KV blocks. */
function drawOrder(context, view, cells, scale) {
  const { geometry: g, frame } = view;
  const differ = (a, b) => g.cube[a] !== g.cube[b];
  borders(context, g, frame, cells, differ, () => true, "rgba(0, 0, 0, .8)", 3 * scale);
  borders(context, g, frame, cells, differ, () => true, "rgba(255, 255, 255, .9)", 1 * scale);
  const walk = cells.filter(({ cell }) => g.nth[cell] >= 0)
    .sort((a, b) => g.nth[a.cell] - g.nth[b.cell]);
  const middle = ({ box }) => [box[0] + box[2] / 2, box[1] + box[3] / 2];
  for (let i = 1; i < walk.length; i++) {
    const adjacent = Math.abs(walk[i].row - walk[i - 1].row) <= 1
      && Math.abs(walk[i].column - walk[i - 1].column) <= 1;
    context.strokeStyle = `hsl(${230 - (180 * i) / walk.length} 95% 60%)`;
    context.lineWidth = (adjacent ? 2.5 : 1) * scale;
    context.setLineDash(adjacent ? [] : [4 * scale, 4 * scale]);
    context.beginPath();
    context.moveTo(...middle(walk[i - 1]));
    context.lineTo(...middle(walk[i]));
    context.stroke();
  }
  context.setLineDash([]);
}

/** Lines where neighbouring cells `differ` and one of them is `wanted`. */
function borders(context, g, frame, cells, differ, wanted, style, lineWidth) {
  context.strokeStyle = style;
  context.lineWidth = lineWidth;
  context.beginPath();
  for (const { cell, row, column, box: [x, y, w, h] } of cells) {
    const line = (inside, r, c, ...ends) => {
      const other = inside ? g.cell(frame, r, c) : -1;
      const edge = inside ? differ(cell, other) && (wanted(cell) || wanted(other)) : false;
      if (!edge) return;
      context.moveTo(ends[0], ends[1]);
      context.lineTo(ends[2], ends[3]);
    };
    line(column > 0, row, column - 1, x, y, x, y + h);
    line(row > 0, row - 1, column, x, y, x + w, y);
  }
  context.stroke();
}

/** Mean heat of every frame, one column each; the current frame marked. */
export function drawStrip(canvas, geometry, heat, frame) {
  const width = (canvas.width = canvas.clientWidth || 640);
  const height = canvas.height;
  const context = canvas.getContext("2d");
  const per = geometry.rows * geometry.columns;
  const column = width / geometry.frames;
  for (let f = 0; f < geometry.frames; f++) {
    let sum = 0;
    let count = 0;
    for (let i = f * per; i < (f + 1) * per; i++) {
      const share = geometry.cube[i] < 0 ? null : heat[geometry.cube[i]];
      if (share === null) continue;
      sum += share;
      count += 1;
    }
    context.fillStyle = count ? `rgb(${color(sum / count)})` : "#3a3f49";
    context.fillRect(f * column, 0, column + 0.5, height);
  }
  context.strokeStyle = "#000";
  context.lineWidth = 4;
  context.strokeRect(frame * column + 1, 1, Math.max(column - 2, 2), height - 2);
  context.strokeStyle = "#fff";
  context.lineWidth = 2;
  context.strokeRect(frame * column + 1, 1, Math.max(column - 2, 2), height - 2);
}

export function drawScale(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = `rgb(${color(x / (canvas.width - 1))})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}
