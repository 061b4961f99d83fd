"""Write needle videos and their questions as an lmms-eval task.

    python examples/eval/make_needle_task.py .needle/task --videos 6 --patches 64
    lmms-eval --include_path .needle/task --tasks needle ...

A question of each skill per video, from held-out seeds (`examples/needle/scenes.py`). The needle
model (`examples/needle/checkpoint`) answers them; another model would need other wording.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "needle")]

import footage  # noqa: E402
import local_task  # noqa: E402
import scenes  # noqa: E402

TASK = "needle"
FIRST_SEED = 5000  # of the held-out ones; others measure on those before


def write(folder: Path, videos: int, patches: int, motion: str) -> Path:
    """The task's folder, with `videos` videos of `patches` temporal patches."""
    questions = []
    for number in range(videos):
        scene = scenes.make(scenes.HELD_OUT_SEEDS[FIRST_SEED + number], patches, motion=motion)
        video = footage.write_mp4(footage.frames(scene), Path(folder) / f"{scene.seed}.mp4")
        for question in one_of_each_skill(scene):
            questions.append(
                {
                    "video": video.name,
                    "question": question.text,
                    "answer": question.answer,
                    "skill": question.skill,
                }
            )
    metrics = dict.fromkeys(("accuracy", *scenes.SKILLS), "mean")
    return local_task.write(
        folder, TASK, questions, HERE / "needle_utils.py", metrics, answer_tokens=4
    )


def one_of_each_skill(scene: scenes.Scene) -> list[scenes.Question]:
    """A question per skill, of those the scene allows."""
    rng = np.random.default_rng((scene.seed, 5))
    asked = scenes.questions(scene)
    by_skill = [[q for q in asked if q.skill == skill] for skill in scenes.SKILLS]
    return [found[rng.integers(len(found))] for found in by_skill if found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, default=6, help="default: 6")
    parser.add_argument("--patches", type=int, default=64, help="of 16 tokens (default: 64)")
    parser.add_argument("--motion", choices=("calm", "busy"), default="calm", help="default: calm")
    options = parser.parse_args()
    if options.videos < 1 or options.patches < 4:
        parser.error(
            f"--videos {options.videos} --patches {options.patches}: at least 1 video of 4 patches"
        )
    print(write(options.folder, options.videos, options.patches, options.motion))


if __name__ == "__main__":
    main()
