"""How often the model is right, skill by skill, on scenes composed from a bank.

Quick, because nothing is drawn or encoded again; `evaluate.py` measures on real videos. Two
ablations tell what a skill rests on: `local`, where video tokens see only their own, the previous
and the first block of 64 tokens, and `hidden`, where the question does not see the needles' blocks.
"""

import batches
import numpy as np
import scenes
import torch
import torch.nn.functional as F
from bank import Bank
from forward import language

BLOCK = 64  # tokens, as a KV block of a server
ABLATIONS = ("none", "local", "hidden")


def logits(model, batch: batches.Batch, prefix_mask=None, mask=None, watch=None, choose=None):
    """For each question those of the answer and of what follows it, [batch, Q, 2, vocabulary].

    Second, the whole pass; with `watch`, the `hints.links`, also where those tokens and the
    questions' last ones look.
    """
    embed = model.get_input_embeddings().weight
    count, asked, longest = batch.questions.shape
    made = language(
        model,
        batch.prefix,
        embed[batch.questions.flatten(1)].to(batch.prefix.dtype),
        batch.prefix_at,
        batch.questions_at,
        batch.mask if mask is None else mask,
        prefix_mask,
        None if watch is None else batch.last_token(),
        watch,
        choose,
    )
    hidden = made.hidden.view(count, asked, longest, -1)
    at = torch.stack([batch.lengths - 1, batch.lengths], -1)[..., None]
    hidden = hidden.gather(2, at.expand(-1, -1, -1, hidden.shape[-1]))
    return F.linear(hidden.float(), model.lm_head.weight.float()), made


@torch.no_grad()
def accuracy(
    model,
    words: batches.Words,
    bank: Bank,
    patches: int,
    videos: int,
    *,
    motion: str | None = None,
    ablation: str = "none",
    kept: int | None = None,
    first_seed: int = scenes.HELD_OUT_SEEDS[0],
    at_once: int = 4,
) -> dict[str, tuple[int, int]]:
    """Right answers and questions per skill, over scenes from `first_seed` on."""
    counts = {skill: [0, 0] for skill in scenes.SKILLS}
    for first in range(0, videos, at_once):
        seeds = [first_seed + first + n for n in range(min(at_once, videos - first))]
        rng = np.random.default_rng(seeds[0])
        batch = batches.make(
            rng, model, words, bank, seeds, patches, kept=kept, varied=False, motion=motion
        )
        said = logits(model, batch, **masks(batch, ablation))[0][:, :, 0].argmax(-1)
        for row, right in zip(batch.asked, (said == batch.answers).tolist()):
            for question, one in zip(row, right):
                counts[question.skill][0] += one
                counts[question.skill][1] += 1
    return {skill: (right, total) for skill, (right, total) in counts.items()}


def shares(counts: dict[str, tuple[int, int]]) -> str:
    """One line: each skill's accuracy."""
    return " ".join(f"{s} {right / total:.3f}" for s, (right, total) in counts.items() if total)


def masks(batch: batches.Batch, ablation: str) -> dict[str, torch.Tensor]:
    """What `logits` needs to run under an ablation.

    Raises:
        ValueError: `ablation` is not one of `ABLATIONS`.
    """
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation={ablation!r}: must be one of {', '.join(ABLATIONS)}")
    if ablation == "local":
        return {"prefix_mask": local(batch.prefix.shape[1])}
    return {"mask": _hiding(batch)} if ablation == "hidden" else {}


def local(length: int) -> torch.Tensor:
    """Video tokens see their own, the previous and the first block only, bool [length, length]."""
    block = torch.arange(length) // BLOCK
    near = (block[:, None] - block[None] <= 1) | (block[None] == 0)
    return near & torch.ones(length, length, dtype=torch.bool).tril()


def _hiding(batch: batches.Batch) -> torch.Tensor:
    """The questions' mask without the blocks in which their needles lie."""
    longest = batch.questions.shape[2]
    mask = batch.mask.expand(len(batch.asked), 1, -1, -1).clone()
    for video, row in enumerate(batch.asked):
        for number, question in enumerate(row):
            rows = slice(number * longest, (number + 1) * longest)
            for patch in question.needles:
                first, last = batch.patch_at[patch, [0, -1]].tolist()
                hidden = slice(first // BLOCK * BLOCK, (last // BLOCK + 1) * BLOCK)
                hidden = slice(hidden.start, min(hidden.stop, batch.prefix.shape[1]))
                mask[video, 0, rows, hidden] = False
    return mask
