"""Write VNBench, the benchmark of the VideoNIAH paper, as an lmms-eval task: lmms-eval has none.

    python examples/eval/make_vnbench_task.py ANNOTATIONS.json VIDEOS/ FOLDER
    lmms-eval --include_path FOLDER --tasks vnbench ...

ANNOTATIONS is the benchmark's own file, a list of questions with the keys video, question, options
(four), gt (the right option), type and try; VIDEOS the folder its videos were unpacked to.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import local_task  # noqa: E402

KEYS = ("video", "question", "options", "gt", "type", "try")


def read(annotations: Path, videos: Path) -> list[dict]:
    """Questions for `vnbench_utils.py`.

    Raises:
        ValueError: the file is not what it should be; says which entry, and why.
    """
    entries = json.loads(annotations.read_text())
    if not isinstance(entries, list):
        raise ValueError(f"{annotations}: expected a list of questions")
    questions = []
    for number, entry in enumerate(entries):
        missing = [key for key in KEYS if key not in entry]
        if missing:
            raise ValueError(f"{annotations}, entry {number}: has no {', '.join(missing)}")
        options, right = entry["options"], entry["gt"]
        if len(options) != 4 or right not in options:
            raise ValueError(
                f"{annotations}, entry {number}: gt={right!r} must be one of four options, "
                f"which are {options!r}"
            )
        questions.append(
            {
                "video": str((videos / entry["video"]).resolve()),
                "question": entry["question"],
                "options": [str(option) for option in options],
                "answer": "ABCD"[options.index(right)],
                "type": entry["type"],
                "try": entry["try"],
            }
        )
    return questions


def write(annotations: Path, videos: Path, folder: Path) -> Path:
    """The task's folder."""
    metrics = {"vnbench": "!function utils.aggregate", "one_try": "mean"}
    return local_task.write(
        folder,
        "vnbench",
        read(annotations, videos),
        HERE / "vnbench_utils.py",
        metrics,
        answer_tokens=16,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("annotations", type=Path)
    parser.add_argument("videos", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        print(write(options.annotations, options.videos, options.folder))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
