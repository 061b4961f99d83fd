"""Extra losses while training: what the tokens of marks and questions should know, where to look.

As in the needle model (its `hints.py`): linear heads on hidden states, and attention that is drawn
to where the answer is.  To count, a mark learns that another of its colour came before, and then,
from such others, that two did.  The heads are not in the checkpoint.
"""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

import places
import torch
import torch.nn.functional as F
from cards import COLOUR_NAMES
from forward import TAPS, Pass
from places import QUARTERS, SKILLS
from prompts import Prompts

IGNORE = -100
LOOK_WEIGHT = 4.0  # else "before" does not look at the card it names, whose own digit is wrong
# What a token that names a mark should know: the mark, its quarter, the mark before it, and whether
# another one of its colour was named before; and at the higher tap whether two were.
OF_MARK = {"digit": 10, "colour": 8, "quarter": 4, "last_digit": 10, "last_colour": 8, "again": 2}
LATER = {"third": 2}
WEIGHTS = {"again": 2.0, "third": 3.0}  # of the others 1
# What a question's last token should know that it asks for; the last class is "nothing".
OF_QUESTION = {"skill": len(SKILLS), "asked": 9, "one": 5, "other": 5}
PER_MARK = 4  # tokens of a mark that are asked
BEFORE, AGAIN, THIRD = range(3)  # kinds of links


def make_heads(hidden: int) -> torch.nn.ModuleList:
    classes = OF_MARK | LATER | OF_QUESTION
    return torch.nn.ModuleList(
        torch.nn.ModuleDict({name: torch.nn.Linear(hidden, n) for name, n in classes.items()})
        for _ in TAPS
    )


def of_marks(scene: places.Scene) -> list[dict[str, int]]:
    """The classes of `OF_MARK` that are the same for all tokens of a mark."""
    known = []
    for index, mark in enumerate(scene.marks):
        before = places.previous(scene, index)
        last = None if before is None else scene.marks[before]
        known.append(
            {
                "digit": mark.digit,
                "colour": mark.colour,
                "quarter": mark.quarter,
                "last_digit": IGNORE if last is None else last.digit,
                "last_colour": IGNORE if last is None else last.colour,
            }
        )
    return known


def named_before(scene: places.Scene, names: torch.Tensor, index: int) -> torch.Tensor:
    """How many other marks of a mark's colour are named before or at each token, int64 [N].

    What counts is when a mark can be told, which may be long after it began to fade in.

    Args:
        names: bool [marks, N], the tokens that name each mark.
    """
    return (names[_alike(scene, index)].cumsum(1) > 0).sum(0)


def of_question(question: places.Question) -> dict[str, int]:
    """The classes of `OF_QUESTION`."""
    words = question.text.strip("?").replace(",", "")
    colours = [COLOUR_NAMES.index(word) for word in words.split() if word in COLOUR_NAMES]
    spots = sorted((words.index(name), q) for q, name in enumerate(QUARTERS) if name in words)
    quarters = [quarter for _, quarter in spots] + [4, 4]
    return {
        "skill": SKILLS.index(question.skill),
        "asked": colours[0] if colours else 8,
        "one": quarters[0],
        "other": quarters[1],
    }


def links(batch: Prompts) -> torch.Tensor:
    """Tokens of marks that should look somewhere: int64 [L, 4] (video, token, kind, mark).

    Of three kinds: at the mark before (`BEFORE`, which mark that is; else -1), at others of its
    colour (`AGAIN`), and at those of them that saw another one still (`THIRD`).
    """
    found = []
    for video, (scene, names) in enumerate(zip(batch.scenes, batch.naming)):
        for index in range(len(scene.marks)):
            own = names[index].nonzero()[:, 0].tolist()
            before = places.previous(scene, index)
            if own and before is not None and names[before, : own[-1]].any():
                found.append([video, own[-1], BEFORE, before])
            if int(_alike(scene, index).sum()):
                found += [
                    [video, at, kind, -1] for at in {*own[:1], *own[-1:]} for kind in (AGAIN, THIRD)
                ]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 4)


def _alike(scene: places.Scene, *indices: int) -> torch.Tensor:
    """Which marks have the first one's colour and are none of these, bool [marks]."""
    colour = scene.marks[indices[0]].colour
    return torch.tensor(
        [m.colour == colour and i not in indices for i, m in enumerate(scene.marks)]
    )


def loss(heads, batch: Prompts, made: Pass, wanted: torch.Tensor):
    """The summed losses, and the share of each clue that is known at the highest tap."""
    total, shares = 0.0, {}
    for tap, (prefix, questions) in enumerate(zip(made.prefix, made.questions)):
        for part, known in (
            _marks(heads[tap], batch, prefix, OF_MARK | LATER if tap else OF_MARK),
            _questions(heads[tap], batch, questions),
        ):
            total, shares = total + part, shares | known
    for part, known in (_looks(batch, made.looks), _linked(batch, made.linked, wanted)):
        total, shares = total + LOOK_WEIGHT * part, shares | known
    return total, shares


def _marks(heads, batch: Prompts, prefix: torch.Tensor, classes: dict[str, int]):
    states, truth = [], {name: [] for name in classes}
    for video, (scene, names) in enumerate(zip(batch.scenes, batch.naming)):
        for index, (own, known) in enumerate(zip(names, of_marks(scene))):
            at = own.nonzero()[:, 0]
            at = at[torch.linspace(0, len(at) - 1, min(PER_MARK, len(at))).long()]
            states.append(prefix[video, at].float())
            before = named_before(scene, names, index)[at].tolist()
            values = {name: [value] * len(at) for name, value in known.items()}
            values["again"] = [int(number > 0) for number in before]
            values["third"] = [int(number > 1) if number else IGNORE for number in before]
            for name in classes:
                truth[name] += values[name]
    return _classified(heads, torch.cat(states), truth)


def _questions(heads, batch: Prompts, states: torch.Tensor):
    rows = batch.last_token()[..., None].expand(-1, -1, states.shape[-1])
    states = states.gather(1, rows).float().flatten(0, 1)
    known = [of_question(question) for row in batch.asked for question in row]
    return _classified(heads, states, {name: [one[name] for one in known] for name in OF_QUESTION})


def _classified(heads, states: torch.Tensor, truth: dict[str, list[int]]):
    total, right = 0.0, {}
    for name, values in truth.items():
        wanted = torch.tensor(values, device=states.device)
        asked = wanted != IGNORE
        if asked.any():
            said = heads[name](states)
            missed = F.cross_entropy(said, wanted, ignore_index=IGNORE)
            total = total + WEIGHTS.get(name, 1.0) * missed
            right[name] = (said.argmax(-1) == wanted)[asked].float().mean().item()
    return total, right


def _looks(batch: Prompts, looks: list[torch.Tensor]):
    """How little of each question's attention goes to the marks it is about.

    A mark learns which one was before it in the first of these layers, so "after", which looks for
    that, cannot find it there yet.  A mark that is one of several of its colour knows so before the
    last of these layers: there "count" looks for the tokens that have seen all others.
    """
    wanted = torch.zeros_like(looks[0])
    first = torch.zeros(wanted.shape[:2], dtype=torch.long, device=wanted.device)
    for video, row in enumerate(batch.asked):
        for number, question in enumerate(row):
            wanted[video, number] = _about(batch, video, question).float()
            if question.skill == "after":
                first[video, number] = 1
            elif question.skill == "count" and len(question.about) > 1:
                first[video, number] = len(looks) - 1
    mass = torch.stack([(look * wanted).sum(-1) for look in looks])
    able = torch.arange(len(looks), device=first.device)[:, None, None] >= first
    total = -(mass[able] + 1e-4).log().mean()
    shares = {"look": mass[-1].mean().item()}
    for skill, layer in (("after", 1), ("count", len(looks) - 1)):
        if (first == layer).any():
            shares[f"look {skill}"] = mass[-1][first == layer].mean().item()
    return total, shares


def _about(batch: Prompts, video: int, question: places.Question) -> torch.Tensor:
    """The tokens at which looking once is enough, bool [N]."""
    scene, names = batch.scenes[video], batch.naming[video]
    if question.skill != "count":
        return names[list(question.about)].any(0)
    seen = [
        names[i] & (named_before(scene, names, i) == len(question.about) - 1)
        for i in question.about
    ]
    return torch.stack(seen).any(0)


def _linked(batch: Prompts, linked: list[torch.Tensor], wanted: torch.Tensor):
    """How little of the attention of `links`' tokens goes where they should look.

    For `BEFORE` in any head of any layer.  For the others in the first head of one layer, and there
    to the text before the video where there is nothing to look at: what such a head brings tells
    whether there was something.
    """
    if not len(wanted):
        return 0.0, {}
    target = torch.stack([_target(batch, *row) for row in wanted.tolist()])  # [L, N]
    mass = torch.stack([(look * target[:, None].to(look)).sum(-1) for look in linked])
    kinds = wanted[:, 2].to(mass.device)
    reached = {
        "linked": mass.amax((0, 2))[kinds == BEFORE],
        "linked again": mass[0, kinds == AGAIN, 0],
        "linked third": mass[1, kinds == THIRD, 0],
    }
    reached = {name: share for name, share in reached.items() if len(share)}
    total = sum(-(share + 1e-4).log().mean() for share in reached.values())
    return total, {name: share.mean().item() for name, share in reached.items()}


def _target(batch: Prompts, video: int, token: int, kind: int, mark: int) -> torch.Tensor:
    """Where a link's token should look, bool [N]."""
    scene, names = batch.scenes[video], batch.naming[video]
    if kind == BEFORE:
        return names[mark]
    own = int(names[:, token].nonzero()[0, 0])
    target = torch.zeros_like(names[own])
    for other in _alike(scene, own).nonzero()[:, 0].tolist():
        seen = names[other].clone()
        if kind == THIRD:
            seen &= (names[_alike(scene, own, other)].cumsum(1) > 0).any(0)
        target |= seen
    target[token:] = False
    if not target.any():
        target[: batch.video_from] = True
    return target
