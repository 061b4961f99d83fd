"""From a scene to frames, and to a real mp4 file.

The same scene gives the same frames. The file is MPEG-4, which every decoder has; at the default
two frames a second one temporal patch is one second.
"""

import tempfile
from pathlib import Path

import cards
import cv2
import haystack
import numpy as np
from scenes import Event, Scene

FPS = 2.0


def frames(scene: Scene) -> np.ndarray:
    """All frames, RGB uint8 [2 × patches, height, width, 3]."""
    rng = np.random.default_rng((scene.seed, 1))
    pictures = np.concatenate(
        [haystack.clip(rng, scene.size, n, scene.motion) for n in clip_lengths(rng, scene.patches)]
    )
    for event in scene.events:
        # Each event has its own generator: moving one does not redraw the others.
        drawn = draw(np.random.default_rng((scene.seed, 2, event.at)), scene.size, event)
        pictures[2 * event.at : 2 * event.at + 2] = drawn
    return pictures


def clip_lengths(rng, patches: int) -> list[int]:
    """Cut the haystack into clips of 6 to 48 patches."""
    lengths = []
    while (left := patches - sum(lengths)) > 0:
        lengths.append(min(left, int(rng.integers(6, 49))))
    return lengths


def draw(rng, size, event: Event) -> np.ndarray:
    """The two frames of an event, uint8 [2, height, width, 3]."""
    if event.kind == "number":
        picture = cards.number_card(rng, size, event.colour, event.value)
    elif event.kind == "frame":
        picture = cards.frame(rng, size, event.colour, event.value)
    elif event.kind == "sign":
        picture = cards.sign(rng, size, event.value)
    elif event.kind == "distractor":
        picture = cards.distractor(rng, size)
    else:
        raise ValueError(f"kind={event.kind!r}: must be number, frame, sign or distractor")
    return haystack.flicker(rng, picture)


def write_mp4(pictures: np.ndarray, path: str | Path, fps: float = FPS) -> Path:
    """Write RGB frames [count, height, width, 3] to an mp4 file and return its path.

    Raises:
        RuntimeError: OpenCV cannot write mp4 files here.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pictures.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise RuntimeError(f"OpenCV cannot write {path}: no MPEG-4 encoder, or no such folder")
    for picture in pictures:
        writer.write(np.ascontiguousarray(picture[..., ::-1]))
    writer.release()
    return path


def read_mp4(path: str | Path) -> np.ndarray:
    """All frames of a video file, RGB uint8 [count, height, width, 3]."""
    capture = cv2.VideoCapture(str(path))
    pictures = []
    while True:
        there, picture = capture.read()
        if not there:
            break
        pictures.append(picture[..., ::-1])
    capture.release()
    if not pictures:
        raise ValueError(f"{path}: no frames could be read")
    return np.stack(pictures)


def through_codec(pictures: np.ndarray) -> np.ndarray:
    """The frames as they come back from a video file."""
    with tempfile.TemporaryDirectory() as folder:
        return read_mp4(write_mp4(pictures, Path(folder) / "clip.mp4"))
