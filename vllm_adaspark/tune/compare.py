"""What each setting cost and lost, and which to take.

A question is lost where the reference's answer was right and the setting's is not; where nobody
knows what is right, where the setting answers something else than the reference.  A question that
the reference got wrong and the setting gets right counts against the losses.  Where the reference
is hardly ever right (whole sentences against a file of single words, for example) it has next to
nothing to lose, and what is right is not asked.  Settings are compared over the questions that they
and the reference answered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .grid import Contender
from .intervals import Loss, loss
from .journal import Line
from .questions import Question

DENSE_ENOUGH = 0.9  # a layer that keeps so much could as well keep all
HARDLY_EVER = 0.2  # share of right answers below which a reference has too little to lose

Answer = Mapping[str, Any]  # of a journal's line


@dataclass(frozen=True)
class Outcome:
    """One contender beside the reference.

    Attributes:
        contender: which.
        refused: why the model or the engine did not run it, or not about some videos; all else is
            nothing where it answered about none.
        videos, questions: how many it answered, of those that the reference did.
        loss: with its interval.
        same: share of answers that are the reference's.
        right: share of right answers, over questions whose answer somebody knows.
        options: share of multiple-choice questions at which it chose as the reference did.
        kl: mean over questions of the KL divergence, in nats, from the reference's probabilities of
            an answer's first tokens to its own, as far as :func:`divergence` sees it.
        flops: share of the dense FLOPs of the language model.
        prefill: mean seconds until a video's first answer begins, vision tower included.
        memory: bytes held at the most.
        layers: mean over videos of what each layer kept: ``attention``, ``ffn``, ``alive``.
        added: what each layer would add to ``flops`` if it were dense.
        mode: "sparse", or "dense (why)" if it left out nothing.
        by_answers: whether ``loss`` counts right answers, where somebody knows them.
    """

    contender: Contender
    refused: str | None = None
    videos: int = 0
    questions: int = 0
    loss: Loss | None = None
    same: float | None = None
    right: float | None = None
    options: float | None = None
    kl: float | None = None
    flops: float | None = None
    prefill: float | None = None
    memory: int | None = None
    layers: dict[str, list[float]] | None = None
    added: list[float] | None = None
    mode: str = "sparse"
    by_answers: bool = True


@dataclass(frozen=True)
class Choice:
    """What to take, for a wanted loss.

    Attributes:
        outcome: the cheapest that fits; the reference if nothing else does.
        sure: whether its whole interval lies within the wanted loss, and not its estimate alone.
        needed: questions that would make it sure; None if it is, or if no number would.
        maybe: beside a sure one, a cheaper one whose estimate alone fits.
    """

    outcome: Outcome
    sure: bool
    needed: int | None = None
    maybe: Outcome | None = None


def outcomes(
    contenders: Sequence[Contender],
    videos: Sequence[Sequence[Question]],
    found: Mapping[tuple[str, str], Line],
) -> list[Outcome]:
    """Each contender beside the first, which is the reference.

    Args:
        contenders: the grid.
        videos: the questions of each video.
        found: the journal's lines, by contender and video; not all need be there.
    """
    reference = contenders[0]
    first = _outcome(reference, reference, videos, found)  # it loses nothing, however judged
    by_answers = first.right is None or first.right >= HARDLY_EVER
    others = [_outcome(each, reference, videos, found, by_answers) for each in contenders[1:]]
    return [replace(first, by_answers=by_answers), *others]


def _outcome(
    contender: Contender,
    reference: Contender,
    videos: Sequence[Sequence[Question]],
    found: Mapping[tuple[str, str], Line],
    by_answers: bool = True,
) -> Outcome:
    lines = [found.get((contender.name, questions[0].name)) for questions in videos]
    refused = next((line["refused"] for line in lines if line and "refused" in line), None)
    pairs, costs = [], []
    for questions, line in zip(videos, lines, strict=True):
        theirs = found.get((reference.name, questions[0].name))
        if not _answered(line) or not _answered(theirs):
            continue
        costs.append(line)
        said = {answer["question"]: answer for answer in theirs["answers"]}
        mine = {answer["question"]: answer for answer in line["answers"]}
        pairs += [(each, said[each.prompt], mine[each.prompt]) for each in questions]
    if not pairs:
        return Outcome(contender, refused=refused)
    told = [line["cost"] for line in costs]
    executed, dense = (sum(cost[key] for cost in told) for key in ("executed", "dense"))
    layers = {
        key: np.mean([cost[key] for cost in told], axis=0).tolist()
        for key in ("attention", "ffn", "alive")
        if all(key in cost for cost in told)
    }
    return Outcome(
        contender,
        refused=refused,
        videos=len(costs),
        questions=len(pairs),
        loss=loss((pair[0].name, lost(*pair, by_answers)) for pair in pairs),
        same=_mean(question.same(a["text"], b["text"]) for question, a, b in pairs),
        right=_mean(right for q, _, b in pairs if (right := q.right(b["text"])) is not None),
        options=_mean(q.chosen(a["text"]) == q.chosen(b["text"]) for q, a, b in pairs if q.options),
        kl=_mean(kl for _, a, b in pairs if (kl := divergence(a, b)) is not None),
        flops=executed / dense,
        prefill=_mean(line["prefill"] for line in costs),
        memory=max((line["memory"] for line in costs if line["memory"]), default=None),
        layers=layers,
        added=_added(told, layers, dense),
        mode=_mode(told),
        by_answers=by_answers,
    )


def _answered(line: Line | None) -> bool:
    return line is not None and "answers" in line


def lost(question: Question, reference: Answer, answer: Answer, by_answers: bool = True) -> float:
    """1 where an answer was lost, -1 where one was won, else 0."""
    before, after = (question.right(each["text"]) for each in (reference, answer))
    if before is None or after is None or not by_answers:
        return float(not question.same(reference["text"], answer["text"]))
    return float(before) - float(after)


def divergence(reference: Answer, answer: Answer) -> float | None:
    """KL divergence of the first tokens, a mean over places, in nats; None where nothing was kept.

    Places are compared as long as the tokens before them are the same, so the first token that
    differs is the last place.  Only the most probable tokens of each are known.  Those that one of
    the two does not know count together as one, which can only make the divergence smaller.
    """
    places = []
    for at, (p, q) in enumerate(zip(reference["logprobs"], answer["logprobs"])):
        both = p.keys() & q.keys()
        sure, other = ([math.exp(each[token]) for token in both] for each in (p, q))
        rest = [max(0.0, 1.0 - sum(known)) for known in (sure, other)]
        pairs = [*zip(sure, other), (rest[0], max(rest[1], 1e-9))]
        places.append(sum(a * math.log(a / max(b, 1e-30)) for a, b in pairs if a > 0))
        if reference["tokens"][at : at + 1] != answer["tokens"][at : at + 1]:
            break
    return max(0.0, float(np.mean(places))) if places else None


def _added(
    told: Sequence[Mapping[str, Any]], layers: Mapping[str, list[float]], dense: float
) -> list[float] | None:
    """What each layer left out, as a share of the dense FLOPs; None where tokens were dropped."""
    if "alive" in layers:
        return None
    parts = [sum(cost[f"dense_{key}"] for cost in told) / dense for key in ("attention", "ffn")]
    number = len(layers["attention"])
    return [
        sum((1 - kept) * part / number for kept, part in zip(pair, parts))
        for pair in zip(layers["attention"], layers["ffn"])
    ]


def _mode(told: Sequence[Mapping[str, Any]]) -> str:
    if any(cost["mode"] == "sparse" for cost in told):
        return "sparse"
    return f"dense ({told[0]['reason']})"


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def choose(found: Sequence[Outcome], wanted: float) -> Choice:
    """The cheapest contender that loses no more than ``wanted``.

    Those whose whole interval lies within it come first; then those whose estimate does.  Whatever
    costs no less than the reference is not worth a loss.

    Args:
        found: the reference first.
        wanted: as a share of the questions.
    """
    reference = found[0]
    fitting = sorted(
        (
            each
            for each in found[1:]
            if each.loss is not None
            and each.loss.value <= wanted
            and each.questions == reference.questions
            and each.flops < reference.flops
        ),
        key=lambda each: (each.flops, each.loss.value),
    )
    if not fitting:
        return Choice(reference, True)
    cheapest = fitting[0]
    sure = next((each for each in fitting if each.loss.high <= wanted), None)
    if sure is None:
        return Choice(cheapest, False, cheapest.loss.needed(wanted))
    return Choice(sure, True, maybe=None if sure is cheapest else cheapest)


def first_dense(outcome: Outcome) -> int:
    """How many of the first layers keep so much that they could stay dense (``dense_layers``)."""
    kept = zip(outcome.layers["attention"], outcome.layers["ffn"])
    return next(
        (at for at, pair in enumerate(kept) if min(pair) < DENSE_ENOUGH),
        len(outcome.layers["attention"]),
    )


def by_video(questions: Iterable[Question]) -> list[list[Question]]:
    """The questions of each video, in the order in which videos first appear."""
    grouped: dict[str, list[Question]] = {}
    for question in questions:
        grouped.setdefault(question.name, []).append(question)
    return list(grouped.values())
