"""One PNG of a trace: frames under their heat map, heat over time, the curve by layer, the text.

Pillow and NumPy only, which vLLM brings; so the demo, ``vllm-adaspark ask --picture`` and analysis
can draw where matplotlib is not installed.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..video.order import cube_order, decode_walk
from .reader import spread

WIDTH, MARGIN, GAP = 1240, 28, 14
SMOOTH = 2  # drawn so much larger, then reduced: Pillow's lines have no soft edges
OPACITY = 0.65
INK, SOFT, LINE, GROUND = "#16181d", "#5b6270", "#d5d9e0", "#ffffff"
ALWAYS = (159, 180, 199)  # tokens in no whole cube
NEVER = (58, 63, 73)  # cubes after the source
DROPPED = (236, 238, 242)  # tokens that the language model never saw
GONE = -2  # their cube
# The same colours as the viewer's (server/viewer/stage.js): samples of "inferno".
COLORS = np.array(
    [
        (0, 0, 4),
        (40, 11, 84),
        (101, 21, 110),
        (159, 42, 99),
        (212, 72, 66),
        (245, 125, 21),
        (250, 193, 39),
        (252, 255, 164),
    ],
    float,
)
SERIES = {
    "video": ("video tokens", "#6b4fd8"),
    "question": ("question", "#0b7d8c"),
    "answer": ("answer", "#c2410c"),
}


def save_heatmap(
    trace: dict[str, Any],
    path: str | Path,
    source: str = "answer",
    frames: int = 6,
    layer: int | None = None,
) -> Path:
    """Draw a trace.

    Args:
        trace: from ``traces.reader.read_offline`` or ``read_http``.
        path: PNG to write.
        source: a key of ``trace["heat"]``: whose attention is shown.
        frames: how many frames at the most.
        layer: the layer shown; None for the mean of all.

    Returns:
        ``path``.

    Raises:
        ValueError: a source, a layer or a number of frames that the trace does not have.
    """
    if source not in trace["heat"]:
        raise ValueError(f"source={source!r}: the trace has {', '.join(trace['heat'])}")
    if layer is not None and layer not in trace["layers"]:
        raise ValueError(f"layer={layer!r}: the trace has {trace['layers']}")
    if frames < 1:
        raise ValueError(f"frames={frames!r}: must be at least 1")
    heat = cube_heat(trace["heat"][source]["heat"], trace["layers"], layer)
    sheet = _Sheet()
    _heading(sheet, trace, source, layer)
    _frames(sheet, trace, heat, frames)
    for number in range(len(trace["videos"])):
        _timeline(sheet, trace, heat, number)
    _scale_and_curve(sheet, trace)
    path = Path(path)
    sheet.finish().save(path, "PNG", optimize=True)
    return path


def cube_heat(rows: list[list[float | None]], layers: list[int], layer: int | None) -> np.ndarray:
    """``[cubes]`` of one layer or the mean of all; NaN for cubes after the source."""
    heat = np.array(rows, dtype=float)
    return heat.mean(0) if layer is None else heat[layers.index(layer)]


def cubes_of(trace: dict[str, Any], number: int) -> np.ndarray:
    """``[t, h, w]``: the cube of each of a video's tokens; -1: in no whole one, -2: dropped."""
    video, size = trace["videos"][number], trace["block_size"]
    if video.get("walk") is None:
        walk = cube_order(tuple(video["grid"]), tuple(video["cube"]), video["order"])
    else:
        walk = decode_walk(video["walk"])
    block = (video["offset"] + np.arange(len(walk))) // size
    cube_of_block = {start // size: nth for nth, start in enumerate(trace["cube_starts"])}
    cubes = np.full(np.prod(video["grid"]), GONE)
    cubes[walk] = [cube_of_block.get(each, -1) for each in block.tolist()]
    return cubes.reshape(video["grid"])


def colors(heat: np.ndarray, cubes: np.ndarray) -> np.ndarray:
    """``[..., 3]`` uint8 of the tokens whose cubes are ``cubes [...]``."""
    share = np.append(heat, [0.0, 0.0])[cubes]  # -1 and -2 take the last two
    rgb = gradient(np.nan_to_num(share))
    rgb[np.isnan(share)] = NEVER
    rgb[cubes < 0] = ALWAYS
    rgb[cubes == GONE] = DROPPED
    return rgb.astype(np.uint8)


def gradient(share: np.ndarray) -> np.ndarray:
    """Colours of shares from 0 to 1, ``[..., 3]``."""
    at = np.clip(share, 0, 1) * (len(COLORS) - 1)
    low = np.minimum(at.astype(int), len(COLORS) - 2)
    return COLORS[low] + (COLORS[low + 1] - COLORS[low]) * (at - low)[..., None]


class _Sheet:
    """White paper that grows downwards; coordinates are those of the finished picture."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", (WIDTH * SMOOTH, 4000 * SMOOTH), GROUND)
        self._draw = ImageDraw.Draw(self._image)
        self.y = MARGIN

    def text(self, x: float, y: float, text: str, size: int = 15, fill: str = INK, **how) -> None:
        self._draw.text((x * SMOOTH, y * SMOOTH), text, fill, _font(size), **how)

    def wrapped(self, text: str, indent: float, size: int = 15, lines: int = 4) -> None:
        """Text from ``y`` on, at most so many lines; ``y`` moves below it."""
        for line in _wrap(text, WIDTH - 2 * MARGIN - indent, size, lines):
            self.text(MARGIN + indent, self.y, line, size)
            self.y += size * 1.45

    def line(self, points: list[tuple[float, float]], fill: str, width: float = 1) -> None:
        scaled = [(x * SMOOTH, y * SMOOTH) for x, y in points]
        self._draw.line(scaled, fill, round(width * SMOOTH), joint="curve")

    def dot(self, x: float, y: float, fill: str, radius: float = 3) -> None:
        self._draw.circle((x * SMOOTH, y * SMOOTH), radius * SMOOTH, fill)

    def paste(self, image: Image.Image, x: float, y: float, w: float, h: float, how: int) -> None:
        size = (round(w * SMOOTH), round(h * SMOOTH))
        self._image.paste(image.resize(size, how), (round(x * SMOOTH), round(y * SMOOTH)))

    def finish(self) -> Image.Image:
        height = round(self.y + MARGIN)
        cut = self._image.crop((0, 0, WIDTH * SMOOTH, height * SMOOTH))
        return cut.resize((WIDTH, height), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * SMOOTH)


def _wrap(text: str, width: float, size: int, lines: int) -> list[str]:
    """``text`` in lines of at most ``width``; the last says if there was more."""
    font, out = _font(size), [""]
    for word in text.split():
        longer = f"{out[-1]} {word}".strip()
        if font.getlength(longer) <= width * SMOOTH or not out[-1]:
            while font.getlength(longer) > width * SMOOTH:  # a word longer than a line
                longer = longer[:-1]
            out[-1] = longer
        elif len(out) == lines:
            out[-1] = out[-1][:-1] + "…"
            break
        else:
            out.append(word)
    return out


def _heading(sheet: _Sheet, trace: dict[str, Any], source: str, layer: int | None) -> None:
    where = "mean of all layers" if layer is None else f"layer {layer}"
    whose = f"the {source}" if source in ("question", "answer") else source.replace(":", " ")
    sheet.text(MARGIN, sheet.y, f"Video cubes attended by {whose}, {where}", 22)
    sheet.y += 36
    facts = [f"{trace['video_tokens']:,} video tokens in {len(trace['cube_starts'])} cubes"]
    settings = trace["settings"]
    facts += [f"{k} {settings[k]}" for k in ("flops", "p_attn", "keep", "p_ffn") if settings.get(k)]
    if trace.get("usage"):
        facts.append(f"{trace['usage']['flops_ratio']:.1%} of the dense FLOPs")
    if trace["cached_tokens"]:
        facts.append(f"{trace['cached_tokens']:,} cached tokens not shown")
    if trace["truncated"]:
        facts.append(f"cut: {trace['truncated']}")
    sheet.text(MARGIN, sheet.y, "   ·   ".join(facts), 14, SOFT)
    sheet.y += 32
    for kind in ("question", "answer"):
        spans = [span for span in trace["spans"] if span["kind"] == kind]
        if text := " … ".join(filter(None, map(_words, spans))):
            sheet.text(MARGIN, sheet.y, kind, 14, SOFT)
            sheet.wrapped(text, 84)
    sheet.y += 12


def _words(span: dict[str, Any]) -> str:
    """A span's text without the chat template's tokens and what comes after them."""
    plain = ["\0" if t.startswith("<|") and t.endswith("|>") else t for t in span.get("texts", ())]
    return next(filter(None, map(str.strip, "".join(plain).split("\0"))), "")


def _frames(sheet: _Sheet, trace: dict[str, Any], heat: np.ndarray, wanted: int) -> None:
    """A strip of frames under their heat, with the time of each."""
    places = sorted(trace["jpegs"]) or [
        (video, n)
        for video, facts in enumerate(trace["videos"])
        for n in spread(facts["grid"][0], wanted)
    ]
    places = [places[i] for i in spread(len(places), wanted)]
    cubes = [cubes_of(trace, number) for number in range(len(trace["videos"]))]
    columns = min(len(places), 6)
    width = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    width = min(width, 380)
    for first in range(0, len(places), columns):
        tallest = 0.0
        for i, (video, n) in enumerate(places[first : first + columns]):
            frame = cubes[video][n]
            height = width * frame.shape[0] / frame.shape[1]
            tallest = max(tallest, height)
            overlay = Image.fromarray(colors(heat, frame))
            size = (round(width * SMOOTH), round(height * SMOOTH))
            overlay = overlay.resize(size, Image.Resampling.NEAREST)
            jpeg = trace["jpegs"].get((video, n))
            if jpeg is not None:
                # In grey, or the picture's colours would change those of the scale.
                below = Image.open(io.BytesIO(jpeg)).convert("L").convert("RGB").resize(size)
                overlay = Image.blend(below, overlay, OPACITY)
            x = MARGIN + i * (width + GAP)
            sheet.paste(overlay, x, sheet.y, width, height, Image.Resampling.NEAREST)
            sheet.text(x, sheet.y + height + 5, _time(trace, video, n), 13, SOFT)
        sheet.y += tallest + 30
    sheet.y += 4


def _time(trace: dict[str, Any], video: int, frame: int) -> str:
    facts = trace["videos"][video]
    name = f"video {video + 1}, " if len(trace["videos"]) > 1 else ""
    seconds = facts["seconds_per_frame"]
    if seconds is None:
        return f"{name}frame pair {frame + 1} of {facts['grid'][0]}"
    return f"{name}{frame * seconds:.1f} s of {facts['grid'][0] * seconds:.0f} s"


def _timeline(sheet: _Sheet, trace: dict[str, Any], heat: np.ndarray, number: int) -> None:
    """The mean heat of each frame, as a band over the width."""
    cubes = cubes_of(trace, number)
    share = np.append(heat, [np.nan, np.nan])[cubes].reshape(len(cubes), -1)
    known = ~np.isnan(share)
    mean = np.nansum(share, 1) / np.maximum(known.sum(1), 1)
    rgb = gradient(mean)
    rgb[~known.any(1)] = ALWAYS
    band = Image.fromarray(rgb.astype(np.uint8)[None])
    name = f" of video {number + 1}" if len(trace["videos"]) > 1 else ""
    sheet.text(MARGIN, sheet.y, f"mean heat of each frame{name}, from start to end", 13, SOFT)
    nearest = Image.Resampling.NEAREST
    sheet.paste(band, MARGIN, sheet.y + 20, WIDTH - 2 * MARGIN, 18, nearest)
    sheet.y += 54


def _scale_and_curve(sheet: _Sheet, trace: dict[str, Any]) -> None:
    top, height = sheet.y + 8, 230
    _curve(sheet, trace, MARGIN + 44, top + 26, 700, height - 60)
    x = MARGIN + 44 + 700 + 60
    sheet.text(x, top, "share of (KV head, source token) pairs", 14)
    sheet.text(x, top + 20, "that attended the cube", 14)
    ramp = Image.fromarray(gradient(np.linspace(0, 1, 256)).astype(np.uint8)[None])
    sheet.paste(ramp, x, top + 48, 330, 16, Image.Resampling.BILINEAR)
    for share in (0, 0.5, 1):
        sheet.text(x + 330 * share, top + 68, f"{share:.0%}", 13, SOFT, anchor="ma")
    for i, (rgb, text) in enumerate(
        (
            (ALWAYS, "in no whole cube: always attended"),
            (NEVER, "after the source: no candidate"),
            (DROPPED, "dropped before the language model"),
        )
    ):
        y = top + 102 + 24 * i
        swatch = Image.new("RGB", (1, 1), rgb)
        sheet.paste(swatch, x, y, 16, 16, Image.Resampling.NEAREST)
        sheet.text(x + 24, y, text, 14)
    sheet.y = top + height


def _curve(sheet: _Sheet, trace: dict[str, Any], x: float, y: float, w: float, h: float) -> None:
    """Share of the preceding cubes attended, by layer and kind of token."""
    layers = trace["layers"]
    sheet.text(x - 44, y - 26, "preceding cubes attended, by layer:", 14)
    step = w / len(layers)
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = y + (1 - share) * h
        sheet.line([(x, at), (x + w, at)], LINE)
        sheet.text(x - 8, at, f"{share:.0%}", 12, SOFT, anchor="rm")
    for i in range(0, len(layers), -(-len(layers) // 16)):
        sheet.text(x + (i + 0.5) * step, y + h + 6, str(layers[i]), 12, SOFT, anchor="ma")
    sheet.text(x + w / 2, y + h + 22, "layer", 12, SOFT, anchor="ma")
    legend = x + 225
    for kind, (label, color) in SERIES.items():
        values = trace["density"][kind]
        points = [
            (x + (i + 0.5) * step, y + (1 - v) * h) for i, v in enumerate(values) if v is not None
        ]
        if not points:
            continue
        sheet.line(points, color, 2)
        for point in points:
            sheet.dot(*point, color)
        sheet.line([(legend, y - 17), (legend + 24, y - 17)], color, 2)
        sheet.text(legend + 31, y - 26, label, 14)
        legend += 145
