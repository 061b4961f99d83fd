"""One PNG of a trace: the frames attended most, under the heat of their cubes.

For where there is no browser: the demo, ``vllm-adaspark ask --picture`` and ``analyze``.  Pillow
and NumPy are enough, which vLLM brings.  The viewer shows the rest of a trace.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .attended import GONE, cube_heat, cubes_of, most_attended

WIDTH, MARGIN, GAP, LINE = 1240, 28, 14, 24
COLUMNS, WIDEST = 6, 380  # of the frames
OPACITY = 0.65
INK, SOFT, GROUND = "#16181d", "#5b6270", "#ffffff"
ALWAYS = (159, 180, 199)  # tokens in no whole cube
NEVER = (58, 63, 73)  # cubes after the source
DROPPED = (236, 238, 242)  # tokens that the language model never saw
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


def save_heatmap(
    trace: dict[str, Any],
    path: str | Path,
    source: str = "answer",
    frames: int = 12,
    layer: int | None = None,
) -> Path:
    """Draw the frames of a trace that its source attended most.

    Args:
        trace: from ``traces.reader.read_offline`` or ``read_http``.
        path: PNG to write.
        source: a key of ``trace["heat"]``: whose attention is shown.
        frames: how many frames at the most; of those whose pictures the trace has, if it has any.
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
    title, facts = _heading(trace, source, layer)
    pictures = _frames(trace, heat, frames)
    rows = [pictures[i : i + COLUMNS] for i in range(0, len(pictures), COLUMNS)]
    tall = [max(picture.height for picture, _ in row) for row in rows]
    size = (WIDTH, 2 * MARGIN + 4 * LINE + sum(tall) + len(rows) * (LINE + GAP))
    sheet = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, _font(22))
    draw.text((MARGIN, MARGIN + 34), facts, SOFT, _font(14))
    y = MARGIN + 3 * LINE
    for row, height in zip(rows, tall, strict=True):
        for number, (picture, time) in enumerate(row):
            x = MARGIN + number * (pictures[0][0].width + GAP)
            sheet.paste(picture, (x, y))
            draw.text((x, y + picture.height + 5), time, SOFT, _font(13))
        y += height + LINE + GAP
    _scale(sheet, draw, y)
    path = Path(path)
    sheet.save(path, "PNG", optimize=True)
    return path


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


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _heading(trace: dict[str, Any], source: str, layer: int | None) -> tuple[str, str]:
    where = "mean of all layers" if layer is None else f"layer {layer}"
    whose = f"the {source}" if source in ("question", "answer") else source.replace(":", " ")
    facts = [f"{trace['video_tokens']:,} video tokens in {len(trace['cube_starts'])} cubes"]
    if trace.get("usage"):
        facts.append(f"{trace['usage']['flops_ratio']:.1%} of the dense FLOPs")
    if trace["cached_tokens"]:
        facts.append(f"{trace['cached_tokens']:,} cached tokens not shown")
    if trace["truncated"]:
        facts.append(f"cut: {trace['truncated']}")
    return f"Video cubes attended by {whose}, {where}", "   ·   ".join(facts)


def _frames(trace: dict[str, Any], heat: np.ndarray, wanted: int) -> list[tuple[Image.Image, str]]:
    """Frames under their heat, and the time of each."""
    places = sorted(trace["jpegs"]) or [
        (video, n) for video, facts in enumerate(trace["videos"]) for n in range(facts["grid"][0])
    ]
    places = most_attended(trace, heat, places, wanted)
    cubes = [cubes_of(trace, number) for number in range(len(trace["videos"]))]
    columns = min(len(places), COLUMNS)
    width = min((WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns, WIDEST)
    pictures = []
    for video, n in places:
        frame = cubes[video][n]
        size = (width, round(width * frame.shape[0] / frame.shape[1]))
        picture = Image.fromarray(colors(heat, frame)).resize(size, Image.Resampling.NEAREST)
        jpeg = trace["jpegs"].get((video, n))
        if jpeg is not None:
            # In grey, or the picture's colours would change those of the scale.
            below = Image.open(io.BytesIO(jpeg)).convert("L").convert("RGB").resize(size)
            picture = Image.blend(below, picture, OPACITY)
        pictures.append((picture, _time(trace, video, n)))
    return pictures


def _time(trace: dict[str, Any], video: int, frame: int) -> str:
    facts = trace["videos"][video]
    name = f"video {video + 1}, " if len(trace["videos"]) > 1 else ""
    seconds = facts["seconds_per_frame"]
    if seconds is None:
        return f"{name}frame pair {frame + 1} of {facts['grid'][0]}"
    return f"{name}{frame * seconds:.1f} s of {facts['grid'][0] * seconds:.0f} s"


def _scale(sheet: Image.Image, draw: ImageDraw.ImageDraw, y: int) -> None:
    """What the colours say."""
    ramp = Image.fromarray(gradient(np.linspace(0, 1, 200)).astype(np.uint8)[None])
    x = MARGIN
    for picture, width, text in (
        (ramp, 200, "0 to 100 % of (KV head, source token) pairs attended the cube"),
        (Image.new("RGB", (1, 1), ALWAYS), 16, "in no whole cube: always attended"),
        (Image.new("RGB", (1, 1), NEVER), 16, "after the source: no candidate"),
        (Image.new("RGB", (1, 1), DROPPED), 16, "dropped"),
    ):
        sheet.paste(picture.resize((width, 16)), (x, y))
        draw.text((x + width + 8, y), text, INK, _font(13))
        x += width + 8 + round(_font(13).getlength(text)) + 24
