"""Extra losses while training: what cards and questions should know, and where to look.

Most skills need a card's tokens to look back: which sign opened this part, which card came before,
which frame named this colour, how many like this there were. And a question must have gathered what
it asks for before it can look for it. Answers alone teach that slowly. Linear heads on hidden
states a third and two thirds up the language model say it directly, and above the first of them the
attention of a question's last token is drawn to the cards it speaks of. To tell a third card of its
colour from a second by how far attention spreads is easy to learn and right nine times in ten; it
is told in two steps instead: a card first learns that it is not the first of its colour, then a
third one looks for an earlier one that knows this. The heads are thrown away after training.
"""

import batches
import torch
import torch.nn.functional as F
from forward import TAPS, Pass
from scenes import CLEARLY_EARLIER, COLOUR_NAMES, SIGNS, SKILLS, Question, Scene

IGNORE = -100
# Classes of each single-valued hint.
CLASSES = {"sign": len(SIGNS), "previous": 10, "again": 2}
LATER = {"third": 2}  # known only at the second tap
WEIGHTS = {"again": 2.0, "third": 3.0}  # of the others 1
# Eight yes-or-no hints each, one per colour.
SETS = ("seen", "named_by")
# Classes of what a question asks for.
ASKED = {"skill": len(SKILLS), "colour": len(COLOUR_NAMES), "other": 9, "figure": len(SIGNS) + 1}
# What a question must have found out two layers higher: the colour that a frame names.
FOUND = {"target": len(COLOUR_NAMES)}
LOOK_WEIGHT = 1.5


def make_heads(hidden: int) -> torch.nn.ModuleList:
    """Per tap a head for every hint."""
    sizes = CLASSES | LATER | dict.fromkeys(SETS, 8) | ASKED | FOUND
    return torch.nn.ModuleList(
        torch.nn.ModuleDict({name: torch.nn.Linear(hidden, size) for name, size in sizes.items()})
        for _ in TAPS
    )


def of_scene(scene: Scene) -> tuple[list[int], dict[str, list]]:
    """Patches of the number cards and, per hint, one value a card."""
    cards = scene.of("number")
    known: dict[str, list] = {name: [] for name in (*CLASSES, *LATER, *SETS)}
    for index, card in enumerate(cards):
        signs = [sign.value for sign in scene.of("sign") if sign.at < card.at]
        known["sign"].append(signs[-1] if signs else IGNORE)
        known["previous"].append(_previous(cards, index))
        earlier = cards[:index]
        alike = sum(other.colour == card.colour for other in earlier)
        known["again"].append(int(alike > 0))
        known["third"].append(int(alike > 1) if alike else IGNORE)
        seen = {other.colour for other in earlier}
        known["seen"].append([float(colour in seen) for colour in range(8)])
        frames = [frame for frame in scene.of("frame") if frame.at < card.at]
        naming = {frame.colour for frame in frames if frame.value == card.colour}
        known["named_by"].append([float(colour in naming) for colour in range(8)])
    return [card.at for card in cards], known


def links(batch: batches.Batch) -> torch.Tensor:
    """Tokens that should look at an earlier card, int64 [L, 3]: video, token, patch to look at.

    Those of a card at the card before it; those of a third card of its colour at the second.
    """
    rows = []
    for video, scene in enumerate(batch.scenes):
        cards, pairs = scene.of("number"), []
        for index, card in enumerate(cards):
            if _previous(cards, index) != IGNORE:
                pairs.append((card.at, cards[index - 1].at))
            alike = [other.at for other in cards[:index] if other.colour == card.colour]
            if len(alike) > 1:
                pairs.append((card.at, alike[-1]))
        rows += [(video, token, b) for a, b in pairs for token in batch.patch_at[a].tolist()]
    return torch.tensor(rows, dtype=torch.long).view(-1, 3)


def of_question(question: Question, scene: Scene) -> dict[str, int]:
    """The skill, the first and second colour and the sign that a question asks for.

    And the colour of the card it ends at: another than it asks for if a frame names it.
    """
    words = question.text.strip("?").replace(",", "").split()
    colours = [COLOUR_NAMES.index(word) for word in words if word in COLOUR_NAMES]
    figures = [SIGNS.index(word) for word in words if word in SIGNS]
    return {
        "skill": SKILLS.index(question.skill),
        "colour": colours[0],
        "other": colours[1] if len(colours) > 1 else 8,
        "figure": figures[0] if figures else len(SIGNS),
        "target": next(e.colour for e in scene.events if e.at == question.about[-1]),
    }


def loss(heads, batch: batches.Batch, made: Pass, wanted: torch.Tensor):
    """The summed losses, and the share of each hint that is known, at the highest tap.

    `wanted` are the batch's `links`, which `made` has watched.
    """
    total, shares = 0.0, {}
    for tap, (prefix, questions) in enumerate(zip(made.prefix, made.questions)):
        for part, known in (
            _cards(heads[tap], batch, prefix, CLASSES | LATER if tap else CLASSES),
            _questions(heads[tap], batch, questions, ASKED | FOUND if tap else ASKED),
        ):
            total, shares = total + part, shares | known
    for part, known in (_looks(batch, made.looks), _linked(batch, made.linked, wanted)):
        total, shares = total + LOOK_WEIGHT * part, shares | known
    return total, shares


def _cards(heads, batch: batches.Batch, prefix: torch.Tensor, classes: dict[str, int]):
    states, known = [], {name: [] for name in (*classes, *SETS)}
    for video, scene in enumerate(batch.scenes):
        places, values = of_scene(scene)
        states.append(prefix[video, batch.patch_at[places]].float())  # [cards, tokens, hidden]
        for name in known:
            known[name] += values[name]
    tokens = torch.cat(states)
    count, length, _ = tokens.shape
    total, right = 0.0, {}
    for name, values in known.items():
        said = heads[name](tokens)
        truth = torch.tensor(values, device=tokens.device)
        if name in SETS:
            truth = truth[:, None].expand(count, length, 8)
            total = total + 6 * F.binary_cross_entropy_with_logits(said, truth)
            right[name] = ((said > 0) == (truth > 0)).all(-1).float().mean().item()
        elif (truth != IGNORE).any():
            truth = truth[:, None].expand(count, length)
            missed = F.cross_entropy(said.flatten(0, 1), truth.flatten(), ignore_index=IGNORE)
            total = total + WEIGHTS.get(name, 1.0) * missed
            counted = truth != IGNORE
            right[name] = (said.argmax(-1) == truth)[counted].float().mean().item()
    return total, right


def _questions(heads, batch: batches.Batch, states: torch.Tensor, asked: dict[str, int]):
    rows = batch.last_token()[..., None].expand(-1, -1, states.shape[-1])
    states = states.gather(1, rows).float().flatten(0, 1)
    known = [of_question(q, s) for s, row in zip(batch.scenes, batch.asked) for q in row]
    total, right = 0.0, {}
    for name in asked:
        truth = torch.tensor([one[name] for one in known], device=states.device)
        said = heads[name](states)
        total = total + F.cross_entropy(said, truth)
        right[name] = (said.argmax(-1) == truth).float().mean().item()
    return total, right


def _looks(batch: batches.Batch, looks: list[torch.Tensor]):
    """How little of each question's attention goes to the cards it is about.

    Of those that count, the layers above the second tap want the last, which knows how many there
    were; of the frame and the card of a `two_hop` question, the card.
    """
    early = torch.zeros(looks[0].shape)
    late = torch.zeros(looks[0].shape)
    for video, row in enumerate(batch.asked):
        for number, question in enumerate(row):
            early[video, number, batch.patch_at[list(question.about)].flatten()] = 1
            at_last = question.skill in ("two_hop", "count")
            last = question.about[-1:] if at_last else question.about
            late[video, number, batch.patch_at[list(last)].flatten()] = 1
    between = TAPS[1] - TAPS[0]
    mass = [(look * early.to(look)).sum(-1) for look in looks[:between]]
    mass += [(look * late.to(look)).sum(-1) for look in looks[between:]]
    total = sum(-(share + 1e-4).log().mean() for share in mass) / len(mass)
    return total, {"look": sum(mass).mean().item() / len(mass)}


def _linked(batch: batches.Batch, linked: list[torch.Tensor], wanted: torch.Tensor):
    """How little of the attention of `links`' tokens goes where they should look.

    One head of one layer is enough.
    """
    if not len(wanted):
        return 0.0, {}
    at = batch.patch_at[wanted[:, 2]].to(linked[0].device)  # [L, tokens of a picture]
    mass = [look.gather(-1, at[:, None].expand(-1, look.shape[1], -1)).sum(-1) for look in linked]
    most = torch.cat(mass, -1).amax(-1)  # [L]
    return -(most + 1e-4).log().mean(), {"linked": most.mean().item()}


def _previous(cards, index: int) -> int:
    """Digit of the card before, unless the one before that is almost as near."""
    if index == 0:
        return IGNORE
    if index > 1:
        near = cards[index].at - cards[index - 1].at
        if cards[index].at - cards[index - 2].at < CLEARLY_EARLIER * near:
            return IGNORE
    return cards[index - 1].value
