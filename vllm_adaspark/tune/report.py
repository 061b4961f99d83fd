"""What a run leaves: a page of Markdown, the numbers as JSON, and settings to copy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..methods import settings_class
from ..settings import CHECKPOINT_KEY, SERVER_KEY
from .compare import DENSE_ENOUGH, Choice, Outcome, first_dense
from .grid import Contender
from .questions import Question

PAGE, NUMBERS, SETTINGS, PICTURE = "tune.md", "tune.json", "adaspark_config.json", "tune.png"
PROGRAM = "vllm-adaspark"


@dataclass(frozen=True)
class Run:
    """All that a report is made of.

    Attributes:
        model: the checkpoint's name.
        videos: the questions of each video.
        found: the outcomes, the reference first.
        choice: what to take.
        wanted: the loss that is allowed.
        left_out: videos that could not be read, and why.
        flags: of the server, whatever the setting: for lengths and frames; words of a shell.
        missing: answers (of a contender about a video) that are still to come.
        about: versions, machine and date, as told.
        command: that goes on with the run, or asks again.
        trained: the ``adaspark_config`` that the checkpoint has.
    """

    model: str
    videos: Sequence[Sequence[Question]]
    found: Sequence[Outcome]
    choice: Choice
    wanted: float
    left_out: Mapping[str, str]
    flags: Sequence[str]
    missing: int
    about: Mapping[str, str]
    command: str
    trained: Mapping[str, Any] | str | None = None

    @property
    def questions(self) -> list[Question]:
        return [question for questions in self.videos for question in questions]

    @property
    def reference(self) -> Outcome:
        return self.found[0]


def write(run: Run, folder: Path) -> list[Path]:
    """Write all but the picture; returns the files."""
    files = [folder / PAGE, folder / NUMBERS]
    files[0].write_text(page(run) + "\n", encoding="utf-8")
    files[1].write_text(json.dumps(numbers(run), indent=1) + "\n", encoding="utf-8")
    settings = checkpoint_settings(run.choice.outcome.contender, run.trained)
    path = folder / SETTINGS
    if settings is None:
        path.unlink(missing_ok=True)  # an earlier report's
        return files
    path.write_text(json.dumps({CHECKPOINT_KEY: settings}, indent=2) + "\n", encoding="utf-8")
    return [*files, path]


def numbers(run: Run) -> dict[str, Any]:
    """Everything, JSON-ready."""
    choice = run.choice
    return {
        "model": run.model,
        **run.about,
        "command": run.command,
        "wanted_loss": run.wanted,
        "videos": len(run.videos),
        "questions": len(run.questions),
        "left_out": dict(run.left_out),
        "missing": run.missing,
        "take": choice.outcome.contender.name,
        "sure": choice.sure,
        "questions_needed": choice.needed,
        "cheaper_but_not_sure": choice.maybe.contender.name if choice.maybe else None,
        "server": server_line(run, choice.outcome.contender),
        "contenders": [
            asdict(each) | {"contender": each.contender.to_dict()} for each in run.found
        ],
    }


# -- settings to copy -----------------------------------------------------------------------------


def checkpoint_settings(
    contender: Contender, trained: Mapping[str, Any] | str | None = None
) -> dict[str, Any] | None:
    """``adaspark_config`` for the checkpoint's config.json, in the place of the one it has; None
    where a server must be told.

    A checkpoint cannot name AdaTP, and "off" of a checkpoint would only hide the plugin.  What only
    an operator may set changes no answer and is left out.
    """
    if contender.method == "adatp" or not contender.settings or "off" in contender.settings:
        return None
    cls = settings_class(contender.method)
    operators = {spec.name for spec in fields(cls) if not spec.metadata["checkpoint"]}
    said = contender.settings
    if isinstance(trained, Mapping) and trained:
        named = cls.spelt_out(trained).keys() | cls.spelt_out(said).keys()
        both = cls.settled(trained, said).to_dict()  # without what a budget replaces
        said = {key: value for key, value in both.items() if key in named}
    return {key: value for key, value in said.items() if key not in operators} or None


def server_line(run: Run, contender: Contender) -> str:
    """The command that serves the model with a contender's settings."""
    named = contender.settings
    flags = {key: value for key, value in named.items() if _has_flag(contender.method, key, value)}
    settings = [word for item in flags.items() for word in flag(*item)]
    method = ["--method", contender.method] if contender.method == "adatp" else []
    if flags != named:
        others = {key: value for key, value in named.items() if key not in flags}
        settings += ["--additional-config", json.dumps({SERVER_KEY: others})]
    words = shlex.join([PROGRAM, "serve", run.model, *method, *settings])
    return " ".join([words, *run.flags])


def _has_flag(method: str, name: str, value: Any) -> bool:
    """Whether a flag of ``vllm-adaspark serve`` can say a setting."""
    if value is False:
        defaults = {spec.name: spec.default for spec in fields(settings_class(method))}
        return name != "enabled" and defaults.get(name) is True
    return value is not None and name != "enabled"


def flag(name: str, value: Any) -> list[str]:
    """A setting as ``vllm-adaspark serve`` takes it."""
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [option] if value else [option.replace("--", "--no-", 1)]
    if name == "cube":
        return [option, ",".join(map(str, value))]
    return [option, value if isinstance(value, str) else json.dumps(value)]


# -- the page -------------------------------------------------------------------------------------


def page(run: Run) -> str:
    """The report as Markdown."""
    parts = [f"# Settings for {run.model}", verdict(run), _copy(run)]
    if run.missing:
        parts.append(
            f"**Not all is answered yet**: {run.missing} of "
            f"{len(run.found) * len(run.videos)} are still to come. The same command goes on:\n\n"
            f"    {run.command}"
        )
    parts += ["## What was tried", _table(run), f"![Loss against FLOPs]({PICTURE})", _words(run)]
    if run.choice.outcome.layers and "off" not in run.choice.outcome.contender.settings:
        parts += ["## Layers", _layers(run.choice.outcome)]
    parts += ["## Where this comes from", _source(run)]
    return "\n\n".join(parts)


def verdict(run: Run) -> str:
    """What to take and how sure that is, in sentences."""
    choice, wanted = run.choice, f"{100 * run.wanted:g} %"
    best, reference = choice.outcome, run.reference
    if best is reference:
        if reference.loss is None:
            return "Nothing can be said yet: the reference has answered nothing."
        return (
            f"**Keep {reference.contender.name}.** No setting that costs less lost at most "
            f"{wanted} over {counted(reference)}." + _judged(run)
        )
    said = [
        f"**Take {best.contender.name}**: it spends {percent(best.flops)} of the dense FLOPs"
        + (f" ({percent(reference.flops)} as trained)" if abs(reference.flops - 1) > 0.001 else "")
        + f", and lost {interval(best)} over {counted(best)}."
    ]
    if choice.sure:
        said.append(f"The whole interval lies within the {wanted} that may be lost.")
    elif choice.needed is not None:
        said.append(
            f"That is the estimate; **{best.questions} questions are too few to be sure** of at "
            f"most {wanted}: about {choice.needed:,} of this kind would show it."
        )
    else:
        said.append(
            f"The estimate is just the {wanted} that may be lost: no number of questions would "
            "make it surely less."
        )
    if best.videos == 1:
        said.append("**All are about one video**: of other videos they say nothing.")
    if choice.maybe is not None:
        needed = choice.maybe.loss.needed(run.wanted)
        more = f"; about {needed:,} questions would tell" if needed else ""
        said.append(
            f"{choice.maybe.contender.name} spends {percent(choice.maybe.flops)} and lost "
            f"{interval(choice.maybe)}, which may be within it and may not{more}."
        )
    said.append(
        f"A video's first answer began after {seconds(best.prefill)} "
        f"({reference.contender.name}: {seconds(reference.prefill)})."
    )
    return " ".join(said) + _judged(run)


def _judged(run: Run) -> str:
    """That right answers were not asked for, and what to do, if so."""
    reference = run.reference
    if reference.by_answers:
        return ""
    name = reference.contender.name
    return (
        f" **Judged by whether answers are {name}'s own**: only {percent(reference.right)} of "
        f"{name}'s answers are among the file's right ones, too few to count what is lost of them. "
        "If it answers in sentences, let the questions ask for one word, or give `options`."
    )


def _copy(run: Run) -> str:
    best = run.choice.outcome.contender
    said = [f"    {server_line(run, best)}"]
    settings = checkpoint_settings(best, run.trained)
    if settings is not None:
        said.append(
            f"or, in the checkpoint's `config.json` ([{SETTINGS}]({SETTINGS})), so that every "
            f'server runs it so:\n\n    "{CHECKPOINT_KEY}": {json.dumps(settings)}'
        )
    return "\n\n".join(said)


def _table(run: Run) -> str:
    chosen = run.choice.outcome
    known = {
        "right": any(each.right is not None for each in run.found),
        "same option": any(each.options is not None for each in run.found),
    }
    head = ["setting", "FLOPs", "prefill", "memory", "lost, points", "same answer"]
    head += [name for name, there in known.items() if there] + ["KL, nats"]
    rows, remarks = [], []
    ordered = sorted(run.found[1:], key=lambda each: -(each.flops or 0))
    for each in [run.reference, *ordered]:
        name = f"**{each.contender.name}**" if each is chosen else each.contender.name
        if each.refused:
            what = "did not run" if each.loss is None else "did not run about all videos"
            remarks.append(f"* {each.contender.name} {what}: {each.refused}")
        if each.loss is None:
            continue
        if each.mode != "sparse" and each is not run.reference:
            name += f", {each.mode}"
        if each.questions < run.reference.questions:
            name += f", {each.questions} questions"
        cells = [
            name,
            percent(each.flops),
            seconds(each.prefill),
            "–" if each.memory is None else f"{each.memory / 2**30:.2f} GiB",
            "" if each is run.reference else interval(each, unit=""),
            percent(each.same),
        ]
        cells += [percent(each.right)] if known["right"] else []
        cells += [percent(each.options)] if known["same option"] else []
        rows.append([*cells, "–" if each.kl is None else f"{each.kl:.4f}"])
    return "\n\n".join([markdown(head, rows), *(["\n".join(remarks)] if remarks else [])])


def _words(run: Run) -> str:
    reference = run.reference.contender.name
    return "\n".join(
        [
            "* *FLOPs*: of the language model, for the first question about each video, which "
            "computes it; a share of the dense model's.  *Prefill*: mean seconds until that "
            "question's answer begins, vision tower included.  *Memory*: the most that the "
            "engine's process held.",
            f"* *Lost*: answers that were right under {reference} and are no more, minus those "
            f"that were not and are now; where the file has no answer, or {reference} is hardly "
            f"ever right, those that differ from {reference}'s.  In square brackets a 95 % "
            "interval: videos are drawn anew, it is wider where they are few, and it never ends "
            "nearer to the estimate than a loss that so many questions could miss.",
            "* *KL*: how far the probabilities of an answer's first tokens moved, from the twenty "
            "most probable of each; at least so much.",
            "* The cheapest of many settings is a little lucky: ask it other questions before "
            "relying on the last point.",
        ]
    )


def _layers(best: Outcome) -> str:
    keys = {
        "attention": "cubes attended",
        "ffn": "tokens that ran the FFN",
        "alive": "tokens alive",
    }
    # Whatever a layer sees of a prompt that loses tokens it runs densely.
    there = ["alive"] if "alive" in best.layers else ["attention", "ffn"]
    head = ["layer", *(keys[key] for key in there)]
    head += ["dense, it would add"] if best.added else []
    rows = []
    for number in range(len(best.layers[there[0]])):
        row = [str(number), *(percent(best.layers[key][number]) for key in there)]
        rows.append(row + ([percent(best.added[number], 1)] if best.added else []))
    said = [f"What {best.contender.name} kept, layer by layer:", markdown(head, rows)]
    if best.added:
        first = first_dense(best)
        if first:
            layers = "first layer keeps" if first == 1 else f"first {first} layers keep"
            said.append(
                f"The {layers} {percent(DENSE_ENOUGH)} and more and could stay dense "
                f"(`dense_layers` {min(first, 15)}) for {percent(sum(best.added[:first]), 1)} of "
                "the dense FLOPs."
            )
        else:
            said.append(
                f"No layer at the beginning keeps {percent(DENSE_ENOUGH)}; `dense_layers` 1 would "
                f"add {percent(best.added[0], 1)} of the dense FLOPs."
            )
    return "\n\n".join(said)


def _source(run: Run) -> str:
    known = sum(bool(question.answers) for question in run.questions)
    said = [
        f"* {len(run.questions)} questions about {len(run.videos)} videos, {known} of them with "
        "right answers",
        *(f"* {key}: {value}" for key, value in run.about.items()),
        f"* `{run.command}`",
    ]
    said += [f"* left out: {name}: {why}" for name, why in run.left_out.items()]
    return "\n".join(said)


# -- words ----------------------------------------------------------------------------------------


def counted(outcome: Outcome) -> str:
    """What an outcome rests on."""
    return f"{outcome.questions} questions about {outcome.videos} videos"


def interval(outcome: Outcome, unit: str = " points") -> str:
    """A loss in percentage points."""
    value, low, high = (100 * x for x in (outcome.loss.value, outcome.loss.low, outcome.loss.high))
    return f"{value + 0.0:.1f} [{low:.1f}, {high:.1f}]{unit}"


def percent(share: float | None, digits: int | None = None) -> str:
    """A share; with a decimal where it is small."""
    if share is None:
        return "–"
    digits = (0 if share >= 0.1 or share == 0 else 1) if digits is None else digits
    return f"{100 * share:.{digits}f} %"


def seconds(value: float | None) -> str:
    """A time with three digits."""
    return "–" if value is None else f"{value:.3g} s"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
