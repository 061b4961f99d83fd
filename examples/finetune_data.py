"""What finetune.py trains on: videos with questions and answers, the same again for the same step.

Either the needle model's made-up videos, of training seeds only, or a file of your own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NEEDLE = Path(__file__).resolve().parent / "needle"
FIRST_SEED = 50_000_000  # of the needle model's training seeds; its own training stays below


@dataclass(frozen=True)
class Clip:
    """A video and what is asked about it.

    frames: RGB uint8 [frames, height, width, 3].
    metadata: as vLLM's video loader and Hugging Face's processor have it.
    """

    frames: np.ndarray
    metadata: dict
    questions: list[tuple[str, str]]  # (question, answer)


class NeedleVideos:
    """Videos of the needle task, drawn as they are needed; see examples/needle/README.md."""

    def __init__(self, patches: tuple[int, int], questions: int) -> None:
        """Of so many temporal patches (from, to), 16 tokens each, and so many questions each."""
        sys.path.append(str(NEEDLE))
        import batches
        import footage
        import scenes

        self._batches, self._footage, self._scenes = batches, footage, scenes
        self._patches, self._questions = patches, questions

    def clip(self, number: int) -> Clip:
        """The ``number``-th video of the training."""
        seed = FIRST_SEED + number
        assert seed in self._scenes.TRAINING_SEEDS
        rng = np.random.default_rng((seed, 6))
        # Short videos are many times cheaper: as much time goes to each length.
        shortest, longest = np.log(self._patches)
        patches = round(float(np.exp(rng.uniform(shortest, longest))))
        motion = ("calm", "busy")[int(rng.integers(2))]
        scene = self._scenes.make(seed, patches, motion=motion)
        frames = self._footage.frames(scene)
        if rng.random() < 0.5:
            frames = self._footage.through_codec(frames)
        asked = self._batches.choose(rng, scene, self._questions, self._scenes.SKILLS)
        pairs = dict.fromkeys((question.text, question.answer) for question in asked)
        return Clip(frames, metadata(len(frames), self._footage.FPS), list(pairs))


class JsonLines:
    """Your own data: a JSON object {"video", "question", "answer"} a line.

    Videos are paths, relative to the file, read as the server reads them, which takes vLLM.  The
    questions about one video are asked together, at most so many; the order is mixed every epoch.

    Raises:
        ValueError: a line that is no such object, or a file without lines.
    """

    def __init__(self, path: Path, questions: int, fps: float, max_frames: int) -> None:
        self._fps, self._max_frames = fps, max_frames
        by_video: dict[Path, list[tuple[str, str]]] = {}
        # A string may hold any break of a line but this; a byte order mark may come first.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                video, question, answer = _entry(line, f"{path}:{number}")
                by_video.setdefault(path.parent / video, []).append((question, answer))
        self._clips = [
            (video, asked[first : first + questions])
            for video, asked in by_video.items()
            for first in range(0, len(asked), questions)
        ]
        if not self._clips:
            raise ValueError(f"{path}: no lines; expected one JSON object a line")

    def clip(self, number: int) -> Clip:
        """The ``number``-th video of the training; begins anew when all have been seen."""
        from vllm_adaspark.video.load import VideoLoader

        epoch, at = divmod(number, len(self._clips))
        order = np.random.default_rng(epoch).permutation(len(self._clips))
        video, asked = self._clips[order[at]]
        frames, described = VideoLoader.load_bytes(
            video.read_bytes(), fps=self._fps, max_frames=self._max_frames
        )
        return Clip(frames, described, asked)


def metadata(frames: int, fps: float) -> dict:
    """Of a video of which every frame is taken."""
    return {
        "fps": fps,
        "duration": frames / fps,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
    }


def _entry(line: str, where: str) -> tuple[str, str, str]:
    keys = ("video", "question", "answer")
    try:
        entry = json.loads(line)
        values = tuple(entry[key] for key in keys)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: expected an object with {', '.join(keys)}; {type(error).__name__}: {error}"
        ) from None
    if not all(isinstance(value, str) and value for value in values):
        raise ValueError(f"{where}: {', '.join(keys)} must be strings with something in them")
    return values
