"""Which score should choose cubes: right answers on the test bed "places" under several.

    python benchmarks/cube_scores.py --patches 32 --videos 12 --share 0.2

AdaSpark scores a cube by its mean key (the paper's rule, AdaS-Attn).  One token of a cube that
matters is a sixty-fourth of that mean.  Here other scores choose the same share of the cubes, by
rank, in the same model:

* ``mean``: the query times the mean key.
* ``spread``: that, plus half of the keys' variance along the query, dimension by dimension: the
  second term of the logarithm of a cube's attention mass.  It needs a second sum per cube.
* ``bounds``: the largest product that the smallest and largest key of a cube allow, dimension by
  dimension (Quest, arXiv 2406.10774).  It needs two vectors per cube.
* ``parts``: the mass of sixteen mean keys, of four tokens each.
* ``mass``: the true mass: every query that is scored times every key.

In PyTorch, without an engine; whole prompts in one chunk, a tile's queries as the fast path has
them (methods/adaspark/score.py).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

PLACES = Path(__file__).resolve().parents[1] / "examples" / "places"
sys.path.append(str(PLACES))

import shared  # noqa: E402, F401, puts the needle model's modules on the path

# isort: split

import footage  # noqa: E402
import grounds  # noqa: E402
import places  # noqa: E402
import prompts  # noqa: E402
import tower as towers  # noqa: E402
from evaluate_places import AT_ONCE, Evaluation  # noqa: E402
from scoring import logits  # noqa: E402

from vllm_adaspark.video.order import spread_tokens  # noqa: E402

BLOCK, CUBE_QUERIES, DENSE_BELOW = 64, 8, 8
FIRST_VIDEO = 500  # of the held-out seeds: others than those of `make places`


def mean(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Logits ``[kv_heads, m, cubes]`` of ``q [kv_heads, m, d]``, scaled, for ``keys [kv_heads,
    cubes, 64, d]``, as all scores here."""
    return q @ keys.mean(2).mT


def spread(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return mean(q, keys) + 0.5 * (q * q) @ keys.var(2, correction=0).mT


def bounds(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return q.clamp(min=0) @ keys.amax(2).mT + q.clamp(max=0) @ keys.amin(2).mT


def parts(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return mass(q, keys.unflatten(2, (16, 4)).mean(3))


def mass(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hmd,hctd->hmct", q, keys).logsumexp(-1)


Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SCORES: dict[str, Score] = {s.__name__: s for s in (mean, spread, bounds, parts, mass)}


def cube_order(patches: int) -> torch.Tensor:
    """Places of a video's tokens (patch by patch, row by row), cube after cube of 4×4×4."""
    at = torch.arange(patches * 64).view(patches // 4, 4, 2, 4, 2, 4)
    return at.permute(0, 2, 4, 1, 3, 5).flatten()


def kept(probabilities: torch.Tensor, share: float) -> torch.Tensor:
    """The most probable ``share`` of the cubes ``[..., cubes]``, as bool."""
    number = math.ceil(share * probabilities.shape[-1])
    best = probabilities.topk(number, -1).indices
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, best, True)


@torch.no_grad()
def answers(model, batch, start: int, tokens: int, score: Score | None, share: float):
    """Logits ``[questions, vocabulary]`` of the answers about one video.

    Args:
        batch: prompts of one video.
        start, tokens: the first of the video's tokens in the prefix, and how many there are.
        score: None attends densely.
        share: of the preceding cubes that a tile keeps.
    """
    config = model.model.language_model.config
    kv_heads = config.num_key_value_heads
    group = config.num_attention_heads // kv_heads
    n = batch.prefix.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril().repeat(kv_heads, 1, 1)
    asked = batch.mask.expand(kv_heads, -1, -1)
    first, last = -(-start // BLOCK), (start + tokens) // BLOCK  # blocks that are cubes
    scored = torch.as_tensor(spread_tokens(BLOCK, CUBE_QUERIES))

    def probabilities(query, keys) -> torch.Tensor:
        """``[kv_heads, tokens, cubes]`` of ``query [heads, tokens, d]``, a group's heads pooled."""
        q = (query * query.shape[-1] ** -0.5).unflatten(0, (kv_heads, group))
        return score(q.flatten(1, 2), keys).softmax(-1).unflatten(1, (group, -1)).mean(1)

    def choose(query, key, asking):
        seen, seen_asked = causal.clone(), asked.clone()
        video = slice(first * BLOCK, last * BLOCK)
        cubes = key[0, ::group, video].unflatten(1, (-1, BLOCK))
        for cube in range(DENSE_BELOW, last - first) if query is not None else ():
            tile = slice((first + cube) * BLOCK, (first + cube + 1) * BLOCK)
            pooled = probabilities(query[0, :, tile][:, scored], cubes[:, :cube]).mean(1)
            keeps = kept(pooled, share).repeat_interleave(BLOCK, -1)
            seen[:, tile, first * BLOCK : tile.start] &= keeps[:, None]
        of_text = kept(probabilities(asking[0], cubes), share)
        seen_asked[:, :, video] &= of_text.repeat_interleave(BLOCK, -1)
        return [mask.repeat_interleave(group, 0)[None] for mask in (seen, seen_asked)]

    return logits(model, batch, choose=None if score is None else choose)[0][0, :, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patches", type=int, default=32, help="64 tokens each; a multiple of 4")
    parser.add_argument("--videos", type=int, default=12, help="each haystack in turn")
    parser.add_argument("--share", type=float, nargs="+", default=[0.2], help="of the cubes, kept")
    parser.add_argument("--score", nargs="+", default=list(SCORES), choices=SCORES)
    arguments = parser.parse_args()
    asker = Evaluation(PLACES / "checkpoint")
    order = cube_order(arguments.patches)
    contenders = {"dense": (None, 1.0)} | {
        f"{name} {share:g}": (SCORES[name], share)
        for share in arguments.share
        for name in arguments.score
    }
    right: dict[str, dict[str, list[bool]]] = {c: defaultdict(list) for c in contenders}
    for number, seed in enumerate(places.HELD_OUT_SEEDS[FIRST_VIDEO:][: arguments.videos]):
        haystack = places.HAYSTACKS[number % len(places.HAYSTACKS)]
        scene = places.make(seed, arguments.patches, haystack)
        frames = footage.through_codec(grounds.frames(scene))
        tokens = towers.in_order(towers.encode_frames(asker.model.model.visual, frames))
        video = tokens.flatten(0, 1)[order], order, torch.zeros(0, len(order)).bool(), scene
        questions = places.questions(scene)[:AT_ONCE]
        batch = prompts.assemble(asker.model, asker.words, [video], [questions])
        batch.prefix = batch.prefix.float()
        start = batch.prefix.shape[1] - len(order)
        for name, (score, share) in contenders.items():
            said = answers(asker.model, batch, start, len(order), score, share).argmax(-1)
            for question, ok in zip(questions, (said == batch.answers[0]).tolist()):
                right[name][question.skill].append(ok)
        print(f"{number + 1} of {arguments.videos} videos", file=sys.stderr, flush=True)
    print("| score, share | " + " | ".join(places.SKILLS) + " | all |")
    print("|---" * (len(places.SKILLS) + 2) + "|")
    for name, by_skill in right.items():
        of_skills = [by_skill[skill] for skill in places.SKILLS]
        cells = [f"{sum(r) / len(r):.2f} ({len(r)})" if r else "" for r in of_skills]
        total = [ok for of_skill in of_skills for ok in of_skill]
        print(f"| {name} | {' | '.join(cells)} | {sum(total) / len(total):.2f} ({len(total)}) |")


if __name__ == "__main__":
    main()
