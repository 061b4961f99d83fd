"""How often the model is right about real videos, by haystack, skill and onset, and what is kept.

    python examples/places/evaluate_places.py examples/places/checkpoint --patches 32 --videos 8

In PyTorch, without a server.  `--keep` drops video tokens before the language model: `evs:0.75` by
vLLM's own rule, `random:0.75` and `uniform:0.75` (every fourth patch) for comparison.  Two
ablations tell what a skill rests on: `hidden` drops the tokens of the marks that the question
needs, `local` lets video tokens see only their own, the previous and the first block of 64 tokens.
"""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

import argparse
from collections import defaultdict
from pathlib import Path

import batches
import footage
import grounds
import numpy as np
import places
import prompts
import scoring
import torch
import tower as towers
from forward import fast_dtype
from places import GRID, HAYSTACKS, HELD_OUT_SEEDS, WINDOWS, Scene
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

TOKENS = GRID[0] * GRID[1]
AT_ONCE = 24  # questions of a video in one pass


def kept(how: str, tokens: torch.Tensor, rng) -> torch.Tensor:
    """Indices of the video tokens that a rule keeps, rising.

    Args:
        how: "all", or the rule and the share it drops, as "evs:0.75".
        tokens: [patches, 64, hidden].

    Raises:
        ValueError: there is no such rule.
    """
    rule, _, share = how.partition(":")
    total = tokens.shape[0] * TOKENS
    if rule == "all":
        return torch.arange(total)
    if rule == "random":
        return torch.from_numpy(
            np.sort(rng.permutation(total)[: round(total * (1 - float(share)))])
        )
    if rule == "uniform":
        every = round(1 / (1 - float(share)))
        patch = torch.arange(total) // TOKENS
        return (patch % every == int(rng.integers(every))).nonzero()[:, 0]
    if rule == "evs":
        from vllm.multimodal.video_prune.evs import compute_retention_mask

        grid = (len(tokens), 2 * GRID[0], 2 * GRID[1])
        return compute_retention_mask(tokens.flatten(0, 1), grid, 2, float(share)).nonzero()[:, 0]
    raise ValueError(f"keep={how!r}: must be all, evs:SHARE, random:SHARE or uniform:SHARE")


def of_marks(scene: Scene, numbers) -> torch.Tensor:
    """Which tokens lie in the windows of these marks while they are there, bool [patches × 64]."""
    there = torch.zeros(scene.patches, WINDOWS, 4, dtype=torch.bool)
    for number in numbers:
        mark = scene.marks[number]
        there[mark.start : mark.end, mark.window] = True
    return towers.in_order(there).flatten()


class Evaluation:
    """A checkpoint, asked about held-out scenes."""

    def __init__(self, path: Path):
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        self.words = batches.Words(
            AutoTokenizer.from_pretrained(path), places.every_question_text()
        )

    @torch.no_grad()
    def ask(self, scene: Scene, keep: str = "all", ablation: str = "none"):
        """All questions about the scene's video, with whether the answer was right."""
        frames = footage.through_codec(grounds.frames(scene))
        tokens = towers.in_order(towers.encode_frames(self.model.model.visual, frames))
        where = kept(keep, tokens, np.random.default_rng(scene.seed))
        questions = places.questions(scene)
        flat = tokens.flatten(0, 1).to(fast_dtype(tokens.device))
        answered = []
        for group in _groups(scene, questions, by_needles=ablation == "hidden"):
            seen = where
            if ablation == "hidden":
                seen = where[~of_marks(scene, group[0].needles)[where]]
            video = flat[seen], seen, torch.zeros(0, len(seen), dtype=torch.bool), scene
            batch = prompts.assemble(self.model, self.words, [video], [group])
            local = {"prefix_mask": scoring.local(batch.prefix.shape[1])}
            said = scoring.logits(self.model, batch, **(local if ablation == "local" else {}))[0]
            right = said[0, :, 0].argmax(-1) == batch.answers[0]
            answered += zip(group, right.tolist())
        return answered


def _groups(scene: Scene, questions, by_needles: bool) -> list[list[places.Question]]:
    """Questions that see the same tokens, some at a time."""
    same = defaultdict(list)
    for question in questions:
        same[question.needles if by_needles else None].append(question)
    return [g[at : at + AT_ONCE] for g in same.values() for at in range(0, len(g), AT_ONCE)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--patches", type=int, nargs="+", default=[32])
    parser.add_argument("--videos", type=int, default=8, help="of each haystack")
    parser.add_argument("--haystack", nargs="+", default=HAYSTACKS, choices=HAYSTACKS)
    parser.add_argument("--keep", nargs="+", default=["all"])
    parser.add_argument("--ablation", nargs="+", default=["none"], choices=scoring.ABLATIONS)
    arguments = parser.parse_args()
    evaluation = Evaluation(arguments.checkpoint)
    for patches in arguments.patches:
        for keep in arguments.keep:
            for ablation in arguments.ablation:
                counts = defaultdict(lambda: [0, 0])
                for haystack in arguments.haystack:
                    for seed in HELD_OUT_SEEDS[: arguments.videos]:
                        scene = places.make(seed, patches, haystack)
                        for question, right in evaluation.ask(scene, keep, ablation):
                            kind = scene.marks[question.needles[-1]].kind
                            for key in (haystack, question.skill, f"onset {kind}", "all"):
                                counts[key][0] += right
                                counts[key][1] += 1
                print(f"{patches * TOKENS} tokens, keep {keep}, ablation {ablation}")
                for key, (right, total) in counts.items():
                    print(f"  {key}: {right / total:.3f} ({total})", flush=True)


if __name__ == "__main__":
    main()
