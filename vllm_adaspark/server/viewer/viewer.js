// The page's state: one trace, one source of attention, one layer, one frame.

import * as api from "./api.js";
import { drawChart } from "./chart.js";
import {
  GONE, Geometry, bit, drawScale, drawSegments, drawStage, drawStrip,
} from "./stage.js";

const $ = (id) => document.getElementById(id);
const PLAY_MS = 400;
const MANY_TOKENS = 3000; // of a span, shown as buttons

const state = {
  meta: null, geometry: null, heat: null, ffn: null,
  source: "answer", // whose attention is shown
  wanted: "answer", // and whose was asked for last
  layer: -1, video: 0, frame: 0, // layer: an index, -1 for the mean of all
  image: null, images: new Map(), playing: null,
};

// -- messages and errors --------------------------------------------------------------------------

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

let running = 0; // attempts under way: the page is busy until all it asked for is shown

function count(change) {
  running += change;
  document.body.setAttribute("aria-busy", String(running > 0));
}

/** Run something that talks to the server; ask for the key if it must, say what went wrong. */
async function attempt(action) {
  count(1);
  try {
    say("");
    await action();
  } catch (error) {
    if (error instanceof api.Unauthorized) {
      $("key").hidden = false;
      $("view").hidden = true;
      $("empty").hidden = true;
      $("key-value").focus();
    }
    say(error.message);
  } finally {
    count(-1);
  }
}

// -- which trace ----------------------------------------------------------------------------------

const when = (seconds) => new Date(seconds * 1000).toLocaleTimeString();

async function refresh() {
  const traces = await api.listTraces();
  $("key").hidden = true;
  $("empty").hidden = traces.length > 0;
  $("trace").disabled = $("delete").disabled = traces.length === 0;
  $("trace").replaceChildren(...traces.map((trace) => {
    const tokens = `${trace.video_tokens.toLocaleString()} video tokens`;
    const text = `${when(trace.started)} · ${tokens} · ${trace.request_id}`;
    return new Option(trace.finished === null ? `${text} (running)` : text, trace.id);
  }));
  if (!traces.length) {
    state.meta = null;
    $("view").hidden = true;
    return;
  }
  const wanted = location.hash.slice(1);
  const known = traces.some((trace) => trace.id === wanted);
  $("trace").value = known ? wanted : traces[0].id;
  await choose($("trace").value);
}

async function choose(id) {
  stop();
  const [meta, ffn] = await Promise.all([api.getTrace(id), api.getFfn(id)]);
  for (const image of state.images.values()) image.close?.();
  // No heat until this trace's own is there: the last one's has other cubes.
  const fresh = { heat: null, images: new Map(), image: null, frame: 0, layer: -1 };
  Object.assign(state, { meta, ffn, ...fresh });
  history.replaceState(null, "", `#${id}`);
  $("view").hidden = false;
  for (const part of document.querySelectorAll(".dropping")) part.hidden = meta.dropping === null;
  for (const part of document.querySelectorAll(".choosing")) part.hidden = meta.dropping !== null;
  for (const part of document.querySelectorAll(".skipping")) part.hidden = !skipsFfn();
  $("show-ffn").checked &&= skipsFfn();
  const options = meta.layers.map((layer, i) => new Option(`${layer}`, i));
  $("layer").replaceChildren(new Option("mean of all", -1), ...options);
  $("video").replaceChildren(...meta.videos.map((_, i) => new Option(i + 1, i)));
  $("video-choice").hidden = meta.videos.length < 2;
  $("cube").max = meta.cube_starts.length - 1;
  $("token").max = Math.max(...meta.spans.map((span) => span.end)) - 1;
  showText();
  showFacts();
  await Promise.all([setVideo(0), setSource(firstSource())]);
}

/** Whether the method may leave tokens out of the FFN. */
const skipsFfn = () => "p_ffn" in state.meta.settings;

/** VideoNSA's gates: pairs of a label and the means of each layer. */
const gates = () => Object.entries(state.meta.means)
  .filter(([name]) => name.startsWith("gate_"))
  .map(([name, values]) => [name.replace("_", " "), values]);

/** The answer, else the question; the last cube where the method has text attend to everything. */
function firstSource() {
  const { density, cube_starts: cubes, dropping } = state.meta;
  const shares = [...density.question, ...density.answer].filter((share) => share !== null);
  const dense = shares.every((share) => share === 1);
  const leaves = density.video.some((share) => share !== null && share < 1);
  if (dropping === null && dense && leaves) return `cube:${cubes.length - 1}`;
  return density.answer.some((share) => share !== null) ? "answer" : "question";
}

function setVideo(number) {
  const { meta } = state;
  const before = meta.videos.slice(0, number).reduce((sum, video) => sum + video.tokens, 0);
  state.video = number;
  state.geometry = new Geometry(meta, number, before);
  $("frame").max = state.geometry.frames - 1;
  return setFrame(0);
}

// -- what is shown --------------------------------------------------------------------------------

async function setSource(source) {
  const { meta } = state;
  state.wanted = source;
  const heat = await api.getHeat(meta.id, source);
  if (state.meta !== meta || state.wanted !== source) return; // something else was asked since
  Object.assign(state, { source, heat });
  const [kind, number] = source.split(":");
  for (const radio of document.getElementsByName("source")) radio.checked = radio.value === kind;
  if (number !== undefined) $(kind).value = number;
  for (const button of $("text").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(source === `token:${button.dataset.token}`));
  }
  const missing = heat.wanted - heat.tokens;
  $("note").textContent = missing <= 0 ? "" :
    `${missing} of ${heat.wanted} source tokens were not recorded: they came from the prefix ` +
    "cache, were never read, or the trace was cut.";
  draw();
}

async function setFrame(frame) {
  const { geometry, images, meta, video } = state;
  state.frame = Math.min(Math.max(frame, 0), geometry.frames - 1);
  $("frame").value = state.frame;
  const seconds = meta.videos[video].seconds_per_frame;
  const at = seconds === null ? "" : ` · ${(state.frame * seconds).toFixed(1)} s`;
  $("frame-label").textContent = `${state.frame + 1} of ${geometry.frames}${at}`;
  const key = `${video}/${state.frame}`;
  if (!images.has(key) && state.frame < meta.videos[video].frames) {
    images.set(key, await api.getFrame(meta.id, video, state.frame));
    if (state.images !== images || key !== `${state.video}/${state.frame}`) return; // moved on
  }
  state.image = images.get(key) ?? null;
  draw();
}

function setLayer(layer) {
  state.layer = Math.min(Math.max(layer, -1), state.meta.layers.length - 1);
  $("layer").value = state.layer;
  draw();
}

/** Per cube: the chosen layer's heat, or the mean of all layers. */
function heatNow() {
  const rows = state.heat.heat;
  if (state.layer >= 0) return rows[state.layer];
  return rows[0].map((first, cube) =>
    first === null ? null : rows.reduce((sum, row) => sum + row[cube], 0) / rows.length);
}

/** By raster cell: its cube's heat; where tokens were dropped between layers, how many saw it. */
function heatOf(cell, heat) {
  if (state.meta.dropping !== null) return ranNow(cell);
  const cube = state.geometry.cube[cell];
  return cube < 0 ? undefined : heat[cube];
}

/** The segments of the video that is shown. */
const segments = () => state.meta.dropping.segments.filter(({ video }) => video === state.video);

/** By raster cell: the share of the shown layers in which it ran the FFN; null: not recorded. */
function ranNow(cell) {
  const { ffn, geometry, layer } = state;
  if (geometry.cube[cell] === GONE) return null;
  const token = geometry.tokensBefore + geometry.nth[cell];
  if (!bit(ffn.recorded, token)) return null;
  const rows = layer >= 0 ? [ffn.ran[layer]] : ffn.ran;
  return rows.reduce((sum, row) => sum + bit(row, token), 0) / rows.length;
}

function draw() {
  if (!state.heat || !state.geometry) return;
  const cubes = heatNow();
  const heat = (cell) => heatOf(cell, cubes);
  const [kind, number] = state.source.split(":");
  drawStage($("stage"), {
    geometry: state.geometry,
    frame: state.frame,
    image: state.image,
    heat,
    ran: ranNow,
    showHeat: $("show-heat").checked,
    showFfn: $("show-ffn").checked,
    showOrder: $("show-order").checked,
    opacity: $("opacity").value / 100,
    chosen: kind === "cube" ? Number(number) : -1,
  });
  drawStrip($("strip"), state.geometry, heat, state.frame);
  const { density, dropping } = state.meta;
  if (dropping !== null) drawSegments($("segments"), state.geometry, segments(), state.frame);
  const series = dropping !== null ? {
    ffn: { label: "video tokens alive", values: state.ffn.share },
  } : {
    video: { label: "video", values: density.video },
    question: { label: "question", values: density.question },
    answer: { label: "answer", values: density.answer },
  };
  if (skipsFfn()) series.ffn = { label: "FFN, video tokens", values: state.ffn.share };
  for (const [label, values] of gates()) series[label.replace(" ", "_")] = { label, values };
  drawChart($("chart"), state.meta.layers, series, state.layer, setLayer);
  const layer = state.layer < 0 ? "all layers" : `layer ${state.meta.layers[state.layer]}`;
  const by = kind === "answer" || kind === "question" ? `the ${kind}` : `${kind} ${number}`;
  const what = dropping !== null ? "tokens alive" : `attended by ${by}`;
  $("stage").setAttribute("aria-label", `Frame ${state.frame + 1}, ${what}, ${layer}`);
}

// -- text and facts -------------------------------------------------------------------------------

function showText() {
  const children = [];
  for (const span of state.meta.spans) {
    if (span.kind === "video") continue;
    const heading = document.createElement("h3");
    heading.textContent = span.kind === "before" ? "before the video" : span.kind;
    const paragraph = document.createElement("div");
    const texts = span.texts ?? span.ids.map((id) => `#${id} `);
    texts.slice(0, MANY_TOKENS).forEach((text, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.token = span.start + i;
      button.title = `token ${span.start + i}`;
      button.textContent = text.replaceAll("\n", "⏎");
      if (/^<\|.*\|>$/.test(text)) button.className = "special";
      paragraph.append(button);
    });
    if (texts.length > MANY_TOKENS) paragraph.append(`… ${texts.length - MANY_TOKENS} more`);
    children.push(heading, paragraph);
  }
  $("text").replaceChildren(...children);
}

const flops = (value) => {
  const units = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1, ""]];
  const [factor, unit] = units.find(([f]) => value >= f) ?? [1, ""];
  return `${(value / factor).toPrecision(3)} ${unit}FLOPs`;
};

/** How many segments there are, and how many tokens are left from which layer on. */
function showDropping(row) {
  const { layers, segments: all } = state.meta.dropping;
  const relevant = all.filter((segment) => segment.relevant).length;
  const known = all.some(({ relevance }) => relevance !== null);
  row("segments", `${all.length}` + (known ? `, of them ${relevant} relevant` : ""));
  const left = layers.map((layer, event) => {
    const kept = all.reduce((sum, segment) => sum + segment.kept[event], 0);
    return `${kept.toLocaleString()} from layer ${layer + 1} on`;
  });
  row("video tokens", `${state.meta.video_tokens.toLocaleString()}, then ${left.join(", ")}`);
  $("ribbon").textContent = known
    ? "Bright ones are closest to the question; those with a green bar keep more."
    : "Which of them the question is about is not known: this server has no encoder.";
}

/** What the ribbon says where the pointer is. */
function pointSegment(event) {
  const box = $("segments").getBoundingClientRect();
  const frame = Math.floor(((event.clientX - box.left) / box.width) * state.geometry.frames);
  const nth = segments().findIndex(({ frames: [first, end] }) => first <= frame && frame < end);
  if (nth < 0) return;
  const { frames: [first, end], tokens, kept, relevance, relevant } = segments()[nth];
  const about = relevance === null ? ""
    : ` · relevance ${relevance.toFixed(3)}${relevant ? " (relevant)" : ""}`;
  const left = kept.map((n, i) => `${n} from layer ${state.meta.dropping.layers[i] + 1} on`);
  $("pointed").textContent = `segment ${nth + 1} · frames ${first + 1} to ${end}${about} · ` +
    `${tokens} tokens, ${left.join(", ")}`;
}

function showFacts() {
  const { meta, ffn } = state;
  const rows = [];
  const row = (name, value, warn) => rows.push([name, value, warn]);
  row("id", meta.request_id);
  const took = meta.finished === null ? "running" : `${(meta.finished - meta.started).toFixed(2)} s`;
  row("started", `${new Date(meta.started * 1000).toLocaleString()} (${took})`);
  row("tokens", `${meta.prompt_tokens.toLocaleString()} prompt, of them ` +
    `${meta.video_tokens.toLocaleString()} video; ${meta.answer_tokens.toLocaleString()} answer`);
  meta.videos.forEach((video, i) => {
    const [t, h, w] = video.grid;
    row(meta.videos.length > 1 ? `video ${i + 1}` : "video",
      `${t} frame pairs × ${h} × ${w} tokens, order ${video.order}`);
    const dropped = t * h * w - video.tokens;
    if (dropped) {
      row("dropped", `${dropped.toLocaleString()} of these tokens, before the language model`);
    }
  });
  if (meta.dropping !== null) showDropping(row);
  else row("cubes", `${meta.cube_starts.length} of ${meta.block_size} tokens`);
  const settings = Object.entries(meta.settings).filter(([k, v]) => v !== null && k !== "trace");
  row("settings", settings.map(([k, v]) =>
    `${k} ${[v].flat().join(k === "cube" ? "×" : "/")}`).join(", "));
  const { usage } = meta;
  if (usage?.flops_ratio !== undefined) {
    const cost = usage.flops ? `: ${flops(usage.flops.executed.total)} of ` +
      flops(usage.flops.dense.total) : "";
    row("FLOPs", `${(100 * usage.flops_ratio).toFixed(1)} % of dense${cost}`);
  } else {
    row("FLOPs", "counted when the request ends");
  }
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  if (skipsFfn() || meta.dropping !== null) {
    row(meta.dropping === null ? "FFN" : "alive",
      `${(100 * mean(ffn.share)).toFixed(1)} % of the recorded video tokens, mean of all layers`);
  }
  for (const [name, values] of gates()) row(name, `${mean(values).toFixed(3)}, mean of all layers`);
  if (meta.cached_tokens) {
    row("cached", `${meta.cached_tokens.toLocaleString()} prompt tokens came from the prefix ` +
      "cache and have no trace; send a cache_salt to have all", true);
  }
  if (meta.truncated) row("cut", meta.truncated, true);
  $("facts").replaceChildren(...rows.flatMap(([name, value, warn]) => {
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    if (warn) text.className = "warn";
    return [term, text];
  }));
}

// -- pointer and keys -----------------------------------------------------------------------------

function cellAt(event) {
  const { geometry: g, frame } = state;
  const box = $("stage").getBoundingClientRect();
  const row = Math.floor(((event.clientY - box.top) / box.height) * g.rows);
  const column = Math.floor(((event.clientX - box.left) / box.width) * g.columns);
  if (row < 0 || column < 0 || row >= g.rows || column >= g.columns) return null;
  return { row, column, cell: g.cell(frame, row, column) };
}

function point(event) {
  const at = state.heat && cellAt(event);
  if (!at) return;
  const { geometry: g } = state;
  const cube = g.cube[at.cell];
  if (cube === GONE) {
    $("pointed").textContent =
      `row ${at.row}, column ${at.column} · dropped before the language model`;
    return;
  }
  const token = g.offset + g.nth[at.cell];
  if (state.meta.dropping !== null) {
    const ran = state.ffn.ran.filter((row) => bit(row, g.tokensBefore + g.nth[at.cell])).length;
    const all = state.meta.layers.length;
    $("pointed").textContent = `token ${token} · row ${at.row}, column ${at.column} · ` +
      (ran < all ? `seen by the first ${ran} of ${all} layers` : "seen by all layers");
    return;
  }
  const share = cube < 0 ? null : heatNow()[cube];
  const heat = cube < 0 ? "in no whole cube, always attended"
    : share === null ? "after the source" : `attended ${(100 * share).toFixed(1)} %`;
  const ran = ranNow(at.cell);
  const ffn = !skipsFfn() ? "" : ran === null ? " · FFN not recorded"
    : ` · FFN in ${(100 * ran).toFixed(0)} % of layers shown`;
  const name = cube < 0 ? "" : `cube ${cube} · `;
  $("pointed").textContent =
    `${name}token ${token} · row ${at.row}, column ${at.column} · ${heat}${ffn}`;
}

function stop() {
  clearInterval(state.playing);
  state.playing = null;
  $("play").textContent = "Play";
  $("play").setAttribute("aria-pressed", "false");
}

function play() {
  if (state.playing !== null) return stop();
  state.playing = setInterval(() => {
    attempt(() => setFrame((state.frame + 1) % state.geometry.frames));
  }, PLAY_MS);
  $("play").textContent = "Pause";
  $("play").setAttribute("aria-pressed", "true");
}

function onKey(event) {
  if (!state.meta || $("view").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, button, #text")) return; // they have keys of their own
  const keys = {
    ArrowLeft: () => attempt(() => setFrame(state.frame - 1)),
    ArrowRight: () => attempt(() => setFrame(state.frame + 1)),
    ArrowUp: () => setLayer(state.layer - 1),
    ArrowDown: () => setLayer(state.layer + 1),
    " ": play,
  };
  if (keys[event.key]) {
    event.preventDefault();
    keys[event.key]();
  }
}

// -- wiring ---------------------------------------------------------------------------------------

const sourceNow = (kind) => (kind === "token" || kind === "cube" ? `${kind}:${$(kind).value}` : kind);

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey($("key-value").value);
  $("key-value").value = "";
  attempt(refresh);
});
$("refresh").addEventListener("click", () => attempt(refresh));
$("delete").addEventListener("click", () => attempt(async () => {
  await api.deleteTrace(state.meta.id);
  await refresh();
}));
$("trace").addEventListener("change", () => attempt(() => choose($("trace").value)));
$("play").addEventListener("click", play);
$("frame").addEventListener("input", () => attempt(() => setFrame(Number($("frame").value))));
$("layer").addEventListener("change", () => setLayer(Number($("layer").value)));
$("video").addEventListener("change", () => {
  attempt(() => setVideo(Number($("video").value)));
  draw();
});
for (const id of ["show-heat", "show-ffn", "show-order", "opacity"]) {
  $(id).addEventListener("input", draw);
}
for (const radio of document.getElementsByName("source")) {
  radio.addEventListener("change", () => attempt(() => setSource(sourceNow(radio.value))));
}
for (const kind of ["token", "cube"]) {
  $(kind).addEventListener("change", () => attempt(() => setSource(sourceNow(kind))));
}
$("text").addEventListener("click", ({ target }) => {
  const { token } = target.dataset;
  if (token !== undefined && !state.meta.dropping) attempt(() => setSource(`token:${token}`));
});
$("stage").addEventListener("pointermove", point);
$("segments").addEventListener("pointermove", pointSegment);
$("stage").addEventListener("click", (event) => {
  const cube = state.geometry.cube[cellAt(event)?.cell] ?? -1;
  if (cube >= 0 && !state.meta.dropping) attempt(() => setSource(`cube:${cube}`));
});
$("strip").addEventListener("click", (event) => {
  const box = $("strip").getBoundingClientRect();
  const frame = Math.floor(((event.clientX - box.left) / box.width) * state.geometry.frames);
  attempt(() => setFrame(frame));
});
document.addEventListener("keydown", onKey);
new ResizeObserver(draw).observe(document.querySelector(".stage"));
drawScale($("scale"));
attempt(refresh);
