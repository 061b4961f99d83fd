"""Write held-out videos of the needle task and a file of questions about them.

    python examples/needle/write_questions.py .needle/tune --videos 10 --patches 256

The folder gets an mp4 a video and ``questions.jsonl``, one question of each skill about each video:
input for ``vllm-adaspark tune``, and an example of how such a file looks.  Half of the videos are
calm, half busy.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import footage
import scenes

# Nobody else takes these held-out seeds: benchmarks/needle begins at 20 million.
FIRST = 10_000_000
MOTIONS = ("calm", "busy")
STRIDE = 100  # seeds that are tried for a video; every other one does


def write(folder: Path, videos: int, patches: int, first: int = 0) -> Path:
    """Write so many videos of ``patches`` seconds each, and their questions.

    Args:
        folder: made if it is not there.
        videos: how many.
        patches: temporal patches of each, 16 video tokens and a second each.
        first: how many videos to skip: another part of the held-out seeds.

    Returns:
        The file of questions.

    Raises:
        ValueError: no such videos.
    """
    if videos < 1 or first < 0:
        raise ValueError(f"videos={videos}, first={first}: expected at least 1, and 0")
    folder.mkdir(parents=True, exist_ok=True)
    lines, seeds = [], iter(scenes.HELD_OUT_SEEDS[FIRST + STRIDE * first :])
    for number in range(first, first + videos):
        scene, asked = _scene(seeds, patches, MOTIONS[number % 2])
        path = footage.write_mp4(footage.frames(scene), folder / f"{number:04}.mp4")
        lines += [
            {"video": path.name, "question": each.text, "answer": each.answer} for each in asked
        ]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _scene(seeds, patches: int, motion: str) -> tuple[scenes.Scene, list[scenes.Question]]:
    """The next scene that has a question of every skill, and one of each."""
    for seed in itertools.islice(seeds, STRIDE):
        scene = scenes.make(seed, patches, motion=motion)
        by_skill: dict[str, list[scenes.Question]] = {skill: [] for skill in scenes.SKILLS}
        for question in scenes.questions(scene):
            by_skill[question.skill].append(question)
        if all(by_skill.values()):
            return scene, [asked[seed % len(asked)] for asked in by_skill.values()]
    raise ValueError(f"patches={patches}: no scene has a question of every skill")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, default=10, help="each asks 6 questions")
    parser.add_argument("--patches", type=int, default=256, help="seconds, 16 video tokens each")
    parser.add_argument("--first", type=int, default=0, help="videos to skip")
    options = parser.parse_args()
    try:
        print(write(options.folder, options.videos, options.patches, options.first))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
