// The curve by layer: share of cubes attended, by kind of token, share of tokens in the FFN, and
// what else a method tells of each layer (VideoNSA: its gates).

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [520, 234, 42, 10, 44, 34];

function add(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

/**
 * layers: layer numbers; series: {name: {label, values (null: none)}}; now: index or -1 for all.
 */
export function drawChart(parent, layers, series, now, choose) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "Share kept by layer");
  const step = (WIDTH - LEFT - RIGHT) / Math.max(layers.length, 1);
  const x = (i) => LEFT + (i + 0.5) * step;
  const y = (share) => TOP + (1 - share) * (HEIGHT - TOP - BOTTOM);
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    add(svg, "line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(share), y2: y(share) });
    add(svg, "text", { x: LEFT - 6, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`);
  }
  const every = Math.ceil(layers.length / 14);
  layers.forEach((layer, i) => {
    if (i % every === 0) {
      add(svg, "text", { x: x(i), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, layer);
    }
  });
  add(svg, "text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "layer");
  if (now >= 0) {
    add(svg, "line", { class: "now", x1: x(now), x2: x(now), y1: TOP, y2: HEIGHT - BOTTOM });
  }
  let [place, line] = [LEFT, 12]; // of the legend
  for (const [name, { label, values }] of Object.entries(series)) {
    if (values.every((value) => value === null)) continue;
    const points = values.map((v, i) => (v === null ? null : `${x(i)},${y(v)}`)).filter(Boolean);
    add(svg, "polyline", { class: `series ${name}`, points: points.join(" ") });
    values.forEach((value, i) => {
      if (value !== null) add(svg, "circle", { class: `dot ${name}`, cx: x(i), cy: y(value), r: 2.5 });
    });
    const room = 40 + 6.4 * label.length;
    if (place + room > WIDTH) [place, line] = [LEFT, line + 16];
    add(svg, "line", { class: `series ${name}`, x1: place, x2: place + 22, y1: line, y2: line });
    add(svg, "text", { x: place + 27, y: line + 4 }, label);
    place += room;
  }
  layers.forEach((layer, i) => {
    const column = add(svg, "rect", {
      class: "column", x: LEFT + i * step, y: TOP, width: step, height: HEIGHT - TOP - BOTTOM,
    });
    const lines = Object.values(series)
      .filter(({ values }) => values[i] !== null)
      .map(({ label, values }) => `${label}: ${percent(values[i])}`);
    add(column, "title", {}, [`layer ${layer}`, ...lines].join("\n"));
    column.addEventListener("click", () => choose(i));
  });
  parent.replaceChildren(svg);
}
