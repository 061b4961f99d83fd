"""Batches for stage B: scenes composed from a bank, questions, M-RoPE positions and masks.

Every video of a batch has the same length, frame size and number of questions. What varies from
batch to batch is what must not matter to the model: the pace of time, whether the frames are one
video or two, how the text's positions continue after a video (Hugging Face and vLLM differ), and
how many of a picture's tokens are there at all. Training on a quarter of the tokens is four times
as fast, and every token knows its whole picture.
"""

from dataclasses import dataclass

import numpy as np
import scenes
import torch
from bank import Bank

BEFORE_VIDEO = "<|im_start|>user\n<|vision_start|>"
BETWEEN_VIDEOS = "<|vision_end|><|vision_start|>"
PACES = (0.5, 1.0, 2.0, 2.0, 2.0, 4.0)  # positions a temporal patch; 2 at two frames a second
FARTHEST = 2400  # position of the last patch when the pace is irregular
LIKE_HUGGING_FACE = 0.3  # share of the videos
TWO_VIDEOS = 0.15  # share of the batches


@dataclass
class Batch:
    prefix: torch.Tensor  # [batch, N, hidden]
    prefix_at: torch.Tensor  # [3, batch, N]
    questions: torch.Tensor  # token ids [batch, Q, longest]
    questions_at: torch.Tensor  # [3, batch, Q × longest]
    mask: torch.Tensor  # bool [Q × longest, N + Q × longest]
    lengths: torch.Tensor  # [batch, Q], of the question without the answer
    answers: torch.Tensor  # [batch, Q] token ids
    asked: list[list[scenes.Question]]
    scenes: list[scenes.Scene]
    patch_at: torch.Tensor  # where each patch's tokens are in the prefix, [patches, tokens a patch]

    def last_token(self) -> torch.Tensor:
        """Of each question, before its answer: index into all questions' tokens, [batch, Q]."""
        asked, longest = self.questions.shape[1:]
        return torch.arange(asked, device=self.lengths.device) * longest + self.lengths - 1


class Words:
    """Token ids of questions and answers; `texts` are all questions there can be."""

    def __init__(self, tokenizer, texts: list[str] | None = None):
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.before_video = self.ids(BEFORE_VIDEO)
        self.between = self.ids(BETWEEN_VIDEOS)
        self.end = tokenizer.eos_token_id
        texts = scenes.every_question_text() if texts is None else texts
        self.longest = max(len(self.question(text)) for text in texts) + 1

    def ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def question(self, text: str) -> list[int]:
        return self.ids(f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n")


def choose(rng, scene: scenes.Scene, count: int, skills) -> list[scenes.Question]:
    """`count` questions, each of a random one of `skills` that the scene has.

    A skill that is listed twice is asked twice as often.
    """
    by_skill: dict[str, list] = {}
    for question in scenes.questions(scene):
        if question.skill in skills:
            by_skill.setdefault(question.skill, []).append(question)
    available = [skill for skill in skills if skill in by_skill]
    return [one_of(rng, by_skill[available[rng.integers(len(available))]]) for _ in range(count)]


def one_of(rng, questions: list[scenes.Question]) -> scenes.Question:
    """Each answer is as likely as any other: most colours appear once, and "1" must not pay."""
    if questions[0].skill == "count":
        answers = sorted({question.answer for question in questions})
        answer = answers[rng.integers(len(answers))]
        questions = [question for question in questions if question.answer == answer]
    return questions[rng.integers(len(questions))]


def make(
    rng,
    model,
    words: Words,
    bank: Bank,
    seeds: list[int],
    patches: int,
    asked: int | None = None,
    *,
    skills=scenes.SKILLS,
    kept: int | None = None,
    varied: bool = True,
    motion: str | None = None,
) -> Batch:
    """A batch of one video per seed.

    Args:
        rng: for everything but the scenes.
        asked: questions a video; None asks one of each of `skills`, and skips those a scene lacks
            by repeating another.
        kept: tokens of a picture that are there; None keeps all.
        varied: vary pace, position convention and number of videos; otherwise 2 frames a second
            and vLLM's convention.
        motion: of the haystack; None draws it.
    """
    size = (28 * bank.grid[0], 28 * bank.grid[1])
    made = [
        scenes.make(seed, patches, size, motion or ("calm", "busy")[int(rng.integers(2))])
        for seed in seeds
    ]
    if asked is None:
        questions = [
            [
                choose(rng, scene, 1, [skill] if _has(scene, skill) else skills)[0]
                for skill in skills
            ]
            for scene in made
        ]
    else:
        questions = [choose(rng, scene, asked, skills) for scene in made]
    chosen = torch.from_numpy(np.stack([bank.compose(rng, scene) for scene in made]))
    pictures, within = _pictures(rng, bank, chosen, kept)
    return _assemble(rng, model, words, bank.grid, pictures, within, made, questions, varied)


def of_video(model, words: Words, grid, tokens: torch.Tensor, scene, asked) -> Batch:
    """A batch of one real video, encoded to `tokens` [patches, tokens of a frame, hidden]."""
    within = torch.arange(tokens.shape[1]).expand(1, len(tokens), -1)
    rng = np.random.default_rng(0)  # nothing is varied
    return _assemble(rng, model, words, grid, tokens[None], within, [scene], [asked], varied=False)


def _assemble(rng, model, words, grid, pictures, within, made, questions, varied: bool) -> Batch:
    patches, asked, device = pictures.shape[1], len(questions[0]), pictures.device
    embed = model.get_input_embeddings().weight
    split = int(rng.integers(2, patches - 1)) if varied and rng.random() < TWO_VIDEOS else None

    def text(ids: list[int]) -> torch.Tensor:
        known = embed[torch.tensor(ids, device=device)].to(pictures.dtype)
        return known.expand(len(made), -1, -1)

    patch_at = torch.arange(patches * pictures.shape[2]).view(patches, -1) + len(words.before_video)
    if split is None:
        parts = [pictures.flatten(1, 2)]
    else:
        halves = pictures[:, :split], pictures[:, split:]
        parts = [halves[0].flatten(1, 2), text(words.between), halves[1].flatten(1, 2)]
        patch_at[split:] += len(words.between)
    prefix = torch.cat([text(words.before_video), *parts], 1)
    prefix_at, next_at = _positions(rng, words, grid, within, split, varied)
    text_at = next_at[:, None] + torch.arange(words.longest).repeat(asked)[None]
    ids, lengths, answers = question_ids(words, questions)
    return Batch(
        prefix=prefix,
        prefix_at=prefix_at.to(device),
        questions=ids.to(device),
        questions_at=text_at.expand(3, -1, -1).to(device),
        mask=question_mask(prefix.shape[1], asked, words.longest).to(device),
        lengths=lengths.to(device),
        answers=answers.to(device),
        asked=questions,
        scenes=made,
        patch_at=patch_at.to(device),
    )


def _has(scene, skill: str) -> bool:
    return any(question.skill == skill for question in scenes.questions(scene))


def _pictures(rng, bank: Bank, chosen: torch.Tensor, kept: int | None):
    """Tokens [batch, patches, kept, hidden] and their place in the frame [batch, patches, kept]."""
    total = bank.tokens.shape[1]
    if kept is None or kept >= total:
        return bank.tokens[chosen], torch.arange(total).expand(*chosen.shape, -1)
    order = rng.random((*chosen.shape, total)).argsort(-1)[..., :kept]
    within = torch.from_numpy(np.sort(order, -1))
    return bank.tokens[chosen[..., None], within], within


def _positions(rng, words: Words, grid, within: torch.Tensor, split: int | None, varied: bool):
    """M-RoPE positions of the prefix [3, batch, N], and where the text goes on [batch]."""
    columns, ends = [], []
    for video in range(len(within)):
        like_hugging_face = varied and rng.random() < LIKE_HUGGING_FACE
        parts, at = [_text(0, len(words.before_video))], len(words.before_video)
        pieces = (
            [within[video]] if split is None else [within[video, :split], within[video, split:]]
        )
        for number, places in enumerate(pieces):
            if number:
                parts.append(_text(at, len(words.between)))
                at += len(words.between)
            when = torch.from_numpy(times(rng, len(places), varied))[:, None].expand_as(places)
            spots = torch.stack([when, places // grid[1], places % grid[1]]) + at
            parts.append(spots.flatten(1))
            at = at + max(grid) if like_hugging_face else int(spots.max()) + 1
        if varied and rng.random() < 0.15:
            at += int(rng.integers(0, 200))
        columns.append(torch.cat(parts, 1))
        ends.append(at)
    return torch.stack(columns, 1), torch.tensor(ends)


def _text(at: int, length: int) -> torch.Tensor:
    return (at + torch.arange(length)).expand(3, -1)


def times(rng, patches: int, varied: bool) -> np.ndarray:
    """Positions in time of a video's patches, rising, the first at 0."""
    if not varied:
        return np.arange(patches) * 2
    if rng.random() < 0.6:
        return np.floor(np.arange(patches) * rng.choice(PACES)).astype(np.int64)
    reach = np.exp(rng.uniform(np.log(patches + 1), np.log(max(FARTHEST, patches + 2))))
    times = np.sort(rng.permutation(max(int(reach), patches))[:patches])
    return times - times[0]


def question_ids(words: Words, questions):
    """Padded ids [batch, Q, longest] with the answer after the question, lengths and answers."""
    ids = torch.zeros(len(questions), len(questions[0]), words.longest, dtype=torch.long)
    lengths, answers = torch.zeros_like(ids[..., 0]), torch.zeros_like(ids[..., 0])
    for video, row in enumerate(questions):
        for number, question in enumerate(row):
            text, answer = words.question(question.text), words.ids(question.answer)[0]
            ids[video, number, : len(text) + 1] = torch.tensor([*text, answer])
            lengths[video, number], answers[video, number] = len(text), answer
    return ids, lengths, answers


def question_mask(prefix: int, asked: int, longest: int) -> torch.Tensor:
    """Every question sees the prefix and itself, causally."""
    owner = torch.arange(asked * longest) // longest
    own = (owner[:, None] == owner[None]).tril()
    return torch.cat([torch.ones(asked * longest, prefix, dtype=torch.bool), own], 1)
