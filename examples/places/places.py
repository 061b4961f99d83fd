"""What a video of places contains and what may be asked about it: pure data, made from a seed.

A frame of 224×224 pixels is 4×4 *windows* of 56 pixels, and a window is 2×2 video tokens.  The
vision tower of this test bed attends within a window only, so that a token stands for its place and
for nothing else.  *Marks*, small coloured cards with a digit, come and go in windows of a video
that is restless or calm (its *haystack*); a mark that a method drops is lost.

    scene = places.make(HELD_OUT_SEEDS[0], patches=64, haystack="swarm")
    for question in places.questions(scene): ...

Skills:
- basic: "Which digit is on the red board?" A board fills its window, appears at once and stays.
- colour: the same of a card, which is smaller and may come in any way (`KINDS`).
- place: the digit in a quarter of the frame that holds one mark.
- before, after: the digit of the mark before or after another, where their order is clear.
- larger: which of the digits in two quarters is larger.
- count: how many cards have a colour.
"""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

from dataclasses import dataclass, replace

import numpy as np
from cards import COLOUR_NAMES
from scenes import HELD_OUT_SEEDS, TRAINING_SEEDS

EASY = ("basic", "colour", "place")
HARD = ("before", "after", "larger", "count")
SKILLS = EASY + HARD
HAYSTACKS = ("calm", "pan", "cuts", "crowd", "swarm")
# How a mark comes: it fades in, a letter turns into it, it comes nearer, or it is there at once and
# stays, or it is there for a single temporal patch.
KINDS = ("fade", "turn", "near", "stay", "pop")
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
WINDOW = 56  # pixels
TOKEN = 28  # pixels
CARD = 28  # pixels; a board fills its window
ACROSS = 4  # windows
SIDE = ACROSS * WINDOW  # pixels of a frame
GRID = (2 * ACROSS, 2 * ACROSS)  # video tokens of a temporal patch
WINDOWS = ACROSS * ACROSS


@dataclass(frozen=True)
class Mark:
    """A digit on a coloured ground, in temporal patches `start` up to `end`.

    window: 0 to 15, row by row.  colour: index of a colour.  change: patches until it is wholly
    there.  side: in pixels when it is wholly there.  board: fills its window.
    """

    window: int
    colour: int
    digit: int
    kind: str
    start: int
    length: int
    change: int = 0
    side: int = CARD
    board: bool = False

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def quarter(self) -> int:
        return self.window // ACROSS // 2 * 2 + self.window % ACROSS // 2


@dataclass(frozen=True)
class Scene:
    seed: int
    patches: int
    haystack: str
    marks: tuple[Mark, ...]  # in order of their start


@dataclass(frozen=True)
class Question:
    skill: str
    text: str
    answer: str
    needles: tuple[int, ...]  # marks without which it cannot be answered; the last has the answer
    about: tuple[int, ...]  # marks where looking once can be enough


def make(seed: int, patches: int, haystack: str) -> Scene:
    """A scene, the same for the same arguments.

    Args:
        seed: from `TRAINING_SEEDS` or `HELD_OUT_SEEDS`.
        patches: length in temporal patches, at least 12.
        haystack: one of `HAYSTACKS`.

    Raises:
        ValueError: an argument is out of its range.
    """
    if seed not in TRAINING_SEEDS and seed not in HELD_OUT_SEEDS:
        raise ValueError(f"seed={seed}: must be in TRAINING_SEEDS or HELD_OUT_SEEDS")
    if patches < 12:
        raise ValueError(f"patches={patches}: must be at least 12")
    if haystack not in HAYSTACKS:
        raise ValueError(f"haystack={haystack!r}: must be one of {', '.join(HAYSTACKS)}")
    rng = np.random.default_rng((seed, HAYSTACKS.index(haystack)))
    colours = _colours(rng)
    windows = _windows(rng, len(colours))
    spans = _spans(rng, len(colours), patches)
    board = int(rng.integers(len(colours)))
    while colours.count(colours[board]) > 1:  # a board is the only mark of its colour
        board = (board + 1) % len(colours)
    marks = []
    for index, (colour, window, span) in enumerate(zip(colours, windows, spans, strict=True)):
        mark = Mark(window, colour, int(rng.integers(10)), "", 0, 0, board=index == board)
        marks.append(timed(rng, mark, *span))
    ordered = tuple(sorted(marks, key=lambda mark: (mark.start, mark.window)))
    return Scene(seed, patches, haystack, ordered)


def timed(rng, mark: Mark, first: int, last: int) -> Mark:
    """The mark with a kind that fits in the patches `first` up to `last`, at a random time."""
    space = last - first
    if mark.board:
        kind, change = "stay", 0
    else:
        kind = "pop" if space < 6 else str(rng.choice(KINDS))
        change = int(rng.integers(4, 9)) if kind in ("fade", "turn", "near") else 0
        change = min(change, space // 2)
    most = min(space, 32)
    length = 1 if kind == "pop" else int(rng.integers(min(most, change + 4), most + 1))
    start = first + int(rng.integers(space - length + 1))
    side = WINDOW if mark.board else CARD
    return replace(mark, kind=kind, change=change, side=side, length=length, start=start)


def _colours(rng) -> list[int]:
    """Of 3 to 7 marks; one colour appears two or three times in four scenes of five."""
    order = [int(colour) for colour in rng.permutation(len(COLOUR_NAMES))]
    colours = order[: int(rng.integers(3, 6))]
    if rng.random() < 0.8:
        colours += [order[7]] * int(rng.integers(2, 4))
    return [colours[i] for i in rng.permutation(len(colours))]


def _windows(rng, count: int) -> list[int]:
    """A window each: one mark in two of the quarters, the others in the other two."""
    inside = [[w for w in range(WINDOWS) if Mark(w, 0, 0, "", 0, 0).quarter == q] for q in range(4)]
    quarters = rng.permutation(4)
    chosen = [int(rng.choice(inside[quarter])) for quarter in quarters[:2]]
    rest = inside[quarters[2]] + inside[quarters[3]]
    chosen += [rest[i] for i in rng.permutation(len(rest))[: count - 2]]
    return [chosen[i] for i in rng.permutation(count)]


def _spans(rng, count: int, patches: int) -> list[tuple[int, int]]:
    """The patches in which each mark may be: one after another in half of the scenes."""
    if rng.random() < 0.5:
        return [(1, patches)] * count
    cuts = 1 + np.arange(count + 1) * (patches - 1) / count
    spans = [(int(cuts[i]), int(cuts[i + 1])) for i in range(count)]
    return [spans[i] for i in rng.permutation(count)]


def questions(scene: Scene) -> list[Question]:
    """All that may be asked about the scene and has one clear answer, skill by skill."""
    marks = list(enumerate(scene.marks))
    by_colour = {c: [i for i, m in marks if m.colour == c] for c in range(len(COLOUR_NAMES))}
    asked: list[Question] = []
    for colour, found in by_colour.items():
        if len(found) == 1:
            asked += _about_one(scene, found[0], COLOUR_NAMES[colour])
        if found and not scene.marks[found[0]].board:
            text = f"How many {COLOUR_NAMES[colour]} cards are there?"
            asked.append(Question("count", text, str(len(found)), tuple(found), tuple(found)))
    alone = {}
    for quarter, name in enumerate(QUARTERS):
        found = [i for i, m in marks if m.quarter == quarter]
        if len(found) == 1:
            alone[name] = found[0]
            digit = str(scene.marks[found[0]].digit)
            text = f"Which digit is at the {name}?"
            asked.append(Question("place", text, digit, tuple(found), tuple(found)))
    for one, a in alone.items():
        for other, b in alone.items():
            digits = scene.marks[a].digit, scene.marks[b].digit
            if a != b and digits[0] != digits[1]:
                text = f"Which digit is larger, {one} or {other}?"
                pair = (a, b) if digits[1] > digits[0] else (b, a)
                asked.append(Question("larger", text, str(max(digits)), pair, pair))
    return asked


def _about_one(scene: Scene, index: int, name: str) -> list[Question]:
    """What is asked about the only mark of a colour."""
    mark = scene.marks[index]
    word = "board" if mark.board else "card"
    skill = "basic" if mark.board else "colour"
    text = f"Which digit is on the {name} {word}?"
    asked = [Question(skill, text, str(mark.digit), (index,), (index,))]
    for skill, other in (("before", previous(scene, index)), ("after", following(scene, index))):
        if other is not None:
            text = f"Which digit came {skill} the {name} {word}?"
            digit = str(scene.marks[other].digit)
            # The later of the two can have looked back at the earlier, and knows it.
            later = index if skill == "before" else other
            asked.append(Question(skill, text, digit, (index, other), (later,)))
    return asked


def previous(scene: Scene, index: int) -> int | None:
    """The mark before, if it is clear which: all that began earlier had ended, in clear order."""
    mark = scene.marks[index]
    earlier = [i for i, m in enumerate(scene.marks) if m.start <= mark.start and i != index]
    if not earlier:
        return None
    last = max(earlier, key=lambda i: scene.marks[i].start)
    before = scene.marks[last]
    others = [scene.marks[i] for i in earlier if i != last]
    clear = before.end <= mark.start and all(m.end <= before.start for m in others)
    return last if clear else None


def following(scene: Scene, index: int) -> int | None:
    """The mark of which this one is clearly the one before."""
    for other in range(index + 1, len(scene.marks)):
        if previous(scene, other) == index:
            return other
    return None


def every_question_text() -> list[str]:
    """Each question in each wording it can have: what a tokenizer must know."""
    named = [f"{name} {word}" for name in COLOUR_NAMES for word in ("card", "board")]
    texts = [f"Which digit is on the {mark}?" for mark in named]
    texts += [f"Which digit came {when} the {m}?" for when in ("before", "after") for m in named]
    texts += [f"Which digit is at the {quarter}?" for quarter in QUARTERS]
    pairs = [(a, b) for a in QUARTERS for b in QUARTERS if a != b]
    texts += [f"Which digit is larger, {a} or {b}?" for a, b in pairs]
    return texts + [f"How many {name} cards are there?" for name in COLOUR_NAMES]
