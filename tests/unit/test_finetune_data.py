"""What examples/finetune.py trains on: needle videos of training seeds, and files of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from finetune_data import JsonLines, NeedleVideos


def test_needle_videos_repeat_and_use_training_seeds_only(monkeypatch) -> None:
    videos = NeedleVideos((10, 20), questions=6)
    import scenes  # examples/needle

    seeds = []
    make = scenes.make
    monkeypatch.setattr(
        scenes, "make", lambda seed, *a, **k: seeds.append(seed) or make(seed, *a, **k)
    )
    first, again, other = (videos.clip(number) for number in (3, 3, 4))
    assert set(seeds) < set(range(50_000_000, 50_000_010)) and len(set(seeds)) == 2
    assert all(seed in scenes.TRAINING_SEEDS for seed in seeds)
    assert np.array_equal(first.frames, again.frames) and first.questions == again.questions
    assert other.questions != first.questions
    assert 20 <= len(first.frames) <= 40 and first.metadata["total_num_frames"] == len(first.frames)
    assert 1 <= len(first.questions) <= 6


def test_json_lines_are_grouped_by_video(tmp_path) -> None:
    entries = [{"video": f"{i % 2}.mp4", "question": f"q{i}", "answer": str(i)} for i in range(10)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(map(json.dumps, entries)))
    clips = JsonLines(path, questions=3, fps=2.0, max_frames=768)._clips
    assert [video.name for video, _ in clips] == ["0.mp4", "0.mp4", "1.mp4", "1.mp4"]
    assert [len(asked) for _, asked in clips] == [3, 2, 3, 2]
    assert clips[0] == (tmp_path / "0.mp4", [("q0", "0"), ("q2", "2"), ("q4", "4")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"data.jsonl:2: expected an object with video, question, answer"),
        ('{"video": "a.mp4", "question": "q"}', "KeyError: 'answer'"),
        ("[1, 2]", "TypeError"),
        ('{"video": "a.mp4", "question": "q", "answer": 3}', "must be strings"),
        ('{"video": "a.mp4", "question": "q", "answer": ""}', "must be strings"),
    ],
)
def test_bad_lines_are_refused(tmp_path, line, message) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"video": "a.mp4", "question": "q", "answer": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        JsonLines(path, 3, 2.0, 768)


def test_an_empty_file_is_refused(tmp_path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no lines"):
        JsonLines(path, 3, 2.0, 768)


def test_lines_of_any_characters(tmp_path) -> None:
    """Breaks of a line within a string, a byte order mark, and the ends of lines of Windows."""
    path = tmp_path / "data.jsonl"
    entries = [{"video": "a.mp4", "question": q, "answer": "日本"} for q in ("a\u2028b", "a\x85b")]
    text = "\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    ((_, asked),) = JsonLines(path, 3, 2.0, 768)._clips
    assert asked == [("a\u2028b", "日本"), ("a\x85b", "日本")]
