"""What is asked of which model: all that is settled, and refused, before an engine starts."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..accounts.cost import Cost, Model
from ..cli import UsageError, media
from ..cli.checkpoints import trained_for
from ..cli.inspect import TooLong, fitting_cost
from ..cli.offline import say
from ..cli.redact import redact_arguments
from ..cli.settings import ADDITIONAL, names
from ..cli.vllm_options import take_json
from ..methods import OF_ARCHITECTURE, settings_class
from ..models.layout import Sampling, Video
from ..settings import METHOD_KEY, SERVER_KEY, Settings
from . import grid, questions
from .compare import by_video
from .engine import Job
from .grid import Contender
from .journal import Journal, fingerprint
from .run import LOG, Work

TEXT_TOKENS = 64  # of a prompt, beside the question: the chat template's
ANSWER_ROOM = 256  # tokens beyond the answer's


@dataclass
class Plan:
    """What is asked of which model: all that is settled before an engine starts."""

    args: argparse.Namespace
    model: Model
    sampling: Sampling
    settled: dict[str, Settings]  # what each contender's settings come to
    folder: Path  # that an engine may read videos in
    clips: Clips
    left_out: dict[str, str]  # videos that cannot be read, and why
    work: Work

    @classmethod
    def of(cls, args: argparse.Namespace) -> Plan:
        """From the arguments.

        Raises:
            UsageError, GridError, QuestionsError, JournalError: something cannot be used.
        """
        source, *file = (path.expanduser() for path in args.videos)
        try:
            model = media.find_model(args.model, args.revision)
        except UsageError as error:
            raise UsageError(str(error).replace("--model", "MODEL", 1)) from None
        sampling = media.sampling(args, model.rules)
        known = grid.Model(
            trained_for=OF_ARCHITECTURE.get(trained_for(model.name, dict(model.config))),
            config=model.config,
            takes_prune=model.layout.takes_prune,
            layers=model.layers,
        )
        methods = [name.strip() for name in args.methods.split(",") if name.strip()]
        if args.grid and (methods or args.quick):
            raise UsageError("--grid and --methods or --quick: leave one of them out")
        contenders = (
            grid.read(args.grid, known)
            if args.grid
            else grid.default(known, methods, quick=args.quick)
        )
        settled = {each.name: grid.check(each, known, each.name) for each in contenders}
        for each in contenders:
            _refuse_misspelt(args, each)
        asked = (
            questions.read(file[0], source)
            if file
            else questions.stock(questions.find_videos(source), source)
        )
        clips = Clips(model, sampling, args.max_tokens)
        videos, left_out = clips.read(by_video(asked), settled[contenders[0].name])
        about = {
            "model": {"name": model.name, "files": _fingerprint(args, model)},
            "grid": [each.to_dict() for each in contenders],
            "questions": [{"video": q.name, "question": q.prompt} for some in videos for q in some],
            "videos": {some[0].name: f"{some[0].video.stat().st_size} bytes" for some in videos},
            "options": {
                "max_tokens": args.max_tokens,
                "frames": asdict(sampling),
                "vllm": redact_arguments(list(args.rest)),
            },
        }
        work = Work(
            contenders,
            videos,
            {name: cost.dense_flops for name, cost in clips.costs.items()},
            Journal(args.out, about),
            args.out,
        )
        return cls(
            args,
            model,
            sampling,
            settled,
            # A link's target, since vLLM asks where that lies.
            Path(os.path.commonpath([q.video.resolve().parent for some in videos for q in some])),
            clips,
            left_out,
            work,
        )

    def words(self) -> str:
        """What is about to be done."""
        work, videos = self.work, self.work.videos
        questions = sum(map(len, videos))
        there = f", of which {len(work.journal)} are there" if len(work.journal) else ""
        flops = sum(
            work.flops[some[0].name] for each in work.contenders for some in work.missing(each)
        )
        return (
            f"{questions} questions about {len(videos)} videos, under {len(work.contenders)} "
            f"settings: {work.total} times a video{there}; {flops / 1e12:,.3g} TFLOPs if all were "
            f"dense; the longest prompt has {self.clips.longest.prompt_tokens:,} tokens"
        )

    def server_flags(self, contender: Contender) -> list[str]:
        """Options of a server for these videos, and those that were given for vLLM."""
        cost = self.clips.cost([self.settled[contender.name]])
        return [
            f"--max-model-len {cost.max_model_len}",
            f"--max-num-batched-tokens {cost.max_num_batched_tokens}",
            *self.model.rules.flags(self.sampling),
            *([shlex.join(redact_arguments(list(self.args.rest)))] if self.args.rest else []),
        ]

    def job(self, contenders: list[Contender], videos: dict[str, Any]) -> Job:
        """The job of an engine."""
        revision = ["--revision", self.args.revision] if self.args.revision else []
        settled = [self.settled[each.name] for each in contenders]
        return Job(
            model=self.model,
            sampling=self.sampling,
            folder=self.folder,
            rest=[*self.args.rest, *revision],
            cost=self.clips.cost(settled),
            volume=settled[0].cube_volume,
            contenders=contenders,
            videos=videos,
            max_tokens=self.args.max_tokens,
            max_pixels=self.args.max_pixels,
            log=self.args.out / LOG,
        )


class Clips:
    """What the videos cost: known from their files, before an engine starts.

    Attributes:
        costs: of a prompt about each video, under the reference's settings.
    """

    def __init__(self, model: Model, sampling: Sampling, max_tokens: int) -> None:
        self._model, self._sampling = model, sampling
        self._room = max_tokens + ANSWER_ROOM
        self._read: dict[str, tuple[Video, int]] = {}  # the video, tokens of its longest question
        self.costs: dict[str, Cost] = {}

    def read(self, videos: list[Any], config: Settings) -> tuple[list[Any], dict[str, str]]:
        """Look into each video.

        Args:
            videos: the questions of each.
            config: the reference's settings.

        Returns:
            Those that can be read, and why others cannot, by their names.

        Raises:
            UsageError: none can be read, or one is too long for the model.
        """
        readable, left_out = [], {}
        for some in videos:
            path, name = some[0].video, some[0].name
            text = TEXT_TOKENS + max(len(question.prompt.encode()) for question in some)
            try:
                self._read[name] = media.probe(path.read_bytes(), name), text
                self.costs[name] = self._cost(name, config)
            except TooLong as error:
                raise UsageError(f"VIDEO {name!r}: {error}") from None
            except (UsageError, OSError) as error:
                left_out[name] = str(error).removeprefix(f"VIDEO {name!r}: ")
                say(f"left out: {name}: {left_out[name]}")
            else:
                readable.append(some)
        if not readable:
            raise UsageError(f"none of the {len(videos)} videos can be read")
        return readable, left_out

    @property
    def longest(self) -> Cost:
        """The cost of the longest prompt, under the reference's settings."""
        return self.costs[self._longest]

    @property
    def _longest(self) -> str:
        return max(self.costs, key=lambda name: self.costs[name].prompt_tokens)

    def cost(self, settled: list[Settings]) -> Cost:
        """The cost of the longest prompt under those of some settings that need the most room."""
        costs = [self._cost(self._longest, config) for config in settled]
        return max(costs, key=lambda cost: (cost.one_step, cost.max_num_batched_tokens))

    def _cost(self, name: str, config: Settings) -> Cost:
        video, text = self._read[name]
        return fitting_cost(
            self._model, video, config, self._sampling, text_tokens=text, answer_tokens=self._room
        )


def _refuse_misspelt(args: argparse.Namespace, contender: Contender) -> None:
    """Settings are the grid's, and MODEL says the model: one among vLLM's options is a mistake."""
    cls = settings_class(contender.method)
    flags = {"--" + name.replace("_", "-") for name in [*names(cls), *cls.words, "p"]}
    for word in args.rest:
        option = word.partition("=")[0].replace("_", "-")
        if option in flags:
            raise UsageError(f"{word}: settings are tried by the grid; give --grid FILE with it")
        if option == "--model":
            raise UsageError(f"{word}: MODEL is the first argument; leave it out")
    said = take_json(args.rest, ADDITIONAL)[0].keys() & {SERVER_KEY, METHOD_KEY}
    if said:
        raise UsageError(
            f"{ADDITIONAL} {', '.join(sorted(said))}: settings and methods are tried by the grid; "
            "give --grid FILE with them"
        )


def _fingerprint(args: argparse.Namespace, model: Model) -> str:
    folder = Path(args.model).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model.name, "config.json", None, args.revision)
        if not isinstance(found, str):
            return args.revision or "latest"
        folder = Path(found).parent
    return fingerprint(folder)
