"""What a video contains and what may be asked about it: pure data, made from a seed.

A scene is a haystack of `patches` temporal patches (two frames each) with events in it, one patch
each. Signs cut it into parts, frames name colours, number cards carry the digits, distractors
carry nothing. All questions of one scene share its video.

    scene = scenes.make(HELD_OUT_SEEDS[0], patches=64)
    for question in scenes.questions(scene): ...

Skills:
- basic: "Which digit is on the red card?" One look at the right place.
- marked: there are several red cards; the sign that opened the part tells which is meant. The
  question cannot see which sign a card follows: the card itself must have looked back.
- before: the digit of the number card before the red one; again a card must have looked back.
- two_hop: the red frame names a colour, the card of that colour carries the digit.
- order: which of two colours came first.
- count: how many number cards have a colour.
"""

from dataclasses import dataclass, replace

import numpy as np
from cards import COLOUR_NAMES, SIGNS

SKILLS = ("basic", "marked", "before", "two_hop", "order", "count")
# Nobody may train on a held-out seed, nor measure on a training seed.
TRAINING_SEEDS = range(0, 100_000_000)
HELD_OUT_SEEDS = range(100_000_000, 200_000_000)

CLEARLY_EARLIER = 2.0  # "the card before": the one before that is this many times as far away


@dataclass(frozen=True)
class Event:
    """Something that fills temporal patch `at`.

    kind: "number" (colour, value = digit), "frame" (colour, value = named colour), "sign" (value =
    figure) or "distractor". Colours, digits and figures are indices.
    """

    kind: str
    at: int
    colour: int = 0
    value: int = 0


@dataclass(frozen=True)
class Scene:
    seed: int
    patches: int
    size: tuple[int, int]  # height, width in pixels
    motion: str  # "calm" or "busy"
    events: tuple[Event, ...]  # in order of time

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


@dataclass(frozen=True)
class Question:
    skill: str
    text: str
    answer: str
    needles: tuple[int, ...]  # temporal patches it hinges on; the last one holds the answer
    about: tuple[int, ...]  # those of the cards it speaks of: where looking once can be enough


def make(
    seed: int,
    patches: int,
    size: tuple[int, int] = (112, 112),
    motion: str = "calm",
    distractors: int | None = None,
) -> Scene:
    """A scene, the same for the same arguments.

    Args:
        seed: from `TRAINING_SEEDS` or `HELD_OUT_SEEDS`.
        patches: length in temporal patches, at least 4.
        size: height and width of a frame in pixels, multiples of 28.
        motion: of the haystack, "calm" or "busy".
        distractors: how many; None draws up to an eighth of the patches (a third if busy).

    Raises:
        ValueError: an argument is out of its range.
    """
    if seed not in TRAINING_SEEDS and seed not in HELD_OUT_SEEDS:
        raise ValueError(f"seed={seed}: must be in TRAINING_SEEDS or HELD_OUT_SEEDS")
    if patches < 4:
        raise ValueError(f"patches={patches}: must be at least 4")
    if size[0] % 28 or size[1] % 28 or min(size) < 56:
        raise ValueError(f"size={size}: height and width must be multiples of 28, at least 56")
    rng = np.random.default_rng(seed)
    signs = _signs(rng, patches)
    numbers, frames = _contents(rng, patches)
    free = rng.permutation(np.setdiff1d(np.arange(patches), [sign.at for sign in signs]))
    events = signs + [replace(card, at=int(at)) for card, at in zip(numbers, free)]
    used = len(numbers)
    for border, named in frames:
        # A frame comes before the card it names, so that the card can have seen it.
        target = next(card for card in events if card.kind == "number" and card.colour == named)
        earlier = [at for at in free[used:] if at < target.at]
        if earlier:
            at = int(earlier[0])
            events.append(Event("frame", at, border, named))
            free = free[free != at]
    rest = free[used:]
    if distractors is None:
        distractors = int(rng.integers(0, max(2, patches // (3 if motion == "busy" else 8)) + 1))
    events += [Event("distractor", int(at)) for at in rest[:distractors]]
    ordered = tuple(sorted(events, key=lambda event: event.at))
    return Scene(seed, patches, tuple(size), motion, ordered)


def _signs(rng, patches: int) -> list[Event]:
    """Signs at the beginning of parts of similar length."""
    parts = 1 if patches < 10 else int(rng.integers(2, len(SIGNS) + 1 if patches >= 24 else 4))
    length = patches / parts
    starts = [
        int(max(0, (part + rng.uniform(-0.2 if part else 0.0, 0.2)) * length))
        for part in range(parts)
    ]
    figures = rng.permutation(len(SIGNS))[:parts]
    return [Event("sign", at, value=int(figure)) for at, figure in zip(starts, figures)]


def _contents(rng, patches: int) -> tuple[list[Event], list[tuple[int, int]]]:
    """Number cards without a place yet, and frames as (border colour, named colour)."""
    colours = [int(colour) for colour in rng.permutation(len(COLOUR_NAMES))]
    if patches < 10:
        singles, repeats = 2, []
    else:
        singles = int(rng.integers(2, 5))
        most = 3 if patches >= 24 else 2
        repeats = rng.integers(2, most + 1, 2 if patches >= 24 else 1).tolist()
    once, several = colours[:singles], colours[singles : singles + len(repeats)]
    drawn = once + [c for c, times in zip(several, repeats) for _ in range(times)]
    numbers = [Event("number", -1, colour, int(rng.integers(10))) for colour in drawn]
    borders = rng.permutation(len(COLOUR_NAMES))[: int(rng.integers(1, 4)) if patches >= 10 else 1]
    frames = [(int(border), once[int(rng.integers(len(once)))]) for border in borders]
    return numbers, [(border, named) for border, named in frames if border != named]


def questions(scene: Scene) -> list[Question]:
    """All that may be asked about the scene and has one clear answer, skill by skill."""
    numbers = scene.of("number")
    times = {c: [card for card in numbers if card.colour == c] for c in range(len(COLOUR_NAMES))}
    single = [cards[0] for cards in times.values() if len(cards) == 1]
    asked: list[Question] = []
    for card in single:
        name = COLOUR_NAMES[card.colour]
        asked.append(_digit("basic", f"Which digit is on the {name} card?", card))
        previous = _clearly_previous(card, numbers)
        if previous:
            text = f"Which digit came before the {name} card?"
            asked.append(
                Question("before", text, str(previous.value), (card.at, previous.at), (card.at,))
            )
    for border in scene.of("frame"):
        named = next((card for card in single if card.colour == border.value), None)
        if named:
            text = f"Which digit does the {COLOUR_NAMES[border.colour]} frame name?"
            places = (border.at, named.at)
            asked.append(Question("two_hop", text, str(named.value), places, places))
    for sign, inside in _parts(scene):
        for colour, cards in times.items():
            here = [card for card in cards if card.at in inside]
            if len(cards) > 1 and len(here) == 1:
                name = COLOUR_NAMES[colour]
                text = f"Which digit is on the {name} card after the {SIGNS[sign.value]}?"
                asked.append(_digit("marked", text, here[0], through=sign))
    for a in single:
        for b in single:
            if a is not b:
                names = COLOUR_NAMES[a.colour], COLOUR_NAMES[b.colour]
                first = names[0] if a.at < b.at else names[1]
                text = f"Which card came first, {names[0]} or {names[1]}?"
                asked.append(Question("order", text, first, (a.at, b.at), (a.at, b.at)))
    for colour, cards in times.items():
        if cards:
            text = f"How many {COLOUR_NAMES[colour]} cards are there?"
            places = tuple(card.at for card in cards)
            asked.append(Question("count", text, str(len(cards)), places, places))
    return asked


def _digit(skill: str, text: str, card: Event, through: Event | None = None) -> Question:
    needles = (card.at,) if through is None else (through.at, card.at)
    return Question(skill, text, str(card.value), needles, (card.at,))


def _clearly_previous(card: Event, numbers: list[Event]) -> Event | None:
    """The number card before `card`, if none is almost as near."""
    earlier = [other for other in numbers if other.at < card.at]
    if not earlier:
        return None
    if len(earlier) > 1:
        near, far = (card.at - other.at for other in (earlier[-1], earlier[-2]))
        if far < CLEARLY_EARLIER * near:
            return None
    return earlier[-1]


def _parts(scene: Scene) -> list[tuple[Event, range]]:
    signs = scene.of("sign")
    ends = [sign.at for sign in signs[1:]] + [scene.patches]
    return [(sign, range(sign.at + 1, end)) for sign, end in zip(signs, ends)]


def every_question_text() -> list[str]:
    """Each question in each wording it can have: what a tokenizer must know."""
    names = COLOUR_NAMES
    texts = [f"Which digit is on the {name} card?" for name in names]
    texts += [f"Which digit came before the {name} card?" for name in names]
    texts += [f"Which digit does the {name} frame name?" for name in names]
    texts += [f"Which digit is on the {n} card after the {s}?" for n in names for s in SIGNS]
    texts += [f"Which card came first, {a} or {b}?" for a in names for b in names if a != b]
    return texts + [f"How many {name} cards are there?" for name in names]
