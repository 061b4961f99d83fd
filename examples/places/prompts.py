"""Batches for stage B: composed videos, or parts of them, with questions that share their video.

Much of training sees some of a video's tokens only: tokens that name each mark, and random others.
That is faster, and it makes a model that methods which drop tokens can be measured on: what they
lose is the marks they drop, not the model's surprise at gaps.
"""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

from dataclasses import dataclass

import batches
import places
import torch
import tracks as banks
from places import GRID, HAYSTACKS

TOKENS = GRID[0] * GRID[1]  # of a temporal patch


@dataclass
class Prompts:
    """Videos of one length with their questions; fields as in the needle model's `batches.Batch`.

    naming: of each video bool [marks, N], the prefix's tokens that name each mark.
    video_from: text tokens in front of the video.
    """

    prefix: torch.Tensor
    prefix_at: torch.Tensor
    questions: torch.Tensor
    questions_at: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    answers: torch.Tensor
    asked: list[list[places.Question]]
    scenes: list[places.Scene]
    naming: list[torch.Tensor]
    video_from: int

    def last_token(self) -> torch.Tensor:
        return batches.Batch.last_token(self)


def choose(rng, scene: places.Scene, count: int, skills) -> list[places.Question]:
    """`count` questions, each of a random one of `skills` that the scene has."""
    by_skill: dict[str, list] = {}
    for question in places.questions(scene):
        if question.skill in skills:
            by_skill.setdefault(question.skill, []).append(question)
    there = [skill for skill in skills if skill in by_skill]
    return [batches.one_of(rng, by_skill[there[rng.integers(len(there))]]) for _ in range(count)]


def make(
    rng,
    model,
    words: batches.Words,
    bank: dict[str, banks.Tracks],
    seeds: list[int],
    patches: int,
    asked: int,
    skills=places.SKILLS,
    kept: int | None = None,
    haystack: str | None = None,
) -> Prompts:
    """A batch of a composed video per seed.

    Args:
        asked: questions a video.
        kept: tokens of a video that are there; None keeps all.
        haystack: None draws one for each video.
    """
    videos = []
    for seed in seeds:
        kind = haystack or str(rng.choice(HAYSTACKS))
        tokens, scene, names = banks.compose(rng, bank[kind], places.make(seed, patches, kind))
        where = _kept(rng, names.flatten(1), kept)
        videos.append((tokens.flatten(0, 1)[where], where, names.flatten(1)[:, where], scene))
    questions = [choose(rng, scene, asked, skills) for *_, scene in videos]
    return assemble(model, words, videos, questions)


def assemble(model, words: batches.Words, videos, questions) -> Prompts:
    """Prompts of videos given as (tokens [N, hidden], their places [N], naming, scene).

    Positions are those that vLLM gives to a video of two frames a second.
    """
    weight = model.get_input_embeddings().weight
    before, dtype = words.before_video, videos[0][0].dtype
    ids = torch.tensor(before, device=weight.device)
    text = weight[ids].to(dtype).expand(len(videos), -1, -1)
    prefix = torch.cat([text, torch.stack([v[0] for v in videos]).to(weight.device)], 1)
    columns, ends = [], []
    for _, where, _, scene in videos:
        patch, spot = where // TOKENS, where % TOKENS
        spots = torch.stack([2 * patch, spot // GRID[1], spot % GRID[1]]) + len(before)
        columns.append(torch.cat([torch.arange(len(before)).expand(3, -1), spots], 1))
        ends.append(len(before) + max(2 * scene.patches - 1, *GRID))
    length = words.longest
    at = torch.tensor(ends)[:, None] + torch.arange(length).repeat(len(questions[0]))[None]
    token_ids, lengths, answers = batches.question_ids(words, questions)
    device = weight.device
    return Prompts(
        prefix=prefix,
        prefix_at=torch.stack(columns, 1).to(device),
        questions=token_ids.to(device),
        questions_at=at.expand(3, -1, -1).to(device),
        mask=batches.question_mask(prefix.shape[1], len(questions[0]), length).to(device),
        lengths=lengths.to(device),
        answers=answers.to(device),
        asked=questions,
        scenes=[scene for *_, scene in videos],
        naming=[
            torch.cat([names.new_zeros(len(names), len(before)), names], 1).to(device)
            for _, _, names, _ in videos
        ],
        video_from=len(before),
    )


def _kept(rng, names: torch.Tensor, kept: int | None) -> torch.Tensor:
    """Indices of `kept` of a video's tokens, rising: some that name each mark, and random others.

    Args:
        names: bool [marks, tokens].
    """
    total = names.shape[1]
    if kept is None or kept >= total:
        return torch.arange(total)
    chosen: list[int] = []
    for row in names:
        own = row.nonzero()[:, 0].numpy()
        chosen += rng.permutation(own)[: int(rng.integers(1, 5))].tolist()
    chosen += rng.permutation(total)[:kept].tolist()
    return torch.tensor(sorted(list(dict.fromkeys(chosen))[:kept]))
