"""A file of variable frame rate with three cards that the needle model can read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from needle import NEEDLE  # benchmarks; puts examples/needle on the path
from video_files import encode

CHECKPOINT = NEEDLE / "checkpoint"
SIZE = (112, 112)
# 30 frames a second for ten seconds, then one every two.
TIMES = [number / 30 for number in range(300)] + [10 + 2.0 * number for number in range(25)]
# Colour and digit of the card on these frames.
CARDS = {"red": (range(30), 7), "green": (range(312, 313), 4), "blue": (range(324, 325), 2)}
QUESTIONS = {
    f"Which digit is on the {colour} card?": str(digit) for colour, (_, digit) in CARDS.items()
}


def write(path: Path) -> Path:
    """Write the file: cards in its first second, in its sparse part, and on its very last frame."""
    import cards
    import haystack

    rng = np.random.default_rng(5)
    pictures = haystack.clip(rng, SIZE, len(TIMES) // 2 + 1, "calm")[: len(TIMES)]
    for colour, (places, digit) in CARDS.items():
        card = cards.number_card(rng, SIZE, cards.COLOUR_NAMES.index(colour), digit)
        for place in places:
            pictures[place] = haystack.flicker(rng, card)[0]
    path.write_bytes(encode(times=TIMES, pictures=pictures))
    return path
