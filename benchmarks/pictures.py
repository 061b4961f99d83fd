"""The two pictures of docs/concepts.md, drawn by the code they explain.

``python benchmarks/pictures.py`` writes docs/cube_order.png (how a small video's tokens fall into
KV blocks) and docs/selection.png (which cubes each tile keeps, by the tile rule).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import inputs
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.patches import Patch

from vllm_adaspark.methods.adaspark.reference import tile_attention
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.video.order import block_spread, cube_order

GRID = (8, 8, 16)  # frames, rows, columns of merged tokens
CUBE = (4, 4, 4)
BLOCK = 64
UNALIGNED = 41  # video tokens before the first block edge
SHARED = "#dddddd"  # a block the video shares with text
P = 0.8
QUESTION_ROW = 0.25  # height of a text token's row, where a cube's is 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in (("cube_order", draw_order), ("selection", draw_selection)):
        figure = picture()
        figure.savefig(out / f"{name}.png", dpi=130, facecolor="white")
        plt.close(figure)
        print(f"wrote {out / name}.png")


def draw_order() -> plt.Figure:
    """Above: the video as a box of tokens coloured by KV block.  Below: its first slab."""
    panels = (
        ("raster order (stock)", "raster", 0),
        ("cube order", "cube", 0),
        ("cube order, video starts inside a block", "cube", UNALIGNED),
    )
    figure = plt.figure(figsize=(12.5, 6.4))
    columns = figure.add_gridspec(1, 3, left=0.02, right=0.98, top=0.9, bottom=0.03, wspace=0.08)
    for column, (title, order, phase) in zip(columns, panels, strict=True):
        colours = _block_colours(order, phase)  # [T, H, W, 4]
        above, below = column.subgridspec(2, 1, height_ratios=(1.7, 1), hspace=0.04)
        _draw_box(figure.add_subplot(above, projection="3d"), colours)
        frames = below.subgridspec(2, 2, wspace=0.06, hspace=0.3)
        for frame in range(CUBE[0]):
            _draw_frame(figure.add_subplot(frames[frame // 2, frame % 2]), colours[frame], frame)
        spread = block_spread(GRID, CUBE, BLOCK, phase=phase, order=order)
        middle = column.get_position(figure)
        middle = (middle.x0 + middle.x1) / 2
        figure.text(middle, 0.95, title, ha="center", fontsize=12.5)
        caption = f"mean squared spread of a block: {spread:.2f}"
        caption += " (grey: shares text)" if phase else ""
        figure.text(middle, 0.91, caption, ha="center", fontsize=10, color="#555555")
    return figure


def draw_selection() -> plt.Figure:
    """A tile's row shows the cubes before it: kept by both KV heads, by one, or left out."""
    x = inputs.make("scenes")
    n = len(x.q)
    config = AdaSparkConfig(p_attn=P)
    _, tiles = tile_attention(x.q, x.k, x.v, x.is_video, inputs.BLOCK, (0, n), config)
    cubes = int(x.cube_of.max()) + 1
    first = inputs.TEXT_BEFORE // inputs.BLOCK  # block of the first cube
    tiles = [tile for tile in tiles if tile.block >= first]  # a tile per cube, then the question's

    nothing, left_out, one, both, dense, own, text = range(7)
    matrix = np.full((len(tiles), 1 + cubes), nothing)
    matrix[:, 0] = text
    for row, tile in enumerate(tiles):
        votes = tile.kept.sum(0).numpy()  # [candidates] KV heads that keep it
        for block, count in zip(tile.candidates, votes, strict=True):
            matrix[row, 1 + block - first] = dense if tile.dense else (left_out, one, both)[count]
        if tile.kind == "video":
            matrix[row, 1 + tile.block - first] = own

    legend = {
        "own cube (causal)": "#1f4e79",
        "kept by both KV heads": "#e07b00",
        "kept by one KV head": "#f8c98a",
        "left out": "#e9edf1",
        f"dense: fewer than {config.dense_below} cubes before": "#8fb3d4",
        "text before the video, always attended": "#7aa874",
    }
    by_value = dict(zip((own, both, one, left_out, dense, text), legend.values(), strict=True))
    palette = ListedColormap(["white", *(by_value[value] for value in range(1, 7))])

    figure, axis = plt.subplots(figsize=(8.6, 8.8), layout="constrained")
    heights = [1 if tile.kind == "video" else QUESTION_ROW for tile in tiles]
    edges = np.cumsum([0, *heights])
    style = {"cmap": palette, "vmin": 0, "vmax": 6, "edgecolor": "white"}
    axis.pcolormesh(np.arange(cubes + 2), edges[: cubes + 1], matrix[:cubes], lw=1.2, **style)
    axis.pcolormesh(np.arange(cubes + 2), edges[cubes:], matrix[cubes:], lw=0.25, **style)
    axis.set(aspect="equal", ylim=(edges[-1], 0))
    axis.tick_params(length=0)
    axis.set_xticks(
        [0.5, *np.arange(5, cubes + 1, 4) + 0.5], labels=["text", *range(5, cubes + 1, 4)]
    )
    shown = range(0, cubes, 4)
    axis.set_yticks(
        [*(row + 0.5 for row in shown), (edges[cubes] + edges[-1]) / 2],
        labels=[*(f"cube {row + 1}" for row in shown), f"question,\n{inputs.QUESTION} tokens"],
    )
    axis.spines[:].set_visible(False)
    axis.set(xlabel="cube (= KV block) attended", ylabel="query tile: a cube, or a text token")
    sparse = [tile for tile in tiles if not tile.dense]
    kept = sum(len(tile.tokens) * int(tile.kept.sum()) for tile in sparse)
    of = sum(len(tile.tokens) * tile.kept.numel() for tile in sparse)
    axis.set_title(f"Cubes kept at p = {P:g}: {kept / of:.0%} of those a sparse query could attend")
    axis.legend(
        handles=[Patch(color=colour, label=label) for label, colour in legend.items()],
        loc="upper right",
        frameon=False,
    )
    return figure


def _block_colours(order: str, phase: int) -> np.ndarray:
    """``[T, H, W, 4]`` RGBA: a colour per KV block, grey for blocks shared with text."""
    token_order = cube_order(GRID, CUBE, order)
    block = np.empty(len(token_order), dtype=int)
    block[token_order] = (np.arange(len(token_order)) + (BLOCK - phase) % BLOCK) // BLOCK
    whole = np.bincount(block)[block] == BLOCK
    palette = plt.get_cmap("tab20").colors
    palette = np.array([*palette[::2], *palette[1::2]])  # strong colours first, then light ones
    palette = np.delete(palette, [7, 17], axis=0)  # its two greys
    rgb = np.where(whole[:, None], palette[block % len(palette)], to_rgb(SHARED))
    return np.concatenate([rgb, np.ones((len(rgb), 1))], axis=1).reshape(*GRID, 4)


def _draw_box(axis: plt.Axes, colours: np.ndarray) -> None:
    solid = colours[:, ::-1].transpose(0, 2, 1, 3)  # [T, W, H, 4], rows counted from below
    axis.voxels(
        np.ones(solid.shape[:3], bool),
        facecolors=solid,
        edgecolor="white",
        linewidth=0.5,
        shade=False,  # the same colours as in the frames below
        clip_on=False,
    )
    axis.set_box_aspect((GRID[0], GRID[2], GRID[1]), zoom=1.3)
    axis.view_init(elev=24, azim=-38)
    axis.set(xticks=[], yticks=[], zticks=[])
    axis.set_xlabel("time", labelpad=-15)
    axis.set_ylabel("width", labelpad=-15)
    for side in (axis.xaxis, axis.yaxis, axis.zaxis):
        side.pane.set_visible(False)
        side.line.set_visible(False)
    axis.patch.set_visible(False)


def _draw_frame(axis: plt.Axes, colours: np.ndarray, frame: int) -> None:
    axis.imshow(colours)
    axis.set_xticks(np.arange(-0.5, GRID[2]), labels=[])
    axis.set_yticks(np.arange(-0.5, GRID[1]), labels=[])
    axis.grid(color="white", lw=0.6)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(f"frame {frame + 1}", fontsize=8.5, pad=2)


if __name__ == "__main__":
    main()
