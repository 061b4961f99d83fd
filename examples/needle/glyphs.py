"""The digits and letters on the cards: a sheet of masks, so that no machine's fonts matter.

`glyphs.png` has one row per character of `CHARACTERS` and one column per font. It was drawn once
from the DejaVu fonts that matplotlib brings along; to draw it again:

    python examples/needle/glyphs.py
"""

from functools import cache
from pathlib import Path

import cv2
import numpy as np

DIGITS = "0123456789"
LETTERS = "EFHKMNPRTVWXY"  # none that looks like a digit; A can pass for a 4, C for a 6, U for a 0
CHARACTERS = DIGITS + LETTERS
# The plainest first: training starts with them.
FONTS = (
    "DejaVuSans-Bold",
    "DejaVuSansMono-Bold",
    "DejaVuSans",
    "DejaVuSansMono",
    "DejaVuSerif-Bold",
    "DejaVuSerif",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
)
CELL = 64  # pixels
SHEET = Path(__file__).with_name("glyphs.png")


@cache
def mask(character: str, font: int, height: int, width: int, tall: int) -> np.ndarray:
    """A character in the middle of a frame, float32 [height, width] in 0 … 1.

    Args:
        character: one of `CHARACTERS`.
        font: index into `FONTS`.
        height, width: of the frame in pixels.
        tall: side in pixels of the square the glyph's cell is scaled to.
    """
    glyph = cv2.resize(_sheet()[CHARACTERS.index(character), font], (tall, tall)) / np.float32(255)
    frame = np.zeros((height, width), np.float32)
    top, left = (height - tall) // 2, (width - tall) // 2
    frame[top : top + tall, left : left + tall] = glyph
    return frame


@cache
def _sheet() -> np.ndarray:
    sheet = cv2.imread(str(SHEET), cv2.IMREAD_GRAYSCALE)
    if sheet is None:
        raise FileNotFoundError(f"{SHEET} is missing; draw it with `python {__file__}`")
    shape = (len(CHARACTERS), CELL, len(FONTS), CELL)
    return np.ascontiguousarray(sheet.reshape(shape).swapaxes(1, 2))


def draw_sheet() -> None:
    """Write `glyphs.png` anew. Needs matplotlib (for its fonts) and Pillow."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    sheet = Image.new("L", (CELL * len(FONTS), CELL * len(CHARACTERS)))
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), CELL - 4)
        for row, character in enumerate(CHARACTERS):
            left, top, right, bottom = draw.textbbox((0, 0), character, font=font)
            x = (column + 0.5) * CELL - (left + right) / 2
            y = (row + 0.5) * CELL - (top + bottom) / 2
            draw.text((x, y), character, fill=255, font=font)
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    draw_sheet()
