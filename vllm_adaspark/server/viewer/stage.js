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
    const raw = Uint8Array.from(atob(video.token_order), (char) => char.charCodeAt(0));
    const order = new DataView(raw.buffer);
    const cubes = new Map(meta.cube_starts.map((start, nth) => [start / meta.block_size, nth]));
    const count = this.frames * this.rows * this.columns;
    this.nth = new Int32Array(count).fill(-1); // by raster cell: its place in the token order, if any
    this.cube = new Int32Array(count).fill(GONE);
    for (let nth = 0; nth < video.tokens; nth++) {
      const cell = order.getInt32(4 * nth, true);
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
 * view: {geometry, frame, image, heat (cell => share; null: comes later, undefined: no whole cube),
 *        ran (cell => share or null),
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
  for (const { cell, cube, row, column } of cells) {
    const share = view.heat(cell);
    const rgb = cube === GONE ? DROPPED
      : share === undefined ? ALWAYS : share === null ? [0, 0, 0] : color(share);
    pixels.data.set([...rgb, 255], 4 * (row * columns + column));
  }
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.globalAlpha = view.opacity;
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, context.canvas.width, context.canvas.height);
  context.imageSmoothingEnabled = true;
  context.globalAlpha = 1;
  for (const { cell, box } of cells) {
    if (view.heat(cell) === null) hatch(context, ...box);
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

/** The token order in this frame, early tokens blue, late ones yellow, and the edges of KV blocks. */
function drawOrder(context, view, cells, scale) {
  const { geometry: g, frame } = view;
  const differ = (a, b) => g.cube[a] !== g.cube[b];
  borders(context, g, frame, cells, differ, () => true, "rgba(0, 0, 0, .8)", 3 * scale);
  borders(context, g, frame, cells, differ, () => true, "rgba(255, 255, 255, .9)", 1 * scale);
  const order = cells.filter(({ cell }) => g.nth[cell] >= 0)
    .sort((a, b) => g.nth[a.cell] - g.nth[b.cell]);
  const middle = ({ box }) => [box[0] + box[2] / 2, box[1] + box[3] / 2];
  for (let i = 1; i < order.length; i++) {
    const adjacent = Math.abs(order[i].row - order[i - 1].row) <= 1
      && Math.abs(order[i].column - order[i - 1].column) <= 1;
    context.strokeStyle = `hsl(${230 - (180 * i) / order.length} 95% 60%)`;
    context.lineWidth = (adjacent ? 2.5 : 1) * scale;
    context.setLineDash(adjacent ? [] : [4 * scale, 4 * scale]);
    context.beginPath();
    context.moveTo(...middle(order[i - 1]));
    context.lineTo(...middle(order[i]));
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

/** Mean heat of every frame, one column each; the current frame marked.  heat: as drawStage's. */
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
      const share = heat(i);
      if (share === null || share === undefined) continue;
      sum += share;
      count += 1;
    }
    context.fillStyle = count ? `rgb(${color(sum / count)})` : "#3a3f49";
    context.fillRect(f * column, 0, column + 0.5, height);
  }
  mark(context, frame * column, column, height);
}

function mark(context, x, width, height) {
  for (const [style, lineWidth] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = style;
    context.lineWidth = lineWidth;
    context.strokeRect(x + 1, 1, Math.max(width - 2, 2), height - 2);
  }
}

/**
 * A ribbon of segments over the frames, as bright as they are relevant to the question, those that
 * count as relevant with a bar below; in two greys where nobody knows.
 */
export function drawSegments(canvas, geometry, segments, frame) {
  const width = (canvas.width = canvas.clientWidth || 640);
  const height = canvas.height;
  const context = canvas.getContext("2d");
  const column = width / geometry.frames;
  const known = segments.map(({ relevance }) => relevance).filter((r) => r !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  segments.forEach(({ frames: [first, end], relevance, relevant }, nth) => {
    const [x, wide] = [first * column, (end - first) * column];
    context.fillStyle = relevance === null ? ["#6d7686", "#98a1b0"][nth % 2]
      : `rgb(${color(high > low ? (relevance - low) / (high - low) : 0.5)})`;
    context.fillRect(x, 0, wide, height);
    if (relevant) {
      context.fillStyle = "#3ddc84";
      context.fillRect(x, height - 5, wide, 5);
    }
    context.fillStyle = "#fff"; // where the video was cut
    if (nth) context.fillRect(x - 1, 0, 2, height);
  });
  mark(context, frame * column, column, height);
}

export function drawScale(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = `rgb(${color(x / (canvas.width - 1))})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}
